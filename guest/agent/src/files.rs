//! Operations on the files of a container.
//!
//! Each runs in a process of its own, because access to the files of an image may block:
//! a file system may be served by a process of the container. The process is in the
//! container's mount namespace, so its root is that of the container and no path leads
//! out of it; it stays in the agent's PID namespace and cgroup, where the container's
//! processes neither see nor stop it.

mod archive;
mod changes;
mod image;
mod operations;
mod place;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, open};
use sm_guest_proto::files::FileOperation;
use thiserror::Error;

use self::place::Places;
use crate::exec::stdio::ChildEnds;
use crate::sys;

/// Maximum length of a sentence about a failure in bytes.
const MAX_FAILURE: usize = 4000;

/// Largest exit status that is an error number. Greater ones have other meanings.
const MAX_ERRNO: i32 = 122;

/// The parts of a container that operations use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    /// Its mount namespace.
    pub(crate) mounts: BorrowedFd<'a>,
    /// Its cgroup.
    pub(crate) cgroup: BorrowedFd<'a>,
    /// The directory with the changes of the root.
    pub(crate) upper: BorrowedFd<'a>,
    /// The root of the image.
    pub(crate) lower: BorrowedFd<'a>,
}

/// Failure of an operation: an error number of Linux and a sentence.
#[derive(Debug, Error)]
#[error("{message}")]
pub(crate) struct FileFailure {
    errno: i32,
    message: String,
}

impl FileFailure {
    fn new(operation: &str, path: &[u8], error: impl Into<io::Error>) -> Self {
        let path = String::from_utf8_lossy(path);
        Self::of(format!("cannot {operation} {path:?}"), error)
    }

    fn of(what: impl std::fmt::Display, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        Self {
            errno: error.raw_os_error().unwrap_or(libc::EIO),
            message: format!("{what}: {error}"),
        }
    }
}

/// Returns true if an operation has input.
pub(crate) fn takes_input(operation: &FileOperation) -> bool {
    matches!(
        operation,
        FileOperation::Write(_) | FileOperation::Unpack { .. }
    )
}

/// Returns true if an operation freezes the container's own cgroup, which is to be thawed
/// when the process has ended.
pub(crate) fn pauses(operation: &FileOperation) -> bool {
    matches!(operation, FileOperation::Layer { pause: true })
}

/// Performs an operation in this process, which was forked for it, and ends the process.
pub(crate) fn run(
    view: View<'_>,
    operation: &FileOperation,
    ends: ChildEnds,
    status: OwnedFd,
) -> ! {
    let ChildEnds::Pipes([input, output, errors]) = ends else {
        sys::exit_now(125);
    };
    // The process must not hold connections open that the agent closes.
    let mut keep = vec![view.mounts, view.cgroup, view.upper, view.lower];
    keep.extend([&input, &output, &errors, &status].map(|fd| fd.as_fd()));
    sys::close_all_but(&keep);
    let streams = Streams {
        input: input.into(),
        output: output.into(),
    };
    let mut status = File::from(status);
    let done = prepare(view).and_then(|places| {
        // The agent reports that the operation has started: it has no PID in the container.
        let _ = status.write_all(&0u32.to_le_bytes());
        drop(status);
        perform(view, &places, operation, streams)
    });
    let code = match done {
        Ok(()) => 0,
        Err(failure) => {
            let message = failure.message.as_bytes();
            let message = message.get(..MAX_FAILURE).unwrap_or(message);
            let _ = File::from(errors).write_all(message);
            let errno = match failure.errno {
                errno @ 1..=MAX_ERRNO => errno,
                _ => libc::EIO,
            };
            u8::try_from(errno).unwrap_or(u8::MAX)
        }
    };
    sys::exit_now(code)
}

/// Input and output of an operation.
struct Streams {
    input: File,
    output: File,
}

/// Enters the container.
fn prepare(view: View<'_>) -> Result<Places, FileFailure> {
    let fail = |error: io::Error| FileFailure::of("cannot enter the container", error);
    // A client that disconnects signals the process group.
    rustix::process::setsid().map_err(|errno| fail(errno.into()))?;
    sys::reset_signals();
    rustix::process::umask(Mode::empty());
    let _ = fs::write("/proc/self/oom_score_adj", "0");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = open("/proc", flags, Mode::empty()).map_err(|errno| fail(errno.into()))?;
    sys::setns(view.mounts, sys::NEW_MOUNTS).map_err(fail)?;
    let root = open("/", flags, Mode::empty()).map_err(|errno| fail(errno.into()))?;
    Ok(Places { root, proc })
}

fn perform(
    view: View<'_>,
    places: &Places,
    operation: &FileOperation,
    streams: Streams,
) -> Result<(), FileFailure> {
    let Streams { input, output } = streams;
    match operation {
        FileOperation::Stat { path, follow } => operations::stat(places, &path.0, *follow, output),
        FileOperation::List { path } => operations::list(places, &path.0, output),
        FileOperation::Read { path, offset, len } => {
            operations::read(places, &path.0, *offset, *len, output)
        }
        FileOperation::Write(write) => operations::write(places, write, input),
        FileOperation::MakeDirectory {
            path,
            mode,
            parents,
        } => operations::make_directory(places, &path.0, *mode, *parents),
        FileOperation::Remove { path, recursive } => {
            operations::remove(places, &path.0, *recursive)
        }
        FileOperation::Rename { from, to } => operations::rename(places, &from.0, &to.0),
        FileOperation::Pack { path, name, follow } => {
            archive::pack(places, &path.0, &name.0, *follow, output)
        }
        FileOperation::Unpack { path, owners } => archive::unpack(places, &path.0, *owners, input),
        FileOperation::Changes => image::changes(view, output),
        FileOperation::Export => image::export(output),
        FileOperation::Layer { pause } => image::layer(view, *pause, output),
    }
}
