//! The workload: its namespaces, its init, and starting commands in it.
//!
//! Attaching the root file system forks the container's *init* into a PID namespace of its
//! own ([`crate::init`]). It assembles the root in its own mount namespace, then waits
//! and reaps orphans. Commands join these namespaces by descriptor and remain children of
//! the agent. To start the main command, init *becomes* it: it is then PID 1, `/proc`
//! shows only workload processes, and its exit ends all of them, as in a container. A VM
//! that never gets a main command keeps the waiting init.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use rustix::process::Pid;
use sm_event_loop::Key;
use sm_guest_proto::control::AttachRoot;
use sm_guest_proto::privileges::Privileges;

use crate::cgroup::Cgroup;
use crate::exec::stdio::ChildEnds;
use crate::exec::{Launch, child};
use crate::files::View;
use crate::init;
use crate::part;
use crate::reactor::{Class, Interest, Reactor, Token, Watched};
use crate::sys::{self, Fork};

/// The namespaces of the workload's processes.
#[derive(Debug)]
pub(crate) struct Namespaces {
    mounts: OwnedFd,
    cgroups: OwnedFd,
    pids: OwnedFd,
}

impl Namespaces {
    fn of(pid: Pid) -> io::Result<Self> {
        let pid = pid.as_raw_nonzero();
        let open = |name| File::open(format!("/proc/{pid}/ns/{name}")).map(OwnedFd::from);
        Ok(Self {
            mounts: open("mnt")?,
            cgroups: open("cgroup")?,
            pids: open("pid")?,
        })
    }

    /// Returns their descriptors.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [&self.mounts, &self.cgroups, &self.pids].map(AsFd::as_fd)
    }

    /// Moves this process into the mount namespace.
    pub(crate) fn join_mounts(&self) -> io::Result<()> {
        sys::setns(self.mounts.as_fd(), sys::NEW_MOUNTS)
    }
}

/// The directories of which a root consists. The container's processes do not see them.
#[derive(Debug)]
struct RootLayers {
    upper: OwnedFd,
    lower: OwnedFd,
}

impl RootLayers {
    /// Takes the descriptors that init has sent first.
    fn take(fds: &mut impl Iterator<Item = OwnedFd>) -> Option<Self> {
        Some(Self {
            upper: fds.next()?,
            lower: fds.next()?,
        })
    }
}

/// Stages of the workload.
#[derive(Debug, Default)]
enum State {
    /// No root file system is attached.
    #[default]
    Empty,
    /// Init is assembling the root.
    Attaching,
    /// Commands can be started.
    Ready(Namespaces),
    /// The namespace has ended with its main command.
    Ended,
}

/// The processes of a container; see the module documentation.
#[derive(Debug)]
pub(crate) struct Workload {
    state: State,
    init: Option<Pid>,
    channel: Option<Watched>,
    main: Option<Key>,
    /// Those of the main command, which commands beside it have as well.
    privileges: Privileges,
    own_pids: OwnedFd,
    /// The image and the changes of the root, once it is assembled.
    layers: Option<RootLayers>,
    /// Directory for the container's mount points.
    directory: PathBuf,
}

/// Message of init about the root file system.
#[derive(Debug)]
pub(crate) enum Attached {
    /// No message has arrived yet.
    Pending,
    /// The root is mounted. The file is the one that its machine ID must be written to.
    Done(Option<OwnedFd>),
    /// The root is not mounted, for this reason.
    Failed(String),
}

impl Workload {
    pub(crate) fn new(directory: PathBuf) -> io::Result<Self> {
        Ok(Self {
            state: State::Empty,
            init: None,
            channel: None,
            main: None,
            privileges: Privileges::default(),
            own_pids: File::open("/proc/self/ns/pid")?.into(),
            layers: None,
            directory,
        })
    }

    /// Returns the session of the main command, if there is one.
    pub(crate) fn main(&self) -> Option<Key> {
        self.main
    }

    /// Returns the privileges of the main command; none are limited before it runs.
    pub(crate) fn privileges(&self) -> Privileges {
        self.privileges
    }

    /// Removes the reference to the main command's session, which has ended.
    pub(crate) fn clear_main(&mut self) {
        self.main = None;
    }

    /// Returns PID 1 of the workload.
    pub(crate) fn init(&self) -> Option<Pid> {
        self.init
    }

    /// Returns the root directory of the workload's processes, if there are any.
    pub(crate) fn root(&self) -> Option<PathBuf> {
        let init = self.init?.as_raw_nonzero();
        matches!(self.state, State::Ready(_)).then(|| format!("/proc/{init}/root").into())
    }

    /// Returns the parts for operations on files, if the root is assembled.
    pub(crate) fn view<'a>(&'a self, cgroup: BorrowedFd<'a>) -> Option<View<'a>> {
        let State::Ready(namespaces) = &self.state else {
            return None;
        };
        let layers = self.layers.as_ref()?;
        Some(View {
            mounts: namespaces.mounts.as_fd(),
            cgroup,
            upper: layers.upper.as_fd(),
            lower: layers.lower.as_fd(),
        })
    }

    /// Returns the mount point of the workload's devpts instance in the agent's view.
    pub(crate) fn devpts(&self) -> PathBuf {
        self.directory.join("pts")
    }

    // ---- attaching ----

    /// Forks init, which starts to assemble the root. `key` is the container's; `files`
    /// are those of the guest's identity.
    pub(crate) fn start_attach(
        &mut self,
        key: Key,
        plan: &AttachRoot,
        files: &Path,
        cgroup: BorrowedFd<'_>,
        reactor: &Reactor,
    ) -> io::Result<()> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // Before the fork, because init would have to be killed if this failed.
        let mut channel = Watched::new(ours);
        let token = Token::new(Class::Container, part::CHANNEL, key);
        channel.set(reactor, token, Interest::READ)?;
        let kinds = sys::NEW_PIDS | sys::NEW_MOUNTS;
        match fork_agent(kinds, Some(cgroup))? {
            Fork::Child => init::run(theirs, files, &self.directory, plan),
            Fork::Parent(pid) => {
                self.init = Some(pid);
                self.state = State::Attaching;
                self.channel = Some(channel);
            }
        }
        Ok(())
    }

    /// Reads a message of init.
    pub(crate) fn attach_progress(&mut self, key: Key, reactor: &Reactor) -> Attached {
        let Some(channel) = &mut self.channel else {
            return Attached::Pending;
        };
        if !matches!(self.state, State::Attaching) {
            // No message is expected any more; init's exit is reported by SIGCHLD.
            let token = Token::new(Class::Container, part::CHANNEL, key);
            let _ = channel.set(reactor, token, Interest::NONE);
            return Attached::Pending;
        }
        let mut message = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &*channel,
            &mut [IoSliceMut::new(&mut message)],
            &mut ancillary,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        );
        let cut = matches!(&received, Ok(all) if all.flags.contains(ReturnFlags::CTRUNC));
        let failure = match received.map(|received| received.bytes) {
            // Without its descriptor the machine ID would never be written.
            Ok(_) if cut => "there are no descriptors left for the root".to_owned(),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Attached::Pending,
            Err(error) => error.to_string(),
            Ok(1) => match self.init.map(Namespaces::of) {
                Some(Ok(namespaces)) => {
                    let mut fds = ancillary.drain().flat_map(descriptors);
                    self.layers = RootLayers::take(&mut fds);
                    self.state = State::Ready(namespaces);
                    return Attached::Done(fds.next());
                }
                Some(Err(error)) => format!("open the workload's namespaces: {error}"),
                None => "the workload's init is gone".to_owned(),
            },
            Ok(0) => "the workload's init died while mounting the root".to_owned(),
            Ok(count) => String::from_utf8_lossy(&message[1..count]).into_owned(),
        };
        self.abandon();
        Attached::Failed(failure)
    }

    /// Cancels attaching, which can then be tried again.
    pub(crate) fn abandon(&mut self) {
        self.channel = None;
        if let Some(pid) = self.init.take() {
            let _ = sys::kill(pid, 9);
        }
        self.state = State::Empty;
    }

    // ---- commands ----

    /// Checks that commands can be started; the error is a sentence.
    pub(crate) fn check_ready(&self) -> Result<(), &'static str> {
        match self.state {
            State::Ready(_) => Ok(()),
            State::Empty | State::Attaching => Err("no root file system is attached yet"),
            State::Ended => Err("the workload has ended"),
        }
    }

    /// Returns true if PID 1 of the workload's namespace has exited or is exiting. An
    /// exiting process has released its memory, which is the first step in Linux.
    pub(crate) fn init_ends(&self) -> bool {
        let program = |pid: Pid| std::fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero()));
        self.init.is_none_or(|pid| program(pid).is_err())
    }

    /// Starts a command beside the workload's main command. It is a child of the agent
    /// inside the workload's namespaces, in the control group that contains the workload's
    /// PID 1, or in `cgroup` if that group accepts no processes.
    pub(crate) fn spawn(
        &self,
        launch: &Launch,
        ends: &ChildEnds,
        status: OwnedFd,
        cgroup: &Cgroup,
    ) -> io::Result<Pid> {
        let State::Ready(namespaces) = &self.state else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        // A process can change the PID namespace of its future children only: enter it,
        // fork, and return.
        sys::setns(namespaces.pids.as_fd(), sys::NEW_PIDS)?;
        let forked = fork_into(cgroup, self.init);
        if let Ok(Fork::Child) = forked {
            join_and_become(namespaces, launch, ends, status);
        }
        sys::setns(self.own_pids.as_fd(), sys::NEW_PIDS)?;
        match forked? {
            Fork::Parent(pid) => Ok(pid),
            Fork::Child => sys::exit_now(125),
        }
    }

    /// Returns the namespaces of its processes, and the directory of the agent's files.
    ///
    /// # Errors
    /// As [`Self::check_ready`].
    pub(crate) fn namespaces(&self) -> Result<(&Namespaces, &Path), &'static str> {
        self.check_ready()?;
        match &self.state {
            State::Ready(namespaces) => Ok((namespaces, &self.directory)),
            State::Empty | State::Attaching | State::Ended => Err("the workload has ended"),
        }
    }

    /// Turns init into the workload's main command, served by session `key`.
    pub(crate) fn become_main(
        &mut self,
        key: Key,
        launch: &Launch,
        ends: &ChildEnds,
        status: &OwnedFd,
    ) -> io::Result<Pid> {
        let (Some(init), Some(channel)) = (self.init, &self.channel) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let memory = rustix::fs::memfd_create("launch", rustix::fs::MemfdFlags::CLOEXEC)?;
        let mut file = File::from(memory);
        file.write_all(&serde_json::to_vec(launch)?)?;
        let mut fds = vec![file.as_fd(), status.as_fd()];
        if let ChildEnds::Pipes(pipes) = ends {
            fds.extend(pipes.iter().map(AsFd::as_fd));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(channel, &[IoSlice::new(&[1])], &mut ancillary, flags)?;
        self.main = Some(key);
        self.privileges = launch.request.privileges.unwrap_or_default();
        Ok(init)
    }

    /// Lets a waiting init exit once it has no children left.
    pub(crate) fn release_init(&mut self) {
        self.channel = None;
    }

    /// Records that `pid` was reaped. Returns true if it was init, in which case no
    /// process of the workload exists any more.
    pub(crate) fn reaped(&mut self, pid: Pid) -> bool {
        if self.init != Some(pid) {
            return false;
        }
        self.init = None;
        if matches!(self.state, State::Ready(_)) {
            self.state = State::Ended;
        }
        self.channel = None;
        true
    }

    /// Returns true while init is assembling the root.
    pub(crate) fn attaching(&self) -> bool {
        matches!(self.state, State::Attaching)
    }

    /// Drops the last references to the workload's mounts.
    pub(crate) fn end(&mut self) {
        self.layers = None;
        self.state = State::Ended;
    }
}

fn descriptors(message: RecvAncillaryMessage<'_>) -> Vec<OwnedFd> {
    match message {
        RecvAncillaryMessage::ScmRights(rights) => rights.collect(),
        _ => Vec::new(),
    }
}

/// Maximum number of attempts to follow PID 1 to another group while a command is
/// started.
const GROUP_CHANGES: u32 = 8;

/// Forks into the group that contains `init`, or into `cgroup` if that group accepts
/// none.
///
/// Docker prefers the opposite order (runc's `setnsProcess`). A process started in the
/// topmost group after systemd has left it, but before it enables controllers, prevents
/// systemd from enabling them as long as it runs; and a group that has enabled
/// controllers accepts no processes. The group of PID 1 avoids both.
fn fork_into(cgroup: &Cgroup, init: Option<Pid>) -> io::Result<Fork> {
    // The group has controllers enabled or threads below it, or has been removed.
    const NOT_THERE: [i32; 4] = [libc::EBUSY, libc::EOPNOTSUPP, libc::ENODEV, libc::ENOENT];
    for _ in 0..GROUP_CHANGES {
        let Some(group) = init.and_then(|init| cgroup.of(init).ok()) else {
            break;
        };
        let forked = fork_agent(0, Some(group.as_fd()));
        let moved = |error: &io::Error| {
            let code = error.raw_os_error();
            code.is_some_and(|code| NOT_THERE.contains(&code))
        };
        if !forked.as_ref().is_err_and(moved) {
            return forked;
        }
    }
    fork_agent(0, Some(cgroup.directory()))
}

fn join_and_become(
    namespaces: &Namespaces,
    launch: &Launch,
    ends: &ChildEnds,
    status: OwnedFd,
) -> ! {
    let joined = sys::setns(namespaces.cgroups.as_fd(), sys::NEW_CGROUPS)
        .and_then(|()| sys::setns(namespaces.mounts.as_fd(), sys::NEW_MOUNTS));
    if joined.is_err() {
        sys::exit_now(125);
    }
    // The parent of a chain executes no program, which would close the descriptors of the
    // agent. A pipe of another command that the agent closes would stay open.
    let mut keep = vec![status.as_fd()];
    if let ChildEnds::Pipes(pipes) = ends {
        keep.extend(pipes.iter().map(AsFd::as_fd));
    }
    sys::close_all_but(&keep);
    child::become_command(launch, ends, status)
}

#[expect(
    unsafe_code,
    reason = "fork needs the caller's word that there is one thread"
)]
pub(crate) fn fork_agent(
    namespaces: std::ffi::c_int,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Fork> {
    // SAFETY: the agent never starts a thread (see the crate's documentation).
    unsafe { sys::fork(namespaces, cgroup) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::refusal;
    use sm_guest_proto::container::ContainerId;
    use sm_guest_proto::control::Upper;

    #[test]
    fn nothing_is_forked_whose_channel_cannot_be_watched() {
        let directory = tempfile::tempdir().unwrap();
        // Not a cgroup, so that a fork into it fails.
        let cgroup = File::open(directory.path()).unwrap();
        let reactor = Reactor::new().unwrap();
        let mut workload = Workload::new(directory.path().into()).unwrap();
        let plan = AttachRoot {
            container: ContainerId::default(),
            lower: "/".into(),
            upper: Upper::Tmpfs { size: 1 },
            hostname: "box".into(),
            shm_size: 1,
            read_only: false,
        };
        for (refused, errno) in [(1, libc::ENOMEM), (0, libc::EBADF)] {
            refusal::begin(refused);
            let (key, files) = (Key::new(0, 0), directory.path());
            let failed = workload.start_attach(key, &plan, files, cgroup.as_fd(), &reactor);
            assert_eq!(failed.unwrap_err().raw_os_error(), Some(errno));
            // It can be tried again.
            assert!(!workload.attaching() && workload.init().is_none());
            assert_eq!(reactor.counts(), (0, 0));
        }
    }
}
