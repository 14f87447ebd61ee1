//! The lab: an emulated machine with a real `/dev/kvm`.
//!
//! QEMU's TCG emulates AMD SVM, so a distribution kernel inside it runs our
//! guests with hardware semantics, at emulation speed. The host's file system is
//! the lab's root, read-only over 9p under a tmpfs overlay; `/tmp`, `/run` and
//! the state of `sm` are on tmpfs, since a 9p share refuses sockets.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::cpio::Archive;
use crate::process::step;
use crate::{apt, modules, paths, stock};

const QEMU: &str = "qemu-system-x86_64";
/// Modules of the lab's kernel; names without a module are built in.
const MODULES: [&str; 9] = [
    "virtio_pci", "9pnet_virtio", "9p", "kvm_amd", "loop", "erofs", "overlay", "fuse", "vhost_vsock",
];

/// Runs in the lab before the command.
const INIT: &str = r#"#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
while read module; do
  case $module in kvm-amd.ko*) options=nested=0 ;; *) options= ;; esac
  $B insmod /modules/$module $options || echo "lab: cannot load $module"
done < /modules/list
$B mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /lower || echo "lab: no host tree"
$B mount -t tmpfs overlay /overlay
$B mkdir /overlay/upper /overlay/work
$B mount -t overlay -o lowerdir=/lower,upperdir=/overlay/upper,workdir=/overlay/work root /root
for name in proc sys dev; do $B mount --move /$name /root/$name; done
$B mkdir -p /root/dev/pts /root/dev/shm /root/lab-results
$B mount -t devpts -o mode=620,ptmxmode=666 devpts /root/dev/pts
$B mount -t tmpfs shm /root/dev/shm
$B mount -t tmpfs -o mode=1777,size=80% tmp /root/tmp
$B mount -t tmpfs run /root/run
$B mount -t cgroup2 cgroup /root/sys/fs/cgroup
$B mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none results /root/lab-results
$B ip link set lo up
cd /root
exec $B chroot /root /bin/sh -c '
  mkdir -p -m 700 /run/user /run/data
  sh /lab-results/.command </dev/null >/lab-results/.stdout 2>/lab-results/.stderr
  echo $? >/lab-results/.status
  sync
  echo o >/proc/sysrq-trigger
  sleep 60'
"#;

/// How a lab is to be.
pub struct Options {
    /// Memory of the machine in MiB.
    pub memory: u32,
    /// Directory that is writable from inside, as `$SM_LAB_RESULTS`.
    pub results: Option<PathBuf>,
    /// Seconds after which the machine is ended.
    pub timeout: u32,
    /// Variables set for the command.
    pub environment: Vec<(String, OsString)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory: 4096,
            results: None,
            timeout: 3600,
            environment: Vec::new(),
        }
    }
}

/// `cargo xtask lab`.
pub fn command(arguments: &[OsString]) -> Result<ExitCode> {
    let mut options = Options::default();
    let mut rest = arguments.iter();
    let mut words: Vec<OsString> = Vec::new();
    while let Some(argument) = rest.next() {
        let mut value = |what: &str| {
            rest.next()
                .cloned()
                .with_context(|| format!("{what} needs a value"))
        };
        match argument.to_str() {
            Some("--memory") => options.memory = number(&value("--memory")?)?,
            Some("--timeout") => options.timeout = number(&value("--timeout")?)?,
            Some("--results") => options.results = Some(value("--results")?.into()),
            Some("--") => break,
            _ => words.push(argument.clone()),
        }
    }
    words.extend(rest.cloned());
    if words.is_empty() {
        bail!("nothing to run: cargo xtask lab -- COMMAND");
    }
    let status = run(&options, &words)?;
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(255)))
}

fn number(text: &OsString) -> Result<u32> {
    let text = text.to_string_lossy();
    text.parse().with_context(|| format!("\"{text}\" is not a number"))
}

/// Installs what the lab needs.
pub fn prepare() -> Result<()> {
    apt::ensure(&["busybox-static"])?;
    apt::ensure_major("qemu-system-x86", QEMU, 10)
}

/// Runs a command in a fresh lab; its output appears on ours. Returns its exit
/// status.
pub fn run(options: &Options, words: &[OsString]) -> Result<i32> {
    prepare()?;
    let kernel = stock::generic()?;
    let initramfs = initramfs(&kernel)?;
    let own = tempfile::tempdir().context("cannot create a directory for results")?;
    let results = match &options.results {
        Some(path) => {
            fs::create_dir_all(path)?;
            path.canonicalize()?
        }
        None => own.path().to_owned(),
    };
    for name in [".status", ".stdout", ".stderr"] {
        let _ = fs::remove_file(results.join(name));
        if name != ".status" {
            fs::write(results.join(name), "")?;
        }
    }
    fs::write(results.join(".command"), script(options, words)?)?;
    let console = results.join(".console");
    let mut qemu = qemu(options, &kernel.image, &initramfs, &results);
    let output = fs::File::create(&console)?;
    qemu.stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    step("Starting the lab (an emulated machine with nested virtualisation)");
    // Ctrl-C goes to the whole process group, and QEMU ends by it.
    let mut child = qemu.spawn().context("cannot start QEMU")?;
    let mut follow = Command::new("tail");
    follow.arg(format!("--pid={}", child.id()));
    follow.args(["-q", "-n", "+1", "-s", "0.2", "-f"]).arg(results.join(".stdout"));
    let mut out = follow.spawn().ok();
    let mut follow = Command::new("tail");
    follow.arg(format!("--pid={}", child.id()));
    follow.args(["-q", "-n", "+1", "-s", "0.2", "-f"]).arg(results.join(".stderr"));
    follow.stdout(std::io::stderr());
    let mut err = follow.spawn().ok();
    child.wait()?;
    for tail in [&mut out, &mut err].into_iter().flatten() {
        let _ = tail.wait();
    }
    match fs::read_to_string(results.join(".status")) {
        Ok(text) => text.trim().parse().context("the lab left no exit status"),
        Err(_) => {
            let text = String::from_utf8_lossy(&fs::read(&console)?).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            for line in lines.iter().skip(lines.len().saturating_sub(25)) {
                eprintln!("    {line}");
            }
            bail!("the lab ended before the command did; its console ended as shown")
        }
    }
}

fn qemu(options: &Options, kernel: &Path, initramfs: &Path, results: &Path) -> Command {
    let mut qemu = Command::new("timeout");
    qemu.arg("--foreground").arg(options.timeout.to_string());
    qemu.arg(QEMU);
    qemu.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,+svm,+npt"]);
    qemu.args(["-smp", "2", "-m", &options.memory.to_string()]);
    qemu.args(["-nographic", "-no-reboot", "-rtc", "base=utc", "-nic", "none"]);
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    qemu.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
    qemu.args(["-fsdev", "local,id=host,path=/,security_model=none,multidevs=remap,readonly=on"]);
    qemu.args(["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"]);
    let share = format!("local,id=results,path={},security_model=none", results.display());
    qemu.args(["-fsdev", &share]);
    qemu.args(["-device", "virtio-9p-pci,fsdev=results,mount_tag=results"]);
    // Nothing to inherit that could keep a pipe of ours open.
    qemu.env_remove("RUST_BACKTRACE");
    qemu.arg0("timeout");
    qemu
}

/// What the lab runs: the command with our working directory and environment.
fn script(options: &Options, words: &[OsString]) -> Result<String> {
    let mut text = String::from("export SM_LAB=1 SM_LAB_RESULTS=/lab-results\n");
    text.push_str("export XDG_RUNTIME_DIR=/run/user XDG_DATA_HOME=/run/data TMPDIR=/tmp\n");
    for name in ["PATH", "HOME"] {
        if let Some(value) = std::env::var_os(name) {
            text.push_str(&format!("export {name}={}\n", quote(&value)));
        }
    }
    for (name, value) in &options.environment {
        text.push_str(&format!("export {name}={}\n", quote(value)));
    }
    let here = std::env::current_dir()?;
    text.push_str(&format!("cd {}\n", quote(here.as_os_str())));
    let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
    text.push_str(&words.join(" "));
    text.push('\n');
    Ok(text)
}

fn quote(word: &std::ffi::OsStr) -> String {
    format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"))
}

/// The lab's initramfs, made once for a kernel.
fn initramfs(kernel: &stock::Stock) -> Result<PathBuf> {
    let path = paths::cache("lab")?.join("initramfs.cpio");
    let mut archive = Archive::default();
    for name in ["bin", "modules", "proc", "sys", "dev", "lower", "overlay", "root"] {
        archive.directory(name);
    }
    archive.file("init", 0o755, INIT.as_bytes());
    let busybox = fs::read("/bin/busybox").context("cannot read busybox")?;
    archive.file("bin/busybox", 0o755, &busybox);
    let mut list = String::new();
    for module in modules::in_order(&kernel.modules, &MODULES)? {
        let name = module
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        archive.file(&format!("modules/{name}"), 0o644, &fs::read(&module)?);
        list.push_str(&name);
        list.push('\n');
    }
    archive.file("modules/list", 0o644, list.as_bytes());
    let bytes = archive.finish();
    if fs::read(&path).is_ok_and(|old| old == bytes) {
        return Ok(path);
    }
    let draft = tempfile::NamedTempFile::new_in(paths::cache("lab")?)?;
    fs::write(draft.path(), bytes)?;
    draft.persist(&path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        assert_eq!(quote("it's".as_ref()), r"'it'\''s'");
        let text = script(&Options::default(), &["echo".into(), "a b".into()]).unwrap();
        assert!(text.ends_with("'echo' 'a b'\n"));
    }
}
