//! How large a window each connection is granted.
//!
//! Every connection has the smallest window for certain. What the device may keep
//! beyond that is shared out: a bit of it to new connections, and more to those
//! that move bytes. The sum of all windows never exceeds what may be kept, so no
//! connection is ever ended, nor its bytes dropped, for want of memory.

use crate::config::{MIN_WINDOW, SHARE, VsockConfig};

/// What a connection begins with at most.
const FIRST: u32 = 64 << 10;

/// What is left to be granted.
#[derive(Debug)]
pub(crate) struct Allowance {
    /// Bytes beyond every connection's share.
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

    /// The window of a new connection.
    pub(crate) fn first(&mut self) -> u32 {
        let most = self.window.min(FIRST) - MIN_WINDOW;
        MIN_WINDOW + self.take(most, 1024)
    }

    /// Up to `wanted` more for a connection that has `granted`; what it has then.
    pub(crate) fn more(&mut self, granted: u32, wanted: u32) -> u32 {
        let most = self.window.saturating_sub(granted).min(wanted);
        granted + self.take(most, 4)
    }

    /// At most `most`, and that part of what is left, in whole chunks.
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

    /// A connection with `granted` is over.
    pub(crate) fn give_back(&mut self, granted: u32) {
        self.extra += u64::from(granted.saturating_sub(MIN_WINDOW));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_windows_together_stay_within_what_may_be_kept() {
        let config = VsockConfig {
            max_connections: 2000,
            max_backlog: 48 << 20,
            ..VsockConfig::default()
        };
        let mut allowance = Allowance::new(&config);
        let mut windows: Vec<u32> = (0..2000).map(|_| allowance.first()).collect();
        assert_eq!(windows.first(), Some(&(36 << 10)));
        // All of them move much, and want all they can get.
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
            allowance.give_back(window);
        }
        assert_eq!(allowance.extra, Allowance::new(&config).extra);
    }

    #[test]
    fn a_connection_that_is_alone_gets_the_whole_window() {
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
