//! Descriptors between a session and its command.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::Winsize;

use crate::node::Node;

/// The command's ends, which depend on the presence of a terminal.
#[derive(Debug)]
pub(crate) enum ChildEnds {
    /// Standard input, output and error.
    Pipes([OwnedFd; 3]),
    /// The terminal's path in the workload's view. The child opens it there, so that
    /// `ttyname` finds it.
    Terminal(String),
}

/// The session's ends.
#[derive(Debug)]
pub(crate) struct AgentEnds {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: Option<OwnedFd>,
}

fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    rustix::io::ioctl_fionbio(fd, true)?;
    Ok(())
}

/// Creates three pipes. Standard input is `null` unless `stdin` is set.
pub(crate) fn pipes(stdin: bool, null: &Node) -> io::Result<(ChildEnds, AgentEnds)> {
    let (input, to_child) = if stdin {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        nonblocking(&writer)?;
        (reader, Some(writer))
    } else {
        (null.open(OFlags::RDONLY)?, None)
    };
    let (stdout, output) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, errors) = pipe_with(PipeFlags::CLOEXEC)?;
    nonblocking(&stdout)?;
    nonblocking(&stderr)?;
    let child = ChildEnds::Pipes([input, output, errors]);
    let agent = AgentEnds {
        stdin: to_child,
        stdout,
        stderr: Some(stderr),
    };
    Ok((child, agent))
}

/// Opens `null` for all streams. The session gets an output that is at its end.
pub(crate) fn nothing(null: &Node) -> io::Result<(ChildEnds, AgentEnds)> {
    let open = || null.open(OFlags::RDWR);
    let child = ChildEnds::Pipes([open()?, open()?, open()?]);
    let (stdout, _) = pipe_with(PipeFlags::CLOEXEC)?;
    nonblocking(&stdout)?;
    let agent = AgentEnds {
        stdin: None,
        stdout,
        stderr: None,
    };
    Ok((child, agent))
}

/// Creates a pseudo-terminal of the devpts instance mounted at `devpts`. Only the agent
/// mounts file systems there, and devpts lets no user create or remove files.
pub(crate) fn terminal(devpts: &Path, cols: u16, rows: u16) -> io::Result<(ChildEnds, AgentEnds)> {
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
    let master: OwnedFd = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(devpts.join("ptmx"))?
        .into();
    rustix::pty::unlockpt(&master)?;
    resize(&master, cols, rows)?;
    let path = rustix::pty::ptsname(&master, Vec::new())?;
    let path = path.into_string().map_err(|_| io::ErrorKind::InvalidData)?;
    // Two descriptors for one terminal, so that each direction is watched separately.
    let stdin = master.try_clone()?;
    let agent = AgentEnds {
        stdin: Some(stdin),
        stdout: master,
        stderr: None,
    };
    Ok((ChildEnds::Terminal(path), agent))
}

/// Sets a terminal's size. A dimension of 0 is replaced by a default (80 columns, 24
/// rows).
pub(crate) fn resize(master: impl std::os::fd::AsFd, cols: u16, rows: u16) -> io::Result<()> {
    let size = Winsize {
        ws_row: if rows == 0 { 24 } else { rows },
        ws_col: if cols == 0 { 80 } else { cols },
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(master, size)?;
    Ok(())
}

/// Creates a status pipe: the agent's end, and the child's.
pub(crate) fn status_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(reader.as_fd(), true)?;
    Ok((reader, writer))
}
