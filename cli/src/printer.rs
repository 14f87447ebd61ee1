//! The only place that writes to standard output and standard error, except for the
//! output of guests' commands. Text is escaped here and nowhere else.

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

    /// Returns true if progress may redraw lines.
    pub(crate) fn interactive(&self) -> bool {
        self.stderr_is_terminal
    }

    /// Prints a result.
    pub(crate) fn line(&self, text: impl Display) {
        // An error means that the reader is gone.
        let _ = writeln!(io::stdout(), "{}", Shown(text));
    }

    /// Prints a line of a stream; returns false if its reader is gone.
    pub(crate) fn line_is_read(&self, text: impl Display) -> bool {
        writeln!(io::stdout(), "{}", Shown(text)).is_ok()
    }

    /// Prints a result as JSON.
    pub(crate) fn json(&self, value: &impl Serialize) -> Result<(), Failure> {
        self.line(shown::json(&serde_json::to_string_pretty(value)?));
        Ok(())
    }

    /// Prints JSON on one line to standard error.
    pub(crate) fn note_json(&self, value: &impl Serialize) -> Result<(), Failure> {
        self.note(shown::json(&serde_json::to_string(value)?));
        Ok(())
    }

    /// Prints a message for people to standard error.
    pub(crate) fn note(&self, text: impl Display) {
        let _ = writeln!(io::stderr(), "{}", Shown(text));
    }

    /// Asks a yes-or-no question at the terminal; `None` without a terminal.
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
