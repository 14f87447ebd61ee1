//! Destinations of `sm save --output`: files are replaced when the archive is complete,
//! links are followed, pipes are written to, and devices are left alone.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

/// The home of a user who has an image.
struct User {
    directory: tempfile::TempDir,
}

impl User {
    fn new() -> Self {
        let user = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        let mut import = user
            .command(&["import", "-", "mine:1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // The end of an archive without entries.
        import.stdin.take().unwrap().write_all(&[0; 1024]).unwrap();
        assert!(import.wait().unwrap().success());
        user
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        common::sm(self.directory.path(), arguments)
    }

    fn save(&self, to: &str) -> Output {
        let mut command = self.command(&["save", "-o", to, "mine:1"]);
        command.output().unwrap()
    }

    /// Loads an archive, and asserts that it contains the image.
    #[track_caller]
    fn loads(&self, archive: &[u8]) {
        let mut load = self
            .command(&["load", "--json"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        load.stdin.take().unwrap().write_all(archive).unwrap();
        let loaded = load.wait_with_output().unwrap();
        assert!(loaded.status.success(), "{loaded:?}");
        let said = String::from_utf8_lossy(&loaded.stdout);
        assert!(said.contains("mine:1"), "{said}");
    }
}

fn kind(path: &Path) -> fs::FileType {
    fs::symlink_metadata(path).unwrap().file_type()
}

#[test]
fn a_device_is_refused_and_stays() {
    let user = User::new();
    let path = user.path("null");
    // The numbers of /dev/null.
    let number = makedev(1, 3);
    let made = mknodat(
        CWD,
        &path,
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        number,
    );
    if let Err(errno) = made {
        eprintln!("skipped: a device cannot be made here: {errno}");
        return;
    }
    symlink("null", user.path("to-null")).unwrap();
    for name in ["null", "to-null"] {
        let saved = user.save(name);
        assert!(!saved.status.success(), "{name}: {saved:?}");
        let said = String::from_utf8_lossy(&saved.stderr);
        assert!(said.contains("it is a device"), "{name}: {said}");
        assert!(kind(&path).is_char_device(), "{name}");
        assert_eq!(path.metadata().unwrap().rdev(), number);
    }
    assert!(kind(&user.path("to-null")).is_symlink());
}

#[test]
fn a_pipe_gets_the_archive_and_stays() {
    let user = User::new();
    let path = user.path("pipe");
    mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let reading = thread::spawn({
        let path = path.clone();
        move || fs::read(path).unwrap()
    });
    let saved = user.save("pipe");
    if !saved.status.success() {
        // Nobody has opened the pipe: the reader must not wait for ever.
        drop(File::options().read(true).write(true).open(&path));
    }
    assert!(saved.status.success(), "{saved:?}");
    assert!(kind(&path).is_fifo());
    user.loads(&reading.join().unwrap());
}

#[test]
fn a_link_is_followed_and_stays() {
    let user = User::new();
    fs::write(user.path("file"), b"before").unwrap();
    fs::create_dir(user.path("sub")).unwrap();
    symlink("file", user.path("to-file")).unwrap();
    symlink("sub/new", user.path("to-new")).unwrap();
    for (link, file) in [("to-file", "file"), ("to-new", "sub/new")] {
        let saved = user.save(link);
        assert!(saved.status.success(), "{saved:?}");
        assert!(kind(&user.path(link)).is_symlink(), "{link}");
        assert!(kind(&user.path(file)).is_file(), "{file}");
        user.loads(&fs::read(user.path(file)).unwrap());
    }
    // A file stays as it is until an archive is complete.
    let before = fs::read(user.path("file")).unwrap();
    let unknown = user.command(&["save", "-o", "file", "unknown:1"]).output();
    assert!(!unknown.unwrap().status.success());
    assert!(fs::read(user.path("file")).unwrap() == before);
}

/// As in `sm save mine:1 | head`.
#[test]
fn a_reader_that_is_gone_is_not_reported() {
    let user = User::new();
    for arguments in [&["save", "mine:1"][..], &["--help"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = user.command(arguments).stdout(writer).output().unwrap();
        assert!(output.stderr.is_empty(), "{arguments:?}: {output:?}");
        let status = match arguments {
            ["save", ..] => 141,
            _ => 0,
        };
        assert_eq!(output.status.code(), Some(status), "{arguments:?}");
    }
}
