//! The caller's terminal: raw mode with sure restoration, size.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Terminal size in columns and rows; `None` if standard input is no terminal.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(rustix::stdio::stdin())
        .or_else(|_| tcgetwinsize(rustix::stdio::stdout()))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Standard input in raw mode until [`Self::restore`] or drop, and on a panic.
#[derive(Clone, Debug)]
pub(crate) struct RawMode {
    saved: Arc<Mutex<Option<(OwnedFd, Termios)>>>,
}

impl RawMode {
    /// Puts the terminal at standard input into raw mode.
    pub(crate) fn enter() -> io::Result<Self> {
        let fd = rustix::stdio::stdin().try_clone_to_owned()?;
        let saved = tcgetattr(&fd)?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(&fd, OptionalActions::Now, &raw)?;
        let mode = Self {
            saved: Arc::new(Mutex::new(Some((fd, saved)))),
        };
        // The release build aborts on a panic, without running destructors.
        let (on_panic, previous) = (mode.clone(), std::panic::take_hook());
        std::panic::set_hook(Box::new(move |info| {
            on_panic.restore();
            previous(info);
        }));
        Ok(mode)
    }

    /// Puts the terminal back. Later calls do nothing.
    pub(crate) fn restore(&self) {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((fd, saved)) = saved.take() {
            // There is nothing left to do when this fails.
            let _ = tcsetattr(&fd, OptionalActions::Now, &saved);
        }
    }
}
