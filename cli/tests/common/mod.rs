//! The built `sm` with the directories of a user below one directory.

use std::path::Path;
use std::process::Command;

/// Returns a command of `sm` that runs in `directory`, has its home there, and takes
/// no setting of sm from the environment of the test.
pub(crate) fn sm(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sm"));
    command.args(arguments).current_dir(directory);
    for (name, value) in [
        ("HOME", "home"),
        ("XDG_DATA_HOME", "data"),
        ("XDG_RUNTIME_DIR", "run"),
        ("XDG_CACHE_HOME", "cache"),
    ] {
        command.env(name, directory.join(value));
    }
    for name in [
        "SM_KERNEL",
        "SM_AGENT",
        "SM_LOG",
        "SM_VMM",
        "SM_IMAGE_QUOTA",
    ] {
        command.env_remove(name);
    }
    command
}
