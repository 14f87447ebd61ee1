//! The supervisor's operations on a running machine.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;

use sm_control::id::random;
use sm_control::launch::{BalloonReport, SnapshotReport, StageTimes};
use sm_control::publish::PublishedPort;
use sm_control::with_causes;
use sm_devices_fs::HostChange;
use sm_devices_vsock::ConnectOptions;
use sm_guest_proto::control::Refresh;
use sm_snapshot::manifest::Layer;
use sm_vmm_core::exit::MachineExit;

use super::shares;
use super::writable::WritableDisk;
use super::{RunningMachine, failed, lock};
use crate::capturing::{CaptureCallbacks, Capturing, Origin, PublishedCapture};
use crate::guest::{
    AfterCapture, GuestEnd, GuestMachine, MergeEnd, MergeStep, PublishedSnapshot, SnapshotGuard,
    SnapshotPlan, SupervisorEvent,
};
use crate::names::{EPHEMERAL_LABEL, IMAGE_LABEL};
use crate::prefetch::Prefetch;
use crate::saved::{Content, Plan};

impl RunningMachine {
    /// Creates an automatic snapshot.
    fn create_automatic_snapshot(&mut self, plan: Plan) -> Result<(), String> {
        let name = plan.name.clone();
        let published = move |result: Result<PublishedCapture, String>| match result {
            Ok(capture) => tracing::info!(
                name,
                pages = capture.captured.manifest.memory.data_pages,
                pause_us = capture.pause.as_micros(),
                "a snapshot was taken"
            ),
            // Another VM may have created the same snapshot in the meantime.
            Err(error) => tracing::warn!(name, error, "a snapshot was not taken"),
        };
        self.capture(plan, Box::new(published))
    }

    fn capture(
        &mut self,
        plan: Plan,
        published: Box<dyn FnOnce(Result<PublishedCapture, String>) + Send>,
    ) -> Result<(), String> {
        let source = self.source.as_ref();
        let copied = self.prefetch.as_ref().map_or(&[][..], Prefetch::copied);
        let origin = Origin {
            chain: source.and_then(|source| source.chain.clone()),
            filled: self.pager.is_some(),
            copied: copied.to_vec(),
        };
        let events = self.events.clone();
        let callbacks = CaptureCallbacks {
            copied: Box::new(move |copied| events.send(SupervisorEvent::Captured(copied))),
            published,
        };
        let disks = &self.disks;
        let freeze = || {
            let frozen = disks.iter().filter_map(|disk| disk.freeze().transpose());
            frozen.collect()
        };
        let (capturing, thread) =
            Capturing::begin(plan, &mut self.machine, origin, freeze, callbacks)?;
        self.capturing = Some(capturing);
        self.publishing.add([thread]);
        Ok(())
    }

    /// Starts an automatic snapshot, if one is planned; returns true if it was started. A
    /// failure does not stop the VM.
    fn start_automatic_snapshot(&mut self, plan: Option<Plan>) -> Result<bool, String> {
        match plan.map(|plan| self.create_automatic_snapshot(plan)) {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(error)) if self.machine.is_running() => {
                tracing::warn!(error, "a snapshot was not taken");
                Ok(false)
            }
            Some(Err(error)) => Err(error),
        }
    }
}

impl GuestMachine for RunningMachine {
    fn restored(&self) -> Option<Layer> {
        self.restored
    }

    fn describe_network(&self, refresh: &mut Refresh) {
        self.network.describe(&self.config.network, refresh);
    }

    fn set_network_rules(&mut self, allow: Vec<String>, deny: Vec<String>) -> Result<(), String> {
        let mut network = self.config.network.clone();
        (network.allow, network.deny) = (allow, deny);
        self.network.set_rules(&network)?;
        // Those of the next snapshot.
        self.config.network = network;
        Ok(())
    }

    fn agent_ready(&mut self) -> Result<bool, String> {
        let plan = self.base_plan.take();
        self.start_automatic_snapshot(plan)
    }

    fn insert_image(&mut self) {
        if let Some(image) = self.image.take() {
            lock(&self.root).set_disk(image);
        }
        // Those of volumes follow the image snapshot, which is not of this VM only.
        if let Some(changes) = self.disks.first_mut() {
            changes.insert();
        }
    }

    fn is_ending(&mut self) {
        for disk in &self.disks {
            disk.is_ending();
        }
    }

    fn insert_volumes(&mut self) {
        for disk in &mut self.disks {
            disk.insert();
        }
    }

    fn wants_root(&self) -> bool {
        self.image_plan.is_some()
    }

    fn root_attached(&mut self) -> Result<bool, String> {
        let plan = self.image_plan.take();
        self.start_automatic_snapshot(plan)
    }

    fn workload_started(&mut self) {
        if let Some(prefetch) = &mut self.prefetch {
            let thread = prefetch.record(self.machine.memory(), &self.store);
            self.publishing.add(thread);
        }
    }

    fn limit_memory(&mut self, bytes: Option<u64>) {
        // That of the next snapshot.
        self.config.memory_limit = bytes;
        let all = self.config.memory;
        let balloon = bytes.map_or(0, |bytes| all.saturating_sub(bytes));
        lock(&self.balloon).set_target(balloon);
    }

    fn balloon(&self) -> Option<BalloonReport> {
        let sizes = lock(&self.balloon).sizes();
        Some(BalloonReport {
            target: sizes.target,
            // The guest may say anything.
            size: sizes.actual.min(self.config.memory),
            returned: sizes.returned,
        })
    }

    fn cached_source(&self) -> Option<String> {
        let source = self.source.as_ref().filter(|source| source.automatic)?;
        source.name()
    }

    fn discard_source(&mut self) -> Option<String> {
        let source = self.source.as_mut().filter(|source| source.automatic)?;
        source.corrupt = true;
        source.name()
    }

    fn check_snapshot(&self, name: &str) -> Result<(), String> {
        self.store
            .check_free(name)
            .map_err(|error| with_causes(&error))
    }

    fn snapshot(&mut self, plan: SnapshotPlan) -> Result<Option<String>, String> {
        let mut labels = BTreeMap::new();
        labels.insert(IMAGE_LABEL.to_owned(), self.config.image.clone());
        if plan.ephemeral {
            labels.insert(EPHEMERAL_LABEL.to_owned(), "yes".to_owned());
        }
        let ephemeral = plan
            .ephemeral
            .then(|| (self.store.clone(), plan.name.clone()));
        let plan = Plan {
            store: self.store.clone(),
            name: plan.name,
            layer: Layer::App,
            identity: self.identity.clone(),
            labels,
            content: Content {
                config: Some(self.config.clone().into()),
                shares: self.shares.clone(),
                ..self.content.clone()
            },
        };
        let events = self.events.clone();
        let published = move |result: Result<PublishedCapture, String>| {
            let snapshot = result.map(|PublishedCapture { captured, pause }| PublishedSnapshot {
                report: SnapshotReport {
                    pages: captured.manifest.memory.data_pages,
                    parent: captured.manifest.parent.map(|parent| parent.name),
                    paused_us: u64::try_from(pause.as_micros()).unwrap_or(u64::MAX),
                    ..SnapshotReport::default()
                },
                guard: Some(SnapshotGuard::new(captured.removal_guard, ephemeral)),
            });
            events.send(SupervisorEvent::Snapshot(snapshot));
        };
        self.capture(plan, Box::new(published))?;
        let fs = lock(&self.fs);
        Ok(shares::lost(fs.unnamed_files().unwrap_or(0)))
    }

    fn host_changes(&self) -> Option<BorrowedFd<'_>> {
        self.watches.as_ref().map(|watches| watches.as_fd())
    }

    fn take_host_changes(&self, limit: usize) -> Vec<HostChange> {
        let watches = self.watches.as_ref();
        watches.map_or_else(Vec::new, |watches| watches.take(limit))
    }

    fn captured(&mut self, then: AfterCapture) -> Result<(), String> {
        let capturing = self.capturing.take();
        if then != AfterCapture::LeavePaused {
            self.machine.resume().map_err(failed("resume the vCPUs"))?;
        }
        if let Some(capturing) = capturing
            && then != AfterCapture::Discard
        {
            capturing.end();
        }
        if let Err(error) = self.adopt_merged() {
            // Snapshots may wait for the end of the merge.
            let failed = MergeStep::Written(Err(error));
            self.events.send(SupervisorEvent::Merge(failed));
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.disks.iter().any(WritableDisk::is_full)
    }

    fn merge(&mut self, in_need: bool) -> bool {
        self.begin_merge(in_need);
        self.merging.is_some()
    }

    fn merge_step(&mut self, step: MergeStep) -> Option<MergeEnd> {
        self.go_on_with_merge(step)
    }

    fn cancel_capture(&self) {
        if let Some(capturing) = &self.capturing {
            capturing.cancel();
        }
    }

    fn reset(&mut self) -> Result<(), String> {
        let chain = self
            .source
            .as_ref()
            .and_then(|source| source.chain.as_ref())
            .ok_or("it was not started from a snapshot")?;
        let state = sm_snapshot::machine::decode(chain).map_err(|error| with_causes(&error))?;
        self.machine.pause().map_err(failed("pause the vCPUs"))?;
        // Pages that were only read are unchanged and stay mapped.
        let written = sm_snapshot::pagemap::private(&self.machine.memory().guest)
            .map_err(failed("find what the machine wrote"))?;
        for disk in &self.disks {
            disk.reset()?;
        }
        let balloon = lock(&self.balloon).sizes().target;
        self.machine
            .reset_to(&state, Some(&written))
            .map_err(failed("reset the machine"))?;
        // The state of the snapshot has the size of that time.
        lock(&self.balloon).set_target(balloon);
        self.machine
            .set_generation_id(random::<16>())
            .map_err(failed("give the machine an identity"))?;
        self.machine.resume().map_err(failed("resume the vCPUs"))
    }

    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        // The supervisor limits the time of a start and of a reset.
        let options = ConnectOptions::default().wait(self.start_timeout);
        self.muxer.connect(port, theirs.into(), options);
        Ok(ours)
    }

    fn has_space(&self) -> bool {
        self.disks.iter().all(WritableDisk::has_space)
    }

    fn pause(&mut self) -> Result<(), String> {
        self.machine.pause().map_err(failed("pause the vCPUs"))
    }

    fn resume(&mut self) -> Result<(), String> {
        self.machine.resume().map_err(failed("resume the vCPUs"))
    }

    fn profile(&self, on: bool) -> Vec<StageTimes> {
        let profiler = self.muxer.profiler();
        if on {
            profiler.start();
            return Vec::new();
        }
        profiler.stop();
        let reports = profiler.report().into_iter();
        let times = reports.map(|report| StageTimes {
            stage: report.stage.name().to_owned(),
            count: report.count,
            total_ns: report.total_ns,
            p50_ns: report.p50_ns,
            p90_ns: report.p90_ns,
            p99_ns: report.p99_ns,
            max_ns: report.max_ns,
        });
        times.collect()
    }

    fn console_tail(&self, lines: usize) -> String {
        self.machine.console().tail(lines)
    }

    fn published(&self) -> Vec<PublishedPort> {
        self.published.list()
    }

    fn close_published(&mut self) {
        self.published.close();
    }

    fn is_delivering(&mut self) -> bool {
        let events = self.events.clone();
        self.published
            .when_delivered(move || events.send(SupervisorEvent::Delivered))
    }

    fn is_delivering_commands(&mut self) -> bool {
        let clients = self.exec.connections();
        if clients.undelivered() == 0 {
            return false;
        }
        let events = self.events.clone();
        clients.when_delivered(move || events.send(SupervisorEvent::Delivered));
        true
    }

    fn stop(&mut self) {
        self.exit.report(MachineExit::Stopped);
    }

    fn end_event(&self) -> BorrowedFd<'_> {
        self.exit.event()
    }

    fn end(&self) -> Option<GuestEnd> {
        let what = match self.exit.reason()? {
            MachineExit::Stopped => return Some(GuestEnd::Stopped),
            MachineExit::PowerOff => "the guest powered itself off".to_owned(),
            MachineExit::Reset => match self.machine.console().guest_panic() {
                Some(panic) => format!("the guest's kernel panicked: {panic}"),
                None => "the guest reset itself".to_owned(),
            },
            MachineExit::TripleFault { vcpu } => {
                format!("vCPU {vcpu} of the guest met a triple fault")
            }
            MachineExit::Halted { vcpu } => format!("vCPU {vcpu} of the guest halted permanently"),
            MachineExit::Fault { vcpu, info } => format!(
                "the hypervisor cannot run vCPU {vcpu} on: {} (at {:#x})",
                info.reason, info.program_counter
            ),
            MachineExit::Failed { reason } => {
                return Some(GuestEnd::Host(format!(
                    "the VM failed on the host: {reason}"
                )));
            }
            // A reason that was added to the machine later.
            other => format!("the machine ended: {other:?}"),
        };
        Some(GuestEnd::Guest(what))
    }
}
