//! The device behind its transport.

use std::sync::Arc;

use sm_event_loop::{Readiness, Registry};
use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;
use sm_virtio::queue::{DescriptorChain, Queue, QueueError};
use sm_virtio::{ActivateError, Activation, CannotSave, DevicePayload, Interrupt, VirtioDevice};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::backend::{BACKEND_TOKENS, NetBackend, NetFrame};
use crate::counters::NetCounters;
use crate::header::{HEADER_LEN, MAX_FRAME, NetHeader};
use crate::receive::{ReceiveRing, Receiver};
use crate::saved::{MAX_BACKEND, NetStateV1};

/// Kind of the device in saved state.
const KIND: &str = "net";
/// Version of its saved state.
pub const STATE_VERSION: u32 = 1;
/// Numbers of the queues (section 5.1.2).
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Smallest MTU that a device may announce (section 5.1.4.1).
const MIN_MTU: u16 = 68;
/// Frames and bytes of the guest that are taken before other handlers have their turn.
const BUDGET: usize = 64;
const BYTES: u32 = 256 << 10;

/// The budget was used up.
const TOKEN_CONTINUE: u64 = BACKEND_TOKENS.end;

/// Configuration of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetConfig {
    mac: [u8; 6],
    mtu: u16,
}

impl NetConfig {
    /// Returns a configuration with this MAC address, and an MTU of 1500.
    #[must_use]
    pub fn new(mac: [u8; 6]) -> Self {
        Self { mac, mtu: 1500 }
    }

    /// Sets the MTU in bytes, at least 68: a driver uses it until its system sets another, and
    /// never a larger one.
    #[must_use]
    pub fn mtu(mut self, mtu: u16) -> Self {
        self.mtu = mtu.max(MIN_MTU);
        self
    }
}

/// The resources of an active device.
struct ActiveNet {
    memory: GuestMemory,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
}

/// A virtio-net device (virtio 1.3 section 5.1).
///
/// Its features do not depend on the backend, so that a guest that was saved without one can
/// continue with one, and the other way round: the driver is notified that the link has
/// changed.
pub struct Net {
    config: NetConfig,
    backend: Option<Box<dyn NetBackend>>,
    active: Option<ActiveNet>,
    queues: Vec<Queue>,
    chain: DescriptorChain,
    receiver: Receiver,
    counters: Arc<NetCounters>,
    /// The state of the link that the driver of a restored device knows.
    known_link: Option<bool>,
}

impl Net {
    /// Creates a device without a link.
    #[must_use]
    pub fn new(config: NetConfig) -> Self {
        Self {
            config,
            backend: None,
            active: None,
            queues: Vec::new(),
            chain: DescriptorChain::new(),
            receiver: Receiver::default(),
            counters: Arc::new(NetCounters::default()),
            known_link: None,
        }
    }

    /// Creates a device with a network behind it.
    #[must_use]
    pub fn with_backend(config: NetConfig, backend: Box<dyn NetBackend>) -> Self {
        Self {
            backend: Some(backend),
            ..Self::new(config)
        }
    }

    /// Returns the device's counters.
    #[must_use]
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.counters)
    }

    fn link_up(&self) -> bool {
        self.backend.is_some()
    }

    /// Serves both queues, once.
    fn turn(&mut self, registry: &mut dyn Registry) {
        let Some(active) = self.active.take() else {
            return;
        };
        let served = self.serve(&active, registry).and_then(|more| {
            if more {
                registry.call_again(TOKEN_CONTINUE);
            }
            let mut interrupt = false;
            for queue in &mut self.queues {
                interrupt |= queue.publish(&active.memory)?;
            }
            Ok(interrupt)
        });
        match served {
            Ok(true) => active.interrupt.used_buffers(),
            Ok(false) => {}
            Err(error) => {
                // Out of service until the driver resets it.
                active.interrupt.needs_reset(&error.to_string());
                if let Some(backend) = &mut self.backend {
                    backend.reset(Some(registry));
                }
                return;
            }
        }
        self.active = Some(active);
    }

    /// Returns true if there may be more to do.
    fn serve(
        &mut self,
        active: &ActiveNet,
        registry: &mut dyn Registry,
    ) -> Result<bool, QueueError> {
        let more = self.transmit(active, registry)?;
        let (Some(backend), Some(queue)) = (&mut self.backend, self.queues.get_mut(RX)) else {
            return Ok(more);
        };
        let mut ring = ReceiveRing {
            queue,
            memory: &active.memory,
            receiver: &mut self.receiver,
            mergeable: active.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            counters: &self.counters,
            failure: None,
        };
        backend.receive(&mut ring, registry);
        match ring.failure {
            Some(error) => Err(error),
            None => Ok(more),
        }
    }

    /// Takes frames of the guest; returns true if there may be more.
    fn transmit(
        &mut self,
        active: &ActiveNet,
        registry: &mut dyn Registry,
    ) -> Result<bool, QueueError> {
        let Some(queue) = self.queues.get_mut(TX) else {
            return Ok(false);
        };
        let mut bytes = 0u32;
        for _ in 0..BUDGET {
            if !queue.pop(&active.memory, &mut self.chain)? {
                return Ok(false);
            }
            let len = self.chain.readable_len();
            let frame = frame(&active.memory, &self.chain);
            match (&mut self.backend, frame) {
                (_, None) => self.counters.malformed(1),
                (None, Some(_)) => self.counters.dropped(1),
                (Some(backend), Some(frame)) => {
                    backend.transmit(&frame, registry);
                    self.counters.transmitted(1);
                    self.counters.transmitted_bytes(frame.bytes.len().into());
                }
            }
            queue.push_used(&active.memory, self.chain.head(), 0)?;
            bytes = bytes.saturating_add(len);
            if bytes >= BYTES {
                break;
            }
        }
        Ok(true)
    }

    /// Decodes a payload, and checks that the backend, if any, can use it.
    fn decode(&self, payload: &DevicePayload) -> Result<NetStateV1, ActivateError> {
        payload.expect(KIND, STATE_VERSION)?;
        let unfit = |reason: String| ActivateError::Payload {
            kind: KIND.to_owned(),
            reason,
        };
        let state = NetStateV1::decode(&payload.bytes)
            .ok_or_else(|| unfit("it is malformed".to_owned()))?;
        if let Some(backend) = &self.backend {
            backend.check(&state.backend).map_err(unfit)?;
        }
        Ok(state)
    }
}

/// Returns the frame in a chain; `None` if there is none.
fn frame<'a>(memory: &'a GuestMemory, chain: &'a DescriptorChain) -> Option<NetFrame<'a>> {
    let mut header = [0; HEADER_LEN as usize];
    let bytes = Window::new(&chain.readable, 0, u32::MAX);
    let len = bytes.len().checked_sub(HEADER_LEN)?;
    if len > MAX_FRAME || !bytes.take(HEADER_LEN).copy_out(memory, &mut header) {
        return None;
    }
    Some(NetFrame {
        header: NetHeader::decode(&header),
        bytes: Window::new(&chain.readable, HEADER_LEN, len),
        memory,
    })
}

/// Returns the features without those whose requirements the driver left out (section
/// 5.1.3.1).
fn consistent(features: u64) -> u64 {
    let mut features = features;
    for (required, dependents) in [
        (
            VIRTIO_NET_F_CSUM,
            [VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6],
        ),
        (
            VIRTIO_NET_F_GUEST_CSUM,
            [VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6],
        ),
    ] {
        if features & 1 << required == 0 {
            features &= !(1 << dependents[0] | 1 << dependents[1]);
        }
    }
    features
}

impl VirtioDevice for Net {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
        ]
        .iter()
        .fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn has_doorbells(&self) -> bool {
        self.backend.is_some()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // mac, status, max_virtqueue_pairs, mtu (section 5.1.4).
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.config.mac);
        config[6] = match self.link_up() {
            // One.
            true => u8::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or(1),
            false => 0,
        };
        config[10..].copy_from_slice(&self.config.mtu.to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(config.iter().skip(start)) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for index in 0..QUEUE_SIZES.len() {
            let queue = activation.queues.get(index);
            if !queue.is_some_and(|queue| queue.ready) {
                return Err(ActivateError::QueueMissing { index });
            }
        }
        self.queues = activation.queues;
        self.active = Some(ActiveNet {
            memory: activation.memory,
            features: consistent(activation.features),
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn started(&mut self, registry: &mut dyn Registry) {
        let Some(active) = &self.active else { return };
        if let Some(known) = self.known_link.take()
            && known != self.backend.is_some()
        {
            active.interrupt.config_changed();
        }
        if let Some(backend) = &mut self.backend {
            backend.started(active.features, registry);
        }
        self.turn(registry);
    }

    fn queue_notified(&mut self, _index: usize, registry: &mut dyn Registry) {
        self.turn(registry);
    }

    fn host_ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        if token != TOKEN_CONTINUE
            && self.active.is_some()
            && let Some(backend) = &mut self.backend
        {
            backend.host_ready(token, readiness, registry);
        }
        self.turn(registry);
    }

    fn reset(&mut self, registry: Option<&mut dyn Registry>) {
        self.active = None;
        self.queues.clear();
        self.known_link = None;
        if let Some(backend) = &mut self.backend {
            backend.reset(registry);
        }
    }

    fn quiesce(&mut self, registry: &mut dyn Registry) {
        if self.active.is_some()
            && let Some(backend) = &mut self.backend
        {
            backend.quiesce(registry);
        }
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn save(&self) -> Result<DevicePayload, CannotSave> {
        let refused = |reason: String| CannotSave { kind: KIND, reason };
        let backend = match &self.backend {
            Some(backend) => backend.save().map_err(refused)?,
            None => Vec::new(),
        };
        if backend.len() > MAX_BACKEND {
            return Err(refused("the guest has too many connections".to_owned()));
        }
        let state = NetStateV1 {
            mac: self.config.mac,
            mtu: self.config.mtu,
            // A restored driver that has not been notified yet is in the same state again
            // when it is restored once more.
            link_up: self.known_link.unwrap_or_else(|| self.link_up()),
            backend,
        };
        Ok(DevicePayload {
            kind: KIND.to_owned(),
            version: STATE_VERSION,
            bytes: state.encode(),
        })
    }

    fn check(&self, payload: &DevicePayload) -> Result<(), ActivateError> {
        self.decode(payload).map(drop)
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        let state = self.decode(payload)?;
        if let Some(backend) = &mut self.backend {
            backend
                .restore(&state.backend)
                .map_err(|reason| ActivateError::Payload {
                    kind: KIND.to_owned(),
                    reason,
                })?;
        }
        self.known_link = Some(state.link_up);
        Ok(())
    }
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net")
            .field("config", &self.config)
            .field("link_up", &self.link_up())
            .finish_non_exhaustive()
    }
}
