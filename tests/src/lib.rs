//! Common code of the end-to-end tests: the built `sm`, its state, and fixtures.
//!
//! `cargo xtask test` sets the environment variables:
//!
//! | variable | meaning |
//! |---|---|
//! | `SM_BIN` | path of the `sm` to test |
//! | `SM_FIXTURES` | directory of OCI layouts: `busybox`, `debian`, `python` |
//! | `SM_DOCKER`, `SM_SYSTEMD`, `SM_WORK` | directories of the OCI layouts `docker`, `systemd` and `work`, for tests named `full_...` |
//! | `SM_KERNEL`, `SM_AGENT` | forwarded to `sm` |
//! | `SM_BENCH_RESTORE`, `SM_BENCH_INITRAMFS` | the benchmark, and its guest |
//! | `SM_LANES` | the static program `tests/guest/lanes.rs` |
//! | `SM_STOCK_KERNEL` | a distribution kernel for the stock-kernel cases |
//! | `SM_TEST_FULL` | set for tests in full length, see [`full`] |
#![warn(missing_docs)]
#![expect(
    clippy::expect_used,
    reason = "this library is part of tests: a failed expectation is a failed test"
)]

use std::ffi::OsStr;
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;
use tempfile::TempDir;

mod mount;
mod terminal;
pub mod tiny;
mod until;

pub use mount::Mount;
pub use terminal::Terminal;
pub use until::{TIMEOUT, until};

/// The result of a command.
#[derive(Debug)]
pub struct Done {
    /// Exit status; `None` if a signal killed it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Done {
    /// Standard output as text.
    #[must_use]
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Asserts the exit status; shows all output if it differs.
    ///
    /// # Panics
    /// The status differs.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            Some(code),
            "\n--- stdout\n{}\n--- stderr\n{}",
            self.out(),
            self.err()
        );
        self
    }

    /// Parses standard output as JSON.
    ///
    /// # Panics
    /// It is not JSON.
    #[track_caller]
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|e| panic!("not JSON ({e}): {}\n{}", self.out(), self.err()))
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: output.stdout,
            stderr: output.stderr,
        }
    }
}

/// Data and runtime directories of one user of `sm`.
#[derive(Debug)]
pub struct Home {
    dir: TempDir,
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

impl Home {
    /// Creates empty directories.
    ///
    /// # Panics
    /// They cannot be created.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for name in ["data", "run"] {
            std::fs::create_dir(dir.path().join(name)).expect("a directory in it");
        }
        Self { dir }
    }

    /// Returns the home that most tests share, so that an image is converted once.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Home> = OnceLock::new();
        SHARED.get_or_init(Self::new)
    }

    /// Returns the data directory of `sm`.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Returns the runtime directory of `sm`, with its sockets.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Returns a command of `sm`, not started yet; standard input is empty.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        self.at_home(Command::new(binary()), arguments)
    }

    /// Like [`Self::command`], with the signal dispositions of a foreground command in a
    /// shell: no signal is ignored, even if this test ignores some.
    #[must_use]
    pub fn foreground<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new("env");
        command.arg("--default-signal").arg(binary());
        self.at_home(command, arguments)
    }

    fn at_home<S: AsRef<OsStr>>(&self, mut command: Command, arguments: &[S]) -> Command {
        command
            .args(arguments)
            .env("XDG_DATA_HOME", self.data())
            .env("XDG_RUNTIME_DIR", self.run_dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs `sm` to its end.
    ///
    /// # Panics
    /// It cannot be started.
    #[track_caller]
    pub fn sm<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Done {
        self.command(arguments)
            .output()
            .expect("sm can be started")
            .into()
    }

    /// Runs `sm` with `input` on its standard input.
    ///
    /// # Panics
    /// It cannot be started.
    #[track_caller]
    pub fn sm_with_input<S: AsRef<OsStr>>(&self, arguments: &[S], input: &[u8]) -> Done {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .spawn()
            .expect("sm can be started");
        let mut stdin = child.stdin.take().expect("stdin is piped");
        std::thread::scope(|scope| {
            // An error means that the command exited without reading everything.
            scope.spawn(move || stdin.write_all(input));
            child.wait_with_output().expect("sm can be waited for")
        })
        .into()
    }

    /// Starts a detached VM that is removed when the value is dropped.
    #[track_caller]
    pub fn detached(&self, arguments: &[&str]) -> Vm<'_> {
        let name = unique("vm");
        let mut all = vec!["run", "-d", "--name", &name];
        all.extend_from_slice(arguments);
        self.sm(&all).exits(0);
        Vm { home: self, name }
    }
}

impl Home {
    /// Creates a VM, which is removed when the value is dropped.
    #[track_caller]
    pub fn created(&self, arguments: &[&str]) -> Vm<'_> {
        let name = unique("vm");
        let mut all = vec!["create", "--name", &name];
        all.extend_from_slice(arguments);
        self.sm(&all).exits(0);
        Vm { home: self, name }
    }

    /// Starts a detached VM from a snapshot; it is removed when the value is
    /// dropped.
    #[track_caller]
    pub fn clone_of(&self, snapshot: &str, prefix: &str) -> Vm<'_> {
        self.clone_with(snapshot, prefix, &[])
    }

    /// Starts a detached VM from a snapshot, with options; it is removed when the value is
    /// dropped.
    #[track_caller]
    pub fn clone_with(&self, snapshot: &str, prefix: &str, options: &[&str]) -> Vm<'_> {
        let name = unique(prefix);
        let run = ["run", "-d", "--name", &name, "--from", snapshot];
        self.sm(&[&run[..], options].concat()).exits(0);
        Vm { home: self, name }
    }
}

/// A running VM of a test.
#[derive(Debug)]
pub struct Vm<'a> {
    home: &'a Home,
    /// Its name.
    pub name: String,
}

impl Vm<'_> {
    /// Runs a command in it.
    #[track_caller]
    pub fn exec(&self, arguments: &[&str]) -> Done {
        let mut all = vec!["exec", &self.name];
        all.extend_from_slice(arguments);
        self.home.sm(&all)
    }

    /// Waits until its workload has written `words`.
    ///
    /// # Panics
    /// The workload ends before.
    #[track_caller]
    pub fn until_it_says(&self, words: &str) {
        let mut logs = self.home.command(&["logs", "-f", &self.name]);
        let mut logs = Reaped(logs.spawn().expect("sm can be started"));
        let mut output = logs.0.stdout.take().expect("stdout is piped");
        let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
        while !String::from_utf8_lossy(&seen).contains(words) {
            let count = output.read(&mut buffer).expect("output can be read");
            let text = String::from_utf8_lossy(&seen);
            assert_ne!(count, 0, "it ended without {words:?}: {text:?}");
            seen.extend_from_slice(&buffer[..count]);
        }
    }

    /// Waits for its end by following its log, and returns the output of `sm inspect`.
    #[track_caller]
    #[must_use]
    pub fn wait(&self) -> Value {
        self.home.sm(&["logs", "-f", &self.name]);
        self.inspect()
    }

    /// Returns the output of `sm inspect` about it.
    ///
    /// # Panics
    /// The output is not a JSON array of one object.
    #[track_caller]
    #[must_use]
    pub fn inspect(&self) -> Value {
        let all = self.home.sm(&["inspect", &self.name]).exits(0).json();
        all.get(0).expect("inspect prints an array").clone()
    }
}

impl Drop for Vm<'_> {
    fn drop(&mut self) {
        let _ = self.home.command(&["rm", "-f", &self.name]).output();
    }
}

/// A process that is killed when dropped.
#[derive(Debug)]
pub struct Reaped(pub Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns a name that no other test of this process uses.
#[must_use]
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}-{}-{n}", std::process::id())
}

/// Returns the path of the `sm` under test.
///
/// # Panics
/// `SM_BIN` is not set: run these tests with `cargo xtask test`.
#[must_use]
pub fn binary() -> PathBuf {
    std::env::var_os("SM_BIN")
        .expect("SM_BIN is set (run these tests by `cargo xtask test`)")
        .into()
}

/// Returns true in the lab, where a test may change the system.
#[must_use]
pub fn lab() -> bool {
    let lab = std::env::var_os("SM_LAB").is_some();
    if !lab {
        eprintln!("skipped: this test changes mounts or the clock, and this is not the lab");
    }
    lab
}

/// Returns true if a test may be slow: `cargo xtask test --full`.
#[must_use]
pub fn full() -> bool {
    std::env::var_os("SM_TEST_FULL").is_some()
}

/// Creates an image that contains only the program for guests, `/lanes`. It is removed
/// when the value is dropped.
///
/// # Panics
/// `SM_LANES` is not set, or the image cannot be created.
#[must_use]
pub fn lanes() -> TempDir {
    let program = std::env::var_os("SM_LANES").expect("SM_LANES is set");
    let root = tempfile::tempdir().expect("a temporary directory");
    std::fs::copy(program, root.path().join("lanes")).expect("the program for guests");
    root
}

/// Returns the reference of a fixture image.
///
/// # Panics
/// `SM_FIXTURES` is not set or does not contain it.
#[must_use]
pub fn image(name: &str) -> String {
    let dir = PathBuf::from(std::env::var_os("SM_FIXTURES").expect("SM_FIXTURES is set"));
    let path = dir.join(name);
    assert!(path.exists(), "no fixture {}", path.display());
    format!("oci:{}", path.display())
}
