//! The supervisor against a fake machine; the test plays the agent.

mod clients;
mod clock;
mod ends;
mod ephemeral;
mod file_access;
mod health;
mod held;
mod host_changes;
mod hostile;
mod input_output;
mod memory;
mod merges;
mod record;
mod restarts;
mod signals;
mod snapshots;
mod space;

use std::io::{Read as _, Write as _};

use sm_control::exit::{ExitReason, FailureCause};
use sm_control::id::VmId;
use sm_control::launch::{ControlAnswer, ControlCall, SnapshotReport, Stage};
use sm_control::session::{Event, Session};
use sm_guest_proto::control::{AgentHello, ControlReply, ControlRequest, GuestStats, Refreshed};
use sm_guest_proto::exec::{ExecControl, ExecReply, ExecRequest, Role};
use sm_guest_proto::frame::{self, ExitStatus, FrameHeader, FrameType};
use sm_guest_proto::{PROTOCOL_VERSION, port};
use sm_snapshot::manifest::Layer;

use self::record::FakeRecord;
use super::testing::{self, FakeGuest, FakeState, FramedPeer, SupervisorSetup, in_own_process};
use super::*;
use crate::guest::{AfterCapture, GuestEnd, PublishedSnapshot};

type Fixture = testing::Fixture<FakeRecord>;

fn fixture(setup: SupervisorSetup) -> Fixture {
    let (record, lock) = FakeRecord::create();
    let config = setup.config(VmId::generate(), "vm".to_owned());
    testing::fixture(record, config, lock, setup)
}

fn not_running(setup: SupervisorSetup) -> (Fixture, Supervisor<FakeGuest>) {
    let (record, lock) = FakeRecord::create();
    let config = setup.config(VmId::generate(), "vm".to_owned());
    testing::not_running(record, config, lock, setup)
}

fn this_program() -> std::process::Command {
    std::process::Command::new(std::env::current_exe().unwrap())
}

impl Fixture {
    fn exit(&self) -> ExitRecord {
        self.record.exit().expect("it has ended")
    }
}
