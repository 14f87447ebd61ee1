use super::*;
use crate::home::Home;

struct Fixture {
    _dir: tempfile::TempDir,
    records: Records,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let records = fixture_in(dir.path());
    Fixture { _dir: dir, records }
}

pub(super) fn fixture_in(directory: &std::path::Path) -> Records {
    let at = |name| directory.join(name);
    Records::open(&Home::new(&at("data"), &at("run"), &at("cache"))).unwrap()
}

pub(super) fn config(id: VmId, name: String) -> VmConfig {
    let mut config = VmConfig::new(id, name);
    config.image = "oci:x".into();
    config.memory_bytes = 64 << 20;
    config.kernel = "/k".into();
    config
}

/// Returns the draft of a record that its creator starts.
pub(super) fn named(name: Option<&str>) -> Draft {
    Draft {
        name: name.map(str::to_owned),
        ..Draft::default()
    }
}

/// Returns the configuration of a VM that removes itself.
fn removing_itself(id: VmId, name: String) -> VmConfig {
    let mut config = config(id, name);
    config.auto_remove = true;
    config
}

impl Fixture {
    fn create(&self, name: Option<&str>) -> Result<(Record, File), crate::Error> {
        self.records
            .create(&named(name), |id, name| Ok(config(id, name)))
    }
}

fn exit(status: u32) -> ExitRecord {
    ExitRecord {
        status,
        reason: ExitReason::Workload,
        ..ExitRecord::lost()
    }
}

#[test]
fn a_record_is_alive_while_its_lock_is_held() {
    let f = fixture();
    let (record, lock) = f.create(None).unwrap();
    assert_eq!(record.state().unwrap(), VmState::Running);
    assert!(matches!(record.remove(), Err(RecordError::Running(_))));
    // A duplicate of the file description, as the VMM gets one, keeps it alive.
    let copy = lock.try_clone().unwrap();
    drop(lock);
    assert_eq!(record.state().unwrap(), VmState::Running);
    record.write_exit(&exit(3)).unwrap();
    assert_eq!(record.state().unwrap(), VmState::Exited(exit(3)));
    let remover = std::thread::spawn({
        let record = record.clone();
        move || record.remove()
    });
    drop(copy);
    remover.join().unwrap().unwrap();
    assert!(f.records.list().unwrap().is_empty());
    assert!(!record.sockets().exists());
}

#[test]
fn names_are_unique_and_checked() {
    let f = fixture();
    let (record, _lock) = f.create(Some("web")).unwrap();
    let error = f.create(Some("web")).unwrap_err().to_string();
    assert!(error.contains("\"web\"") && error.contains(record.config().id.short()));
    assert!(f.create(Some("a/b")).is_err());
    let (_other, _other_lock) = f.create(None).unwrap();
    assert_eq!(f.records.list().unwrap().len(), 2);
}

#[test]
fn lookup_takes_names_and_unambiguous_prefixes() {
    let f = fixture();
    let (a, _lock_a) = f.create(Some("a")).unwrap();
    let (_b, _lock_b) = f.create(Some("b")).unwrap();
    let id = &a.config().id;
    for query in ["a", id.as_str(), id.short()] {
        // "a" may also be a prefix of an identifier: names take precedence.
        assert_eq!(f.records.find(query).unwrap().config().id, *id);
    }
    assert!(matches!(f.records.find(""), Err(RecordError::NotFound(_))));
    assert!(matches!(
        f.records.find("zzz"),
        Err(RecordError::NotFound(_))
    ));
}

#[test]
fn sweeping_cleans_up_after_dead_vms_only() {
    let f = fixture();
    let (alive, _lock) = f.create(Some("alive")).unwrap();
    let (killed, lock) = f.create(Some("killed")).unwrap();
    std::fs::write(killed.directory().join(CONSOLE), b"").unwrap();
    let_go(lock);
    let (aborted, lock) = f.create(Some("stillborn")).unwrap();
    let_go(lock);
    let (gone, lock) = f
        .records
        .create(&named(Some("gone")), |id, name| {
            Ok(removing_itself(id, name))
        })
        .unwrap();
    let_go(lock);
    std::fs::create_dir(f.records.directory.join(".new-x")).unwrap();
    std::fs::create_dir(f.records.directory.join(".removed-x")).unwrap();
    std::fs::create_dir(f.records.sockets.join("0123456789ab")).unwrap();

    f.records.sweep().unwrap();

    assert!(alive.sockets().exists());
    assert_eq!(alive.state().unwrap(), VmState::Running);
    assert!(!killed.sockets().exists());
    assert!(matches!(
        killed.state().unwrap(),
        VmState::Exited(ExitRecord {
            reason: ExitReason::Lost,
            ..
        })
    ));
    assert!(!aborted.directory().exists());
    assert!(!gone.directory().exists() && !gone.sockets().exists());
    assert_eq!(std::fs::read_dir(&f.records.sockets).unwrap().count(), 1);
    assert_eq!(
        std::fs::read_dir(&f.records.directory).unwrap().count(),
        3, // two records and the registry's lock
    );
}

/// Its process was killed when it was about to remove the record, and the host was started
/// anew: there are no sockets.
#[test]
fn a_listing_removes_the_record_of_a_vm_that_was_to_be_removed() {
    let f = fixture();
    let (kept, kept_lock) = f.create(Some("kept")).unwrap();
    let created = f.records.create(&named(Some("gone")), |id, name| {
        Ok(removing_itself(id, name))
    });
    let (gone, gone_lock) = created.unwrap();
    for record in [&kept, &gone] {
        std::fs::write(record.directory().join(CONSOLE), b"").unwrap();
        record.write_exit(&exit(3)).unwrap();
        record.remove_sockets().unwrap();
    }
    // As long as a process is there, it does this.
    let names = |records: &Records| {
        let (left, damaged) = records.swept().unwrap();
        assert!(damaged.is_empty());
        let names = left.into_iter().map(|record| record.config.name);
        names.collect::<Vec<_>>()
    };
    assert_eq!(names(&f.records), ["kept"]);
    assert!(gone.directory().exists());
    let_go(kept_lock);
    let_go(gone_lock);
    assert_eq!(names(&f.records), ["kept"]);
    assert!(!gone.directory().exists());
    assert_eq!(kept.state().unwrap(), VmState::Exited(exit(3)));
}

#[test]
fn waiting_ends_when_the_lock_is_released() {
    let f = fixture();
    let (record, lock) = f.create(None).unwrap();
    let waiter = std::thread::spawn({
        let record = record.clone();
        move || record.wait_until_unlocked()
    });
    let_go(lock);
    waiter.join().unwrap().unwrap();
    assert!(matches!(record.state().unwrap(), VmState::Exited(_)));
}

#[test]
fn damaged_records_are_left_out_of_listings() {
    let f = fixture();
    let (record, _lock) = f.create(None).unwrap();
    std::fs::write(record.directory().join(CONFIG), b"{").unwrap();
    assert!(f.records.list().unwrap().is_empty());
    let id = record.config().id.clone();
    let damaged = f.records.damaged().unwrap();
    assert_eq!(damaged[0].id, id);
    assert!(damaged[0].reason.contains(CONFIG), "{damaged:?}");
}

#[test]
fn one_damaged_record_affects_no_other() {
    let f = fixture();
    let (damaged, lock) = f.create(Some("damaged")).unwrap();
    let (unreadable, unreadable_lock) = f.create(Some("unreadable")).unwrap();
    let (killed, killed_lock) = f.create(Some("killed")).unwrap();
    for record in [&unreadable, &killed] {
        std::fs::write(record.directory().join(CONSOLE), b"").unwrap();
    }
    std::fs::write(damaged.directory().join(CONFIG), b"{}").unwrap();
    std::fs::write(unreadable.directory().join(EXIT), b"{").unwrap();
    // The exit record of this one cannot be written: a directory has the draft's name.
    let (full, full_lock) = f.create(Some("full")).unwrap();
    std::fs::write(full.directory().join(CONSOLE), b"").unwrap();
    std::fs::create_dir(full.directory().join(".exit.json.new")).unwrap();
    drop((unreadable_lock, killed_lock, full_lock));

    f.records.sweep().unwrap();

    assert_eq!(killed.exit().unwrap().unwrap().reason, ExitReason::Lost);
    assert!(matches!(full.state().unwrap(), VmState::Exited(_)));
    assert!(unreadable.state().is_err());
    // The VM is alive, so its sockets stay, and it cannot be removed.
    assert!(damaged.sockets().exists());
    let id = damaged.config().id.clone();
    let found = f.records.find(id.short()).unwrap_err();
    assert!(matches!(found, RecordError::Damaged { .. }), "{found}");
    let refused = f.records.remove_damaged(id.short()).unwrap_err();
    assert!(matches!(refused, RecordError::Running(_)), "{refused}");
    // New records can be created beside them, and both kinds can be removed.
    let _other = f.create(Some("other")).unwrap();
    let_go(lock);
    f.records.remove_damaged(id.short()).unwrap();
    unreadable.remove().unwrap();
    assert!(!damaged.directory().exists() && !damaged.sockets().exists());
    assert!(f.records.damaged().unwrap().is_empty());
}

#[test]
fn a_record_whose_files_cannot_be_examined_is_not_erased() {
    let f = fixture();
    let (record, lock) = f.create(None).unwrap();
    let console = record.directory().join(CONSOLE);
    std::os::unix::fs::symlink(CONSOLE, &console).unwrap();
    assert!(console.try_exists().is_err());
    let_go(lock);
    f.records.sweep().unwrap();
    assert!(record.directory().exists());
    std::fs::remove_file(&console).unwrap();
    f.records.sweep().unwrap();
    assert!(!record.directory().exists());
}

#[test]
fn a_reason_of_a_later_version_is_a_reason() {
    let f = fixture();
    let (record, _lock) = f.create(None).unwrap();
    let text = br#"{"status": 9, "reason": "evicted_by_moonlight", "finished_ns": 1}"#;
    std::fs::write(record.directory().join(EXIT), text).unwrap();
    let exit = record.exit().unwrap().unwrap();
    assert_eq!((exit.status, exit.reason), (9, ExitReason::Other));
}

#[test]
fn records_are_read_once_by_one_who_makes_many() {
    let f = fixture();
    let (first, _lock) = f.create(Some("first")).unwrap();
    let _second = f.create(Some("second")).unwrap();
    // The record is not read a second time.
    let path = first.directory().join(CONFIG);
    let written = std::fs::metadata(&path).unwrap().modified().unwrap();
    std::fs::write(&path, b"{").unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_modified(written).unwrap();
    let error = f.create(Some("first")).unwrap_err();
    assert!(error.to_string().contains("taken"), "{error}");
}

#[test]
fn an_ended_vm_that_removes_itself_frees_its_name_at_once() {
    let f = fixture();
    let make = || {
        f.records.create(&named(Some("again")), |id, name| {
            Ok(removing_itself(id, name))
        })
    };
    let (first, _lock) = make().unwrap();
    assert!(make().is_err());
    first.write_exit(&exit(0)).unwrap();
    make().unwrap();
}

/// The record disappears at any moment between the listing and the look at its files.
#[test]
fn a_name_is_free_while_the_record_of_an_ended_vm_disappears() {
    let f = fixture();
    let create = || {
        f.records.create(&named(Some("again")), |id, name| {
            Ok(removing_itself(id, name))
        })
    };
    let (mut record, _lock) = create().unwrap();
    for round in 0..500 {
        record.write_exit(&exit(0)).unwrap();
        let begin = std::sync::Barrier::new(2);
        let next = std::thread::scope(|scope| {
            scope.spawn(|| {
                begin.wait();
                record.erase().unwrap();
            });
            begin.wait();
            create()
        });
        (record, _) = next.unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
}

/// A record that is left out of listings because its VM has ended does not reappear while
/// it is removed.
#[test]
fn the_record_of_an_ended_vm_stays_out_of_listings_while_it_disappears() {
    let f = fixture();
    for round in 0..500 {
        let (record, _lock) = f
            .records
            .create(&named(None), |id, name| Ok(removing_itself(id, name)))
            .unwrap();
        record.write_exit(&exit(0)).unwrap();
        let begin = std::sync::Barrier::new(2);
        let listed = std::thread::scope(|scope| {
            scope.spawn(|| {
                begin.wait();
                record.erase().unwrap();
            });
            begin.wait();
            f.records.list().unwrap()
        });
        assert!(listed.is_empty(), "round {round}");
    }
}

#[test]
fn the_name_of_a_record_of_a_later_version_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let make = |id, name| Ok(config(id, name));
    let (record, _lock) = fixture_in(dir.path())
        .create(&named(Some("web")), make)
        .unwrap();
    let later = br#"{"version": 99, "name": "web", "more": [1]}"#;
    std::fs::write(record.directory().join(CONFIG), later).unwrap();
    let records = fixture_in(dir.path());
    let taken = records.create(&named(Some("web")), make).unwrap_err();
    assert!(taken.to_string().contains("taken"), "{taken}");
    records.create(&named(Some("other")), make).unwrap();
    // One without a name prevents nothing.
    std::fs::write(record.directory().join(CONFIG), br#"{"version": 99}"#).unwrap();
    fixture_in(dir.path())
        .create(&named(Some("web")), make)
        .unwrap();
}

#[test]
fn a_name_is_not_free_while_its_record_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let make = |id, name| Ok(config(id, name));
    let (record, _lock) = fixture_in(dir.path())
        .create(&named(Some("web")), make)
        .unwrap();
    // The record exists, and reading its configuration fails, also for root.
    let path = record.directory().join(CONFIG);
    let aside = record.directory().join("aside");
    std::fs::rename(&path, &aside).unwrap();
    std::fs::create_dir(&path).unwrap();
    let records = fixture_in(dir.path());
    let error = records.create(&named(Some("web")), make).unwrap_err();
    let text = sm_control::with_causes(&error);
    assert!(
        text.contains(CONFIG) && text.contains("directory"),
        "{text}"
    );
    std::fs::remove_dir(&path).unwrap();
    std::fs::rename(&aside, &path).unwrap();
    let taken = records.create(&named(Some("web")), make).unwrap_err();
    assert!(taken.to_string().contains("taken"), "{taken}");
}

/// Releases a lock independent of copies of the descriptor, which a process that another
/// test forks has until its exec.
fn let_go(lock: File) {
    flock(&lock, FlockOperation::Unlock).unwrap();
}

/// All observers of a dead VM get the same answer, whatever the others do.
#[test]
fn a_dead_vm_is_dead_during_its_clean_up() {
    let f = fixture();
    for round in 0..50 {
        let (record, lock) = f.create(Some("killed")).unwrap();
        std::fs::write(record.directory().join(CONSOLE), b"").unwrap();
        let_go(lock);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| f.records.sweep().unwrap());
                scope.spawn(|| {
                    for _ in 0..20 {
                        let state = record.state().unwrap();
                        assert_ne!(state, VmState::Running, "in round {round}");
                    }
                });
            }
        });
        std::thread::scope(|scope| {
            // One thread removes the record; the other one finds it removed, or nothing
            // to do.
            for _ in 0..2 {
                scope.spawn(|| match record.remove() {
                    Ok(()) | Err(RecordError::NotFound(_)) => {}
                    Err(other) => panic!("{other}"),
                });
            }
        });
        assert!(!record.directory().exists());
    }
}
