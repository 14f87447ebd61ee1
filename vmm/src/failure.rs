//! Failures of starting a machine.

/// The cause of a failed start; a sentence.
pub(crate) struct Failure {
    pub(crate) message: String,
    /// True if the snapshot may be corrupt; false if the cause is the host or the
    /// request.
    pub(crate) spoilt: bool,
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self {
            message,
            spoilt: false,
        }
    }
}
