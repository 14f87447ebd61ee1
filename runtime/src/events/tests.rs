use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use super::log::FILE;
use super::*;

const NAME: &str = "events::tests::events_of_many_processes_are_complete_and_in_order";
/// Variable with the directory of the log, for a process that writes.
const WRITER: &str = "SM_TEST_EVENT_WRITER";
const WRITERS: usize = 8;
const EACH: usize = 200;

fn event(id: &str, number: usize) -> EventRecord {
    EventRecord::now(EventSubject::Vm, EventAction::Start, id, "web").with("number", number)
}

fn all() -> EventQuery {
    EventQuery::new().since(0)
}

fn number(event: &EventRecord) -> usize {
    event.attributes["number"].parse().unwrap()
}

/// The file is small, so that it is rotated once while it is read.
fn log(directory: &Path) -> EventLog {
    EventLog::with_limit(directory, 100_000)
}

#[test]
fn events_of_many_processes_are_complete_and_in_order() {
    if let Some(directory) = std::env::var_os(WRITER) {
        let (log, id) = (log(Path::new(&directory)), std::process::id().to_string());
        (0..EACH).for_each(|number| log.note(&event(&id, number)));
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let log = log(&directory.path().join("events"));
    let mut stream = EventStream::open(&log, all().follow(true)).unwrap();
    let writers: Vec<_> = (0..WRITERS)
        .map(|_| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", NAME])
                .env(WRITER, log.directory())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..WRITERS * EACH {
        let event = stream.wait_event().unwrap().unwrap();
        let next = seen.entry(event.id.clone()).or_default();
        assert_eq!(number(&event), *next, "of {}", event.id);
        *next += 1;
    }
    for mut writer in writers {
        assert!(writer.wait().unwrap().success());
    }
    assert_eq!(seen.len(), WRITERS);
    assert!(stream.next_event().unwrap().is_none());
    assert!(
        log.directory().join(super::log::PREVIOUS).exists(),
        "it was rotated"
    );
}

/// The reader has seen no file before.
#[test]
fn the_first_file_may_be_renamed_before_it_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::with_limit(&directory.path().join("events"), 1);
    let mut stream = EventStream::open(&log, EventQuery::new()).unwrap();
    log.note(&event("a", 1));
    let log = EventLog::with_limit(log.directory(), 1000);
    log.note(&event("a", 2));
    for expected in [1, 2] {
        assert_eq!(number(&stream.next_event().unwrap().unwrap()), expected);
    }
    assert!(stream.next_event().unwrap().is_none());
}

#[test]
fn a_query_limits_time_action_and_object() {
    let directory = tempfile::tempdir().unwrap();
    let log = log(&directory.path().join("events"));
    let mut early = EventStream::open(&log, EventQuery::new()).unwrap();
    for (time_ns, action, id) in [
        (10, EventAction::Create, "aa"),
        (20, EventAction::Start, "aa"),
        (30, EventAction::Start, "bb"),
    ] {
        log.note(&EventRecord {
            time_ns,
            action,
            ..event(id, 0)
        });
    }
    let times = |query: EventQuery| {
        let mut stream = EventStream::open(&log, query).unwrap();
        let events = std::iter::from_fn(|| stream.wait_event().unwrap());
        events.map(|event| event.time_ns).collect::<Vec<_>>()
    };
    assert_eq!(times(all()), [10, 20, 30]);
    assert_eq!(times(all().action(EventAction::Start)), [20, 30]);
    assert_eq!(times(all().object("a")), [10, 20]);
    assert_eq!(times(all().object("web")), [10, 20, 30]);
    assert_eq!(
        times(EventQuery::new().since(15).until(25).follow(true)),
        [20]
    );
    assert_eq!(times(all().subject(EventSubject::Image)), [0; 0]);
    assert_eq!(times(EventQuery::new()), [0; 0], "only from now on");
    assert_eq!(early.next_event().unwrap().unwrap().time_ns, 10);
}

/// The disk was full, or the host went down.
#[test]
fn a_line_that_was_cut_off_costs_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let log = log(&directory.path().join("events"));
    log.note(&event("a", 1));
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .open(log.directory().join(FILE))
        .unwrap();
    file.write_all(b"\n{\"time_ns\": 12, \"ty").unwrap();
    log.note(&event("a", 2));
    file.write_all(&vec![b'x'; 200_000]).unwrap();
    log.note(&event("a", 3));
    let mut stream = EventStream::open(&log, all()).unwrap();
    let numbers: Vec<_> = std::iter::from_fn(|| stream.next_event().unwrap())
        .map(|event| number(&event))
        .collect();
    assert_eq!(numbers, [1, 2, 3]);
}

#[test]
fn long_events_lose_their_labels() {
    let directory = tempfile::tempdir().unwrap();
    let log = log(&directory.path().join("events"));
    let mut long = event("a", 7);
    long.labels.insert("x".to_owned(), "y".repeat(70_000));
    log.note(&long);
    let read = EventStream::open(&log, all())
        .unwrap()
        .next_event()
        .unwrap();
    let read = read.unwrap();
    assert!(read.labels.is_empty());
    assert_eq!(number(&read), 7);
}
