//! `sm` on a pseudo-terminal of its own, with simulated input.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::{Home, Reaped, TIMEOUT};

/// A terminal with `sm` in its foreground.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    /// Keeps the terminal's settings readable after `sm` has ended.
    slave: File,
    output: Receiver<Vec<u8>>,
    unread: String,
    child: Reaped,
}

impl Home {
    /// Starts `sm` on a terminal of 80 columns and 24 rows.
    ///
    /// # Panics
    /// There are no pseudo-terminals, or no `setsid`.
    #[track_caller]
    pub fn terminal<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC);
        let master = File::from(master.expect("a pseudo-terminal"));
        grantpt(&master).expect("a granted pseudo-terminal");
        unlockpt(&master).expect("an unlocked pseudo-terminal");
        let name = ptsname(&master, Vec::new()).expect("its name");
        let slave = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().expect("a name in ASCII"))
            .expect("its other side");
        let side = || Stdio::from(slave.try_clone().expect("a descriptor"));
        let sm = self.command(arguments);
        // A new session with the terminal as its controlling terminal, so that size
        // changes are signalled.
        let mut command = Command::new("setsid");
        command
            .args(["--ctty", "--wait"])
            .arg(sm.get_program())
            .args(sm.get_args())
            .stdin(side())
            .stdout(side())
            .stderr(side());
        for (name, value) in sm.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let (sender, output) = mpsc::channel();
        let mut reader = master.try_clone().expect("a descriptor");
        let terminal = |child| Terminal {
            master,
            slave,
            output,
            unread: String::new(),
            child: Reaped(child),
        };
        let terminal = {
            let made = terminal(command.spawn().expect("setsid can be started"));
            made.resize(80, 24);
            made
        };
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        terminal
    }
}

impl Terminal {
    /// Types keys.
    ///
    /// # Panics
    /// The terminal is closed.
    #[track_caller]
    pub fn types(&mut self, keys: &str) {
        self.master
            .write_all(keys.as_bytes())
            .expect("the terminal takes keys");
    }

    /// Waits until `text` is shown, and returns the output since the last call, up to and
    /// including `text`.
    ///
    /// # Panics
    /// The text does not appear.
    #[track_caller]
    pub fn shows(&mut self, text: &str) -> String {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(at) = self.unread.find(text) {
                let rest = self.unread.split_off(at + text.len());
                return std::mem::replace(&mut self.unread, rest);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.unread.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("no {text:?} on the terminal, but {:?}", self.unread)
                }
            }
        }
    }

    /// Changes the size of the window.
    ///
    /// # Panics
    /// The terminal is closed.
    #[track_caller]
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size).expect("the terminal has a size");
    }

    /// Returns true if the terminal is in raw mode.
    ///
    /// # Panics
    /// The terminal is closed.
    #[must_use]
    pub fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.slave).expect("the terminal has modes");
        !modes
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO)
    }

    /// Waits until `sm` exits, and returns its status.
    ///
    /// # Panics
    /// It does not exit.
    #[track_caller]
    pub fn ends(&mut self) -> i32 {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let ended = self.child.0.try_wait().expect("sm can be waited for");
            if let Some(status) = ended {
                return status.code().expect("sm was not killed");
            }
            // Output is read in the meantime, so that it does not block.
            let more = self.output.recv_timeout(Duration::from_millis(20));
            if let Ok(bytes) = more {
                self.unread.push_str(&String::from_utf8_lossy(&bytes));
            }
            assert!(Instant::now() < deadline, "sm ends; {:?}", self.unread);
        }
    }
}
