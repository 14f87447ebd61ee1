//! Deadlines of requests that are answered later.
//!
//! The reactor cannot cancel a deadline. Each deadline therefore has a number, so that a
//! deadline of a completed request is not mistaken for that of a later request of the
//! same kind.

use std::time::{Duration, Instant};

use crate::reactor::{Class, Reactor, Token};
use crate::slab::Key;

/// A connection that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    /// The connection.
    pub(crate) key: Key,
    token: Token,
}

impl Waiting {
    /// Returns true if `passed` is the deadline of this request.
    pub(crate) fn is_due(&self, passed: Token) -> bool {
        self.token == passed
    }
}

/// Assigns numbers to deadlines.
#[derive(Debug, Default)]
pub(crate) struct Deadlines {
    last: u32,
}

impl Deadlines {
    /// Records that `key` waits for an answer. After `limit`, an event for `part` of
    /// `class` is delivered.
    pub(crate) fn wait(
        &mut self,
        reactor: &mut Reactor,
        class: Class,
        part: u8,
        key: Key,
        limit: Duration,
    ) -> Waiting {
        self.last = self.last.wrapping_add(1);
        let number = Key {
            slot: 0,
            generation: self.last,
        };
        let token = Token::new(class, part, number);
        reactor.timer(Instant::now() + limit, token);
        Waiting { key, token }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::Event;

    #[test]
    fn deadlines_of_earlier_requests_are_distinguished() {
        let mut reactor = Reactor::new().unwrap();
        let mut deadlines = Deadlines::default();
        let key = Key {
            slot: 3,
            generation: 9,
        };
        let mut wait = |limit| {
            let limit = Duration::from_millis(limit);
            deadlines.wait(&mut reactor, Class::Workload, 2, key, limit)
        };
        let (first, second) = (wait(0), wait(20));
        let mut passed = Vec::new();
        let mut events = Vec::new();
        while passed.len() < 2 {
            reactor.wait(&mut events).unwrap();
            passed.extend(events.iter().map(|event| match event {
                Event::Timer(token) => *token,
                Event::Io(..) => panic!("nothing is watched"),
            }));
        }
        assert!(first.is_due(passed[0]) && !second.is_due(passed[0]));
        assert!(second.is_due(passed[1]) && !first.is_due(passed[1]));
    }
}
