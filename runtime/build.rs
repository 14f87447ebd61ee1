//! Embeds the guest agent named by `SM_AGENT_BIN`, with its digest, which is then not
//! computed at every start, and the kernel named by `SM_KERNEL_BIN`, which is compressed
//! with zstd in `SM_KERNEL_ZST`. A program with both needs no other files on a host with
//! KVM.

use std::path::{Path, PathBuf};
use std::{env, fs};

use sha2::{Digest as _, Sha256};

type Result<T> = std::result::Result<T, String>;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for part in ["agent", "kernel"] {
        println!("cargo::rustc-check-cfg=cfg(sm_embedded_{part})");
    }
    let embedded = named("SM_AGENT_BIN")
        .map_or(Ok(()), |agent| embed("agent", &agent, &agent))
        .and_then(
            |()| match (named("SM_KERNEL_BIN"), named("SM_KERNEL_ZST")) {
                (None, None) => Ok(()),
                (Some(kernel), Some(zstd)) => embed("kernel", &kernel, &zstd),
                _ => Err("SM_KERNEL_BIN and SM_KERNEL_ZST belong together".to_owned()),
            },
        );
    if let Err(error) = embedded {
        println!("cargo::error={error}");
    }
}

/// Returns the file that an environment variable names, if it is set.
fn named(variable: &str) -> Option<PathBuf> {
    println!("cargo::rerun-if-env-changed={variable}");
    let path = env::var_os(variable).map(PathBuf::from)?;
    println!("cargo::rerun-if-changed={}", path.display());
    Some(path)
}

/// Embeds `file`, which has `contents` or their compressed form, and the digest of the
/// contents.
fn embed(part: &str, contents: &Path, file: &Path) -> Result<()> {
    let read = |path: &Path| {
        fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    let output = env::var_os("OUT_DIR").map(PathBuf::from);
    let output = output.ok_or("there is no OUT_DIR")?;
    let contents_read = read(contents)?;
    let digest: String = Sha256::digest(&contents_read)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    // A copy, so that a concurrent change of the file cannot make contents and digest
    // differ.
    let bytes = if file == contents {
        contents_read
    } else {
        read(file)?
    };
    let copy = output.join(part);
    fs::write(&copy, bytes).map_err(|error| format!("cannot write {copy:?}: {error}"))?;
    let name = part.to_uppercase();
    println!("cargo::rustc-cfg=sm_embedded_{part}");
    println!("cargo::rustc-env=SM_EMBEDDED_{name}={}", copy.display());
    println!("cargo::rustc-env=SM_EMBEDDED_{name}_SHA256={digest}");
    Ok(())
}
