//! Requests that are answered later.

use std::time::{Duration, Instant};

use sm_event_loop::Key;

use crate::reactor::{Deadline, Reactor, Token};

/// A connection that waits for an answer. Its deadline is cancelled when this is dropped.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// The connection.
    pub(crate) key: Key,
    _deadline: Deadline,
}

impl Waiting {
    /// Records that `key` waits for an answer. After `limit`, `late` is delivered.
    pub(crate) fn new(reactor: &Reactor, key: Key, late: Token, limit: Duration) -> Self {
        Self {
            key,
            _deadline: reactor.deadline(Instant::now() + limit, late),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::{Class, Event};

    #[test]
    fn deadlines_of_earlier_requests_do_not_pass() {
        let mut reactor = Reactor::new().unwrap();
        let late = Token::single(Class::Containers, 2);
        let wait = |key, limit| {
            let limit = Duration::from_millis(limit);
            Waiting::new(&reactor, Key::new(key, 9), late, limit)
        };
        let answered = wait(3, 0);
        assert_eq!(answered.key, Key::new(3, 9));
        drop(answered);
        let started = Instant::now();
        let _second = wait(4, 20);
        let mut events = Vec::new();
        while events.is_empty() {
            events = reactor.events();
        }
        assert!(started.elapsed() >= Duration::from_millis(20));
        assert!(matches!(events[..], [Event::Timer(token)] if token == late));
    }
}
