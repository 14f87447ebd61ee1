//! Flushes that fail, and flushes of what an earlier process wrote.

use super::recorded::{Failure, Operation, Recorded};
use super::*;

type Log = Arc<Mutex<Vec<Operation>>>;
type Fail = Arc<Mutex<Option<Failure>>>;

/// A disk of one layer, its recorded operations, and its failures.
fn recorded() -> (LayeredDisk, Log, Fail) {
    let storage = Recorded::default();
    let log = Arc::clone(&storage.operations);
    let fail = Arc::clone(&storage.fail);
    let layer = DiskLayer::create_on(Box::new(storage), id(1), id(0), CAPACITY).unwrap();
    (LayeredDisk::new(vec![layer]).unwrap(), log, fail)
}

/// Linux reports a failed write-back once, and marks the pages as clean: the second fsync
/// succeeds, and an index that it made durable would name clusters that were lost.
#[test]
fn nothing_is_durable_any_more_after_a_failed_sync() {
    let (disk, log, fail) = recorded();
    let memory = memory();
    write(&disk, &memory, &[7; 4096], 0);
    *fail.lock().unwrap() = Some(Failure {
        applies: |operation| matches!(operation, Operation::Sync),
        kind: io::ErrorKind::InvalidData,
    });
    assert!(disk.flush().is_err());
    *fail.lock().unwrap() = None;
    let before = log.lock().unwrap().len();
    for _ in 0..2 {
        let error = disk.flush().unwrap_err();
        assert_eq!(error.to_string(), "an earlier write-back failed");
    }
    assert_eq!(log.lock().unwrap().len(), before, "no index was written");
    // Of a disk that lies upon it, neither.
    let above = disk.freeze(file(), id(2), CAPACITY).unwrap();
    assert!(above.flush().is_err());
}

/// An index that there is no space for was not written, so it may be tried again.
#[test]
fn an_index_without_space_is_written_later() {
    let (disk, log, fail) = recorded();
    let memory = memory();
    write(&disk, &memory, &[7; 4096], 0);
    *fail.lock().unwrap() = Some(Failure {
        applies: |operation| matches!(operation, Operation::Store(..)),
        kind: io::ErrorKind::StorageFull,
    });
    let error = disk.flush().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    *fail.lock().unwrap() = None;
    let before = log.lock().unwrap().len();
    disk.flush().unwrap();
    let log = log.lock().unwrap();
    let written = log[before..]
        .iter()
        .filter(|operation| matches!(operation, Operation::Store(..)));
    assert_eq!(written.count(), 1);
}

/// A process that was killed has left pages in the page cache: the next one reads them, and
/// its guest expects that a flush makes durable what it has read.
#[test]
fn the_first_flush_is_one_of_all_layers() {
    let syncs = |log: &Mutex<Vec<Operation>>| {
        let log = log.lock().unwrap();
        let is_sync = |operation: &&Operation| matches!(operation, Operation::Sync);
        log.iter().filter(is_sync).count()
    };
    let (mut layers, mut logs) = (Vec::new(), Vec::new());
    for number in 1..=3 {
        let storage = Recorded::default();
        logs.push(Arc::clone(&storage.operations));
        let layer =
            DiskLayer::create_on(Box::new(storage), id(number), id(number - 1), CAPACITY).unwrap();
        layers.push(layer);
    }
    let disk = LayeredDisk::new(layers).unwrap();
    disk.flush().unwrap();
    for log in &logs {
        assert_eq!(syncs(log), 1);
    }
    disk.flush().unwrap();
    assert_eq!(
        logs.iter().map(|log| syncs(log)).collect::<Vec<_>>(),
        [1, 1, 2]
    );
}
