//! Why there is no machine.

/// Why there is no machine; a sentence.
pub(crate) struct Failure {
    pub(crate) message: String,
    /// It may be the snapshot's fault, not the host's or the request's.
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
