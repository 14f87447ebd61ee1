//! VMs, their logs and listings with real supervisors of fake machines; the tests play
//! the agents.

mod events;
mod exec;
mod files;
mod killed;
mod load;
mod logs;

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use sm_control::launch::{ControlAnswer, ControlCall};
use sm_control::session::Event;
use sm_guest_proto::control::ControlRequest;
use sm_guest_proto::exec::{ExecControl, ExecReply, ExecRequest};
use sm_guest_proto::frame::FrameType;
use sm_vmm::testing::{self, FramedPeer, SupervisorSetup, in_own_process, text};
use tempfile::TempDir;

use super::*;
use crate::events::{EventAction, EventQuery};
use crate::logs::Logs;
use crate::record::ExitReason;

type Supervised = testing::Fixture<Record>;

/// A VM in a home of its own.
struct Fixture {
    sm: Sm,
    vm: Supervised,
    _directory: TempDir,
}

fn fixture(setup: SupervisorSetup) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let sm = sm_in(directory.path());
    let vm = supervised(&sm, Some("vm"), setup);
    Fixture {
        sm,
        vm,
        _directory: directory,
    }
}

fn sm_in(directory: &Path) -> Sm {
    Sm::builder().below(directory).build().unwrap()
}

fn supervised(sm: &Sm, name: Option<&str>, setup: SupervisorSetup) -> Supervised {
    let records = Records::open(sm.home()).unwrap();
    let (record, lock) = records
        .create(
            &crate::record::Draft {
                name: name.map(str::to_owned),
                ..Default::default()
            },
            |id, name| Ok(setup.config(id, name)),
        )
        .unwrap();
    // The machine creates the console log when it starts.
    std::fs::write(record.directory().join("console.log"), b"").unwrap();
    let config = record.config().clone();
    testing::fixture(record, config, lock, setup)
}

/// Plays the process that starts a VM again, and the VM's process.
fn supervised_again(sm: &Sm, record: &Record, setup: SupervisorSetup) -> Supervised {
    let records = Records::open(sm.home()).unwrap();
    let (record, lock) = records.claim(record).unwrap().expect("it is idle");
    record.take_over().unwrap();
    let config = record.config().clone();
    testing::fixture(record, config, lock, setup)
}

impl Fixture {
    fn find(&self) -> Vm {
        self.sm.vm("vm").unwrap()
    }
}

#[test]
fn vms_are_inspected_without_a_time_limit() {
    let mut f = fixture(SupervisorSetup::default().detached());
    let (_agent, mut main) = f.vm.start();
    let found = f.sm.vms().inspect(Duration::MAX).unwrap();
    let states: Vec<_> = found.vms.iter().map(|vm| vm.state.status).collect();
    assert_eq!(states, [VmStatus::Running]);
    main.exit(0);
    f.vm.finish();
}

/// As `sm events` and `sm inspect` show it.
#[test]
fn a_vm_without_space_on_the_host_says_so() {
    let mut f = fixture(SupervisorSetup::default().detached());
    let (_agent, mut main) = f.vm.start();
    let mut events =
        f.sm.events(EventQuery::new().since(0).follow(true))
            .unwrap();
    let mut next = |action| {
        let mut noted = std::iter::from_fn(|| events.wait_event().unwrap());
        let event = noted.find(|event| event.action == action).unwrap();
        assert_eq!(event.attributes["reason"], "no_disk_space");
    };
    f.vm.set_space(false);
    next(EventAction::Pause);
    let state = f.find().inspect().unwrap().state;
    assert_eq!(state.status, VmStatus::Paused);
    assert_eq!(state.problem.unwrap(), "no disk space on the host");
    f.vm.set_space(true);
    next(EventAction::Unpause);
    let state = f.find().inspect().unwrap().state;
    assert_eq!((state.status, state.problem), (VmStatus::Running, None));
    main.exit(0);
    f.vm.finish();
}
