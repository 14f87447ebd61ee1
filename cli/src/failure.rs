//! Failures and the exit statuses of `sm`.

use std::fmt;

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
            .downcast_ref::<sm_runtime::Error>()
            .map_or(OUR_FAILURE, sm_runtime::Error::exit_status)
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
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let error = sm_runtime::Error::Start {
            message: "x: not found".into(),
            status: 127,
        };
        assert_eq!(Failure::from(error).status_of_run(), 127);
        let other = Failure::new(anyhow::anyhow!("x"));
        assert_eq!(other.status_of_run(), OUR_FAILURE);
    }
}
