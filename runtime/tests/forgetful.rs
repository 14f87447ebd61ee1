//! A program that starts a VM and never calls `run_vmm_if_asked`. It is not started again as
//! the VMM, or, if it is named as that, ends there with an error instead of starting a VM,
//! and so on.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use sm_image::{Compression, Config, LayoutBuilder, MemoryFile};
use sm_runtime::{RunOptions, Sm};

/// Variable with the directory of the program, which counts its starts there.
const DIRECTORY: &str = "SM_TEST_FORGETFUL";
/// Variable that is set if the program names itself as that of VMs.
const NAMED: &str = "SM_TEST_FORGETFUL_NAMED";

fn main() -> ExitCode {
    match std::env::var_os(DIRECTORY) {
        Some(directory) => forgetful(Path::new(&directory)),
        None => {
            test(false);
            test(true);
            ExitCode::SUCCESS
        }
    }
}

fn test(named: bool) {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let layout = at("layout");
    let mut image = LayoutBuilder::new(&layout, Compression::None).unwrap();
    let file = MemoryFile::File(b"hello".to_vec());
    image.memory_layer(&[("hello", 0o644, file)]).unwrap();
    image.finish("v1", Config::default()).unwrap();
    let mut elf = vec![0; 1024];
    elf[..4].copy_from_slice(b"\x7fELF");
    fs::write(at("elf"), elf).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    // A program that names another one as that of VMs needs no guest agent itself.
    match named {
        true => command.env(NAMED, "1").env_remove("SM_AGENT"),
        false => command.env("SM_AGENT", at("elf")),
    };
    let done = command
        .env(DIRECTORY, directory.path())
        .env("SM_KERNEL", at("elf"))
        .env_remove("SM_VMM")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(text.contains("run_vmm_if_asked"), "{text}");
    assert_eq!(done.status.code(), Some(1), "{text}");
    // One start of the program itself, and one as the VMM if it is named as that.
    let starts = 1 + usize::from(named);
    assert_eq!(fs::read(at("count")).unwrap().len(), starts, "{text}");
    // Nothing is left of the VM.
    let left = fs::read_dir(at("data/vms")).unwrap();
    assert_eq!(left.count(), 1, "only the lock of the records");
    println!("a forgetful program ends with an error, named: {named} ... ok");
}

/// The `main` of an application.
fn forgetful(directory: &Path) -> ExitCode {
    let at = |name: &str| directory.join(name);
    let mut count = fs::read(at("count")).unwrap_or_default();
    count.push(b'x');
    fs::write(at("count"), &count).unwrap();
    // Limit for the case that the program is started recursively after all.
    if count.len() > 5 {
        return ExitCode::from(9);
    }
    let mut builder = Sm::builder().below(directory);
    if std::env::var_os(NAMED).is_some() {
        builder = builder.vmm(std::env::current_exe().unwrap());
    }
    let reference = format!("oci:{}:v1", at("layout").display());
    let started = builder
        .build()
        .and_then(|sm| sm.image(&reference))
        .and_then(|image| image.run(RunOptions::new().command(["/hello"])));
    match started {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", sm_runtime::control::with_causes(&error));
            ExitCode::from(1)
        }
    }
}
