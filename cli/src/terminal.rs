//! The caller's terminal: its size, and raw mode with reliable restoration.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Returns the terminal's size in columns and rows; `None` if standard input is no
/// terminal.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(rustix::stdio::stdin())
        .or_else(|_| tcgetwinsize(rustix::stdio::stdout()))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Raw mode of standard input until [`Self::restore`], drop or a panic.
#[derive(Clone, Debug)]
pub(crate) struct RawMode {
    saved: Arc<Mutex<Option<(OwnedFd, Termios)>>>,
}

impl RawMode {
    /// Sets the terminal at standard input to raw mode.
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

    /// Restores the terminal. Later calls do nothing.
    pub(crate) fn restore(&self) {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((fd, saved)) = saved.take() {
            // A failure cannot be handled.
            let _ = tcsetattr(&fd, OptionalActions::Now, &saved);
        }
    }
}
