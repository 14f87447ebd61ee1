//! Files of a VM; the test plays an agent that may be hostile.

use std::thread::JoinHandle;

use sm_guest_proto::container::ContainerId;
use sm_guest_proto::exec::Hello;
use sm_guest_proto::files::{FileOperation, FileRequest, FileStat, FileType, PathBytes};
use sm_tar::TarWriter;

use super::*;
use crate::files::{CopyOptions, FilesError, Links, WriteOptions};
use crate::record::{Draft, FileAccessRecord};
use crate::{ErrorKind, RecordError, Refusal};

/// Serves one operation for each function.
fn agent(vm: &Supervised, answers: Vec<fn(FileOperation, &mut FramedPeer)>) -> JoinHandle<()> {
    let listener = UnixListener::bind(vm.record.exec_socket()).unwrap();
    std::thread::spawn(move || {
        for answer in answers {
            let (stream, _) = listener.accept().unwrap();
            let mut peer = FramedPeer(stream);
            let hello: ExecControl = peer.receive_json(FrameType::Control);
            assert!(matches!(hello, ExecControl::Hello(_)));
            let request: ExecControl = peer.receive_json(FrameType::Control);
            let ExecControl::Files(FileRequest {
                container,
                operation,
            }) = request
            else {
                panic!("{request:?}");
            };
            assert_eq!(container, ContainerId::default());
            let protocol = sm_guest_proto::PROTOCOL_VERSION;
            peer.send_json(&ExecReply::Hello(Hello { protocol }));
            peer.send_json(&ExecReply::Started { container, pid: 0 });
            answer(operation, &mut peer);
        }
    })
}

fn describe(kind: FileType, peer: &mut FramedPeer) {
    let stat = FileStat {
        path: PathBytes(b"/x".to_vec()),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        size: 4,
        mtime: (1, 2),
        target: None,
    };
    let mut line = serde_json::to_vec(&stat).unwrap();
    line.push(b'\n');
    peer.send(FrameType::Stdout, &line);
    peer.exit(0);
}

fn archive(names: &[&str]) -> Vec<u8> {
    let mut writer = TarWriter::new(Vec::new());
    for name in names {
        writer.append_empty(name.as_bytes()).unwrap();
    }
    writer.finish().unwrap()
}

fn with_agent(answers: Vec<fn(FileOperation, &mut FramedPeer)>, test: impl FnOnce(&Vm)) {
    let mut f = fixture(SupervisorSetup::default().detached());
    let (_agent, mut main) = f.vm.start();
    let agent = agent(&f.vm, answers);
    test(&f.find());
    agent.join().unwrap();
    main.exit(0);
    f.vm.finish();
}

#[test]
fn contents_arrive_and_failures_have_their_kinds() {
    with_agent(
        vec![
            |_, peer| {
                peer.send(FrameType::Stdout, b"hello ");
                peer.send(FrameType::Stdout, b"world");
                peer.exit(0);
            },
            |_, peer| {
                peer.send(FrameType::Stdout, b"part");
                peer.send(FrameType::Stderr, b"it is \x1b[2J gone");
                peer.exit(2);
            },
            |_, peer| {
                peer.send(FrameType::Stdout, &vec![b'x'; 40_000]);
                peer.exit(0);
            },
            |operation, peer| {
                assert!(matches!(operation, FileOperation::Write(_)));
                let (kind, data) = peer.receive().unwrap();
                assert_eq!((kind, data.as_slice()), (FrameType::Stdin, &b"data"[..]));
                assert_eq!(peer.receive().unwrap(), (FrameType::Stdin, Vec::new()));
                peer.send(FrameType::Stderr, b"full");
                peer.exit(28);
            },
        ],
        |vm| {
            let files = vm.files();
            let mut text = String::new();
            let read = files.read("/x", 0, None).unwrap().read_to_string(&mut text);
            assert_eq!((read.unwrap(), text.as_str()), (11, "hello world"));
            // A part is not taken for the whole.
            let mut part = Vec::new();
            let error = files.read("/x", 0, None).unwrap().read_to_end(&mut part);
            let error = error.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
            assert!(!error.to_string().contains('\x1b'), "{error}");
            // A line of a guest is limited.
            let error = files.stat("/x", Links::Keep).unwrap_err();
            assert!(
                matches!(error, Error::Files(FilesError::Answer(_))),
                "{error}"
            );
            let error = files.write("/x", &b"data"[..], &WriteOptions::new());
            let error = error.unwrap_err();
            assert_eq!(
                (error.kind(), error.to_string()),
                (ErrorKind::NoSpace, "full".into())
            );
        },
    );
}

#[test]
fn a_hostile_guest_creates_only_what_was_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("to");
    std::fs::create_dir(&to).unwrap();
    let file: fn(FileOperation, &mut FramedPeer) = |_, peer| describe(FileType::File, peer);
    with_agent(
        vec![
            file,
            |operation, peer| {
                assert!(matches!(operation, FileOperation::Pack { .. }));
                peer.send(FrameType::Stdout, &archive(&["x"]));
                peer.exit(0);
            },
            file,
            |_, peer| {
                // The client disconnects once it has read the name.
                peer.send(FrameType::Stdout, &archive(&[".bashrc"]));
            },
            file,
            |_, peer| {
                // The client disconnects once it has read the name.
                peer.send(FrameType::Stdout, &archive(&["../x"]));
            },
            file,
            |_, peer| {
                peer.send(FrameType::Stdout, &archive(&["x"]));
                peer.send(FrameType::Stderr, b"it changed");
                peer.exit(5);
            },
        ],
        |vm| {
            let copy = || vm.files().copy_out("/x", &to, &CopyOptions::new());
            copy().unwrap();
            assert!(to.join("x").is_file());
            for _ in 0..2 {
                let error = copy().unwrap_err();
                assert!(
                    matches!(error, Error::Files(FilesError::Extract(_))),
                    "{error}"
                );
            }
            assert_eq!(copy().unwrap_err().to_string(), "it changed");
            let names = std::fs::read_dir(&to).unwrap().count();
            assert_eq!((names, directory.path().join("x").exists()), (1, false));
        },
    );
}

#[test]
fn files_of_a_paused_vm_are_refused() {
    let mut f = fixture(SupervisorSetup::default().detached());
    let (_agent, mut main) = f.vm.start();
    let vm = f.find();
    vm.pause().unwrap();
    let error = vm.files().stat("/", Links::Keep).unwrap_err();
    assert!(
        matches!(error, Error::Refused(Refusal::Paused(_))),
        "{error}"
    );
    vm.resume().unwrap();
    main.exit(0);
    f.vm.finish();
}

/// Plays the process of a machine for the files of an idle VM.
fn access(vm: &Vm) -> testing::Fixture<FileAccessRecord> {
    let records = Records::open(vm.sm().home()).unwrap();
    let claimed = records.claim_files(vm.record()).unwrap();
    let (record, lock) = claimed.expect("it is idle");
    let config = record.config().clone();
    let setup = SupervisorSetup::default().files();
    testing::fixture(FileAccessRecord(record), config, lock, setup)
}

/// Accesses the files of an idle VM: nobody notices, and starts and removals wait.
fn check_access(vm: &mut Vm) {
    let events = |vm: &Vm| {
        let query = EventQuery::new().since(0);
        let mut log = vm.sm().events(query).unwrap();
        std::iter::from_fn(|| log.next_event().unwrap()).count()
    };
    let records = Records::open(vm.sm().home()).unwrap();
    let (state, before) = (vm.state().unwrap(), events(vm));
    let mut machine = access(vm);
    let (mut agent, _main) = machine.start_for_files();
    assert_eq!(vm.state().unwrap(), state);
    records.sweep().unwrap();
    assert_eq!(vm.state().unwrap(), state);
    assert!(vm.control().is_err(), "clients find no running VM");
    vm.stop(None).unwrap();
    if let VmState::Exited(exit) = &state {
        assert_eq!(vm.wait().unwrap(), *exit);
    }
    let is_in_use = |error: &RecordError| matches!(error, RecordError::FilesInUse(_));
    for refused in [
        records.claim(vm.record()).map(drop),
        records.claim_files(vm.record()).map(drop),
        vm.record().remove(),
    ] {
        let error = refused.unwrap_err();
        assert!(is_in_use(&error), "{error}");
    }
    // A start that waits goes on when the access ends.
    let waiting = {
        let (records, record) = (records.clone(), vm.record().clone());
        std::thread::spawn(move || {
            loop {
                match records.claim(&record) {
                    Err(RecordError::FilesInUse(_)) => {}
                    claimed => break claimed.unwrap(),
                }
            }
        })
    };
    drop(machine.launcher.take());
    let request = agent.receive_json(FrameType::Control);
    assert!(matches!(request, ControlRequest::PowerOff { .. }));
    drop(agent);
    machine.finish();
    let (record, lock) = waiting.join().unwrap().expect("it is idle");
    // It is not started after all.
    record.return_to_idle().unwrap();
    drop(lock);
    assert_eq!(vm.state().unwrap(), state);
    assert_eq!(events(vm), before, "there is no event");
}

#[test]
fn files_of_an_idle_vm_are_accessed_and_nothing_else_changes() {
    let mut f = fixture(SupervisorSetup::default().detached());
    let (_agent, mut main) = f.vm.start();
    main.exit(3);
    f.vm.finish();
    check_access(&mut f.find());
}

#[test]
fn files_of_a_vm_that_was_never_started_are_accessed() {
    let directory = tempfile::tempdir().unwrap();
    let sm = sm_in(directory.path());
    let draft = Draft {
        name: Some("vm".to_owned()),
        idle: true,
        ..Draft::default()
    };
    let setup = SupervisorSetup::default();
    let records = Records::open(sm.home()).unwrap();
    let created = records.create(&draft, |id, name| Ok(setup.config(id, name)));
    drop(created.unwrap());
    check_access(&mut sm.vm("vm").unwrap());
}

/// Its process was killed, and nobody has noticed.
#[test]
fn a_vm_that_was_lost_does_not_seem_to_run_while_its_files_are_accessed() {
    let directory = tempfile::tempdir().unwrap();
    let sm = sm_in(directory.path());
    let draft = Draft {
        name: Some("vm".to_owned()),
        ..Draft::default()
    };
    let setup = SupervisorSetup::default();
    let records = Records::open(sm.home()).unwrap();
    let created = records.create(&draft, |id, name| Ok(setup.config(id, name)));
    let (record, lock) = created.unwrap();
    std::fs::write(record.directory().join("console.log"), b"").unwrap();
    drop(lock);
    let vm = sm.vm("vm").unwrap();
    let (claimed, _lock) = records.claim_files(vm.record()).unwrap().expect("idle");
    assert!(claimed.control_socket() != record.control_socket());
    assert!(
        matches!(vm.state().unwrap(), VmState::Exited(exit) if exit.reason == ExitReason::Lost)
    );
}
