//! The workload's cgroup (v2): one group that every workload process is in.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::Pid;

use crate::part;
use crate::reactor::{Class, Reactor, Ready, Token, Watched};

/// Controllers offered to the workload, where the kernel has them.
const CONTROLLERS: [&str; 5] = ["cpu", "memory", "pids", "io", "cpuset"];

/// What `cgroup.events` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Events {
    /// Some process is in the group or below.
    pub(crate) populated: bool,
    /// All of them are stopped.
    pub(crate) frozen: bool,
}

impl Events {
    fn parse(text: &str) -> Self {
        let has = |line| text.lines().any(|other| other == line);
        Self {
            populated: has("populated 1"),
            frozen: has("frozen 1"),
        }
    }
}

/// See the module text.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    events: Option<Watched>,
    /// The group's own path, as `/proc/PID/cgroup` of a process in it has it.
    name: Option<Vec<u8>>,
    /// OOM kills of before this VM was started or restored.
    earlier_oom_kills: u64,
}

impl Cgroup {
    /// Creates the group `name` below `mount`, a cgroup2 file system.
    pub(crate) fn create(mount: &Path, name: &str) -> io::Result<Self> {
        let path = mount.join(name);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let directory = File::open(&path)?.into();
        Ok(Self {
            path,
            directory,
            events: None,
            name: None,
            earlier_oom_kills: 0,
        })
    }

    /// Makes the controllers available inside the group. One that the kernel
    /// lacks is left out.
    pub(crate) fn offer_controllers(&self) {
        if let Some(parent) = self.path.parent() {
            let file = parent.join("cgroup.subtree_control");
            let all = CONTROLLERS.map(|name| format!("+{name}")).join(" ");
            if fs::write(&file, all).is_err() {
                for name in CONTROLLERS {
                    let _ = fs::write(&file, format!("+{name}"));
                }
            }
        }
    }

    /// The directory, for starting processes in the group.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Learns the group's path from `pid`, which was started in it.
    pub(crate) fn learn_path(&mut self, pid: Pid) -> io::Result<()> {
        self.name = Some(path_of(pid)?);
        Ok(())
    }

    /// The directory of the group that `pid` is in, this one or one below.
    ///
    /// A process cannot be started in a group whose controllers are turned on for the
    /// groups below it, as systemd does with its root (cgroups(7), "no internal
    /// processes" rule). The group of a running process is not such a one.
    pub(crate) fn of(&self, pid: Pid) -> io::Result<OwnedFd> {
        let outside = || io::Error::other("the workload's PID 1 has left its cgroup");
        let below = match &self.name {
            Some(name) => below(name, &path_of(pid)?).ok_or_else(outside)?,
            None => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(open(self.path.join(below), flags, Mode::empty())?)
    }

    /// Counts OOM kills from now on: this VM starts, or goes on as another one.
    pub(crate) fn forget_oom_kills(&mut self) {
        self.earlier_oom_kills = self.all_oom_kills();
    }

    /// Processes of the group and of groups below it that were killed for want of
    /// memory, since [`Cgroup::forget_oom_kills`].
    pub(crate) fn oom_kills(&self) -> u64 {
        self.all_oom_kills().saturating_sub(self.earlier_oom_kills)
    }

    fn all_oom_kills(&self) -> u64 {
        // Of the whole guest where the kernel does not count by group.
        let text = fs::read_to_string(self.path.join("memory.events"))
            .or_else(|_| fs::read_to_string("/proc/vmstat"))
            .unwrap_or_default();
        field(&text, "oom_kill")
    }

    /// Asks for all processes to be stopped, or lets them go on. Stopping takes
    /// effect when [`Cgroup::events`] says so.
    pub(crate) fn freeze(&self, freeze: bool) -> io::Result<()> {
        fs::write(
            self.path.join("cgroup.freeze"),
            if freeze { "1" } else { "0" },
        )
    }

    /// Kills every process in the group.
    pub(crate) fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Reads the state and, from then on, reports a change of it as an event
    /// for [`part::CGROUP`] until [`Cgroup::stop_watching`].
    pub(crate) fn events(&mut self, reactor: &Reactor) -> io::Result<Events> {
        let watched = match &mut self.events {
            Some(watched) => watched,
            none => none.insert(Watched::new(
                File::open(self.path.join("cgroup.events"))?.into(),
            )),
        };
        let token = Token::single(Class::Workload, part::CGROUP);
        watched.set(reactor, token, Ready::PRI)?;
        // Some dozen bytes, whatever the group does.
        let mut text = [0; 1024];
        let count = rustix::io::pread(&*watched, &mut text, 0)?;
        let text = text.get(..count).unwrap_or_default();
        Ok(Events::parse(&String::from_utf8_lossy(text)))
    }

    /// Ends what [`Cgroup::events`] began.
    pub(crate) fn stop_watching(&mut self, reactor: &Reactor) {
        if let Some(watched) = self.events.take() {
            watched.retire(reactor);
        }
    }

    /// Every process in the group and in groups below it.
    pub(crate) fn processes(&self) -> Vec<Pid> {
        let mut found = Vec::new();
        let mut directories = vec![self.path.clone()];
        while let Some(directory) = directories.pop() {
            let pids = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            let pids = pids.lines().filter_map(|line| line.parse().ok());
            found.extend(pids.filter_map(Pid::from_raw));
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    directories.push(entry.path());
                }
            }
        }
        found
    }

    /// CPU time used by the group, in microseconds.
    pub(crate) fn cpu_us(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("cpu.stat")).unwrap_or_default();
        field(&text, "usage_usec")
    }
}

/// The path of the cgroup2 group that `pid` is in.
fn path_of(pid: Pid) -> io::Result<Vec<u8>> {
    let text = fs::read(format!("/proc/{}/cgroup", pid.as_raw_nonzero()))?;
    let mut lines = text.split(|byte| *byte == b'\n');
    let path = lines.find_map(|line| line.strip_prefix(b"0::"));
    Ok(path.ok_or(io::ErrorKind::NotFound)?.to_vec())
}

/// `path` relative to the group `name`, when it is that or below it.
fn below(name: &[u8], path: &[u8]) -> Option<PathBuf> {
    let rest = path.strip_prefix(name)?;
    let inside = match rest {
        [] => rest,
        [b'/', rest @ ..] => rest,
        _ if name.ends_with(b"/") => rest,
        _ => return None,
    };
    Some(OsStr::from_bytes(inside).into())
}

/// The number after `name` in a file of `name value` lines.
pub(crate) fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| {
            let mut words = line.split_whitespace();
            let key = words.next()?.trim_end_matches(':');
            (key == name).then(|| words.next()?.parse().ok()).flatten()
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_whole_name() {
        let text = "MemTotal:  12 kB\nMemAvailable:\t7 kB\noom_kill 3\noom_group_kill 4\n";
        assert_eq!(field(text, "MemTotal"), 12);
        assert_eq!(field(text, "MemAvailable"), 7);
        assert_eq!(field(text, "oom_kill"), 3);
        assert_eq!(field(text, "Mem"), 0);
    }

    #[test]
    fn oom_kills_are_those_of_the_group_since_it_was_told_to_forget() {
        let mount = tempfile::tempdir().unwrap();
        let mut cgroup = Cgroup::create(mount.path(), "workload").unwrap();
        let events = mount.path().join("workload/memory.events");
        fs::write(&events, "low 0\noom 9\noom_kill 2\noom_group_kill 0\n").unwrap();
        assert_eq!(cgroup.oom_kills(), 2);
        cgroup.forget_oom_kills();
        assert_eq!(cgroup.oom_kills(), 0);
        fs::write(&events, "low 0\noom 9\noom_kill 3\noom_group_kill 0\n").unwrap();
        assert_eq!(cgroup.oom_kills(), 1);
    }

    #[test]
    fn a_group_below_is_found_by_its_path() {
        let find = |name: &str, path: &str| below(name.as_bytes(), path.as_bytes());
        assert_eq!(find("/workload", "/workload"), Some("".into()));
        assert_eq!(
            find("/workload", "/workload/init.scope"),
            Some("init.scope".into())
        );
        assert_eq!(find("/", "/a/b"), Some("a/b".into()));
        assert_eq!(find("/workload", "/workloads"), None);
        assert_eq!(find("/workload", "/"), None);
    }

    #[test]
    fn events_are_read_by_line_not_by_substring() {
        let events = Events::parse("populated 1\nfrozen 0\n");
        assert!(events.populated && !events.frozen);
        assert_eq!(
            Events::parse("populated 10\nunfrozen 1\n"),
            Events::default()
        );
    }
}
