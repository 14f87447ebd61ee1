//! Requests whose answer comes later, and the deadlines of that.
//!
//! A deadline cannot be taken back from the reactor. It carries a number instead, so
//! that one that was set for an earlier request means nothing to a later one of the
//! same kind: a freeze that ended in time must not end the next.

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
    /// Whether the deadline that passed is this one's.
    pub(crate) fn is_due(&self, passed: Token) -> bool {
        self.token == passed
    }
}

/// Numbers requests.
#[derive(Debug, Default)]
pub(crate) struct Deadlines {
    last: u32,
}

impl Deadlines {
    /// Notes that `key` waits, at most `limit`: then there is an event for `part` of
    /// `class`.
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
    fn the_deadline_of_an_earlier_request_is_not_a_later_ones() {
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
