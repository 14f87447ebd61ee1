use std::net::Ipv4Addr;
use std::sync::mpsc::Receiver;

use super::*;
use crate::engine::{EgressVerdict, event_channel};

fn policy(_: &EgressRequest) -> EgressVerdict {
    EgressVerdict::Prohibit
}

fn request(port: u16) -> EgressRequest {
    EgressRequest {
        protocol: FlowProtocol::Tcp,
        destination: (Ipv4Addr::LOCALHOST, port).into(),
    }
}

fn key(port: u16) -> FlowKey {
    let end = |port| (Ipv4Addr::LOCALHOST.into(), port);
    FlowKey::new(end(1), end(port))
}

fn journal(limit: usize) -> (Journal, Receiver<NetEvent>) {
    let mut journal = Journal::new();
    let (sink, events) = event_channel(limit);
    journal.set_sink(sink);
    (journal, events)
}

#[test]
fn refusals_of_one_destination_are_merged() {
    let (mut journal, events) = journal(10_000);
    let counts = |events: &Receiver<NetEvent>| -> Vec<(u16, u64)> {
        let refusals = events.try_iter().map(|event| match event {
            NetEvent::Refused(refused) => (refused.remote.port(), refused.count),
            event => panic!("{event:?}"),
        });
        refusals.collect()
    };
    for _ in 0..1000 {
        journal.refused(&mut policy, &request(1));
    }
    journal.refused(&mut policy, &request(2));
    assert_eq!(counts(&events), [(1, 1), (2, 1)]);
    journal.timer();
    assert_eq!(counts(&events), [(1, 999)]);
    // One that was quiet for a window is a new one.
    journal.refused(&mut policy, &request(2));
    journal.refused(&mut policy, &request(1));
    assert_eq!(counts(&events), [(2, 1)]);
    journal.timer();
    assert_eq!(counts(&events), [(1, 1)]);
    journal.timer();
    assert!(journal.log.unwrap().refused.is_empty());
}

#[test]
fn a_scan_of_ports_has_a_bound() {
    let (mut journal, events) = journal(10_000);
    for port in 1..=5000 {
        journal.refused(&mut policy, &request(port));
    }
    assert_eq!(events.try_iter().count(), MAX_REFUSALS);
    journal.timer();
    let lost = NetEvent::Lost(5000 - MAX_REFUSALS as u64);
    assert_eq!(events.try_iter().collect::<Vec<_>>(), [lost]);
    journal.limited("UDP flows");
    journal.limited("TCP connections");
    journal.limited("UDP flows");
    assert_eq!(events.try_iter().count(), 2);
}

#[test]
fn flows_have_a_rate_and_what_was_lost_is_counted() {
    let (mut journal, events) = journal(10_000);
    let start = Instant::now();
    for _ in 0..BURST + 500 {
        journal.opened(&mut policy, FlowProtocol::Tcp, &key(5), start);
    }
    assert_eq!(events.try_iter().count() as u64, BURST);
    // A second later there is room for as many as of a second.
    let later = start + Duration::from_secs(1);
    for _ in 0..RATE + 7 {
        journal.opened(&mut policy, FlowProtocol::Tcp, &key(5), later);
    }
    let received: Vec<_> = events.try_iter().collect();
    assert_eq!(received[0], NetEvent::Lost(500));
    assert_eq!(received.len() as u64, 1 + RATE);
}

/// A reader that does not read loses events, and stops nobody.
#[test]
fn a_full_channel_loses_events() {
    let (mut journal, events) = journal(2);
    let now = Instant::now();
    let tally = journal.begin(now);
    for port in 1..=5 {
        journal.ended(FlowProtocol::Udp, key(port), tally, FlowEnd::TimedOut);
    }
    let later = now + Duration::from_secs(3);
    journal.report(&mut policy, later, None);
    let received: Vec<_> = events.try_iter().collect();
    let [NetEvent::Ended(_, summary), NetEvent::Ended(..)] = &received[..] else {
        panic!("{received:?}");
    };
    assert_eq!(summary.end, FlowEnd::TimedOut);
    assert!(summary.duration > Duration::from_secs(2));
    journal.opened(&mut policy, FlowProtocol::Tcp, &key(9), later);
    assert_eq!(events.recv(), Ok(NetEvent::Lost(3)));
    assert!(matches!(events.recv(), Ok(NetEvent::Opened(_))));
    drop(events);
    journal.limited("UDP flows");
}
