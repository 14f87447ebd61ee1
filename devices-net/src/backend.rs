//! The interface between a device and the network behind it.

use std::ops::Range;

use sm_event_loop::{Readiness, Registry};
use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;

use crate::header::NetHeader;
use crate::receive::ReceiveRing;

/// Tokens of a backend's descriptors and timers.
pub const BACKEND_TOKENS: Range<u64> = 0..1 << 62;

/// A frame that the guest has transmitted, in guest memory.
///
/// The guest may change the bytes while they are read: read each header once, into memory
/// of the host, and check that copy.
#[derive(Clone, Copy)]
pub struct NetFrame<'a> {
    /// The header, as the guest wrote it.
    pub header: NetHeader,
    /// The frame from its Ethernet header on; at most [`MAX_FRAME`](crate::MAX_FRAME) bytes.
    pub bytes: Window<'a>,
    /// The memory that has the bytes.
    pub memory: &'a GuestMemory,
}

/// The network behind a device.
///
/// The device calls it on its event loop. A turn is one event: frames of the guest, a
/// descriptor or timer of the backend, or a notification of new receive buffers. In each
/// turn the device passes the guest's frames to [`Self::transmit`] (a bounded number; others
/// follow in the next turn), then calls [`Self::receive`] once, and notifies the guest of all
/// that was used at the end. Host descriptors and timers are registered under tokens in
/// [`BACKEND_TOKENS`].
pub trait NetBackend: Send {
    /// Called when the driver is ready, after a restore, and again after a pause: registers
    /// descriptors, and continues where [`Self::quiesce`] stopped. `features` are those that
    /// the driver has negotiated; a frame for the guest may use `needs_csum` and segments
    /// only if they include GUEST_CSUM and GUEST_TSO.
    fn started(&mut self, features: u64, registry: &mut dyn Registry);

    /// Takes a frame of the guest. Its buffers return to the guest when this returns, so a
    /// backend copies or sends what it needs, and may discard the frame.
    fn transmit(&mut self, frame: &NetFrame<'_>, registry: &mut dyn Registry);

    /// Delivers frames to the guest, until the backend has none or the ring has no buffers.
    /// Called again when the guest has offered more. Work is bounded by the backend, which
    /// asks for another turn by `Registry::call_again` with a token of its own.
    fn receive(&mut self, ring: &mut ReceiveRing<'_>, registry: &mut dyn Registry);

    /// Called when a descriptor of the backend is ready, or a timer or a further turn is due.
    /// [`Self::receive`] follows.
    fn host_ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry);

    /// Stops work until [`Self::started`]: the state is about to be saved.
    fn quiesce(&mut self, registry: &mut dyn Registry);

    /// Ends all connections of the guest: the driver has reset the device, or a saved state
    /// is about to be restored. Without a registry the event loop has ended.
    fn reset(&mut self, registry: Option<&mut dyn Registry>);

    /// Returns the bytes that [`Self::restore`] restores, at most 1 MiB.
    ///
    /// # Errors
    /// The reason why the state cannot be saved.
    fn save(&self) -> Result<Vec<u8>, String>;

    /// Checks bytes for [`Self::restore`], and changes nothing.
    ///
    /// # Errors
    /// The reason why they do not fit.
    fn check(&self, bytes: &[u8]) -> Result<(), String>;

    /// Restores what [`Self::save`] saved, before [`Self::started`]. Connections that it
    /// names are connections of a guest of which this one is a copy. The bytes are empty if
    /// the saved device had no backend.
    ///
    /// # Errors
    /// Bytes that [`Self::check`] refuses.
    fn restore(&mut self, bytes: &[u8]) -> Result<(), String>;
}
