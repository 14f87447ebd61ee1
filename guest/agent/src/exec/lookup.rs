//! Lookup of the program in `PATH`, with Docker's error messages.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::LaunchError;

/// Docker's `PATH` for a request that sets none.
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds the file of `program`, which is searched in `path` if it contains no slash.
///
/// # Errors
/// 127 if there is none, 126 if it cannot be executed.
pub(crate) fn find(program: &str, path: &str) -> Result<String, LaunchError> {
    if program.contains('/') {
        return match executable(Path::new(program)) {
            Ok(()) => Ok(program.to_owned()),
            Err(Unfit::Denied(text)) => {
                Err(LaunchError::denied(format!("exec: {program:?}: {text}")))
            }
            Err(Unfit::Absent(text)) => Err(LaunchError::absent(format!(
                "exec: {program:?}: stat {program}: {text}"
            ))),
        };
    }
    let mut denied = false;
    for directory in path.split(':') {
        // An empty element means the working directory, as in every shell.
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = format!("{}/{program}", directory.trim_end_matches('/'));
        match executable(Path::new(&candidate)) {
            Ok(()) => return Ok(candidate),
            Err(Unfit::Denied(_)) => denied = true,
            Err(Unfit::Absent(_)) => {}
        }
    }
    if denied && !program.is_empty() {
        return Err(LaunchError::denied(format!(
            "exec: {program:?}: permission denied"
        )));
    }
    Err(LaunchError::absent(format!(
        "exec: {program:?}: executable file not found in $PATH"
    )))
}

enum Unfit {
    Absent(&'static str),
    Denied(&'static str),
}

fn executable(path: &Path) -> Result<(), Unfit> {
    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => Unfit::Denied("permission denied"),
        io::ErrorKind::NotADirectory => Unfit::Absent("not a directory"),
        _ => Unfit::Absent("no such file or directory"),
    })?;
    if metadata.is_dir() {
        return Err(Unfit::Denied("is a directory"));
    }
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
        return Err(Unfit::Denied("permission denied"));
    }
    Ok(())
}

/// Returns the error for a failed `execve` of a file that was found.
pub(crate) fn exec_error(path: &str, error: &io::Error) -> LaunchError {
    match error.raw_os_error() {
        Some(libc::ENOENT) => LaunchError::absent(format!(
            "exec {path}: no such file or directory (its interpreter is missing)"
        )),
        Some(libc::ENOEXEC) => LaunchError::denied(format!("exec {path}: exec format error")),
        Some(libc::EACCES) => LaunchError::denied(format!("exec {path}: permission denied")),
        Some(libc::E2BIG) => LaunchError::denied(format!("exec {path}: argument list too long")),
        _ => LaunchError::denied(format!("exec {path}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(directory: &Path, name: &str, mode: u32) {
        let path = directory.join(name);
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn the_first_executable_in_path_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        fs::create_dir_all(a.join("tool")).unwrap();
        fs::create_dir(&b).unwrap();
        place(&a, "other", 0o644);
        place(&b, "tool", 0o755);
        place(&b, "other", 0o755);
        let path = format!("/nonexistent:{}:{}/", a.display(), b.display());
        let expected = |name| format!("{}/{name}", b.display());
        assert_eq!(find("tool", &path).unwrap(), expected("tool"));
        assert_eq!(find("other", &path).unwrap(), expected("other"));
    }

    #[test]
    fn the_status_distinguishes_absent_from_unusable() {
        let directory = tempfile::tempdir().unwrap();
        place(directory.path(), "data", 0o644);
        let path = directory.path().display().to_string();
        let status = |program: &str| find(program, &path).unwrap_err().status;
        assert_eq!(status("nothing"), 127);
        assert_eq!(status(""), 127);
        assert_eq!(status("data"), 126);
        assert_eq!(status(&format!("{path}/nothing")), 127);
        assert_eq!(status(&format!("{path}/data")), 126);
        assert_eq!(status(&path), 126);
        let text = find("nothing", &path).unwrap_err().message;
        assert_eq!(
            text,
            "exec: \"nothing\": executable file not found in $PATH"
        );
    }
}
