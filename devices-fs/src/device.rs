//! The device behind its transport.

use std::mem;

use sm_event_loop::{Readiness, Registry};
use sm_fs_server::{FsConfig, FsCounts, FsStateV1, Server, ShareError};
use sm_virtio::queue::Queue;
use sm_virtio::{ActivateError, Activation, CannotSave, DevicePayload, VirtioDevice};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::saved::{decode, encode};
use crate::service::{Running, Service};

/// Kind of the device in saved state.
const KIND: &str = "fs";
/// Version of its saved state.
pub const STATE_VERSION: u32 = 1;
/// Name by which a guest mounts the file system: `mount -t virtiofs sm DIRECTORY`.
pub const TAG: &str = "sm";
/// Length of a tag in configuration space in bytes (virtio 1.3 section 5.11.4).
const TAG_LEN: usize = 36;
/// The queue of FORGET and of urgent requests, then that of all others. The latter holds a
/// request of 1 MiB in pages of 4 KiB, with its headers.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
const REQUEST_QUEUES: u32 = 1;

/// Reason why the shares of a device cannot be replaced.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SetSharesError {
    /// The guest has mounted the file system, and refers to files of the earlier shares.
    #[error("the guest has mounted the shared directories")]
    Mounted,
    /// A share is not usable.
    #[error(transparent)]
    Share(#[from] ShareError),
}

/// The server and, while the driver uses the device, the queues.
enum State {
    /// The driver has not set up the device.
    Inactive(Box<Server>),
    /// No request is being served, and there is no thread.
    Idle(Box<Service>),
    /// The thread has the queues and the server.
    Running(Running),
    /// The thread, and with it the server, is gone.
    Lost,
}

/// A virtio-fs device (virtio 1.3 section 5.11) with the tag [`TAG`].
///
/// It starts a thread with the first request, and up to four others for requests that take
/// long: more than 64 KiB of contents, or work of a disk. The event loop only passes
/// notifications on. Without requests, and so without shares, it costs nothing.
pub struct Fs {
    state: State,
    /// Queues as of the last time that no thread ran.
    queues: Vec<Queue>,
}

impl Fs {
    /// Creates a device with shares, or without any.
    ///
    /// # Errors
    /// A share is not usable.
    pub fn new(config: FsConfig) -> Result<Self, ShareError> {
        Ok(Self {
            state: State::Inactive(Box::new(Server::new(config)?)),
            queues: Vec::new(),
        })
    }

    /// Replaces the shares, before the guest mounts the file system. Waits for requests in
    /// execution.
    ///
    /// # Errors
    /// The guest has mounted it, or a share is not usable; nothing is changed.
    pub fn set_shares(&mut self, config: FsConfig) -> Result<(), SetSharesError> {
        let new = Server::new(config)?;
        self.park(false);
        let server = match &mut self.state {
            State::Inactive(server) => &mut **server,
            State::Idle(service) => &mut service.server,
            State::Running(_) | State::Lost => return Err(SetSharesError::Mounted),
        };
        if server.is_mounted() {
            return Err(SetSharesError::Mounted);
        }
        *server = new;
        Ok(())
    }

    /// Returns the numbers of objects that the server holds; none while it serves requests.
    #[must_use]
    pub fn counts(&self) -> Option<FsCounts> {
        match &self.state {
            State::Inactive(server) => Some(server.counts()),
            State::Idle(service) => Some(service.server.counts()),
            State::Running(_) | State::Lost => None,
        }
    }

    /// Returns the number of files that the guest has open and that have no name any more: they
    /// cannot be opened again when saved state is restored. None while it serves requests.
    #[must_use]
    pub fn unnamed_files(&self) -> Option<usize> {
        match &self.state {
            State::Inactive(server) => Some(server.unnamed_files()),
            State::Idle(service) => Some(service.server.unnamed_files()),
            State::Running(_) | State::Lost => None,
        }
    }

    /// Ends the thread.
    fn park(&mut self, abandon: bool) {
        self.state = match mem::replace(&mut self.state, State::Lost) {
            State::Running(running) => match running.stop(abandon) {
                Some(service) => {
                    self.queues.clone_from(&service.queues);
                    State::Idle(Box::new(service))
                }
                None => State::Lost,
            },
            other => other,
        };
    }

    /// Starts the thread if there are requests and it does not run.
    fn serve(&mut self) {
        match &self.state {
            State::Running(running) => return running.notify(),
            State::Idle(service) if service.has_requests() => {}
            _ => return,
        }
        if let State::Idle(service) = mem::replace(&mut self.state, State::Lost) {
            let interrupt = service.interrupt.clone();
            match service.start() {
                Ok(running) => self.state = State::Running(running),
                Err(error) => interrupt.needs_reset(&format!("no thread: {error}")),
            }
        }
    }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// Most guests never mount it. One that does so after [`Fs::set_shares`] notifies it by the
    /// vCPU's thread.
    fn has_doorbells(&self) -> bool {
        match &self.state {
            State::Inactive(server) => !server.is_empty(),
            State::Idle(_) | State::Running(_) | State::Lost => true,
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_LEN + 4];
        config[..TAG.len()].copy_from_slice(TAG.as_bytes());
        config[TAG_LEN..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(config.iter().skip(start)) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for index in 0..QUEUE_SIZES.len() {
            if !activation
                .queues
                .get(index)
                .is_some_and(|queue| queue.ready)
            {
                return Err(ActivateError::QueueMissing { index });
            }
        }
        match mem::replace(&mut self.state, State::Lost) {
            State::Inactive(server) => {
                self.queues.clone_from(&activation.queues);
                self.state = State::Idle(Box::new(Service {
                    memory: activation.memory,
                    interrupt: activation.interrupt,
                    queues: activation.queues,
                    server: *server,
                    failed: false,
                }));
                Ok(())
            }
            other => {
                self.state = other;
                Err(ActivateError::Io {
                    operation: "use the file server after its thread panicked",
                    source: std::io::ErrorKind::Other.into(),
                })
            }
        }
    }

    fn started(&mut self, _registry: &mut dyn Registry) {
        self.serve();
    }

    fn queue_notified(&mut self, _index: usize, _registry: &mut dyn Registry) {
        self.serve();
    }

    fn host_ready(&mut self, _token: u64, _readiness: Readiness, _registry: &mut dyn Registry) {}

    fn reset(&mut self, _registry: Option<&mut dyn Registry>) {
        self.park(true);
        self.queues.clear();
        self.state = match mem::replace(&mut self.state, State::Lost) {
            State::Idle(service) => {
                let mut server = service.server;
                server.reset();
                State::Inactive(Box::new(server))
            }
            other => other,
        };
    }

    fn quiesce(&mut self, _registry: &mut dyn Registry) {
        self.park(false);
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn save(&self) -> Result<DevicePayload, CannotSave> {
        let refused = |reason: &str| CannotSave {
            kind: KIND,
            reason: reason.to_owned(),
        };
        let server = match &self.state {
            State::Inactive(server) => &**server,
            State::Idle(service) => &service.server,
            State::Running(_) => return Err(refused("requests are in execution")),
            State::Lost => return Err(refused("its thread has panicked")),
        };
        let bytes = match server.save() {
            None => Vec::new(),
            Some(state) => encode(&state).ok_or_else(|| {
                refused(
                    "the guest uses too many files of shared directories: try again when \
                     programs have closed some",
                )
            })?,
        };
        Ok(DevicePayload {
            kind: KIND.to_owned(),
            version: STATE_VERSION,
            bytes,
        })
    }

    fn check(&self, payload: &DevicePayload) -> Result<(), ActivateError> {
        payload.expect(KIND, STATE_VERSION)?;
        session(payload).map(drop)
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        payload.expect(KIND, STATE_VERSION)?;
        let session = session(payload)?;
        let server = match &mut self.state {
            State::Inactive(server) => server,
            _ => return Err(unfit(payload, "the device is in use".to_owned())),
        };
        server.reset();
        match session {
            Some(state) => server
                .restore(&state)
                .map_err(|error| unfit(payload, error.to_string())),
            None => Ok(()),
        }
    }
}

/// Decodes the session of a payload, if there is one.
fn session(payload: &DevicePayload) -> Result<Option<FsStateV1>, ActivateError> {
    if payload.bytes.is_empty() {
        return Ok(None);
    }
    match decode(&payload.bytes) {
        Some(state) => Ok(Some(state)),
        None => Err(unfit(payload, "it is malformed".to_owned())),
    }
}

fn unfit(payload: &DevicePayload, reason: String) -> ActivateError {
    ActivateError::Payload {
        kind: payload.kind.clone(),
        reason,
    }
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs").finish_non_exhaustive()
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.park(true);
    }
}
