//! Failures and the exit statuses of `sm`.

use std::fmt;
use std::io;

use sm_runtime::image::ImageError;
use sm_runtime::volumes::VolumeError;
use sm_runtime::workload::WorkloadError;
use sm_runtime::{
    AgentError, Error, FailureCause, KernelError, OptionError, RecordError, Refusal, StartError,
};

/// Docker's status for a failure of `run` itself, not of its command, and for invalid
/// options.
pub(crate) const OUR_FAILURE: u32 = 125;
/// Docker's status for a failure of any other command.
pub(crate) const FAILED: u32 = 1;

/// The failure of a command of `sm`.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: anyhow::Error,
}

impl Failure {
    pub(crate) fn new(error: anyhow::Error) -> Self {
        Self { error }
    }

    /// Returns the exit status of `sm run`: 126 or 127 if its command could not be run.
    pub(crate) fn status_of_run(&self) -> u32 {
        self.error
            .downcast_ref::<Error>()
            .map_or(OUR_FAILURE, Error::exit_status)
    }

    /// Returns what the user can do about the failure, where the library, which knows no
    /// commands, does not say it.
    fn hint(&self) -> Option<String> {
        self.error.chain().find_map(|cause| {
            // Transparent errors are not causes of the errors around them.
            match cause.downcast_ref::<Error>() {
                Some(Error::Record(error)) => return hint_of_record(error),
                Some(Error::Kernel(error)) => return hint_of_kernel(error),
                Some(Error::Agent(error)) => return hint_of_agent(error),
                Some(Error::Image(error)) => return hint_of_image(error),
                Some(Error::File {
                    operation: "mount",
                    path,
                    source,
                }) if source.kind() == io::ErrorKind::NotFound => {
                    let path = path.display();
                    return Some(format!("create it, for instance with \"mkdir {path}\""));
                }
                Some(Error::Volume(VolumeError::BadName(name))) if name.contains('/') => {
                    return Some(format!("a path of the host is written as \"./{name}\""));
                }
                Some(Error::Option(OptionError::Fixed(_))) => {
                    return Some("leave it out".to_owned());
                }
                Some(Error::Option(option)) => return hint_of_option(option),
                Some(Error::Refused(refusal)) => return hint_of_refusal(refusal),
                Some(Error::Start(StartError::Failed { cause, .. })) => {
                    return cause.and_then(hint_of_cause);
                }
                Some(Error::Workload(WorkloadError::NoCommand)) => {
                    return Some("give a command after the image".to_owned());
                }
                _ => {}
            }
            let record = cause.downcast_ref().and_then(hint_of_record);
            record
                .or_else(|| cause.downcast_ref().and_then(hint_of_kernel))
                .or_else(|| cause.downcast_ref().and_then(hint_of_image))
        })
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(error.into())
    }
}

/// Writes the error, then its causes on one line each, without the repetitions of
/// transparent errors.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = self.error.to_string();
        f.write_str(&last)?;
        for cause in self.error.chain().skip(1) {
            let text = cause.to_string();
            if text != last {
                write!(f, "\n  because: {text}")?;
            }
            last = text;
        }
        match self.hint() {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

fn hint_of_option(option: &OptionError) -> Option<String> {
    match option {
        OptionError::MountMissing { target, path } => Some(format!(
            "mount it, or something else, with \"-v {}:{target}\"",
            path.display()
        )),
        OptionError::ManyWriters { .. } => {
            Some("let them with --share-binds, or mount it with :ro".to_owned())
        }
        OptionError::Mtu { .. } => Some("leave out --mtu for 1500".to_owned()),
        OptionError::ResolverWord(_) => {
            Some("give each domain its own --dns-search, and each option --dns-option".to_owned())
        }
        _ => None,
    }
}

fn hint_of_record(error: &RecordError) -> Option<String> {
    match error {
        RecordError::NameTaken { name, .. } => Some(format!(
            "remove that VM with \"sm rm {name}\", or choose another name"
        )),
        RecordError::Running(name) => {
            Some(format!("stop it with \"sm stop {name}\", or use --force"))
        }
        RecordError::Later { .. } => {
            Some("use the version of sm that has written it, or a later one".to_owned())
        }
        _ => None,
    }
}

fn hint_of_image(error: &ImageError) -> Option<String> {
    match error {
        ImageError::Space { .. } => {
            Some("free some, for instance with \"sm image prune\"".to_owned())
        }
        ImageError::Used { user, .. } => {
            let (kind, name) = user.split_once(' ')?;
            let name = name.trim_matches('"');
            match kind {
                "snapshot" => Some(format!(
                    "remove the snapshot with \"sm snapshot rm {name}\""
                )),
                _ => Some(format!("remove the VM with \"sm rm {name}\"")),
            }
        }
        _ => None,
    }
}

/// Returns what the user can do about an error of selecting a kernel.
pub(crate) fn hint_of_kernel(error: &KernelError) -> Option<String> {
    match error {
        KernelError::None => Some(
            "build one with \"sm kernel build\" in the source tree of sm, choose one with \
             \"sm kernel use PATH\", or name one with --kernel PATH"
                .to_owned(),
        ),
        _ => None,
    }
}

/// Returns what the user can do about an error of finding the guest agent.
pub(crate) fn hint_of_agent(error: &AgentError) -> Option<String> {
    match error {
        AgentError::None => Some(
            "set SM_AGENT to the sm-guest-agent binary, or build with \"cargo xtask build\", \
             which embeds it"
                .to_owned(),
        ),
        _ => None,
    }
}

/// Returns what the user can do about the failure of a VM.
pub(crate) fn hint_of_cause(cause: FailureCause) -> Option<String> {
    let hint = match cause {
        FailureCause::AutomaticSnapshot => {
            "if the snapshot is the reason, start without it (--cold)"
        }
        FailureCause::NoGenerationId => "use a kernel with CONFIG_VMGENID, or --cold",
        FailureCause::NoUserfault => "leave out --paging userfault",
        FailureCause::OutOfMemory => "give the VM more with --memory",
        _ => return None,
    };
    Some(hint.to_owned())
}

fn hint_of_refusal(refusal: &Refusal) -> Option<String> {
    match refusal {
        Refusal::NoWorkload { .. } => Some(
            "run an image, which uses it by itself, or make a snapshot of a running VM".to_owned(),
        ),
        Refusal::NoImage { image, .. } => Some(format!(
            "bring it back with \"sm pull {image}\", if that still names it"
        )),
        Refusal::RootInMemory(name) => Some(format!(
            "start it with \"sm start {name}\"; a VM that runs without --root tmpfs keeps its files"
        )),
        Refusal::ContinuesSnapshot { vm, .. } => {
            Some(format!("start it first with \"sm start {vm}\""))
        }
        Refusal::UnreadableSnapshot { name, .. } => Some(format!(
            "if that snapshot is not needed any more, remove it with \"sm snapshot rm {name}\""
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_follow_the_causes() {
        let running = || RecordError::Running("web".to_owned());
        let text = "VM \"web\" is running\n  hint: stop it with \"sm stop web\", or use --force";
        assert_eq!(Failure::from(running()).to_string(), text);
        assert_eq!(Failure::from(Error::from(running())).to_string(), text);
        let used = ImageError::Used {
            reference: "web".to_owned(),
            user: "snapshot \"warm\"".to_owned(),
        };
        let text = Failure::from(Error::from(used)).to_string();
        assert!(text.ends_with("hint: remove the snapshot with \"sm snapshot rm warm\""));
        let failed = StartError::Failed {
            message: "the guest did not start".to_owned(),
            cause: Some(FailureCause::AutomaticSnapshot),
        };
        let text = Failure::from(Error::from(failed)).to_string();
        assert!(text.ends_with("start without it (--cold)"), "{text}");
        let missing = Error::File {
            operation: "mount",
            path: "/srv/none".into(),
            source: io::ErrorKind::NotFound.into(),
        };
        let text = Failure::from(missing).to_string();
        assert!(text.ends_with("with \"mkdir /srv/none\""), "{text}");
        let relative = Error::from(VolumeError::BadName("some/directory".to_owned()));
        let text = Failure::from(relative).to_string();
        assert!(text.ends_with("written as \"./some/directory\""), "{text}");
        let none = Error::from(WorkloadError::NoCommand);
        let text = Failure::from(none).to_string();
        assert!(
            text.ends_with("hint: give a command after the image"),
            "{text}"
        );
        let outer = anyhow::Error::from(Error::from(KernelError::None)).context("cannot start");
        let text = Failure::new(outer).to_string();
        assert!(
            text.starts_with("cannot start\n  because: no guest kernel found\n  hint: build one"),
            "{text}"
        );
    }

    #[test]
    fn causes_follow_the_error() {
        let error = anyhow::anyhow!("no such file").context("cannot read \"x\"");
        assert_eq!(
            Failure::new(error).to_string(),
            "cannot read \"x\"\n  because: no such file"
        );
    }

    #[test]
    fn a_command_that_was_not_found_keeps_its_status() {
        let error = sm_runtime::StartError::Command {
            message: "x: not found".into(),
            status: 127,
        };
        assert_eq!(Failure::from(Error::from(error)).status_of_run(), 127);
        let other = Failure::new(anyhow::anyhow!("x"));
        assert_eq!(other.status_of_run(), OUR_FAILURE);
    }
}
