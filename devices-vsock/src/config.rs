//! Configuration of a device.

use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::backlog::CHUNK;

/// Smallest credit window in bytes: every connection gets it, independent of their number.
pub(crate) const MIN_WINDOW: u32 = 4096;
/// Bytes of backlog reserved for each connection: the smallest window, and one more chunk,
/// because the first and the last chunk may be used in part.
pub(crate) const SHARE: u64 = MIN_WINDOW as u64 + CHUNK as u64;
const MAX_WINDOW: u32 = 1 << 30;
const MAX_CONNECTIONS: usize = 1 << 20;

/// Configuration of a vsock device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VsockConfig {
    /// Context identifier of the guest: 3 to 2^32 - 2.
    pub guest_cid: u64,
    /// Maximum number of bytes of the guest that one connection may have in flight, 4 KiB
    /// to 1 GiB. A connection starts with a smaller window, which grows as it moves bytes,
    /// as far as `max_backlog` allows.
    pub window: u32,
    /// Largest number of connections, 1 to 2^20.
    pub max_connections: usize,
    /// Maximum number of bytes that all connections together may store because host sockets
    /// do not accept them: at least 8 KiB for each of `max_connections`. The excess is
    /// distributed to connections that move many bytes. All windows are granted from it, so
    /// it is never exceeded, whatever the guest and its peers do.
    pub max_backlog: u64,
    /// Time that the guest may take to answer a request for a connection, and to confirm
    /// the end of one. More than zero.
    pub answer_timeout: Duration,
    /// Time that the guest, once it has answered, may take to send the status of a
    /// connection that was requested with [`crate::ConnectOptions::status_reply`].
    pub status_timeout: Duration,
    /// Time for which the last bytes of a connection that the guest has closed are stored
    /// for a host socket that accepts none of them. Every accepted byte restarts it.
    pub linger: Duration,
}

impl Default for VsockConfig {
    fn default() -> Self {
        Self {
            guest_cid: 3,
            window: 256 << 10,
            max_connections: 16_384,
            max_backlog: 192 << 20,
            answer_timeout: Duration::from_secs(10),
            // Linux's timeout of a TCP connect is 127 s (tcp(7), tcp_syn_retries).
            status_timeout: Duration::from_secs(130),
            linger: Duration::from_secs(600),
        }
    }
}

/// Reason why a device cannot be created.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SetUpError {
    /// A value of the configuration is out of its range.
    #[error("{field} is {value}, and must be {range}")]
    Config {
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The permitted range.
        range: &'static str,
    },
    /// An operation of the host failed.
    #[error("cannot {operation}")]
    Io {
        /// The failed operation.
        operation: &'static str,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
}

impl VsockConfig {
    /// Sets [`Self::guest_cid`].
    #[must_use]
    pub fn guest_cid(mut self, guest_cid: u64) -> Self {
        self.guest_cid = guest_cid;
        self
    }

    /// Sets [`Self::window`].
    #[must_use]
    pub fn window(mut self, window: u32) -> Self {
        self.window = window;
        self
    }

    /// Sets [`Self::max_connections`].
    #[must_use]
    pub fn max_connections(mut self, max_connections: usize) -> Self {
        self.max_connections = max_connections;
        self
    }

    /// Sets [`Self::max_backlog`].
    #[must_use]
    pub fn max_backlog(mut self, max_backlog: u64) -> Self {
        self.max_backlog = max_backlog;
        self
    }

    /// Sets [`Self::answer_timeout`].
    #[must_use]
    pub fn answer_timeout(mut self, answer_timeout: Duration) -> Self {
        self.answer_timeout = answer_timeout;
        self
    }

    /// Sets [`Self::status_timeout`].
    #[must_use]
    pub fn status_timeout(mut self, status_timeout: Duration) -> Self {
        self.status_timeout = status_timeout;
        self
    }

    /// Sets [`Self::linger`].
    #[must_use]
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`SetUpError::Config`] for the first value that is out of its range.
    pub fn check(&self) -> Result<(), SetUpError> {
        let within = |sound: bool, field, value, range| {
            let error = SetUpError::Config {
                field,
                value,
                range,
            };
            if sound { Ok(()) } else { Err(error) }
        };
        let connections = self.max_connections as u64;
        within(
            (3..u64::from(u32::MAX)).contains(&self.guest_cid),
            "guest_cid",
            self.guest_cid,
            "3 to 4294967294",
        )?;
        within(
            (MIN_WINDOW..=MAX_WINDOW).contains(&self.window),
            "window",
            self.window.into(),
            "4096 to 2^30 bytes",
        )?;
        within(
            (1..=MAX_CONNECTIONS).contains(&self.max_connections),
            "max_connections",
            connections,
            "1 to 2^20",
        )?;
        within(
            self.max_backlog >= connections * SHARE,
            "max_backlog",
            self.max_backlog,
            "at least 8 KiB for each connection",
        )?;
        within(
            !self.answer_timeout.is_zero(),
            "answer_timeout",
            0,
            "more than zero",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        let good = VsockConfig::default();
        good.check().unwrap();
        let refused = [
            VsockConfig {
                guest_cid: 2,
                ..good
            },
            VsockConfig {
                guest_cid: 1 << 32,
                ..good
            },
            VsockConfig { window: 0, ..good },
            VsockConfig {
                window: 4095,
                ..good
            },
            VsockConfig {
                max_connections: 0,
                ..good
            },
            VsockConfig {
                max_backlog: 8192 * 16_384 - 1,
                ..good
            },
            VsockConfig {
                answer_timeout: Duration::ZERO,
                ..good
            },
        ];
        let fields = refused.map(|config| match config.check() {
            Err(SetUpError::Config { field, .. }) => field,
            other => panic!("{config:?}: {other:?}"),
        });
        assert_eq!(
            fields,
            [
                "guest_cid",
                "guest_cid",
                "window",
                "window",
                "max_connections",
                "max_backlog",
                "answer_timeout"
            ]
        );
    }
}
