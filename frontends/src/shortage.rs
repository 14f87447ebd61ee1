//! Retries after transient memory shortages.
//!
//! Linux fails a call on a socket with ENOBUFS or ENOMEM when it has no memory for it at
//! the moment. The connection is still usable, and no event reports that memory is
//! available again, so the call is repeated after a delay.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use rustix::io::Errno;
use sm_event_loop::{Registry, Timer};

use crate::token;

/// Delay before a call is repeated.
pub(crate) const RETRY: Duration = Duration::from_millis(10);

/// Returns true if a call failed because the system lacked memory.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOBUFS | Errno::NOMEM)
    )
}

/// Clients whose calls are repeated, each under its token with [`token::RETRY`].
#[derive(Default)]
pub(crate) struct Retries {
    /// Timers by token: each client has at most one, independent of its events.
    waiting: HashMap<u64, Timer>,
}

impl Retries {
    pub(crate) fn add(&mut self, token: u64, registry: &mut dyn Registry) {
        if !self.waiting.contains_key(&token)
            && let Some(timer) = registry.set_timer_after(RETRY, token | token::RETRY)
        {
            self.waiting.insert(token, timer);
        }
    }

    /// Notes that the timer of `token` has passed.
    pub(crate) fn passed(&mut self, token: u64) {
        self.waiting.remove(&token);
    }

    /// Cancels the retry of `token`.
    pub(crate) fn remove(&mut self, token: u64, registry: &mut dyn Registry) {
        if let Some(timer) = self.waiting.remove(&token) {
            registry.cancel_timer(timer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use sm_event_loop::testing::ManualLoop;
    use sm_event_loop::{EventHandler, Readiness};

    use super::*;

    #[derive(Default)]
    struct Client {
        retries: Retries,
        due: Vec<u64>,
    }

    impl EventHandler for Client {
        fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
            for token in [7, 7, 8, 9, 7] {
                self.retries.add(token, registry);
            }
            self.retries.remove(9, registry);
            Ok(())
        }

        fn ready(&mut self, token: u64, _: Readiness, _: &mut dyn Registry) {
            let token = token & !token::RETRY;
            self.retries.passed(token);
            self.due.push(token);
        }
    }

    #[test]
    fn a_token_waits_once() {
        let mut event_loop = ManualLoop::new();
        let client = Arc::new(Mutex::new(Client::default()));
        let id = event_loop.add_handler(client.clone()).unwrap();
        event_loop.settle();
        assert!(client.lock().unwrap().due.is_empty());
        event_loop.advance(RETRY);
        event_loop.settle();
        assert_eq!(client.lock().unwrap().due, [7, 8]);
        assert_eq!(event_loop.until_timer(), None);
        event_loop.with(id, |registry| {
            client.lock().unwrap().retries.add(7, registry);
        });
        assert_eq!(event_loop.until_timer(), Some(RETRY));
    }
}
