use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const MSS: u16 = 100;

/// A segment of the guest that is in order.
fn segment(control: &Control, payload: usize) -> TcpSegment {
    let mut segment = TcpSegment::new(1, 2, TcpFlags::ACK);
    segment.sequence = control.receive_next;
    segment.acknowledgment = control.send_end;
    segment.window = 1000;
    segment.payload = payload;
    segment
}

fn syn(sequence: u32, scale: Option<u8>) -> TcpSegment {
    let mut syn = TcpSegment::new(1, 2, TcpFlags::SYN);
    syn.sequence = sequence;
    syn.options.mss = Some(MSS);
    syn.options.scale = scale;
    syn.window = 1000;
    syn
}

/// A connection that is established, with numbers that begin at `base`.
fn open(base: u32) -> Control {
    let mut control = Control::new(&syn(base, Some(0)), base, 1460, false);
    assert_eq!(
        control.receive(&segment(&control, 0), 0, false),
        Effect::default()
    );
    let _ = control.grant(65_535, true);
    control.sent_syn();
    let effect = control.receive(&segment(&control, 0), 0, false);
    assert!(effect.established && effect.send && !effect.acknowledge);
    assert_eq!(control.phase, Phase::Open);
    assert_eq!(control.window(), 1000);
    control
}

/// The receiver of a guest, which has a buffer of bytes and drops what is beyond its window.
struct Receiver {
    next: u32,
    /// Numbers that have come out of order, that of a FIN included.
    early: BTreeSet<u32>,
    window: u32,
    received: u32,
    end: Option<u32>,
    ended: bool,
}

impl Receiver {
    fn receive(&mut self, sequence: u32, len: u32, end: Option<u32>) {
        for offset in 0..len + u32::from(end.is_some()) {
            let number = sequence.wrapping_add(offset);
            let ahead = number.wrapping_sub(self.next);
            if ahead <= self.window && (offset == len || ahead < self.window) {
                self.early.insert(number);
            }
        }
        self.end = self.end.or(end);
        while self.early.remove(&self.next) {
            if self.end == Some(self.next) {
                self.ended = true;
            } else {
                self.received += 1;
            }
            self.next = self.next.wrapping_add(1);
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Up to so many segments are sent; bits say which are lost.
    Send(u8, u8),
    /// Acknowledgments arrive, so often.
    Acknowledge(u8),
    /// The guest reads, and has this window.
    Window(u16),
    Timeout,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..8u8, any::<u8>()).prop_map(|(count, lost)| Step::Send(count, lost)),
        (1..5u8).prop_map(Step::Acknowledge),
        (0..2000u16).prop_map(Step::Window),
        Just(Step::Timeout),
    ]
}

proptest! {
    /// However segments are lost, windows close and timers expire: the guest gets every byte
    /// once, and the end after them.
    #[test]
    fn all_bytes_arrive_in_order(
        base in prop_oneof![Just(u32::MAX - 500), Just((1 << 31) - 500), any::<u32>()],
        total in 0u32..5000,
        steps in prop::collection::vec(step(), 0..120),
        largest in 100u32..1000,
    ) {
        let mut control = open(base);
        let first = control.send_first;
        let end = first.wrapping_add(total);
        let mut guest = Receiver {
            next: first,
            early: BTreeSet::new(),
            window: 1000,
            received: 0,
            end: None,
            ended: false,
        };
        let mut end_acknowledged = false;
        // At last nothing is lost any more.
        let rest = (0..400).flat_map(|_| {
            [Step::Send(8, 0), Step::Acknowledge(1), Step::Window(1000), Step::Timeout]
        });
        for step in steps.into_iter().chain(rest) {
            match step {
                Step::Send(count, lost) => {
                    for number in 0..count {
                        let stored = distance(control.send_first, end).min(total);
                        let ended = !end_acknowledged;
                        let sendable = control.sendable(stored, ended, largest);
                        let Some(sendable) = sendable else { break };
                        let sequence = control.send_next;
                        prop_assert!(sendable.len <= largest);
                        let last = sequence.wrapping_add(sendable.len);
                        prop_assert!(at_most(last, end));
                        prop_assert_eq!(sendable.end, last == end);
                        control.sent(sendable);
                        prop_assert!(at_most(control.send_next, control.send_end));
                        if lost >> (number % 8) & 1 == 0 {
                            guest.receive(sequence, sendable.len, sendable.end.then_some(last));
                        }
                    }
                }
                Step::Acknowledge(count) => {
                    for _ in 0..count {
                        let mut ack = segment(&control, 0);
                        ack.acknowledgment = guest.next;
                        ack.window = u16::try_from(guest.window).unwrap();
                        let stored = distance(control.send_first, end).min(total);
                        let before = control.send_first;
                        let effect = control.receive(&ack, stored, !end_acknowledged);
                        prop_assert!(!effect.reset && !effect.acknowledge);
                        prop_assert!(effect.acknowledged <= stored);
                        prop_assert!(at_most(before, control.send_first));
                        end_acknowledged |= effect.end_acknowledged;
                    }
                }
                Step::Window(window) => {
                    // Linux does not shrink a window.
                    guest.window = guest.window.max(window.into());
                }
                Step::Timeout => {
                    control.rewind();
                    control.probe = true;
                }
            }
            prop_assert!(guest.received <= total);
        }
        prop_assert_eq!(guest.received, total);
        prop_assert!(guest.ended && end_acknowledged);
        prop_assert_eq!(control.in_flight(), 0);
    }

    /// Segments of a guest in any order and number: each byte is taken once, in order, and
    /// never more than was granted.
    #[test]
    fn bytes_of_the_guest_are_taken_once(
        base in prop_oneof![Just(u32::MAX - 500), any::<u32>()],
        segments in prop::collection::vec((0u32..3000, 0usize..600, any::<bool>(), 0u32..2000), 1..200),
    ) {
        let mut control = open(base);
        let first = control.receive_next;
        let mut taken = 0;
        let mut granted = distance(control.receive_next, control.receive_edge);
        for (at, payload, end, room) in segments {
            let mut segment = segment(&control, payload);
            segment.sequence = first.wrapping_add(at);
            if end {
                segment.flags = segment.flags.and(TcpFlags::FIN);
            }
            let effect = control.receive(&segment, 0, false);
            if let Some(part) = effect.payload {
                prop_assert_eq!(at + part.skip, taken);
                prop_assert!(part.skip + part.len <= u32::try_from(payload).unwrap());
                taken += part.len;
                prop_assert!(taken <= granted);
            }
            if effect.end {
                prop_assert_eq!(u64::from(at) + payload as u64, u64::from(taken));
            }
            if payload > 0 || end {
                prop_assert!(effect.acknowledge);
            }
            prop_assert_eq!(effect.gap, !control.guest_ended && at > taken && (payload > 0 || end));
            control.taken(effect.payload.map_or(0, |part| part.len), effect.end);
            let _ = control.grant(room, false);
            granted = granted.max(taken + u32::from(control.guest_ended) + room);
            prop_assert!(at_most(control.receive_edge, first.wrapping_add(granted + (1 << 16))));
            if control.guest_ended {
                break;
            }
        }
    }
}

#[test]
fn resets_must_have_the_next_number() {
    let mut control = open(7);
    let reset = |sequence| {
        let mut reset = TcpSegment::new(1, 2, TcpFlags::RST);
        reset.sequence = sequence;
        reset
    };
    let next = control.receive_next;
    let before = control.receive(&reset(next.wrapping_sub(1)), 0, false);
    assert_eq!(before, Effect::default());
    let inside = control.receive(&reset(next + 1), 0, false);
    assert!(!inside.reset && inside.acknowledge);
    let beyond = control.receive(&reset(next.wrapping_add(1 << 20)), 0, false);
    assert_eq!(beyond, Effect::default());
    assert!(control.receive(&reset(next), 0, false).reset);
}

#[test]
fn a_repeated_syn_is_answered_again() {
    let mut control = Control::new(&syn(5, None), 9, 1460, false);
    control.sent_syn();
    assert_ne!(control.send_next, control.send_first);
    let effect = control.receive(&syn(5, None), 0, false);
    assert!(effect.again && control.send_next == control.send_first);
    control.sent_syn();
    // An acknowledgment of something else is refused.
    let mut wrong = segment(&control, 0);
    wrong.acknowledgment = 9;
    assert_eq!(control.receive(&wrong, 0, false).refused, Some(9));
    assert_eq!(control.phase, Phase::Accepting);
    // On an open connection a SYN only gets an acknowledgment.
    let mut control = open(5);
    let before = control.clone();
    let effect = control.receive(&syn(500, None), 0, false);
    assert!(effect.acknowledge && !effect.again);
    assert_eq!(control.receive_next, before.receive_next);
}

#[test]
fn options_of_the_syn_decide_about_windows_and_sizes() {
    let with = Control::new(&syn(5, Some(7)), 9, 1460, false);
    assert_eq!(
        with.options(1460),
        SynOptions {
            mss: Some(1460),
            scale: Some(SCALE)
        }
    );
    let mut without = Control::new(&syn(5, None), 9, 1460, false);
    assert_eq!(without.options(1460).scale, None);
    assert_eq!(without.grant(1 << 20, false), u16::MAX);
    for (mss, v6, expected) in [
        (None, false, 536),
        (None, true, 1220),
        (Some(9000), false, 1460),
        (Some(1), false, MIN_MSS),
    ] {
        let mut syn = syn(5, None);
        syn.options.mss = mss;
        assert_eq!(Control::new(&syn, 9, 1460, v6).mss, expected);
    }
}

#[test]
fn windows_are_not_taken_back() {
    let mut control = open(5);
    let granted = control.grant(100 << SCALE, false);
    assert_eq!(granted, 65_535 >> SCALE);
    control.taken(60_000, false);
    // The rest of the old window stays granted without room for it; it is shown in units.
    assert_eq!(control.grant(0, false), 5535 >> SCALE);
    assert!(control.worth_granting(2 * 5535));
    assert!(!control.worth_granting(2 * 5535 - 1));
    assert_eq!(u32::from(control.grant(64 << SCALE, false)), 64);
    assert!(!control.worth_granting(64 << SCALE));
}

#[test]
fn three_duplicates_mean_a_loss() {
    let mut control = open(5);
    for _ in 0..5 {
        let sendable = control.sendable(500, false, 100).unwrap();
        control.sent(sendable);
    }
    assert_eq!(control.in_flight(), 500);
    let mut duplicate = segment(&control, 0);
    duplicate.acknowledgment = control.send_first;
    for _ in 0..2 {
        assert!(!control.receive(&duplicate, 500, false).again);
    }
    assert!(control.receive(&duplicate, 500, false).again);
    assert_eq!(control.send_next, control.send_first);
    // Those of the other segments are of the same loss.
    for _ in 0..10 {
        assert!(!control.receive(&duplicate, 500, false).again);
    }
    assert_eq!(control.in_flight(), 500);
    assert_eq!(control.sequence(), control.send_end);
}

#[test]
fn keep_alive_probes_are_answered() {
    let mut control = open(5);
    for payload in [0, 1] {
        let mut probe = segment(&control, payload);
        probe.sequence = control.receive_next.wrapping_sub(1);
        let effect = control.receive(&probe, 0, false);
        assert!(effect.acknowledge && effect.probe && effect.payload.is_none());
    }
    let effect = control.receive(&segment(&control, 0), 0, false);
    assert!(!effect.acknowledge && !effect.probe);
}

/// The answer of a guest to the SYN of this side.
fn syn_ack(control: &Control, sequence: u32) -> TcpSegment {
    let mut answer = syn(sequence, Some(3));
    answer.flags = TcpFlags::SYN.and(TcpFlags::ACK);
    answer.acknowledgment = control.send_end;
    answer
}

#[test]
fn a_connection_to_the_guest_opens_with_its_answer() {
    for base in [0, 1000, u32::MAX - 1] {
        let mut control = Control::opening(base, 1460);
        assert_eq!(control.options(1460).scale, Some(SCALE));
        assert_eq!(control.grant(20_000, true), 20_000);
        control.sent_syn();
        assert_eq!((control.phase, control.in_flight()), (Phase::Opening, 1));
        // Old segments, and resets that do not refuse the SYN.
        let mut old = syn_ack(&control, 7);
        old.acknowledgment = old.acknowledgment.wrapping_add(1);
        assert!(control.receive(&old, 0, false).refused.is_some());
        old.flags = TcpFlags::RST.and(TcpFlags::ACK);
        assert!(!control.receive(&old, 0, false).reset);
        let mut reset = TcpSegment::new(1, 2, TcpFlags::RST);
        reset.acknowledgment = control.send_end;
        assert!(!control.receive(&reset, 0, false).reset);
        assert_eq!(control.phase, Phase::Opening);
        let mut refusing = control.clone();
        reset.flags = TcpFlags::RST.and(TcpFlags::ACK);
        assert!(refusing.receive(&reset, 0, false).reset);

        // A SYN that is lost is sent again.
        control.rewind();
        assert_eq!(control.send_next, control.send_first);
        control.sent_syn();
        let effect = control.receive(&syn_ack(&control, 77), 0, false);
        assert!(effect.established && effect.acknowledge && effect.send);
        assert_eq!(control.phase, Phase::Open);
        assert_eq!((control.receive_next, control.in_flight()), (78, 0));
        assert_eq!((control.mss, control.window()), (MSS, 1000));
        // Windows are shifted from now on, on both sides.
        let mut data = segment(&control, 10);
        data.window = 50;
        let effect = control.receive(&data, 0, false);
        assert_eq!((effect.payload.unwrap().len, control.window()), (10, 400));
        // The answer once more is acknowledged, as its acknowledgment was lost.
        assert!(
            control
                .receive(&syn_ack(&control, 77), 0, false)
                .acknowledge
        );
        assert_eq!(control.phase, Phase::Open);
    }
}
