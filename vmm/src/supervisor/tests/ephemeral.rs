//! Ephemeral snapshots are removed when no client will open them.

use std::collections::BTreeMap;

use sm_snapshot::capture::{Ancestry, Capture, Description};
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::state_file::Section;
use sm_snapshot::store::SnapshotStore;
use sm_vmm_core::memory::{MIN_MEMORY, MachineMemory, MemoryConfig};

use super::*;
use crate::guest::SnapshotGuard;

/// Publishes a snapshot, like the thread of a machine.
fn publish(store: &SnapshotStore, name: &str) -> PublishedSnapshot {
    let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
    let description = Description {
        layer: Layer::App,
        sm_version: String::new(),
        machine_version: 1,
        vcpus: 1,
        kernel: String::new(),
        agent: String::new(),
        cpu: CpuFeatures::default(),
        protocol: 1,
        devices: Vec::new(),
        labels: BTreeMap::new(),
    };
    let state = Section {
        name: "machine".into(),
        version: 1,
        payload: Vec::new(),
    };
    let captured = Capture::begin(store, &memory, Ancestry::Booted)
        .unwrap()
        .finish(store, name, description, vec![state])
        .unwrap();
    PublishedSnapshot {
        report: SnapshotReport::default(),
        guard: Some(SnapshotGuard::new(
            captured.removal_guard,
            Some((store.clone(), name.to_owned())),
        )),
    }
}

fn names(store: &SnapshotStore) -> Vec<String> {
    let entries = store.list().unwrap().into_iter();
    entries.map(|entry| entry.name).collect()
}

/// Returns a VM whose workload exited after the capture for a snapshot, and the client
/// that requested it.
fn ended_while_publishing() -> (Fixture, FramedPeer) {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let mut client = FramedPeer(UnixStream::connect(f.record.control_socket()).unwrap());
    let call = ControlCall::Snapshot {
        name: "slow".to_owned(),
        stop: false,
        ephemeral: true,
    };
    client.send(FrameType::Request, &serde_json::to_vec(&call).unwrap());
    for expected in [
        ControlRequest::Freeze,
        ControlRequest::PrepareSnapshot,
        ControlRequest::Thaw,
    ] {
        let request: ControlRequest = agent.receive_json(FrameType::Control);
        assert_eq!(request, expected);
        agent.send_json(&ControlReply::Done);
    }
    main.exit(6);
    assert_eq!(f.events(), ["exit 6", "ended 6"]);
    // The machine is released, too.
    while agent.receive().is_some() {}
    (f, client)
}

#[test]
fn an_ephemeral_snapshot_of_an_exited_vm_is_removed_with_its_client() {
    for leaves_early in [false, true] {
        let (mut f, client) = ended_while_publishing();
        let mut client = Some(client);
        let directory = tempfile::tempdir().unwrap();
        let store = SnapshotStore::open(directory.path()).unwrap();
        let published = publish(&store, "slow");
        assert_eq!(names(&store), ["slow"]);
        if leaves_early {
            client = None;
        }
        f.dial.send(SupervisorEvent::Snapshot(Ok(published)));
        if let Some(client) = &mut client {
            let answer: ControlAnswer = client.receive_json(FrameType::Control);
            assert!(matches!(answer, ControlAnswer::Snapshot(_)), "{answer:?}");
            assert!(client.receive().is_none());
        }
        f.finish();
        assert_eq!(names(&store), [""; 0]);
        assert_eq!(f.exit().status, 6);
    }
}

#[test]
fn an_ephemeral_snapshot_that_is_open_stays() {
    let (mut f, mut client) = ended_while_publishing();
    let directory = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(directory.path()).unwrap();
    let published = publish(&store, "slow");
    let lease = store.lease("slow").unwrap();
    f.dial.send(SupervisorEvent::Snapshot(Ok(published)));
    let answer: ControlAnswer = client.receive_json(FrameType::Control);
    assert!(matches!(answer, ControlAnswer::Snapshot(_)), "{answer:?}");
    f.finish();
    assert_eq!(names(&store), ["slow"]);
    drop(lease);
}
