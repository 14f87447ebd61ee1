//! Embeds the guest agent named by `SM_AGENT_BIN`, so that `sm` is one file.

use std::path::PathBuf;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(sm_embedded_agent)");
    println!("cargo::rerun-if-env-changed=SM_AGENT_BIN");
    println!("cargo::rerun-if-changed=build.rs");
    let Some(path) = std::env::var_os("SM_AGENT_BIN").map(PathBuf::from) else {
        return;
    };
    println!("cargo::rerun-if-changed={}", path.display());
    match path.canonicalize() {
        Ok(path) => {
            println!("cargo::rustc-cfg=sm_embedded_agent");
            println!("cargo::rustc-env=SM_EMBEDDED_AGENT={}", path.display());
        }
        Err(error) => {
            println!(
                "cargo::error=cannot embed the guest agent {}: {error}",
                path.display()
            );
        }
    }
}
