//! The one place that writes to standard output and standard error, but for the
//! bytes of guests' commands. What is text is escaped here and nowhere else.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};

use serde::Serialize;

use crate::failure::Failure;
use crate::shown::{self, Shown};

/// Prints results to standard output and everything else to standard error.
#[derive(Debug)]
pub(crate) struct Printer {
    stderr_is_terminal: bool,
}

impl Printer {
    pub(crate) fn new() -> Self {
        Self {
            stderr_is_terminal: io::stderr().is_terminal(),
        }
    }

    /// Whether progress may redraw lines.
    pub(crate) fn interactive(&self) -> bool {
        self.stderr_is_terminal
    }

    /// A result.
    pub(crate) fn line(&self, text: impl Display) {
        // A reader that has gone away wants no more.
        let _ = writeln!(io::stdout(), "{}", Shown(text));
    }

    /// A result as JSON.
    pub(crate) fn json(&self, value: &impl Serialize) -> Result<(), Failure> {
        self.line(shown::json(&serde_json::to_string_pretty(value)?));
        Ok(())
    }

    /// JSON on one line, for whoever reads standard error.
    pub(crate) fn note_json(&self, value: &impl Serialize) -> Result<(), Failure> {
        self.note(shown::json(&serde_json::to_string(value)?));
        Ok(())
    }

    /// Something a person may want to know.
    pub(crate) fn note(&self, text: impl Display) {
        let _ = writeln!(io::stderr(), "{}", Shown(text));
    }

    /// Asks a yes-or-no question at the terminal; `None` when there is nobody to
    /// answer.
    pub(crate) fn confirm(&self, question: &str) -> Option<bool> {
        if !io::stdin().is_terminal() || !self.stderr_is_terminal {
            return None;
        }
        let _ = write!(io::stderr(), "{} [y/N] ", Shown(question));
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).ok()?;
        Some(matches!(answer.trim(), "y" | "Y" | "yes"))
    }

    pub(crate) fn error(&self, failure: &Failure) {
        let _ = writeln!(io::stderr(), "sm: {}", Shown(failure));
    }
}
