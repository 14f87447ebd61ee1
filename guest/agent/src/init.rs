//! PID 1 of a container's namespace, until the main command replaces it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use sm_guest_proto::control::AttachRoot;

use crate::exec::child;
use crate::exec::read_launch;
use crate::exec::stdio::ChildEnds;
use crate::log;
use crate::root;
use crate::sys;

/// Assembles the root file system, reports the result, waits, and possibly becomes the
/// main command. Runs in a process forked by the agent.
pub(crate) fn run(channel: OwnedFd, files: &Path, directory: &Path, plan: &AttachRoot) -> ! {
    let status = match assemble(channel, files, directory, plan) {
        Ok(channel) => wait(channel).map_or(1, |()| 0),
        Err(()) => 1,
    };
    sys::exit_now(status)
}

fn assemble(
    channel: OwnedFd,
    files: &Path,
    directory: &Path,
    plan: &AttachRoot,
) -> Result<OwnedFd, ()> {
    let mut keep = vec![channel.as_fd()];
    keep.extend(log::descriptor());
    sys::close_all_but(&keep);
    let (message, assembled) = match root::assemble(files, directory, plan) {
        Ok(assembled) => (vec![0], Some(assembled)),
        Err(error) => {
            let mut message = vec![1];
            message.extend_from_slice(error.to_string().as_bytes());
            (message, None)
        }
    };
    let fds = assembled.iter().flat_map(|assembled| {
        let layers = [&assembled.upper, &assembled.lower];
        layers.into_iter().chain(&assembled.machine_id)
    });
    let fds: Vec<_> = fds.map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let parts = [IoSlice::new(&message)];
    let sent = sendmsg(&channel, &parts, &mut ancillary, SendFlags::NOSIGNAL);
    match (sent, message.len()) {
        (Ok(_), 1) => Ok(channel),
        _ => Err(()),
    }
}

/// Reaps orphans until a message to become the main command, or the end of the channel.
fn wait(channel: OwnedFd) -> io::Result<()> {
    let signals = sys::signal_fd(&[libc::SIGCHLD])?;
    let mut channel = Some(channel);
    loop {
        // Reap first, because children may have exited before the signal was watched.
        while sys::next_signal(signals.as_fd()).is_some() {}
        let childless = loop {
            match sys::reap() {
                Ok(Some(_)) => {}
                Ok(None) => break false,
                Err(_) => break true,
            }
        };
        if childless && channel.is_none() {
            return Ok(());
        }
        let mut fds = vec![PollFd::new(&signals, PollFlags::IN)];
        if let Some(channel) = &channel {
            fds.push(PollFd::new(channel, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let called = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        drop(fds);
        if called && let Some(open) = channel.take() {
            channel = take_message(open)?;
        }
    }
}

/// Handles one message; `None` if the agent closed the channel.
fn take_message(channel: OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(&channel, &mut buffers, &mut ancillary, flags)?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let mut fds = fds.into_iter();
    let (Some(memory), Some(status)) = (fds.next(), fds.next()) else {
        return Ok(Some(channel));
    };
    let launch = read_launch(memory)?;
    let ends = match (launch.terminal.clone(), fds.next(), fds.next(), fds.next()) {
        (Some(path), ..) => ChildEnds::Terminal(path),
        (None, Some(stdin), Some(stdout), Some(stderr)) => {
            ChildEnds::Pipes([stdin, stdout, stderr])
        }
        _ => return Ok(Some(channel)),
    };
    child::become_command(&launch, &ends, status)
}
