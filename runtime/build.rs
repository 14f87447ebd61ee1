//! Embeds the guest agent named by `SM_AGENT_BIN`, so that `sm` is one file, with its
//! digest, which is then not computed at every start.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use sha2::{Digest as _, Sha256};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(sm_embedded_agent)");
    println!("cargo::rerun-if-env-changed=SM_AGENT_BIN");
    println!("cargo::rerun-if-changed=build.rs");
    let Some(path) = env::var_os("SM_AGENT_BIN").map(PathBuf::from) else {
        return;
    };
    println!("cargo::rerun-if-changed={}", path.display());
    if let Err(error) = embed(&path) {
        println!(
            "cargo::error=cannot embed the guest agent {}: {error}",
            path.display()
        );
    }
}

fn embed(path: &Path) -> io::Result<()> {
    let output = env::var_os("OUT_DIR").map(PathBuf::from);
    let output = output.ok_or_else(|| io::Error::other("there is no OUT_DIR"))?;
    let agent = fs::read(path)?;
    let digest: String = Sha256::digest(&agent)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    // A copy, so that a concurrent change of the file cannot make contents and digest
    // differ.
    let copy = output.join("agent");
    fs::write(&copy, agent)?;
    println!("cargo::rustc-cfg=sm_embedded_agent");
    println!("cargo::rustc-env=SM_EMBEDDED_AGENT={}", copy.display());
    println!("cargo::rustc-env=SM_EMBEDDED_AGENT_SHA256={digest}");
    Ok(())
}
