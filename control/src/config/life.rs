//! The restart policy of a VM.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::exit::{ExitReason, ExitRecord};

/// The condition under which a VM is started again after its workload has ended.
///
/// Its text is Docker's: `no`, `on-failure`, `on-failure:5`, `always`, `unless-stopped`.
///
/// ```
/// use sm_control::config::RestartPolicy;
///
/// let policy: RestartPolicy = "on-failure:5".parse()?;
/// assert_eq!(policy, RestartPolicy::OnFailure { max: 5 });
/// assert_eq!(policy.to_string(), "on-failure:5");
/// assert!("sometimes".parse::<RestartPolicy>().is_err());
/// # Ok::<(), sm_control::config::UnknownPolicy>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// After a status other than 0.
    OnFailure {
        /// Most restarts after one start by a client; 0 for any number.
        max: u32,
    },
    /// After every end that no client asked for, and after a reboot of the host.
    Always,
    /// As [`Self::Always`], but not after a reboot if a client had stopped it.
    UnlessStopped,
}

/// A text that is no restart policy.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "\"{0}\" is no restart policy: write no, on-failure, on-failure:N, always or unless-stopped"
)]
pub struct UnknownPolicy(pub String);

impl RestartPolicy {
    /// Returns true if a VM that ended with `exit` after `restarts` restarts is started
    /// again. Its end at the request of a client, `exit.stopped`, counts only for
    /// [`Self::UnlessStopped`]: the caller knows whether the request was for this end.
    #[must_use]
    pub fn restarts_after(self, exit: &ExitRecord, restarts: u32) -> bool {
        match self {
            Self::No => false,
            Self::OnFailure { max } => exit.status != 0 && (max == 0 || restarts < max),
            Self::Always => true,
            Self::UnlessStopped => !exit.stopped,
        }
    }

    /// Returns true if a VM with this exit record, whose process is gone, should run: the
    /// host was restarted, or the process was killed.
    #[must_use]
    pub fn resumes_after(self, exit: &ExitRecord) -> bool {
        let failed_at_first = exit.reason == ExitReason::StartFailed && exit.restarts == 0;
        !failed_at_first && self.restarts_after(exit, exit.restarts)
    }
}

impl FromStr for RestartPolicy {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, max) = match text.split_once(':') {
            Some((name, max)) => (name, Some(max)),
            None => (text, None),
        };
        let unknown = || UnknownPolicy(text.to_owned());
        match (name, max) {
            ("no" | "", None) => Ok(Self::No),
            ("always", None) => Ok(Self::Always),
            ("unless-stopped", None) => Ok(Self::UnlessStopped),
            ("on-failure", None) => Ok(Self::OnFailure { max: 0 }),
            ("on-failure", Some(max)) => {
                let max = max.parse().map_err(|_| unknown())?;
                Ok(Self::OnFailure { max })
            }
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::No => f.write_str("no"),
            Self::OnFailure { max: 0 } => f.write_str("on-failure"),
            Self::OnFailure { max } => write!(f, "on-failure:{max}"),
            Self::Always => f.write_str("always"),
            Self::UnlessStopped => f.write_str("unless-stopped"),
        }
    }
}

impl TryFrom<String> for RestartPolicy {
    type Error = UnknownPolicy;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<RestartPolicy> for String {
    fn from(policy: RestartPolicy) -> Self {
        policy.to_string()
    }
}

/// Returns true for the policy of configurations that name none.
pub(super) fn is_default(policy: &RestartPolicy) -> bool {
    *policy == RestartPolicy::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: u32, stopped: bool) -> ExitRecord {
        ExitRecord {
            status,
            reason: ExitReason::Workload,
            stopped,
            ..ExitRecord::lost()
        }
    }

    #[test]
    fn policies_have_dockers_texts() {
        for text in [
            "no",
            "on-failure",
            "on-failure:7",
            "always",
            "unless-stopped",
        ] {
            assert_eq!(text.parse::<RestartPolicy>().unwrap().to_string(), text);
        }
        for text in [
            "never",
            "always:1",
            "on-failure:",
            "on-failure:-1",
            "on-failure:x",
        ] {
            let error = text.parse::<RestartPolicy>().unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn failures_are_counted() {
        let policy = RestartPolicy::OnFailure { max: 2 };
        assert!(!policy.restarts_after(&ended(0, false), 0));
        assert!(policy.restarts_after(&ended(1, false), 1));
        assert!(!policy.restarts_after(&ended(1, false), 2));
        assert!(RestartPolicy::OnFailure { max: 0 }.restarts_after(&ended(1, false), 1000));
    }

    #[test]
    fn a_stopped_vm_resumes_only_with_always() {
        assert!(RestartPolicy::Always.resumes_after(&ended(0, true)));
        assert!(!RestartPolicy::UnlessStopped.resumes_after(&ended(0, true)));
        assert!(RestartPolicy::UnlessStopped.resumes_after(&ended(0, false)));
        assert!(!RestartPolicy::No.resumes_after(&ended(1, false)));
        let aborted = ExitRecord {
            reason: ExitReason::StartFailed,
            ..ended(125, false)
        };
        assert!(!RestartPolicy::Always.resumes_after(&aborted));
    }
}
