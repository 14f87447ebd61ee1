//! Sizes of connections' credit windows.
//!
//! Every connection has at least the smallest window. The rest of the configured backlog is
//! distributed: a small part to each new connection, and more to connections that move
//! bytes. The sum of all windows never exceeds `max_backlog`, so lack of memory never ends
//! a connection or drops its bytes.

use crate::config::{MIN_WINDOW, SHARE, VsockConfig};

/// Largest first window of a connection, in bytes.
const FIRST: u32 = 64 << 10;

/// The part of the backlog that is not granted yet.
#[derive(Debug)]
pub(crate) struct Allowance {
    /// Bytes beyond the shares of all connections.
    extra: u64,
    window: u32,
}

impl Allowance {
    pub(crate) fn new(config: &VsockConfig) -> Self {
        let shares = SHARE.saturating_mul(config.max_connections as u64);
        Self {
            extra: config.max_backlog.saturating_sub(shares),
            window: config.window,
        }
    }

    /// Returns the window of a new connection.
    pub(crate) fn first(&mut self) -> u32 {
        let most = self.window.min(FIRST) - MIN_WINDOW;
        MIN_WINDOW + self.take(most, 1024)
    }

    /// Grants up to `wanted` more bytes to a connection that has `granted`; returns its new
    /// window.
    pub(crate) fn more(&mut self, granted: u32, wanted: u32) -> u32 {
        let most = self.window.saturating_sub(granted).min(wanted);
        granted + self.take(most, 4)
    }

    /// Takes at most `most` bytes, and at most that part of the rest, in whole chunks.
    fn take(&mut self, most: u32, part: u64) -> u32 {
        let fair = u32::try_from(self.extra / part).unwrap_or(u32::MAX);
        let taken = if fair < most {
            fair / MIN_WINDOW * MIN_WINDOW
        } else {
            most
        };
        self.extra -= u64::from(taken);
        taken
    }

    /// Returns the window of a connection that has ended.
    pub(crate) fn release(&mut self, granted: u32) {
        self.extra += u64::from(granted.saturating_sub(MIN_WINDOW));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_all_windows_stays_within_the_backlog() {
        let config = VsockConfig {
            max_connections: 2000,
            max_backlog: 48 << 20,
            ..VsockConfig::default()
        };
        let mut allowance = Allowance::new(&config);
        let mut windows: Vec<u32> = (0..2000).map(|_| allowance.first()).collect();
        assert_eq!(windows.first(), Some(&(36 << 10)));
        // All of them move many bytes, and request as much as possible.
        for _ in 0..10 {
            for window in &mut windows {
                let more = allowance.more(*window, *window);
                assert!(more >= *window && more <= config.window);
                *window = more;
            }
        }
        let kept: u64 = windows.iter().map(|&window| u64::from(window) + 4096).sum();
        assert!(kept <= config.max_backlog);
        assert!(kept > config.max_backlog / 10 * 8, "most of it is used");
        assert!(windows.iter().all(|&window| window >= MIN_WINDOW));
        for window in windows {
            allowance.release(window);
        }
        assert_eq!(allowance.extra, Allowance::new(&config).extra);
    }

    #[test]
    fn a_single_connection_gets_the_whole_window() {
        let config = VsockConfig::default();
        let mut allowance = Allowance::new(&config);
        let mut window = allowance.first();
        assert_eq!(window, FIRST);
        for _ in 0..8 {
            window = allowance.more(window, window);
        }
        assert_eq!(window, config.window);
    }
}
