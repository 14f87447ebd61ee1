//! The cgroups (v2) of containers.
//!
//! A container's group contains all of its processes. A group above contains the groups of
//! all containers, and no processes.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::Pid;

use crate::part;
use crate::reactor::{Class, Interest, Reactor, Token, Watched};

/// Controllers enabled for containers, if the kernel has them.
const CONTROLLERS: [&str; 5] = ["cpu", "memory", "pids", "io", "cpuset"];

/// Contents of `cgroup.events`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Events {
    /// The group or one of its descendants contains a process.
    pub(crate) populated: bool,
    /// All processes are frozen.
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

/// A cgroup; see the module documentation.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    events: Option<Watched>,
    /// The group's own path, in the form of `/proc/PID/cgroup` of its processes.
    name: Option<Vec<u8>>,
    /// OOM kills from before this VM was started or restored.
    earlier_oom_kills: u64,
    /// CPU time from before this VM was started or restored, in microseconds.
    earlier_cpu_us: u64,
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
            earlier_cpu_us: 0,
        })
    }

    /// Creates the group `name` below this one.
    pub(crate) fn below(&self, name: &str) -> io::Result<Self> {
        Self::create(&self.path, name)
    }

    /// Enables the controllers inside the group, except those that the kernel lacks.
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

    /// Returns the group's directory, for starting processes in the group.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Stores the group's path, read from `pid`, which was started in it.
    pub(crate) fn read_path(&mut self, pid: Pid) -> io::Result<()> {
        self.name = Some(path_of(pid)?);
        Ok(())
    }

    /// Opens the directory of the group that contains `pid`: this group or a descendant.
    ///
    /// A process cannot be started in a group that has enabled controllers for its
    /// children, as systemd does in its root group (cgroups(7), "no internal processes"
    /// rule). The group of a running process never has.
    pub(crate) fn of(&self, pid: Pid) -> io::Result<OwnedFd> {
        let outside = || io::Error::other("the container's PID 1 has left its cgroup");
        let below = match &self.name {
            Some(name) => below(name, &path_of(pid)?).ok_or_else(outside)?,
            None => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(open(self.path.join(below), flags, Mode::empty())?)
    }

    /// Counts OOM kills and CPU time from now on, when this VM starts or continues as
    /// another one.
    pub(crate) fn reset_counts(&mut self) {
        self.earlier_oom_kills = self.all_oom_kills();
        self.earlier_cpu_us = self.all_cpu_us();
    }

    /// Returns the number of processes in the group and its descendants that the OOM
    /// killer killed since [`Cgroup::reset_counts`].
    pub(crate) fn oom_kills(&self) -> u64 {
        self.all_oom_kills().saturating_sub(self.earlier_oom_kills)
    }

    fn all_oom_kills(&self) -> u64 {
        // A kernel without per-group counters provides a count for the whole guest.
        let text = fs::read_to_string(self.path.join("memory.events"))
            .or_else(|_| fs::read_to_string("/proc/vmstat"))
            .unwrap_or_default();
        field(&text, "oom_kill")
    }

    /// Freezes or thaws all processes. Freezing is complete when [`Cgroup::events`]
    /// reports it.
    pub(crate) fn freeze(&self, freeze: bool) -> io::Result<()> {
        fs::write(
            self.path.join("cgroup.freeze"),
            if freeze { "1" } else { "0" },
        )
    }

    /// Kills all processes in the group.
    pub(crate) fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Reads the state and watches it: until [`Cgroup::stop_watching`], changes are
    /// reported as events for [`part::CGROUP`].
    pub(crate) fn events(&mut self, reactor: &Reactor) -> io::Result<Events> {
        let watched = match &mut self.events {
            Some(watched) => watched,
            none => none.insert(Watched::new(
                File::open(self.path.join("cgroup.events"))?.into(),
            )),
        };
        let token = Token::single(Class::Containers, part::CGROUP);
        watched.set(reactor, token, Interest::PRIORITY)?;
        // The file has a few dozen bytes in every state.
        let mut text = [0; 1024];
        let count = rustix::io::pread(&*watched, &mut text, 0)?;
        let text = text.get(..count).unwrap_or_default();
        Ok(Events::parse(&String::from_utf8_lossy(text)))
    }

    /// Stops the watch that [`Cgroup::events`] started.
    pub(crate) fn stop_watching(&mut self) {
        self.events = None;
    }

    /// Returns all processes in the group and its descendants.
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

    /// Returns the CPU time used by the group since [`Cgroup::reset_counts`], in
    /// microseconds.
    pub(crate) fn cpu_us(&self) -> u64 {
        self.all_cpu_us().saturating_sub(self.earlier_cpu_us)
    }

    fn all_cpu_us(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("cpu.stat")).unwrap_or_default();
        field(&text, "usage_usec")
    }
}

/// Returns the path of the cgroup2 group that contains `pid`.
fn path_of(pid: Pid) -> io::Result<Vec<u8>> {
    let text = fs::read(format!("/proc/{}/cgroup", pid.as_raw_nonzero()))?;
    let mut lines = text.split(|byte| *byte == b'\n');
    let path = lines.find_map(|line| line.strip_prefix(b"0::"));
    Ok(path.ok_or(io::ErrorKind::NotFound)?.to_vec())
}

/// Returns `path` relative to the group `name`, if it is the group or a descendant.
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

/// Returns the number after `name` in a file of `name value` lines, 0 if there is none.
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
    fn oom_kills_are_counted_since_the_last_reset() {
        let mount = tempfile::tempdir().unwrap();
        let mut cgroup = Cgroup::create(mount.path(), "workload").unwrap();
        let events = mount.path().join("workload/memory.events");
        fs::write(&events, "low 0\noom 9\noom_kill 2\noom_group_kill 0\n").unwrap();
        assert_eq!(cgroup.oom_kills(), 2);
        cgroup.reset_counts();
        assert_eq!(cgroup.oom_kills(), 0);
        fs::write(&events, "low 0\noom 9\noom_kill 3\noom_group_kill 0\n").unwrap();
        assert_eq!(cgroup.oom_kills(), 1);
    }

    #[test]
    fn cpu_time_is_counted_since_the_last_reset() {
        let mount = tempfile::tempdir().unwrap();
        let mut cgroup = Cgroup::create(mount.path(), "workload").unwrap();
        let stat = mount.path().join("workload/cpu.stat");
        fs::write(&stat, "usage_usec 9000\nuser_usec 8000\n").unwrap();
        assert_eq!(cgroup.cpu_us(), 9000);
        cgroup.reset_counts();
        assert_eq!(cgroup.cpu_us(), 0);
        fs::write(&stat, "usage_usec 9700\nuser_usec 8000\n").unwrap();
        assert_eq!(cgroup.cpu_us(), 700);
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
