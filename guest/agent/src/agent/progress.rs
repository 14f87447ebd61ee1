//! Requests whose answer depends on an event in the guest, and their deadlines.

use std::io;
use std::time::Duration;

use sm_event_loop::Key;
use sm_guest_proto::control::ControlReply;

use super::Agent;
use super::requests::{POWERING_OFF, failed};
use crate::cgroup::Events;
use crate::kernel_log::KernelLog;
use crate::reactor::{Class, Token};
use crate::waiting::Waiting;
use crate::workload::Attached;
use crate::{control, log, part, sys};

/// Timeout for assembling the root.
const ATTACH_DEADLINE: Duration = Duration::from_secs(30);
/// Timeout for freezing.
const FREEZE_DEADLINE: Duration = Duration::from_secs(5);

impl Agent {
    /// Records that connection `key` waits for the event `part` of all containers.
    pub(crate) fn await_containers(&mut self, part: u8, key: Key, limit: Duration) -> Waiting {
        let late = Token::single(Class::Containers, part);
        Waiting::new(&self.reactor, key, late, limit)
    }

    /// Records that connection `key` waits for the root of `container`.
    pub(crate) fn await_root(&mut self, container: Key, key: Key) {
        let late = Token::new(Class::Container, part::ATTACH, container);
        let waiting = Waiting::new(&self.reactor, key, late, ATTACH_DEADLINE);
        if let Some(container) = self.containers.get_mut(container) {
            container.attaching = Some(waiting);
        }
    }

    pub(super) fn check_attach(&mut self, key: Key) {
        let Some(container) = self.containers.get_mut(key) else {
            return;
        };
        let failure = match container.workload.attach_progress(key, &self.reactor) {
            Attached::Pending => return,
            Attached::Done(machine_id) => {
                if let Some(init) = container.workload.init() {
                    let read = container.cgroup.read_path(init);
                    log::note_failure("find the container's cgroup", read);
                }
                let attached = self.identity.attached(machine_id);
                attached.err().map(|error| error.to_string())
            }
            Attached::Failed(message) => Some(message),
        };
        let waiting = container.attaching.take();
        let reply = match failure {
            None => ControlReply::Done,
            Some(message) => {
                container.workload.abandon();
                self.containers.remove(key);
                ControlReply::Error { message }
            }
        };
        self.answer(waiting.map(|waiting| waiting.key), &reply);
    }

    /// Answers the request for a root that takes too long. The container is removed, so
    /// that it can be tried again.
    pub(super) fn attach_deadline(&mut self, key: Key) {
        if let Some(container) = self.containers.get_mut(key)
            && let Some(waiting) = container.attaching.take()
        {
            container.workload.abandon();
            self.containers.remove(key);
            let message = "mounting the root file system took too long".to_owned();
            self.answer(Some(waiting.key), &ControlReply::Error { message });
        }
    }

    /// Answers the request whose deadline has passed. Deadlines of requests that were
    /// answered before are cancelled.
    pub(super) fn containers_deadline(&mut self, part: u8) {
        let (waiting, what) = match part {
            part::FREEZE => {
                log::note_failure("thaw", self.containers.group.freeze(false));
                self.containers.group.stop_watching();
                (self.freezing.take(), "freezing the containers' processes")
            }
            // The child cannot be killed while it blocks on a device; it does no harm.
            part::PREPARE => {
                let waiting = self.preparing.take().map(|(waiting, _)| waiting);
                (waiting, "writing data back")
            }
            part::MOUNT => {
                let mounting = self.mounting.take();
                let waiting = mounting.map(|(waiting, pid, _)| {
                    let _ = sys::kill(pid, 9);
                    waiting
                });
                (waiting, "mounting file systems")
            }
            part::REPORT => {
                let reporting = self.reporting.take();
                let waiting = reporting.map(|(waiting, pid, _)| {
                    let _ = sys::kill(pid, 9);
                    waiting
                });
                (waiting, "reading the workload's files")
            }
            _ => return,
        };
        let message = format!("{what} took too long");
        let key = waiting.map(|waiting| waiting.key);
        self.answer(key, &ControlReply::Error { message });
    }

    /// Starts to freeze; the answer is sent once every process is frozen.
    pub(crate) fn start_freeze(&mut self, key: Key) -> io::Result<()> {
        self.containers.group.freeze(true)?;
        self.freezing = Some(self.await_containers(part::FREEZE, key, FREEZE_DEADLINE));
        Ok(())
    }

    /// Thaws the containers, which are to end. A freeze in progress is answered, because its
    /// deadline would stop the watch of the cgroup that the power-off needs.
    pub(super) fn cancel_freeze(&mut self) {
        log::note_failure("thaw", self.containers.group.freeze(false));
        if let Some(waiting) = self.freezing.take() {
            self.answer(Some(waiting.key), &failed(POWERING_OFF));
        }
    }

    /// Returns the answer to a freeze. Containers that cannot be confirmed as frozen are
    /// thawed.
    pub(crate) fn frozen(&mut self, result: io::Result<Events>) -> ControlReply {
        match result {
            Ok(_) => ControlReply::Done,
            Err(error) => {
                log::note_failure("thaw", self.containers.group.freeze(false));
                ControlReply::Error {
                    message: format!("read cgroup.events: {error}"),
                }
            }
        }
    }

    pub(crate) fn cgroup_changed(&mut self) {
        if self.freezing.is_some() {
            match self.containers.group.events(&self.reactor) {
                Ok(events) if !events.frozen => {}
                result => {
                    self.containers.group.stop_watching();
                    let waiting = self.freezing.take();
                    let reply = self.frozen(result);
                    self.answer(waiting.map(|waiting| waiting.key), &reply);
                }
            }
        }
        if self.power.is_some() {
            self.check_power();
        }
    }

    /// Searches the kernel log for a new VM generation ID.
    pub(crate) fn check_vmgenid(&mut self) {
        match self.kernel_log.as_mut().map(KernelLog::vm_fork_seen) {
            Some(Ok(seen)) => self.vmgenid_seen |= seen,
            Some(Err(error)) => {
                log::error("read the kernel log", error);
                // It would wake the agent continuously.
                self.watch_kernel_log(false);
            }
            None => {}
        }
        if self.vmgenid_seen {
            self.finish_refresh();
        }
    }

    /// Answers a refresh that has waited for the VM generation ID for long enough. The
    /// log is read once more, because watching it may have failed.
    pub(super) fn refresh_deadline(&mut self) {
        self.check_vmgenid();
        self.finish_refresh();
    }

    /// Answers a refresh that waits for the VM generation ID.
    pub(super) fn finish_refresh(&mut self) {
        if let Some(waiting) = self.refreshing.take() {
            self.watch_kernel_log(false);
            let reply = self.refreshed();
            self.answer(Some(waiting.key), &reply);
        }
    }

    pub(super) fn watch_kernel_log(&mut self, on: bool) {
        if let Some(kernel_log) = &mut self.kernel_log {
            log::note_failure("watch the kernel log", kernel_log.watch(&self.reactor, on));
        }
    }

    /// Sets the deadline of a refresh that waits for the VM generation ID.
    pub(crate) fn wait_for_vmgenid(&mut self, key: Key, wait: Duration) {
        self.watch_kernel_log(true);
        let late = Token::single(Class::Control, control::part::VMGENID);
        self.refreshing = Some(Waiting::new(&self.reactor, key, late, wait));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::tests::{Fixture, HOUR};
    use crate::reactor::{Event, refusal};
    use std::os::fd::OwnedFd;

    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

    const FORK: &[u8] = b"5,9,9,-;random: crng reseeded due to virtual machine fork\n";

    /// Returns a model of the kernel log: its writing end and its reader.
    fn kernel_log() -> (OwnedFd, KernelLog) {
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (kernel, log) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        (kernel, KernelLog::new(log))
    }

    fn seen(reply: &ControlReply) -> bool {
        match reply {
            ControlReply::Refreshed(refreshed) => refreshed.vmgenid_seen,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_refresh_waits_for_the_generation_id_and_then_leaves_the_log_alone() {
        let mut fixture = Fixture::new();
        let (key, mut host) = fixture.host();
        let (kernel, log) = kernel_log();
        let agent = &mut fixture.agent;
        agent.kernel_log = Some(log);
        let before = agent.reactor.counts();
        agent.wait_for_vmgenid(key, HOUR);
        // A longer record than most.
        let other = [&b"13,8,8,-;"[..], &[b'x'; 4000]].concat();
        for record in [&other[..], FORK] {
            send(&kernel, record, SendFlags::empty()).unwrap();
        }
        fixture.turn();
        assert!(seen(&host.reply()));
        assert_eq!(fixture.agent.reactor.counts(), before);
    }

    #[test]
    fn a_log_that_could_not_be_watched_is_read_at_the_deadline() {
        for is_logged in [true, false] {
            let mut fixture = Fixture::new();
            let (key, mut host) = fixture.host();
            let (kernel, log) = kernel_log();
            let agent = &mut fixture.agent;
            agent.kernel_log = Some(log);
            refusal::begin(1);
            agent.wait_for_vmgenid(key, HOUR);
            if is_logged {
                send(&kernel, FORK, SendFlags::empty()).unwrap();
            }
            let late = Token::single(Class::Control, control::part::VMGENID);
            agent.handle(Event::Timer(late));
            assert_eq!(seen(&host.reply()), is_logged);
        }
    }

    #[test]
    fn a_log_that_cannot_be_read_is_not_watched() {
        let mut fixture = Fixture::new();
        let (key, _host) = fixture.host();
        // The writing end of a pipe without a reader is in an error state for ever.
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let agent = &mut fixture.agent;
        agent.kernel_log = Some(KernelLog::new(writer));
        let (before, _) = agent.reactor.counts();
        agent.wait_for_vmgenid(key, HOUR);
        assert_eq!(agent.reactor.counts().0, before + 1);
        fixture.turn();
        let agent = &fixture.agent;
        assert_eq!(agent.reactor.counts().0, before);
        // The deadline remains.
        assert!(agent.refreshing.is_some());
    }
}
