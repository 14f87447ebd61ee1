//! Containers: a root with its mounts, the processes in it, and their cgroup.
//!
//! All containers are in one cgroup, so that a snapshot freezes them together
//! ([`Containers::group`]); each has a group of its own below it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount};
use rustix::process::Pid;
use sm_event_loop::{Key, Slab};
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::AttachRoot;

use crate::cgroup::Cgroup;
use crate::reactor::Reactor;
use crate::waiting::Waiting;
use crate::workload::Workload;

/// Maximum number of containers of a guest.
const MAX_CONTAINERS: usize = 64;

/// A container; see the module documentation.
pub(crate) struct Container {
    pub(crate) id: ContainerId,
    pub(crate) workload: Workload,
    pub(crate) cgroup: Cgroup,
    /// Number of OOM kills counted by the cgroup that are attributed to execs.
    pub(crate) exec_oom_kills: u64,
    /// The connection that waits for the root.
    pub(crate) attaching: Option<Waiting>,
}

impl Container {
    /// Forks the container's init, which starts to assemble the root from the files of the
    /// guest's identity in `files` and the container's own directory.
    pub(crate) fn start_attach(
        &mut self,
        key: Key,
        plan: &AttachRoot,
        files: &Path,
        reactor: &Reactor,
    ) -> io::Result<()> {
        mount_devpts(&self.workload.devpts())?;
        self.cgroup.offer_controllers();
        let cgroup = self.cgroup.directory();
        self.workload
            .start_attach(key, plan, files, cgroup, reactor)
    }

    /// Counts OOM kills and CPU time from now on.
    pub(crate) fn reset_counts(&mut self) {
        self.cgroup.reset_counts();
        self.exec_oom_kills = 0;
    }
}

/// The containers of the guest.
pub(crate) struct Containers {
    slab: Slab<Container>,
    /// The cgroup with the groups of all containers.
    pub(crate) group: Cgroup,
    /// The parent of the containers' directories.
    directory: PathBuf,
}

impl Containers {
    /// Creates an empty set. Mount points are below `directory`.
    pub(crate) fn new(directory: &Path, group: Cgroup) -> Self {
        Self {
            slab: Slab::default(),
            group,
            directory: directory.join("containers"),
        }
    }

    /// Creates a container without a root.
    ///
    /// # Errors
    /// A container has this identifier, or there are too many; a sentence.
    pub(crate) fn create(&mut self, id: &ContainerId) -> Result<Key, String> {
        if self.find(id).is_some() {
            return Err(format!("container {id} has a root file system already"));
        }
        if self.slab.len() >= MAX_CONTAINERS {
            return Err(format!(
                "this guest has {MAX_CONTAINERS} containers already"
            ));
        }
        let new = || -> io::Result<Container> {
            let directory = self.directory.join(id.as_str());
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)?;
            self.group.offer_controllers();
            Ok(Container {
                id: id.clone(),
                workload: Workload::new(directory)?,
                cgroup: self.group.below(id.as_str())?,
                exec_oom_kills: 0,
                attaching: None,
            })
        };
        let created = new().map_err(|error| format!("create container {id}: {error}"))?;
        Ok(self.slab.insert(created))
    }

    /// Removes a container whose root could not be assembled.
    pub(crate) fn remove(&mut self, key: Key) {
        self.slab.remove(key);
    }

    /// Returns the container `id`.
    pub(crate) fn find(&self, id: &ContainerId) -> Option<Key> {
        let mut all = self.slab.iter();
        all.find_map(|(key, container)| (container.id == *id).then_some(key))
    }

    pub(crate) fn get(&self, key: Key) -> Option<&Container> {
        self.slab.get(key)
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut Container> {
        self.slab.get_mut(key)
    }

    /// Returns the container `id`, or a sentence if there is none.
    pub(crate) fn named(&mut self, id: &ContainerId) -> Result<(Key, &mut Container), String> {
        let missing = || format!("container {id} has no root file system yet");
        let key = self.find(id).ok_or_else(missing)?;
        let container = self.slab.get_mut(key).ok_or_else(missing)?;
        Ok((key, container))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Container> {
        self.slab.iter().map(|(_, container)| container)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Container> {
        self.slab.iter_mut().map(|(_, container)| container)
    }

    /// Returns true if any container has an init that was not reaped.
    pub(crate) fn has_init(&self) -> bool {
        self.iter()
            .any(|container| container.workload.init().is_some())
    }

    /// Returns the container whose init is `pid`.
    pub(crate) fn of_init(&self, pid: Pid) -> Option<Key> {
        let mut all = self.slab.iter();
        all.find_map(|(key, container)| (container.workload.init() == Some(pid)).then_some(key))
    }

    /// Returns the container whose main command is served by `session`.
    pub(crate) fn of_main(&mut self, session: Key) -> Option<&mut Container> {
        self.iter_mut()
            .find(|container| container.workload.main() == Some(session))
    }
}

/// Mounts the devpts instance for a container's terminals.
fn mount_devpts(target: &Path) -> io::Result<()> {
    let named = |error: io::Error| io::Error::other(format!("mount devpts: {error}"));
    if target.join("ptmx").exists() {
        return Ok(());
    }
    fs::create_dir_all(target).map_err(named)?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    let options = c"newinstance,ptmxmode=0666,mode=0620,gid=5";
    mount("devpts", target, "devpts", flags, Some(options)).map_err(|error| named(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containers() -> (tempfile::TempDir, Containers) {
        let directory = tempfile::tempdir().unwrap();
        // An ordinary directory, in which writes have no effect.
        let group = Cgroup::create(directory.path(), "group").unwrap();
        let containers = Containers::new(directory.path(), group);
        (directory, containers)
    }

    #[test]
    fn containers_are_distinct() {
        let (directory, mut containers) = containers();
        let [web, db] = ["web", "db"].map(|name| ContainerId::new(name).unwrap());
        let first = containers.create(&web).unwrap();
        let second = containers.create(&db).unwrap();
        assert_eq!(containers.find(&web), Some(first));
        assert_eq!(containers.find(&db), Some(second));
        assert!(containers.create(&web).unwrap_err().contains("already"));
        for name in ["web", "db"] {
            assert!(directory.path().join("containers").join(name).is_dir());
            assert!(directory.path().join("group").join(name).is_dir());
        }
        containers.remove(first);
        assert!(containers.named(&web).is_err() && containers.named(&db).is_ok());
        // It can be tried again.
        containers.create(&web).unwrap();
    }

    #[test]
    fn the_number_of_containers_is_limited() {
        let (_directory, mut containers) = containers();
        let id = |number: usize| ContainerId::new(format!("c{number}")).unwrap();
        for number in 0..MAX_CONTAINERS {
            containers.create(&id(number)).unwrap();
        }
        assert!(containers.create(&id(MAX_CONTAINERS)).is_err());
    }
}
