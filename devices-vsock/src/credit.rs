//! The arithmetic of credit (virtio 1.3 section 5.10.6.3).
//!
//! Each side grants the other a window (`buf_alloc`) and announces the number of bytes that
//! it has forwarded so far (`fwd_cnt`, modulo 2^32); every packet carries both. A sender
//! may have `buf_alloc - (sent - fwd_cnt)` more bytes in flight.
//!
//! The types only count, for any width of counter, so that tests can visit all states of a
//! narrow one.

/// An unsigned counter.
pub(crate) trait Count: Copy + Ord + Default {
    const ONE: Self;
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
    fn saturating_minus(self, other: Self) -> Self;
    fn quarter(self) -> Self;
}

macro_rules! count {
    ($type:ty) => {
        impl Count for $type {
            const ONE: Self = 1;
            fn plus(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            fn minus(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
            fn saturating_minus(self, other: Self) -> Self {
                self.saturating_sub(other)
            }
            fn quarter(self) -> Self {
                self / 4
            }
        }
    };
}

count!(u32);
#[cfg(test)]
count!(u8);

/// Credit that the other side granted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outgoing<C> {
    sent: C,
    window: C,
    forwarded: C,
}

impl<C: Count> Outgoing<C> {
    /// Takes the values of a packet.
    pub(crate) fn update(&mut self, window: C, forwarded: C) {
        self.window = window;
        self.forwarded = forwarded;
    }

    /// Returns the number of bytes that may be sent now. A peer that claims to have
    /// forwarded more than it received has nearly 2^32 bytes in flight, more than any
    /// sensible window.
    pub(crate) fn available(&self) -> C {
        self.window
            .saturating_minus(self.sent.minus(self.forwarded))
    }

    /// Returns the largest amount that could be available.
    pub(crate) fn window(&self) -> C {
        self.window
    }

    pub(crate) fn send(&mut self, len: C) {
        self.sent = self.sent.plus(len);
    }
}

/// Credit that this side grants.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Incoming<C> {
    window: C,
    received: C,
    forwarded: C,
    /// `forwarded` in the last announcement.
    announced: C,
}

impl<C: Count> Incoming<C> {
    pub(crate) fn new(window: C) -> Self {
        Self {
            window,
            ..Self::default()
        }
    }

    /// Returns the number of bytes that were received and not forwarded.
    pub(crate) fn unforwarded(&self) -> C {
        self.received.minus(self.forwarded)
    }

    pub(crate) fn window(&self) -> C {
        self.window
    }

    /// Enlarges the window.
    pub(crate) fn grow(&mut self, window: C) {
        self.window = self.window.max(window);
    }

    /// Counts `len` received bytes; returns false, and does not count them, if they exceed
    /// the window.
    #[must_use]
    pub(crate) fn receive(&mut self, len: C) -> bool {
        let sound = len <= self.window.saturating_minus(self.unforwarded());
        if sound {
            self.received = self.received.plus(len);
        }
        sound
    }

    /// Counts `len` forwarded bytes.
    pub(crate) fn forward(&mut self, len: C) {
        self.forwarded = self.forwarded.plus(len);
    }

    /// Returns true if an announcement is due: a quarter of the window was freed since the
    /// last one, so the other side still has most of its credit.
    pub(crate) fn is_due(&self) -> bool {
        self.forwarded.minus(self.announced) >= self.window.quarter().max(C::ONE)
    }

    /// Returns window and counter for the next packet.
    pub(crate) fn announce(&mut self) -> (C, C) {
        self.announced = self.forwarded;
        (self.window, self.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn available_is_correct_for_every_window_and_every_wrap_around() {
        for forwarded in 0..=u8::MAX {
            for on_the_way in 0..=u8::MAX {
                for window in 0..=u8::MAX {
                    let credit = Outgoing {
                        sent: forwarded.wrapping_add(on_the_way),
                        window,
                        forwarded,
                    };
                    let expected = (i16::from(window) - i16::from(on_the_way)).max(0);
                    assert_eq!(i16::from(credit.available()), expected);
                }
            }
        }
    }

    #[test]
    fn exactly_the_granted_bytes_are_accepted() {
        // Only the difference of the counters matters; they wrap around anywhere.
        for forwarded in [0u8, 1, 127, 128, 254, 255] {
            for window in 0..=u8::MAX {
                for kept in 0..=window {
                    let before = Incoming {
                        window,
                        received: forwarded.wrapping_add(kept),
                        forwarded,
                        announced: forwarded,
                    };
                    let all = u16::from(window) - u16::from(kept);
                    for len in 0..=u8::MAX {
                        let mut after = before;
                        assert_eq!(after.receive(len), u16::from(len) <= all);
                        assert!(after.unforwarded() <= window, "{before:?} {len}");
                    }
                }
            }
        }
    }

    /// A sender, a receiver, and the last announcement, which may be delayed.
    #[derive(Clone, Copy, PartialEq, Eq, Hash)]
    struct Pair {
        sent: u8,
        known: (u8, u8),
        window: u8,
        received: u8,
        forwarded: u8,
        announced: u8,
        on_the_way: Option<(u8, u8)>,
    }

    impl Pair {
        fn sides(&self) -> (Outgoing<u8>, Incoming<u8>) {
            let mut out = Outgoing {
                sent: self.sent,
                ..Outgoing::default()
            };
            out.update(self.known.0, self.known.1);
            let incoming = Incoming {
                window: self.window,
                received: self.received,
                forwarded: self.forwarded,
                announced: self.announced,
            };
            (out, incoming)
        }

        /// Returns all possible successors.
        fn next(&self) -> Vec<Self> {
            let (out, incoming) = self.sides();
            let mut all = Vec::new();
            for len in 1..=out.available() {
                let (mut out, mut incoming) = (out, incoming);
                out.send(len);
                assert!(incoming.receive(len), "an honest sender is refused");
                all.push(Self {
                    sent: out.sent,
                    received: incoming.received,
                    ..*self
                });
            }
            for len in 1..=incoming.unforwarded() {
                let mut incoming = incoming;
                incoming.forward(len);
                all.push(Self {
                    forwarded: incoming.forwarded,
                    ..*self
                });
            }
            if self.on_the_way.is_none() && incoming.is_due() {
                let mut incoming = incoming;
                let announced = incoming.announce();
                all.push(Self {
                    announced: incoming.announced,
                    on_the_way: Some(announced),
                    ..*self
                });
            }
            if let Some(announced) = self.on_the_way {
                all.push(Self {
                    known: announced,
                    on_the_way: None,
                    ..*self
                });
            }
            all
        }
    }

    #[test]
    fn an_honest_pair_never_overruns_and_never_stalls() {
        for window in [1, 2, 3, 4, 5, 7, 9] {
            // Close to the wrap-around, so that all counters pass it.
            let start = u8::MAX - 1;
            let first = Pair {
                sent: start,
                known: (window, start),
                window,
                received: start,
                forwarded: start,
                announced: start,
                on_the_way: None,
            };
            let mut seen = HashSet::from([first]);
            let mut left = vec![first];
            while let Some(pair) = left.pop() {
                let next = pair.next();
                let can_send = pair.sides().0.available() > 0;
                assert!(can_send || !next.is_empty(), "a stall with {window}");
                for pair in next {
                    if seen.insert(pair) {
                        left.push(pair);
                    }
                }
            }
            // Every value of the counters was reached.
            let positions: HashSet<u8> = seen.iter().map(|pair| pair.sent).collect();
            assert_eq!(positions.len(), 256);
        }
    }

    #[test]
    fn a_window_grows_and_is_announced_with_the_counter() {
        let mut incoming = Incoming::<u32>::new(1000);
        assert!(incoming.receive(1000));
        incoming.forward(249);
        assert!(!incoming.is_due());
        incoming.forward(1);
        assert!(incoming.is_due());
        incoming.grow(2000);
        assert_eq!(incoming.announce(), (2000, 250));
        assert!(!incoming.is_due());
        incoming.grow(500);
        assert_eq!(incoming.window(), 2000);
    }
}
