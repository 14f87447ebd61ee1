//! The device: its life, and what wakes it up.
//!
//! Work is done in turns on the event loop. A turn looks at what the guest sent
//! (`transmit.rs`), fills its receive buffers (`receive.rs`) and tells it; it is
//! bounded, and when there is more to do the next one follows once other handlers
//! had theirs. Host sockets that are ready are only noted: the turn that serves
//! them comes after all that are ready at the same time.

mod receive;
mod reset;
mod transmit;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use sm_event_loop::{Interest, Readiness, Registered, Registry, new_eventfd};
use sm_virtio::GuestMemory;
use sm_virtio::queue::{Chain, Queue, QueueError, Span};
use sm_virtio::{ActivateError, Activation, DevicePayload, Interrupt, VirtioDevice};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::receive::Receiver;
use self::reset::TransportReset;
use self::transmit::Gathered;
use crate::config::{SetUpError, VsockConfig};
use crate::handle::{Command, ConnectError, Mailbox, MuxerHandle};
use crate::muxer::{DEADLINE, Muxer, RETRIES};
use crate::profile::Stage;
use crate::saved::Saved;

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
/// Buffers given back before the driver is told, when there are more to come.
const BATCH: usize = 16;

/// The guest's side.
struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
}

/// Why a part of a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// There is nothing to do.
    Idle,
    /// It waits for receive buffers of the guest.
    Buffers,
    /// It was long enough.
    Budget,
}

/// The vsock device.
pub struct Vsock {
    config: VsockConfig,
    muxer: Muxer,
    mailbox: Arc<Mailbox>,
    /// Room for what is taken out of the mailbox.
    commands: Vec<Command>,
    /// Wakes the device when there is something in the mailbox.
    registered: Option<Registered<Arc<Mailbox>>>,
    active: Option<Active>,
    queues: Vec<Queue>,
    /// The guest knows sockets that keep messages apart.
    seqpacket: bool,
    /// The driver broke a queue, and has not reset the device since.
    failed: bool,
    receiver: Receiver,
    gathered: Gathered,
    chain: Chain,
    spans: Vec<Span>,
    reset: TransportReset,
    quiesced_at: Option<Instant>,
    /// When the guest's notification that is being served came, if that is
    /// measured.
    kicked: Option<Instant>,
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // Whoever asks from now on is refused; who waits is told by dropping.
        drop(self.mailbox.commands.close());
        self.muxer.clear(None);
    }
}

impl Vsock {
    /// Makes a device and a handle for host code.
    ///
    /// # Errors
    /// A configuration out of range, or no descriptors to be had.
    pub fn new(config: VsockConfig) -> Result<(Arc<Mutex<Self>>, MuxerHandle), SetUpError> {
        config.check()?;
        let failed = |operation| move |source| SetUpError::Io { operation, source };
        let wake = new_eventfd().map_err(failed("make an eventfd"))?;
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
            chain: Chain::new(),
            spans: Vec::new(),
            reset: TransportReset::None,
            quiesced_at: None,
            kicked: None,
        };
        Ok((Arc::new(Mutex::new(device)), MuxerHandle { mailbox }))
    }

    /// One turn of work.
    fn turn(&mut self, registry: &mut dyn Registry) {
        self.take_commands(registry);
        let Some(active) = self.active.take() else {
            return;
        };
        match self.serve(&active, registry) {
            Ok(more) => {
                self.active = Some(active);
                if more {
                    registry.again(TURN);
                }
            }
            Err(error) => self.fail(&active, error, registry),
        }
    }

    /// Serves both directions; says whether there is more to do right away.
    fn serve(&mut self, active: &Active, registry: &mut dyn Registry) -> Result<bool, QueueError> {
        self.proceed_with_reset(active)?;
        // Credit comes with what the guest sent.
        let sent = self.transmit(active, registry)?;
        let received = self.receive(active, registry)?;
        self.publish(active, TX)?;
        self.publish(active, RX)?;
        self.publish(active, EVENT)?;
        // Resets may have found their buffers, so that the guest can be heard again.
        let heard = sent == Pause::Buffers && self.muxer.has_room();
        Ok(heard || sent == Pause::Budget || received == Pause::Budget)
    }

    /// Tells the driver of the buffers of a queue that were given back.
    fn publish(&mut self, active: &Active, index: usize) -> Result<(), QueueError> {
        let queue = self.queues.get_mut(index).filter(|queue| queue.ready);
        if let Some(queue) = queue
            && queue.publish(&active.memory)?
        {
            let begun = self.mailbox.profiler.begin();
            active.interrupt.used_buffers();
            self.mailbox.profiler.end(Stage::Interrupt, begun);
        }
        Ok(())
    }

    /// The driver broke a queue: nothing goes on until it resets the device.
    fn fail(&mut self, active: &Active, error: QueueError, registry: &mut dyn Registry) {
        let reason = error.to_string();
        self.failed = true;
        active.interrupt.needs_reset(&reason);
        // Before the streams end, so that it explains why.
        self.mailbox.failed(&reason);
        self.muxer.clear(Some(registry));
        self.receiver.forget();
        self.gathered.forget();
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
        let over = readiness.hangup || readiness.error;
        connection.readable |= readiness.readable || over;
        connection.hung_up |= over;
        if connection.has_backlog() && (readiness.writable || readiness.error) {
            if !self.muxer.flush(slot, registry) {
                return;
            }
        } else if readiness.writable {
            // It need not be told any more.
            self.muxer.watch_writing(slot, registry);
        }
        if over && let Some(connection) = self.muxer.get(slot) {
            connection.notice_hang_up();
            if connection.is_given_up() {
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
        // Each signal is told once, and nothing need be read.
        let edge = Interest {
            edge: true,
            ..Interest::READ
        };
        match registry.add(Arc::clone(&self.mailbox), MAILBOX, edge) {
            Ok(mailbox) => self.registered = Some(mailbox),
            Err(error) => tracing::error!(%error, "host code cannot reach the guest"),
        }
    }
}

impl VirtioDevice for Vsock {
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
        // Edges may have been missed while the machine was paused.
        for slot in 0..self.muxer.slots() {
            let all = Readiness {
                readable: true,
                writable: true,
                // There may be an end behind the bytes.
                hangup: true,
                ..Readiness::default()
            };
            self.socket_ready(slot, all, registry);
        }
        self.turn(registry);
    }

    fn queue_notified(&mut self, _index: usize, registry: &mut dyn Registry) {
        // All queues are looked at: room for resets may have come with receive
        // buffers.
        let begun = self.mailbox.profiler.begin();
        self.kicked = begun;
        self.turn(registry);
        self.kicked = None;
        self.mailbox.profiler.end(Stage::GuestKick, begun);
    }

    fn host_ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        match token {
            MAILBOX => registry.again(TURN),
            TURN => {
                let begun = self.mailbox.profiler.begin();
                self.turn(registry);
                self.mailbox.profiler.end(Stage::HostReady, begun);
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
                registry.again(TURN);
            }
        }
    }

    fn reset(&mut self, registry: Option<&mut dyn Registry>) {
        self.active = None;
        self.failed = false;
        self.queues.clear();
        self.receiver.forget();
        self.gathered.forget();
        self.reset = TransportReset::None;
        self.muxer.clear(registry);
    }

    fn quiesce(&mut self, registry: &mut dyn Registry) {
        // Buffers that were taken and are not used are the driver's again.
        if let Some(queue) = self.queues.get_mut(RX) {
            self.receiver.give_back(queue);
        }
        self.quiesced_at = Some(registry.now());
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn save(&self) -> DevicePayload {
        let state = Saved {
            guest_cid: self.config.guest_cid,
            next_port: self.muxer.next_port,
        };
        DevicePayload {
            kind: "vsock".to_owned(),
            version: 2,
            bytes: state.encode(),
        }
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        payload.expect("vsock", 2)?;
        // Ports go on from where they were: Linux does not forget a connection
        // that a transport reset ended before its process closes the socket, and
        // refuses another one with the same ports until then.
        let saved = Saved::decode(&payload.bytes).ok_or_else(|| ActivateError::Payload {
            kind: "vsock".to_owned(),
            reason: "it is malformed".to_owned(),
        })?;
        self.config.guest_cid = saved.guest_cid;
        self.muxer.next_port = saved.next_port;
        self.reset = TransportReset::Owed;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_device_takes_no_port_that_the_guest_may_remember() {
        let (saved, _handle) = Vsock::new(VsockConfig::default()).unwrap();
        let mut saved = saved.lock().unwrap();
        let used: Vec<u32> = (0..3).map(|_| saved.muxer.free_port(1024)).collect();
        let (restored, _handle) = Vsock::new(VsockConfig::default()).unwrap();
        let mut restored = restored.lock().unwrap();
        restored.restore(&saved.save()).unwrap();
        assert!(!used.contains(&restored.muxer.free_port(1024)));
    }
}
