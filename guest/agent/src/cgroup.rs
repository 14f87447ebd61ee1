//! The workload's cgroup (v2): one group that every workload process is in.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::process::Pid;

use crate::reactor::{Class, Reactor, Ready, Token, Watched};
use crate::workload::part;

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
        let mut text = String::new();
        let mut file = File::from(watched.as_fd().try_clone_to_owned()?);
        file.rewind()?;
        file.read_to_string(&mut text)?;
        Ok(Events::parse(&text))
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
        text.lines()
            .find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok())
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
