//! The device: its life cycle and its events.
//!
//! Work is done in turns on the event loop. A turn handles the guest's packets
//! (`transmit.rs`), fills its receive buffers (`receive.rs`) and notifies it. Turns are
//! bounded; if work is left, the next turn follows after other handlers had theirs. Ready
//! host sockets are only recorded: the turn that serves them follows after all that are
//! ready at the same time.

mod receive;
mod reset;
mod transmit;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use sm_event_loop::{Interest, Readiness, Registered, Registry, new_eventfd};
use sm_virtio::GuestMemory;
use sm_virtio::queue::{DescriptorChain, Queue, QueueError, Span};
use sm_virtio::{ActivateError, Activation, CannotSave, DevicePayload, Interrupt, VirtioDevice};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::receive::Receiver;
use self::reset::TransportReset;
use self::transmit::Gathered;
use crate::config::{SetUpError, VsockConfig};
use crate::handle::{Command, ConnectError, Mailbox, MuxerHandle};
use crate::muxer::{DEADLINE, Muxer, RETRIES};
use crate::profile::ProfileStage;
use crate::saved::{STATE_VERSION, VsockStateV2};

/// Kind of the device in saved state.
const KIND: &str = "vsock";
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Tokens on the event loop; connections use their slot numbers, alone and with
/// [`DEADLINE`] or [`RETRIES`].
const MAILBOX: u64 = 1 << 62;
const TURN: u64 = MAILBOX + 1;
/// VIRTIO_VSOCK_F_STREAM and VIRTIO_VSOCK_F_SEQPACKET (virtio 1.3 section 5.10.3).
const F_STREAM: u64 = 1 << 0;
const F_SEQPACKET: u64 = 1 << 1;
/// Buffers returned before the driver is notified, if more follow.
const BATCH: usize = 16;

/// The guest's side.
struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
}

/// Reason why a part of a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// No work is left.
    Idle,
    /// Packets wait for receive buffers of the guest.
    Buffers,
    /// The budget of the turn is used up.
    Budget,
}

/// The vsock device.
pub struct Vsock {
    config: VsockConfig,
    muxer: Muxer,
    mailbox: Arc<Mailbox>,
    /// Buffer for the commands of the mailbox.
    commands: Vec<Command>,
    /// Registration of the mailbox, which wakes the device.
    registered: Option<Registered<Arc<Mailbox>>>,
    active: Option<Active>,
    queues: Vec<Queue>,
    /// The guest has negotiated seqpacket sockets.
    seqpacket: bool,
    /// The driver corrupted a queue, and has not reset the device since.
    failed: bool,
    receiver: Receiver,
    gathered: Gathered,
    chain: DescriptorChain,
    spans: Vec<Span>,
    reset: TransportReset,
    quiesced_at: Option<Instant>,
    /// Time of the guest's notification that is being served, if it is measured.
    kicked: Option<Instant>,
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // Later requests are refused; dropping the waiting ones notifies their requesters.
        drop(self.mailbox.commands.close());
        self.muxer.clear(None);
    }
}

impl Vsock {
    /// Creates a device and a handle for host code.
    ///
    /// # Errors
    /// A configuration out of range, or no descriptors available.
    pub fn new(config: VsockConfig) -> Result<(Arc<Mutex<Self>>, MuxerHandle), SetUpError> {
        config.check()?;
        let failed = |operation| move |source| SetUpError::Io { operation, source };
        let wake = new_eventfd().map_err(failed("create an eventfd"))?;
        let mailbox = Arc::new(Mailbox::new(wake, config.max_connections));
        let muxer = Muxer::new(config, Arc::clone(&mailbox));
        let device = Self {
            config,
            muxer,
            mailbox: Arc::clone(&mailbox),
            commands: Vec::new(),
            registered: None,
            active: None,
            queues: Vec::new(),
            seqpacket: false,
            failed: false,
            receiver: Receiver::default(),
            gathered: Gathered::default(),
            chain: DescriptorChain::new(),
            spans: Vec::new(),
            reset: TransportReset::None,
            quiesced_at: None,
            kicked: None,
        };
        Ok((Arc::new(Mutex::new(device)), MuxerHandle { mailbox }))
    }

    /// Runs one turn of work.
    fn turn(&mut self, registry: &mut dyn Registry) {
        self.take_commands(registry);
        let Some(active) = self.active.take() else {
            return;
        };
        match self.serve(&active, registry) {
            Ok(more) => {
                self.active = Some(active);
                if more {
                    registry.call_again(TURN);
                }
            }
            Err(error) => self.fail(&active, error, registry),
        }
    }

    /// Serves both directions; returns true if there is more work to do immediately.
    fn serve(&mut self, active: &Active, registry: &mut dyn Registry) -> Result<bool, QueueError> {
        self.proceed_with_reset(active)?;
        // The guest's packets carry credit, so they come first.
        let sent = self.transmit(active, registry)?;
        let received = self.receive(active, registry)?;
        self.publish(active, TX)?;
        self.publish(active, RX)?;
        self.publish(active, EVENT)?;
        // Resets may have used buffers, so that packets of the guest can be handled again.
        let has_room = sent == Pause::Buffers && self.muxer.has_room();
        Ok(has_room || sent == Pause::Budget || received == Pause::Budget)
    }

    /// Publishes the returned buffers of a queue, and notifies the driver if it wants to be
    /// notified.
    fn publish(&mut self, active: &Active, index: usize) -> Result<(), QueueError> {
        let queue = self.queues.get_mut(index).filter(|queue| queue.ready);
        if let Some(queue) = queue
            && queue.publish(&active.memory)?
        {
            let since = self.mailbox.profiler.begin();
            active.interrupt.used_buffers();
            self.mailbox.profiler.end(ProfileStage::Interrupt, since);
        }
        Ok(())
    }

    /// Handles a queue that the driver corrupted: the device stops until the driver resets
    /// it.
    fn fail(&mut self, active: &Active, error: QueueError, registry: &mut dyn Registry) {
        let reason = error.to_string();
        self.failed = true;
        active.interrupt.needs_reset(&reason);
        // Before the streams end, so that the reason is known.
        self.mailbox.failed(&reason);
        self.muxer.clear(Some(registry));
        self.receiver.clear();
        self.gathered.clear();
    }

    fn take_commands(&mut self, registry: &mut dyn Registry) {
        let refusal = self.failed.then_some(ConnectError::Reset);
        let mut commands = std::mem::take(&mut self.commands);
        self.mailbox.commands.take(&mut commands);
        for command in commands.drain(..) {
            self.muxer.command(command, refusal, registry);
        }
        self.commands = commands;
    }

    fn socket_ready(&mut self, slot: u32, readiness: Readiness, registry: &mut dyn Registry) {
        let Some(connection) = self.muxer.get(slot) else {
            return;
        };
        let hung_up = readiness.hangup || readiness.error;
        connection.readable |= readiness.readable || hung_up;
        connection.hung_up |= hung_up;
        if connection.has_backlog() && (readiness.writable || readiness.error) {
            if !self.muxer.flush(slot, registry) {
                return;
            }
        } else if readiness.writable {
            // Its writability need not be reported any more.
            self.muxer.watch_writing(slot, registry);
        }
        if hung_up && let Some(connection) = self.muxer.get(slot) {
            connection.handle_hang_up();
            if connection.is_cancelled() {
                self.muxer.abort(slot, ConnectError::HungUp, registry);
                return;
            }
        }
        self.muxer.settle(slot, registry);
    }

    fn attach(&mut self, registry: &mut dyn Registry) {
        if self.registered.is_some() {
            return;
        }
        // Edge-triggered: each signal is reported once, and nothing need be read.
        let edge = Interest::READ.edge_triggered();
        match registry.add(Arc::clone(&self.mailbox), MAILBOX, edge) {
            Ok(mailbox) => self.registered = Some(mailbox),
            Err(error) => tracing::error!(%error, "host code cannot reach the guest"),
        }
    }

    /// Returns the configuration and the next host port in a saved payload.
    fn saved(&self, payload: &DevicePayload) -> Result<(VsockConfig, u32), ActivateError> {
        payload.expect(KIND, STATE_VERSION)?;
        let unfit = |reason: String| ActivateError::Payload {
            kind: KIND.to_owned(),
            reason,
        };
        let saved = VsockStateV2::decode(&payload.bytes)
            .ok_or_else(|| unfit("it is malformed".to_owned()))?;
        let config = VsockConfig {
            guest_cid: saved.guest_cid,
            ..self.config
        };
        config.check().map_err(|error| unfit(error.to_string()))?;
        Ok((config, saved.next_port))
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM | F_SEQPACKET | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config.guest_cid.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(config.iter().skip(start)) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn attached(&mut self, registry: &mut dyn Registry) {
        self.attach(registry);
        self.take_commands(registry);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for index in [RX, TX] {
            if !activation.queues.get(index).is_some_and(|q| q.ready) {
                return Err(ActivateError::QueueMissing { index });
            }
        }
        self.seqpacket = activation.features & F_SEQPACKET != 0;
        self.failed = false;
        self.queues = activation.queues;
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn started(&mut self, registry: &mut dyn Registry) {
        self.attach(registry);
        if let Some(since) = self.quiesced_at.take() {
            let paused = registry.now().saturating_duration_since(since);
            self.muxer.resume_timers(paused, registry);
        }
        // Edges may have been missed while the machine was paused, and an end may follow the
        // bytes.
        for slot in 0..self.muxer.slots() {
            self.socket_ready(slot, Readiness::UNKNOWN, registry);
        }
        self.turn(registry);
    }

    fn queue_notified(&mut self, _index: usize, registry: &mut dyn Registry) {
        // Serves all queues: receive buffers may have made room for resets.
        let since = self.mailbox.profiler.begin();
        self.kicked = since;
        self.turn(registry);
        self.kicked = None;
        self.mailbox.profiler.end(ProfileStage::GuestKick, since);
    }

    fn host_ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        match token {
            MAILBOX => registry.call_again(TURN),
            TURN => {
                let since = self.mailbox.profiler.begin();
                self.turn(registry);
                self.mailbox.profiler.end(ProfileStage::HostReady, since);
            }
            token => {
                let Ok(slot) = u32::try_from(token & !(DEADLINE | RETRIES)) else {
                    return;
                };
                if token & DEADLINE != 0 {
                    self.muxer.expire(slot, registry);
                } else if token & RETRIES != 0 {
                    self.muxer.retry(slot, registry);
                } else {
                    self.socket_ready(slot, readiness, registry);
                }
                registry.call_again(TURN);
            }
        }
    }

    fn reset(&mut self, registry: Option<&mut dyn Registry>) {
        self.active = None;
        self.failed = false;
        self.queues.clear();
        self.receiver.clear();
        self.gathered.clear();
        self.reset = TransportReset::None;
        self.muxer.clear(registry);
    }

    fn quiesce(&mut self, registry: &mut dyn Registry) {
        // Unused buffers are returned to the driver.
        if let Some(queue) = self.queues.get_mut(RX) {
            self.receiver.return_unused(queue);
        }
        self.quiesced_at = Some(registry.now());
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn save(&self) -> Result<DevicePayload, CannotSave> {
        let state = VsockStateV2 {
            guest_cid: self.config.guest_cid,
            next_port: self.muxer.next_port,
        };
        Ok(DevicePayload {
            kind: KIND.to_owned(),
            version: STATE_VERSION,
            bytes: state.encode(),
        })
    }

    fn check(&self, payload: &DevicePayload) -> Result<(), ActivateError> {
        self.saved(payload).map(|_| ())
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        let (config, next_port) = self.saved(payload)?;
        self.config = config;
        // Ports continue from their saved position: Linux does not forget a connection that
        // a transport reset ended before its process closes the socket, and refuses another
        // one with the same ports until then.
        self.muxer.next_port = next_port;
        self.reset = TransportReset::Pending;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_device_uses_no_port_that_the_guest_may_remember() {
        let (saved, _handle) = Vsock::new(VsockConfig::default()).unwrap();
        let mut saved = saved.lock().unwrap();
        let used: Vec<u32> = (0..3).map(|_| saved.muxer.free_port(1024)).collect();
        let (restored, _handle) = Vsock::new(VsockConfig::default()).unwrap();
        let mut restored = restored.lock().unwrap();
        restored.restore(&saved.save().unwrap()).unwrap();
        assert!(!used.contains(&restored.muxer.free_port(1024)));
    }

    #[test]
    fn any_payload_is_restored_or_refused() {
        let (device, _handle) = Vsock::new(VsockConfig::default()).unwrap();
        let mut device = device.lock().unwrap();
        let payload = |version, guest_cid| DevicePayload {
            kind: KIND.to_owned(),
            version,
            bytes: VsockStateV2 {
                guest_cid,
                next_port: u32::MAX,
            }
            .encode(),
        };
        let reserved = [0, 1, 2, u64::from(u32::MAX), 1 << 32, u64::MAX];
        for guest_cid in reserved {
            let error = device.restore(&payload(2, guest_cid)).unwrap_err();
            assert!(error.to_string().contains("guest_cid"), "{error}");
        }
        for version in [0, 1, 3] {
            let error = device.restore(&payload(version, 3)).unwrap_err();
            let found = format!("\"vsock\" version {version}");
            assert!(error.to_string().contains(&found), "{error}");
        }
        let mut trailing = payload(2, 3);
        trailing.bytes.push(0);
        assert!(device.restore(&trailing).is_err());
        device.restore(&payload(2, 77)).unwrap();
        assert_eq!(device.save().unwrap(), payload(2, 77));
        // The search for a free port wraps.
        device.muxer.free_port(1024);
    }
}
