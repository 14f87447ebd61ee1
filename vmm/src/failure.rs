//! Failures of starting a machine.

use sm_control::exit::FailureCause;

/// The cause of a failed start; a sentence.
pub(crate) struct StartFailure {
    pub(crate) message: String,
    /// True if the snapshot may be corrupt; false if the cause is the host or the
    /// request.
    pub(crate) corrupt: bool,
    /// The cause, if it is one for which there is a remedy.
    pub(crate) cause: Option<FailureCause>,
}

impl From<String> for StartFailure {
    fn from(message: String) -> Self {
        Self {
            message,
            corrupt: false,
            cause: None,
        }
    }
}
