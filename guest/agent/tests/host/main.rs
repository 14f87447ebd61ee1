//! Tests of the whole agent on this machine: it runs in namespaces of its own, with this
//! machine's `/` as the image and unix sockets instead of vsock.
//!
//! The tests need root and a cgroup2 file system. The agent runs in a process of its own,
//! which is another instance of this program.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

mod client;
mod exec;
mod files;
mod forward;
mod identity;
mod lifecycle;
mod luck;
mod privileges;

use std::fs;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use client::ControlClient;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::{AttachRoot, ControlReply, ControlRequest, Upper};

/// A running agent, which is terminated on drop.
pub(crate) struct Agent {
    pub(crate) directory: tempfile::TempDir,
    cgroup: PathBuf,
    process: Child,
}

pub(crate) fn cgroup_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next()? == "cgroup2").then(|| path.into())
    })
}

impl Agent {
    /// Starts an agent that has no root yet.
    pub(crate) fn bare() -> Self {
        Self::after("true")
    }

    /// Starts an agent without a root after running shell commands in its namespaces.
    pub(crate) fn after(commands: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let name = directory.path().file_name().unwrap();
        let cgroup = cgroup_mount().unwrap().join("sm-agent-test").join(name);
        fs::create_dir_all(&cgroup).unwrap();
        let mut process = Command::new("unshare")
            .args([
                "--mount",
                "--uts",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-ec",
            ])
            .arg(format!("{commands}\nexec \"$0\" \"$@\""))
            .arg(std::env::current_exe().unwrap())
            .arg("serve")
            .args([directory.path(), &cgroup])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // The agent writes a byte once it listens.
        let mut ready = process.stdout.take().unwrap();
        ready.read_exact(&mut [0]).unwrap();
        Self {
            directory,
            cgroup,
            process,
        }
    }

    /// Starts an agent with this machine's root attached.
    pub(crate) fn attached() -> Self {
        Self::bare().attach()
    }

    /// Attaches this machine's root.
    pub(crate) fn attach(self) -> Self {
        let reply = self.control().ask(&ControlRequest::AttachRoot(self.plan()));
        assert_eq!(reply, ControlReply::Done);
        self
    }

    /// Returns the PID of the agent in this namespace.
    pub(crate) fn pid(&self) -> u32 {
        children(self.process.id())[0]
    }

    /// Returns the parent of the workload's cgroup.
    pub(crate) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub(crate) fn plan(&self) -> AttachRoot {
        AttachRoot {
            container: ContainerId::default(),
            lower: "/".into(),
            upper: Upper::Tmpfs { size: 64 << 20 },
            hostname: "box".into(),
            shm_size: 1 << 20,
            read_only: false,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn control(&self) -> ControlClient {
        ControlClient::open(self.path())
    }

    /// Returns the contents of the file `path` for a process of the workload.
    pub(crate) fn text(&self, path: &str) -> String {
        let mut text = String::new();
        let mut file = self.open(path, OFlags::RDONLY);
        file.read_to_string(&mut text).unwrap();
        text
    }

    /// Replaces the contents of the file `path` as a process of the workload.
    pub(crate) fn overwrite(&self, path: &str, text: &str) {
        let mut file = self.open(path, OFlags::WRONLY | OFlags::TRUNC);
        file.write_all(text.as_bytes()).unwrap();
    }

    fn open(&self, path: &str, flags: OFlags) -> fs::File {
        let procs = fs::read_to_string(self.cgroup.join("containers/main/cgroup.procs")).unwrap();
        let root = format!("/proc/{}/root", procs.lines().next().unwrap());
        let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let resolve = ResolveFlags::IN_ROOT;
        let file = openat2(root, path, flags, Mode::empty(), resolve);
        fs::File::from(file.unwrap())
    }

    /// Waits for the agent to exit by itself. Returns true if it succeeded.
    pub(crate) fn wait(&mut self) -> bool {
        self.process.wait().unwrap().success()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let containers = self.cgroup.join("containers");
        let _ = fs::write(containers.join("cgroup.kill"), "1");
        let _ = wait_until_empty(&containers);
        remove_groups(&containers);
        let _ = fs::remove_dir(&self.cgroup);
    }
}

/// Removes an empty cgroup with its descendants.
fn remove_groups(group: &Path) {
    for below in fs::read_dir(group).into_iter().flatten().flatten() {
        if below.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&below.path());
        }
    }
    let _ = fs::remove_dir(group);
}

/// Returns the children of a single-threaded process.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let words = text.split_whitespace();
    words.map(|word| word.parse().unwrap()).collect()
}

/// Waits until a cgroup contains no processes, which takes a moment after a kill.
fn wait_until_empty(cgroup: &Path) -> std::io::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut events = fs::File::open(cgroup.join("cgroup.events"))?;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.contains("populated 0") {
            return Ok(());
        }
        let limit = Timespec {
            tv_sec: 5,
            tv_nsec: 0,
        };
        if poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&limit))? == 0 {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
    }
}

/// Runs the agent in this process.
fn serve(directory: &Path, cgroup: &Path) -> std::io::Result<()> {
    let listen = |name| -> std::io::Result<_> {
        let listener = UnixListener::bind(directory.join(name))?;
        listener.set_nonblocking(true)?;
        Ok(listener.into())
    };
    let listeners = [listen("exec")?, listen("forward")?, listen("control")?];
    std::io::stdout().write_all(b"\n")?;
    std::io::stdout().flush()?;
    sm_guest_agent::boot::serve_on(listeners, directory, cgroup)
}

type Test = (&'static str, fn());

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, command, directory, cgroup] = arguments.as_slice()
        && command == "serve"
    {
        return match serve(Path::new(directory), Path::new(cgroup)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("agent: {error}");
                ExitCode::FAILURE
            }
        };
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    if !rustix::process::geteuid().is_root() || cgroup_mount().is_none() {
        let missing = "running the agent takes root and a cgroup2 file system";
        return match sm_test_needs::met("root", Some(missing)) {
            true => ExitCode::FAILURE,
            false => ExitCode::SUCCESS,
        };
    }
    let filter = arguments
        .get(1)
        .filter(|argument| !argument.starts_with('-'));
    let tests = [
        exec::TESTS,
        files::TESTS,
        forward::TESTS,
        identity::TESTS,
        lifecycle::TESTS,
        luck::TESTS,
        privileges::TESTS,
    ]
    .concat();
    for (name, test) in tests {
        if filter.is_none_or(|filter| name.contains(filter.as_str())) {
            println!("test {name} ...");
            test();
        }
    }
    let _ = cgroup_mount().map(|mount| fs::remove_dir(mount.join("sm-agent-test")));
    println!("ok");
    ExitCode::SUCCESS
}
