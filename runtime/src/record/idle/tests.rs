use super::super::tests::{config, fixture_in};
use super::*;
use crate::record::{Draft, ExitReason, VmState};

struct Home {
    _directory: tempfile::TempDir,
    records: Records,
}

fn home() -> Home {
    let directory = tempfile::tempdir().unwrap();
    let records = fixture_in(directory.path());
    Home {
        _directory: directory,
        records,
    }
}

impl Home {
    /// Creates a VM without starting it.
    fn created(&self, name: &str) -> Record {
        let draft = Draft {
            name: Some(name.to_owned()),
            idle: true,
            ..Draft::default()
        };
        let created = self.records.create(&draft, |id, name| Ok(config(id, name)));
        created.unwrap().0
    }

    fn claim(&self, record: &Record) -> (Record, fs::File) {
        let claimed = self.records.claim(record).unwrap();
        claimed.expect("no process is there")
    }

    /// Plays a run of the VM that ends with `status`.
    fn run(&self, record: &Record, status: u32) {
        let (record, _lock) = self.claim(record);
        record.take_over().unwrap();
        fs::write(record.directory().join("console.log"), b"").unwrap();
        assert_eq!(record.state().unwrap(), VmState::Running);
        record.write_exit(&exit(status)).unwrap();
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
fn a_created_vm_is_no_lost_one() {
    let home = home();
    let record = home.created("web");
    for _ in 0..2 {
        assert_eq!(record.state().unwrap(), VmState::Created);
        home.records.sweep().unwrap();
    }
    home.run(&record, 3);
    assert_eq!(record.state().unwrap(), VmState::Exited(exit(3)));
    assert_eq!(record.last_exit().unwrap(), None);
    home.run(&record, 4);
    assert_eq!(record.state().unwrap(), VmState::Exited(exit(4)));
    assert_eq!(record.last_exit().unwrap(), Some(exit(3)));
    record.remove().unwrap();
    assert!(!record.directory().exists());
}

/// The process that starts the VM is killed at every step.
#[test]
fn an_interrupted_start_leaves_the_vm_as_it_was() {
    let home = home();
    let record = home.created("web");
    for sweep in [false, true] {
        let (_, lock) = home.claim(&record);
        assert_eq!(record.state().unwrap(), VmState::Created);
        drop(lock);
        if sweep {
            home.records.sweep().unwrap();
        }
        assert_eq!(record.state().unwrap(), VmState::Created, "{sweep}");
    }
    home.run(&record, 3);
    for sweep in [false, true] {
        let (_, lock) = home.claim(&record);
        assert_eq!(record.state().unwrap(), VmState::Running);
        drop(lock);
        if sweep {
            home.records.sweep().unwrap();
        }
        let ended = record.state().unwrap();
        assert_eq!(ended, VmState::Exited(exit(3)), "{sweep}");
    }
    // The VM's process is killed after it has taken over.
    let (claimed, lock) = home.claim(&record);
    claimed.take_over().unwrap();
    drop(lock);
    home.records.sweep().unwrap();
    let VmState::Exited(lost) = record.state().unwrap() else {
        panic!("no process is there");
    };
    assert_eq!(lost.reason, ExitReason::Lost);
    assert_eq!(record.last_exit().unwrap(), Some(exit(3)));
}

#[test]
fn one_of_many_starts_gets_the_vm() {
    let home = home();
    let record = home.created("web");
    let results: Vec<_> = std::thread::scope(|scope| {
        let start = || home.records.claim(&record).unwrap();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
        let observer = scope.spawn(|| {
            for _ in 0..1000 {
                let state = record.state().unwrap();
                assert!(matches!(state, VmState::Created | VmState::Running));
            }
        });
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        let results = results.collect();
        observer.join().unwrap();
        results
    });
    assert_eq!(results.iter().flatten().count(), 1);
}

#[test]
fn a_start_and_a_removal_exclude_each_other() {
    for _ in 0..50 {
        let home = home();
        let record = home.created("web");
        std::thread::scope(|scope| {
            let start = scope.spawn(|| home.records.claim(&record));
            let remove = scope.spawn(|| record.remove());
            match (start.join().unwrap(), remove.join().unwrap()) {
                (Ok(Some((record, _lock))), Err(RecordError::Running(_))) => {
                    assert!(record.directory().exists());
                }
                (Err(RecordError::NotFound(_)), Ok(())) => {
                    assert!(!record.directory().exists());
                }
                other => panic!("{other:?}"),
            }
        });
    }
}

#[test]
fn a_start_waits_for_the_process_of_a_vm_that_has_ended() {
    let home = home();
    let record = home.created("web");
    let (claimed, lock) = home.claim(&record);
    claimed.take_over().unwrap();
    assert!(home.records.claim(&record).unwrap().is_none());
    claimed.write_exit(&exit(0)).unwrap();
    std::thread::scope(|scope| {
        let start = scope.spawn(|| home.claim(&record));
        drop(lock);
        start.join().unwrap();
    });
}

/// The wait between two runs.
#[test]
fn a_vm_restarts_only_while_its_process_is_there() {
    let home = home();
    let record = home.created("web");
    let (claimed, lock) = home.claim(&record);
    claimed.take_over().unwrap();
    let ended = ExitRecord {
        restarting: true,
        ..exit(1)
    };
    claimed.write_exit(&ended).unwrap();
    let waiting = VmState::Restarting(ended.clone());
    assert_eq!(record.state().unwrap(), waiting);
    assert!(home.records.claim(&record).unwrap().is_none());
    assert!(matches!(record.remove(), Err(RecordError::Running(_))));
    home.records.sweep().unwrap();
    // The next run takes over without a gap.
    claimed.take_over().unwrap();
    assert_eq!(record.state().unwrap(), VmState::Running);
    assert_eq!(record.last_exit().unwrap(), Some(ended.clone()));
    claimed.write_exit(&ended).unwrap();
    drop(lock);
    assert_eq!(record.state().unwrap(), VmState::Exited(ended));
}

#[test]
fn names_change_and_stay_unique() {
    let home = home();
    let (web, db) = (home.created("web"), home.created("sql"));
    let rename = |record: &Record, name: &str| {
        home.records.change(record, |config| {
            name.clone_into(&mut config.name);
            Ok(())
        })
    };
    let error = rename(&web, "sql").unwrap_err().to_string();
    assert!(error.contains("already taken"), "{error}");
    assert!(rename(&web, "a/b").is_err());
    rename(&web, "www").unwrap();
    rename(&web, "www").unwrap();
    rename(&db, "web").unwrap();
    let find = |name| {
        home.records
            .find(name)
            .map(|record| record.config().id.clone())
    };
    assert_eq!(find("www").unwrap(), web.config().id);
    assert_eq!(find("web").unwrap(), db.config().id);
    // A name of hexadecimal digits could begin an identifier.
    assert!(matches!(find("sql"), Err(RecordError::NotFound(_))));
    // The old name is free, also for a value that knew it.
    home.created("sql");
    let taken = Draft {
        name: Some("web".to_owned()),
        ..Draft::default()
    };
    assert!(
        home.records
            .create(&taken, |id, name| Ok(config(id, name)))
            .is_err()
    );
}

/// What the record of a version before `start` leaves out is not invented.
#[test]
fn the_settings_of_starts_are_kept() {
    let home = home();
    let start = sm_control::config::StartSettingsV1 {
        source: sm_control::config::SettingsSourceV1::Image { cold: true },
        cmdline: "quiet".to_owned(),
        paging: crate::Paging::Map,
        root_disk: None,
        upper_size: None,
        mounts: Vec::new(),
        volumes_in_root: Vec::new(),
        shm_size: None,
        start_timeout_ms: 1,
    };
    let draft = Draft {
        start: Some(start.clone()),
        idle: true,
        name: None,
    };
    let (record, _) = home
        .records
        .create(&draft, |id, name| Ok(config(id, name)))
        .unwrap();
    let (claimed, _lock) = home.claim(&record);
    assert_eq!(claimed.start_settings(), Some(&start));
}
