//! Errors of operations on VMs.

mod option;

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;

use sm_control::ControlError;
use sm_control::exit::FailureCause;
use sm_control::workload::WorkloadError;
use sm_image::Platform;
use thiserror::Error;

pub use self::option::{FixedOption, OptionError};

use crate::files::FilesError;
use crate::guest_agent::AgentError;
use crate::home::HomeError;
use crate::kernel::KernelError;
use crate::record::{Record, RecordError};
use crate::volumes::VolumeError;

/// An error of this crate. [`Error::kind`] has what most callers need to know.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The directories cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// A record cannot be created, found or removed.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Image and options result in no command.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// No kernel can be booted.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// There is no usable guest agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] sm_image::Error),
    /// A snapshot cannot be used or removed.
    #[error(transparent)]
    Snapshot(#[from] sm_snapshot::Error),
    /// A volume cannot be used.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// An option is out of range, or cannot be used here.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The VM process cannot be started, or the connection to it failed.
    #[error("cannot {operation}")]
    Vmm {
        /// The operation that failed.
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file that is needed to start a VM cannot be used.
    #[error("cannot {operation} {path:?}")]
    File {
        /// The operation that failed.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// An operation on files failed.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The VM did not start its workload.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The VM with this name is not running.
    #[error("VM \"{0}\" is not running")]
    NotRunning(String),
    /// The operation is not possible in this state, or the VM refused it.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// The cause of an [`Error::Start`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StartError {
    /// The command of the workload does not exist, or cannot be executed.
    #[error("{message}")]
    Command {
        /// Docker's exit status: 127 or 126.
        status: u32,
        /// A sentence of the guest.
        message: String,
    },
    /// The VM failed before its workload ran.
    #[error("{message}")]
    Failed {
        /// A sentence, followed by the last lines of the guest's console if there are any.
        message: String,
        /// The cause, if it is one for which there is a remedy.
        cause: Option<FailureCause>,
    },
    /// The VM process ended without a report.
    #[error("the VM's process ended unexpectedly ({how}){log}", log = after_colon(log))]
    Died {
        /// Its exit status or signal.
        how: String,
        /// The last lines of its log.
        log: String,
    },
    /// The program of VM processes is none: it does not call [`crate::run_vmm_if_asked`].
    #[error("the VM's process ended before it was one ({how}): {ENTRY_ADVICE}{log}")]
    NotAVmm {
        /// Its exit status or signal.
        how: String,
        /// The last lines of its output.
        log: String,
    },
    /// No program of VM processes is set, and this one did not call
    /// [`crate::run_vmm_if_asked`].
    #[error("this program is not the process of a VM, and no other one is named: {ENTRY_ADVICE}")]
    NoProgram,
    /// This process was itself started as that of a VM.
    #[error(
        "this process was started to be the process of a VM, and starts a VM instead: {ENTRY_ADVICE}"
    )]
    InsideVmm,
}

/// Advice for a program that does not become a VMM.
pub(crate) const ENTRY_ADVICE: &str =
    "its program has to call sm_runtime::run_vmm_if_asked() first thing in main";

fn after_colon(log: &str) -> String {
    match log {
        "" => String::new(),
        log => format!(":{log}"),
    }
}

/// The cause of an [`Error::Refused`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The VM is paused.
    #[error("VM \"{0}\" is paused: unpause it first")]
    Paused(String),
    /// The workload of the VM does not run yet.
    #[error("VM \"{0}\" is still starting: try again when its workload runs")]
    Starting(String),
    /// The VM ended without an exit status.
    #[error("VM \"{0}\" reports no exit status")]
    NoExitStatus(String),
    /// VMs of this host cannot run the programs of the image.
    #[error(
        "image \"{image}\" is for {platform}, and VMs of this host run programs for {} only",
        Platform::host()
    )]
    Platform {
        /// Reference of the image.
        image: String,
        /// The image's platform.
        platform: Platform,
    },
    /// The snapshot holds no workload that could continue.
    #[error("snapshot \"{name}\" holds {holds}, so there is nothing to go on with")]
    NoWorkload {
        /// The snapshot.
        name: String,
        /// Its contents.
        holds: &'static str,
    },
    /// It is unknown which image a snapshot needs, so none is removed.
    #[error(
        "cannot determine which images snapshots need: snapshot \"{name}\" cannot be read: {reason}"
    )]
    UnreadableSnapshot {
        /// The snapshot.
        name: String,
        /// The cause.
        reason: String,
    },
    /// The record of the VM is of a version that did not store the settings of its start.
    #[error("VM \"{0}\" was created by a version that could not start it again")]
    NoStartSettings(String),
    /// The image of the VM is not in the store any more.
    #[error("image \"{image}\" of VM \"{vm}\" is not in the store any more")]
    NoImage {
        /// The VM.
        vm: String,
        /// The reference by which its image was opened.
        image: String,
    },
    /// The changes of the VM's root were in guest memory.
    #[error("VM \"{0}\" has no files until it is started: its root is in guest memory")]
    RootInMemory(String),
    /// The next start of the VM discards what is written to its disk.
    #[error(
        "VM \"{vm}\" continues snapshot \"{snapshot}\" when it is started, without changes to its \
         files"
    )]
    ContinuesSnapshot {
        /// The VM.
        vm: String,
        /// The snapshot.
        snapshot: String,
    },
    /// The VM, or its guest, refused the operation; its own sentence.
    #[error("{0}")]
    Vm(String),
    /// The VM's process answered something else.
    #[error("the VM's process answered {0}")]
    Answer(String),
}

/// The kind of an [`crate::Error`], for callers that handle some kinds differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such VM, image, snapshot, kernel, agent or file.
    NotFound,
    /// The name is in use.
    AlreadyExists,
    /// The query matches several VMs or images.
    Ambiguous,
    /// The VM is not running.
    NotRunning,
    /// The VM, image or snapshot is in use, or in a state that does not permit the
    /// operation.
    Busy,
    /// An option, name or reference is invalid.
    Invalid,
    /// This host, or this version, cannot do it.
    Unsupported,
    /// A record, image or snapshot is damaged.
    Damaged,
    /// A file or directory is not accessible to this user.
    PermissionDenied,
    /// A file system is full.
    NoSpace,
    /// A peer did not answer in time.
    Timeout,
    /// A registry or engine cannot be reached, or refused the request.
    Remote,
    /// The caller cancelled the operation.
    Cancelled,
    /// The command of a workload does not exist, or cannot be executed.
    Command,
    /// The VM failed before its workload ran, or its process is none.
    Start,
    /// The VM or its guest refused the operation.
    Refused,
    /// Anything else, mostly a failed system call.
    Other,
}

impl Error {
    /// Returns the kind of the error.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Home(error) => kind_of_home(error),
            Self::Record(error) => kind_of_record(error),
            Self::Workload(_) | Self::Option(_) => ErrorKind::Invalid,
            Self::Kernel(KernelError::None) | Self::Agent(AgentError::None) => ErrorKind::NotFound,
            Self::Kernel(KernelError::Unusable { .. }) | Self::Agent(AgentError::NotElf { .. }) => {
                ErrorKind::Invalid
            }
            Self::Image(error) => kind_of_image(error),
            Self::Snapshot(error) => kind_of_snapshot(error),
            Self::Volume(error) => error.kind(),
            Self::Vmm { source, .. } | Self::File { source, .. } => kind_of_io(source),
            Self::Files(error) => kind_of_io(&error.kind().into()),
            Self::Start(StartError::Command { .. }) => ErrorKind::Command,
            Self::Start(_) => ErrorKind::Start,
            Self::NotRunning(_) => ErrorKind::NotRunning,
            Self::Refused(refusal) => match refusal {
                Refusal::Paused(_) | Refusal::Starting(_) => ErrorKind::Busy,
                Refusal::Platform { .. } | Refusal::NoStartSettings(_) => ErrorKind::Unsupported,
                Refusal::NoImage { .. } => ErrorKind::NotFound,
                Refusal::RootInMemory(_) | Refusal::ContinuesSnapshot { .. } => ErrorKind::Busy,
                Refusal::NoWorkload { .. } => ErrorKind::Invalid,
                Refusal::UnreadableSnapshot { .. } => ErrorKind::Damaged,
                Refusal::NoExitStatus(_) | Refusal::Vm(_) | Refusal::Answer(_) => {
                    ErrorKind::Refused
                }
            },
            Self::Kernel(_) | Self::Agent(_) => kind_of_causes(self),
        }
    }

    /// Returns the exit status of Docker's command line for this failure: 127 or 126 if the
    /// command of the workload could not be run ([`ErrorKind::Command`]), else 125.
    #[must_use]
    pub fn exit_status(&self) -> u32 {
        match self {
            Self::Start(StartError::Command { status, .. }) => *status,
            _ => 125,
        }
    }

    /// Returns the error for a VM whose process does not exist.
    pub(crate) fn not_running(record: &Record) -> Self {
        match record.state() {
            Err(RecordError::NotFound(name)) => RecordError::NotFound(name).into(),
            _ => Self::NotRunning(record.config().name.clone()),
        }
    }
}

fn kind_of_home(error: &HomeError) -> ErrorKind {
    match error {
        HomeError::Unknown { .. } => ErrorKind::NotFound,
        HomeError::NotPrivate { .. } => ErrorKind::PermissionDenied,
        HomeError::Io { source, .. } => kind_of_io(source),
    }
}

fn kind_of_record(error: &RecordError) -> ErrorKind {
    match error {
        RecordError::Home(error) => kind_of_home(error),
        RecordError::NotFound(_) => ErrorKind::NotFound,
        RecordError::Ambiguous(_) => ErrorKind::Ambiguous,
        RecordError::NameTaken { .. } => ErrorKind::AlreadyExists,
        RecordError::BadName(_) => ErrorKind::Invalid,
        RecordError::Later { .. } => ErrorKind::Unsupported,
        RecordError::Form { .. } if error.is_of_later_version() => ErrorKind::Unsupported,
        RecordError::Damaged { .. } | RecordError::Form { .. } => ErrorKind::Damaged,
        RecordError::Running(_) | RecordError::FilesInUse(_) => ErrorKind::Busy,
        RecordError::Io { source, .. } => kind_of_io(source),
    }
}

fn kind_of_image(error: &sm_image::Error) -> ErrorKind {
    use sm_image::ErrorKind as Image;
    match error.kind() {
        Image::InvalidName => ErrorKind::Invalid,
        Image::NotFound => ErrorKind::NotFound,
        Image::Ambiguous => ErrorKind::Ambiguous,
        Image::Unauthorized => ErrorKind::PermissionDenied,
        Image::Unreachable | Image::Service => ErrorKind::Remote,
        Image::Damaged => ErrorKind::Damaged,
        Image::LimitExceeded | Image::Unsupported => ErrorKind::Unsupported,
        Image::InUse => ErrorKind::Busy,
        Image::NoSpace => ErrorKind::NoSpace,
        Image::Cancelled => ErrorKind::Cancelled,
        _ => kind_of_causes(error),
    }
}

fn kind_of_snapshot(error: &sm_snapshot::Error) -> ErrorKind {
    use sm_snapshot::Error as Snapshot;
    match error {
        Snapshot::NotFound { .. } => ErrorKind::NotFound,
        Snapshot::Exists { .. } => ErrorKind::AlreadyExists,
        Snapshot::BadName { .. } => ErrorKind::Invalid,
        Snapshot::Damaged { .. } | Snapshot::Parent { .. } => ErrorKind::Damaged,
        Snapshot::Newer { .. }
        | Snapshot::Older { .. }
        | Snapshot::Incompatible { .. }
        | Snapshot::TooDeep { .. }
        | Snapshot::Fragmented { .. } => ErrorKind::Unsupported,
        Snapshot::Cancelled => ErrorKind::Cancelled,
        Snapshot::InUse { .. } => ErrorKind::Busy,
        error => kind_of_causes(error),
    }
}

/// Returns the kind of the first I/O error among the causes of `error`.
fn kind_of_causes(error: &(dyn StdError + 'static)) -> ErrorKind {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref() {
            return kind_of_io(error);
        }
        cause = error.source();
    }
    ErrorKind::Other
}

pub(crate) fn kind_of_io(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
        io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => ErrorKind::Timeout,
        _ => ErrorKind::Other,
    }
}

impl From<ControlError> for Error {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::NotRunning(name) => Self::NotRunning(name),
            ControlError::Refused(text) => Refusal::Vm(text).into(),
            ControlError::Io { operation, source } => Self::Vmm { operation, source },
            // A kind of error that was added to the enum later.
            other => Self::Vmm {
                operation: "talk to the VM's process",
                source: io::Error::other(other),
            },
        }
    }
}

#[cfg(test)]
mod tests;
