//! `cargo xtask lab`: runs a command in an emulated machine with a real `/dev/kvm`.
//!
//! The machine mounts the host's tree at the same paths; writes stay in its memory. The
//! command has the streams, status, directory and environment of a local process.

use std::fs;
use std::io::{self, Read as _, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use crate::apt::Apt;
use crate::cpio::CpioArchive;
use crate::deb::Deb;
use crate::qemu::{QemuMachine, Share};
use crate::stream::copy_until;
use crate::{cmd, modules, paths};

/// Modules of the lab's kernel, with their parameters. Nested virtualisation in the lab's
/// guests is not needed.
const MODULES: [(&str, &str); 14] = [
    ("virtio_pci", ""),
    ("virtio_console", ""),
    ("virtio_rng", ""),
    ("9pnet_virtio", ""),
    ("9p", ""),
    ("kvm", ""),
    ("kvm_amd", "nested=0"),
    ("loop", "max_loop=8"),
    ("crc32c_generic", ""),
    ("erofs", ""),
    ("overlay", ""),
    ("ext4", ""),
    ("fuse", ""),
    ("tun", ""),
];

pub(crate) const PACKAGES: [&str; 5] = ["busybox-static", "kmod", "xz-utils", "zstd", "util-linux"];

/// Version of the initramfs; it must be raised for changes that the sources below do not
/// show.
const RECIPE: &str = "1";
const INIT: &str = include_str!("lab-init.sh");
const SESSION: &str = include_str!("lab-session.sh");

/// Status of a command that exceeded its time limit, as of coreutils' `timeout`.
const TIMED_OUT: u8 = 124;
const INTERRUPTED: u8 = 130;
/// Most machines that may crash while running one job.
const ATTEMPTS: u32 = 4;
const MAX_CONCURRENT: usize = 4;

/// Returns the number of labs that can run concurrently on this machine: each emulates
/// one CPU.
///
/// The lab has one CPU because QEMU's emulation of SVM is unsound with more: an interrupt
/// that KVM injects into a guest stays pending in the emulated CPU, and when another
/// CPU's thread interrupts the emulation at the wrong moment, it is delivered again, in
/// whatever context runs then. Four busy vCPUs on two emulated CPUs crash the lab's
/// kernel, or a guest, within two minutes (QEMU 10.0.2); on one CPU they never did.
pub(crate) fn max_concurrent() -> usize {
    thread::available_parallelism().map_or(1, |cpus| cpus.get().min(MAX_CONCURRENT))
}

/// Destination of a job's output, and of messages about the lab.
#[derive(Clone)]
pub(crate) enum JobOutput {
    /// This process's standard streams, unbuffered.
    Inherit,
    /// A buffer of both streams, to be printed later.
    Buffer(Arc<Mutex<Vec<u8>>>),
}

impl JobOutput {
    fn out(&self) -> Box<dyn Write + Send> {
        match self {
            Self::Inherit => Box::new(io::stdout()),
            Self::Buffer(buffer) => Box::new(BufferedOutput(buffer.clone())),
        }
    }

    fn err(&self) -> Box<dyn Write + Send> {
        match self {
            Self::Inherit => Box::new(io::stderr()),
            Self::Buffer(buffer) => Box::new(BufferedOutput(buffer.clone())),
        }
    }
}

struct BufferedOutput(Arc<Mutex<Vec<u8>>>);

impl Write for BufferedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut buffer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A command to run in the lab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LabJob {
    pub(crate) command: Vec<String>,
    /// Variables in addition to this process's environment.
    pub(crate) environment: Vec<(String, String)>,
    /// A directory to which the command may write, as `$SM_LAB_RESULTS`.
    pub(crate) results: Option<PathBuf>,
    /// True to forward this process's standard input, unless it is a terminal.
    pub(crate) input: bool,
    pub(crate) memory_mib: u32,
    /// More than one is faster and crashes: see [`max_concurrent`].
    pub(crate) cpus: u32,
    pub(crate) timeout: Option<Duration>,
}

impl Default for LabJob {
    fn default() -> Self {
        Self {
            command: Vec::new(),
            environment: Vec::new(),
            results: None,
            input: false,
            memory_mib: 4096,
            cpus: 1,
            timeout: None,
        }
    }
}

/// The machine ended before its command did: its kernel or QEMU crashed.
#[derive(Debug, thiserror::Error)]
#[error("the lab died before the command ended; above is the end of its console")]
pub(crate) struct LabCrashed;

/// The boot files of the lab.
pub(crate) struct Lab {
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// Runs a job and returns its exit status.
///
/// An error that is [`LabCrashed`] does not concern the command.
pub(crate) fn run(lab: &Lab, job: &LabJob, output: &JobOutput) -> Result<u8> {
    let control = tempfile::tempdir().context("cannot make a temporary directory")?;
    let results = match &job.results {
        Some(directory) => directory.clone(),
        None => control.path().join("results"),
    };
    fs::create_dir_all(&results).with_context(|| format!("cannot make {:?}", results.display()))?;
    let shared = control.path().join("control");
    fs::create_dir(&shared)?;
    let token = token()?;
    fs::write(shared.join("token"), &token)?;
    fs::write(shared.join("job"), script(job)?)?;
    fs::write(shared.join("visible"), visible()?)?;

    let console = control.path().join("console");
    let machine = QemuMachine {
        kernel: lab.kernel.clone(),
        initramfs: lab.initramfs.clone(),
        console: console.clone(),
        memory_mib: job.memory_mib,
        cpus: job.cpus,
    };
    let shares = [
        Share {
            tag: "root",
            path: Path::new("/"),
            read_only: true,
        },
        Share {
            tag: "control",
            path: &shared,
            read_only: false,
        },
        Share {
            tag: "results",
            path: &results,
            read_only: false,
        },
    ];
    let ended = attend(&machine, &shares, &token, job, output)?;
    let status = fs::read_to_string(shared.join("status")).ok();
    let status = status.and_then(|text| text.trim().parse::<u8>().ok());
    match (ended, status) {
        (JobEnd::Interrupted, _) => Ok(INTERRUPTED),
        (JobEnd::TimedOut, _) => {
            show_tail(&console, &mut output.err());
            let _ = writeln!(
                output.err(),
                "xtask: the lab was stopped: the command's time was over"
            );
            Ok(TIMED_OUT)
        }
        (JobEnd::Complete, Some(status)) => Ok(status),
        _ => {
            show_tail(&console, &mut output.err());
            Err(LabCrashed.into())
        }
    }
}

/// Repeats a job of the lab if the lab crashed under it, which happens now and then
/// because of QEMU's emulation of SVM. The result of the command is final: a failed test
/// is never repeated.
pub(crate) fn outlive_crashes(mut job: impl FnMut() -> Result<u8>) -> Result<u8> {
    for attempt in 1.. {
        match job() {
            Err(error) if error.is::<LabCrashed>() && attempt < ATTEMPTS => {
                cmd::note(format_args!(
                    "the emulated machine crashed, not the command: starting another \
                     ({attempt} of {ATTEMPTS} used)"
                ));
            }
            ended => return ended,
        }
    }
    unreachable!("the last attempt returns")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum JobEnd {
    /// All output was received.
    Complete,
    /// The machine has exited.
    Crashed,
    TimedOut,
    Interrupted,
}

/// Runs the machine until both output streams have ended.
fn attend(
    machine: &QemuMachine,
    shares: &[Share<'_>],
    token: &[u8],
    job: &LabJob,
    to: &JobOutput,
) -> Result<JobEnd> {
    // Ctrl-C reaches QEMU as well, which exits; this process then cleans up.
    let interrupted = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGINT, interrupted.clone())
        .context("cannot handle SIGINT")?;

    let (input, input_port) = UnixStream::pair()?;
    let (mut output, output_port) = UnixStream::pair()?;
    let (mut errors, errors_port) = UnixStream::pair()?;
    let deadline = job.timeout.map(|timeout| Instant::now() + timeout);
    let mut qemu = {
        let mut command = machine.command(shares);
        command
            .stdin(Stdio::from(OwnedFd::from(input_port)))
            .stdout(Stdio::from(OwnedFd::from(output_port)))
            .stderr(Stdio::from(OwnedFd::from(errors_port)));
        // The command holds copies of the ports until it is dropped.
        command.spawn().context("cannot run qemu-system-x86_64")?
    };
    if job.input {
        forward_input(input.try_clone()?);
    } else {
        input.shutdown(Shutdown::Write)?;
    }

    let (sender, receiver) = mpsc::channel();
    let (mark, send, mut out) = (token.to_owned(), sender.clone(), to.out());
    thread::spawn(move || {
        let seen = copy_until(&mut output, &mut out, &mark);
        let _ = send.send(seen);
    });
    let (mark, mut err) = (token.to_owned(), to.err());
    thread::spawn(move || {
        let seen = copy_until(&mut errors, &mut err, &mark);
        let _ = sender.send(seen);
    });

    let mut ended = JobEnd::Complete;
    for _ in 0..2 {
        let seen = match deadline {
            None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(deadline) => {
                receiver.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            }
        };
        match seen {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) | Err(RecvTimeoutError::Disconnected) => ended = JobEnd::Crashed,
            // Our own output is closed, so the rest has no reader.
            Ok(Err(_)) => {
                ended = JobEnd::Interrupted;
                break;
            }
            Err(RecvTimeoutError::Timeout) => {
                ended = JobEnd::TimedOut;
                break;
            }
        }
    }
    let _ = qemu.kill();
    qemu.wait()?;
    drop(input);
    if interrupted.load(Ordering::Relaxed) {
        ended = JobEnd::Interrupted;
    }
    Ok(ended)
}

/// Forwards standard input unless it is a terminal. The thread may stay blocked in a
/// read; it ends with the process.
fn forward_input(mut port: UnixStream) {
    if io::IsTerminal::is_terminal(&io::stdin()) {
        return;
    }
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut port);
        // Only this direction is shut down: if the socket were closed, QEMU would drop
        // unread bytes. The caller keeps it open.
        let _ = port.shutdown(Shutdown::Write);
    });
}

fn show_tail(console: &Path, to: &mut dyn Write) {
    let bytes = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    for line in lines.iter().skip(lines.len().saturating_sub(40)) {
        let _ = writeln!(to, "lab console: {}", line.trim_end());
    }
}

/// Returns a random mark that no output contains.
fn token() -> Result<Vec<u8>> {
    let mut random = [0; 24];
    fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    let mut token = b"<end of stream ".to_vec();
    for byte in random {
        write!(token, "{byte:02x}")?;
    }
    token.push(b'>');
    Ok(token)
}

/// Directories of the host at whose paths the lab has file systems of its own.
const COVERED: [&str; 3] = ["/tmp", "/run", "/dev"];

/// Returns the directories below [`COVERED`] that the lab mounts nevertheless, one per
/// line: the workspace, its build output, the cache and the current directory.
fn visible() -> Result<String> {
    let current = std::env::current_dir().context("cannot tell the current directory")?;
    let directories = [paths::root(), paths::target(), paths::cache("")?, current];
    let mut list = String::new();
    for directory in covered(directories)? {
        list.push_str(&directory);
        list.push('\n');
    }
    Ok(list)
}

/// Returns those of `directories` that the lab's own file systems hide, by their real
/// paths, parents before children and none inside another.
fn covered(directories: impl IntoIterator<Item = PathBuf>) -> Result<Vec<String>> {
    let mut hidden = Vec::new();
    for directory in directories {
        // Build output that does not exist yet is not needed.
        let Ok(real) = directory.canonicalize() else {
            continue;
        };
        // "/tmp" itself stays the lab's: it exists there, and is empty by design.
        let inside = |cover: &str| real.starts_with(cover) && real != Path::new(cover);
        if !COVERED.iter().any(|cover| inside(cover)) {
            continue;
        }
        let text = real.to_str().filter(|text| !text.contains('\n'));
        let text = text.with_context(|| {
            let path = real.display();
            format!("the lab cannot show {path:?}: its name is not UTF-8 or has a line end")
        })?;
        hidden.push(text.to_owned());
    }
    hidden.sort();
    hidden.dedup_by(|next, kept| Path::new(next).starts_with(&*kept));
    Ok(hidden)
}

/// Returns the shell script that executes the command.
fn script(job: &LabJob) -> Result<String> {
    let mut text = String::new();
    let inherited = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| is_identifier(name))
        .filter(|(name, _)| name != "TMPDIR" && name != cmd::LIBRARY_PATH);
    let ours = [
        ("SM_LAB", "1"),
        ("SM_LAB_RESULTS", "/run/lab/results"),
        ("XDG_RUNTIME_DIR", "/run/user/0"),
        ("XDG_DATA_HOME", "/run/lab/data"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()));
    for (name, value) in inherited.chain(ours).chain(job.environment.iter().cloned()) {
        text.push_str(&format!("export {name}={}\n", quoted(&value)));
    }
    let directory = std::env::current_dir().context("cannot tell the current directory")?;
    text.push_str(&format!(
        "cd {} || exit 125\nexec",
        quoted(&directory.to_string_lossy())
    ));
    for word in &job.command {
        text.push(' ');
        text.push_str(&quoted(word));
    }
    text.push('\n');
    Ok(text)
}

fn is_identifier(name: &str) -> bool {
    !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Quotes a word for a POSIX shell.
pub(crate) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Creates kernel and initramfs of the lab from the distribution's generic kernel unless
/// the cache has them.
pub(crate) fn prepare(apt: &Apt) -> Result<Lab> {
    apt.ensure_qemu()?;
    let package = apt.depends_on("linux-image-amd64", "linux-image-")?;
    let version = apt
        .candidate(&package)?
        .with_context(|| format!("apt does not know {package}"))?;
    let modules = format!("{MODULES:?}");
    let parts = [&version, RECIPE, INIT, SESSION, &modules].map(str::as_bytes);
    let labs = paths::cache("lab")?;
    let done = labs.join(paths::fingerprint(&parts));
    let built = || Lab {
        kernel: done.join("vmlinuz"),
        initramfs: done.join("initramfs"),
    };
    let Some(_lock) = paths::lock_unless(&done, &labs)? else {
        return Ok(built());
    };
    apt.ensure(&PACKAGES)?;
    let deb = Deb::fetch(&format!("{package}={version}"))?;
    cmd::step(format_args!("preparing the lab with {package}"));
    let work = tempfile::tempdir_in(paths::cache("tmp")?)?;
    deb.unpack(work.path())?;
    let fresh = assemble(&work)?;
    fs::rename(&fresh, &done).with_context(|| format!("cannot publish {:?}", done.display()))?;
    Ok(built())
}

/// Creates the cache entry from the unpacked kernel package.
fn assemble(work: &TempDir) -> Result<PathBuf> {
    let release = modules::release(work.path())?;
    modules::index(work.path(), &release)?;
    let tree = work.path().join("lib/modules").join(&release);
    let dep = fs::read_to_string(tree.join("modules.dep"))?;
    let names = MODULES.map(|(name, _)| name);

    let mut archive = CpioArchive::default();
    for directory in [
        "bin", "dev", "lower", "modules", "new", "proc", "sys", "upper",
    ] {
        archive.directory(directory)?;
    }
    archive.character_device("dev/console", (5, 1))?;
    let busybox = fs::read("/bin/busybox").context("cannot read /bin/busybox")?;
    archive.file("bin/busybox", 0o755, &busybox)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.file("session", 0o644, SESSION.as_bytes())?;
    let mut list = String::new();
    for file in modules::load_order(&dep, &names) {
        let name = modules::plain_name(&file);
        let parameters = MODULES
            .iter()
            .find(|(module, _)| name.replace('-', "_") == format!("{module}.ko"))
            .map_or("", |(_, parameters)| parameters);
        list.push_str(&format!("{name} {parameters}\n"));
        archive.file(
            &format!("modules/{name}"),
            0o644,
            &modules::read(&tree.join(&file))?,
        )?;
    }
    archive.file("modules/list", 0o644, list.as_bytes())?;

    let fresh = work.path().join("lab");
    fs::create_dir(&fresh)?;
    fs::write(fresh.join("initramfs"), archive.finish()?)?;
    fs::copy(
        work.path().join(format!("boot/vmlinuz-{release}")),
        fresh.join("vmlinuz"),
    )?;
    Ok(fresh)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use anyhow::{Result, bail};

    use super::{ATTEMPTS, LabCrashed, covered, is_identifier, outlive_crashes, quoted};

    #[test]
    fn words_survive_the_shell() {
        for word in ["", "plain", "it's", "a b\n$(c) `d` \\ \"e\" *"] {
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", quoted(word))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }

    #[test]
    fn directories_below_tmp_are_shown_once_and_tmp_itself_is_not() {
        let root = tempfile::tempdir_in("/tmp").unwrap();
        let root = root.path().canonicalize().unwrap();
        let shared = tempfile::tempdir_in("/dev/shm").unwrap();
        let inner = root.join("a b/target");
        std::fs::create_dir_all(&inner).unwrap();
        let link = root.join("link");
        std::os::unix::fs::symlink(&inner, &link).unwrap();
        let paths = [
            inner.clone(),
            PathBuf::from("/tmp"),
            PathBuf::from("/usr"),
            root.join("a b"),
            link,
            root.join("missing"),
            shared.path().to_owned(),
        ];
        let shown = covered(paths).unwrap();
        let expected = [shared.path(), &root.join("a b")];
        assert_eq!(shown, expected.map(|path| path.to_str().unwrap()));
    }

    #[test]
    fn a_name_with_a_line_end_is_refused() {
        let root = tempfile::tempdir_in("/tmp").unwrap();
        let odd = root.path().join("a\nb");
        std::fs::create_dir(&odd).unwrap();
        assert!(covered([odd]).is_err());
    }

    #[test]
    fn only_names_that_the_shell_can_export() {
        assert!(is_identifier("SM_BIN_2"));
        assert!(!is_identifier("2X"));
        assert!(!is_identifier("BASH_FUNC_x%%"));
    }

    /// Returns the result of a job with these answers, and the number of its runs.
    fn outlive(answers: &[fn() -> Result<u8>]) -> (Result<u8>, usize) {
        let mut ran = 0;
        let ended = outlive_crashes(|| {
            ran += 1;
            answers[(ran - 1).min(answers.len() - 1)]()
        });
        (ended, ran)
    }

    #[test]
    fn a_crashed_lab_is_started_again() {
        let (ended, ran) = outlive(&[|| Err(LabCrashed.into()), || Ok(0)]);
        assert_eq!((ended.unwrap(), ran), (0, 2));
    }

    #[test]
    fn the_number_of_crashes_is_limited() {
        let (ended, ran) = outlive(&[|| Err(LabCrashed.into())]);
        assert!(ended.unwrap_err().is::<LabCrashed>());
        assert_eq!(ran, ATTEMPTS as usize);
    }

    #[test]
    fn a_failed_test_is_final() {
        let (ended, ran) = outlive(&[|| Ok(101), || Ok(0)]);
        assert_eq!((ended.unwrap(), ran), (101, 1));
        let (ended, ran) = outlive(&[|| bail!("no QEMU"), || Ok(0)]);
        assert!(ended.is_err());
        assert_eq!(ran, 1);
    }
}
