//! The virtio devices of a machine in their slots.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use sm_hypervisor::{Doorbell, IrqLine, IrqTrigger, VirtualMachine};
use thiserror::Error;

use crate::bus::{BusBuilder, BusError, MmioDevice};
use crate::layout::{VIRTIO_SLOTS, VIRTIO_WINDOW_SIZE, virtio_gsi, virtio_window};
use sm_event_loop::EventLoopHandle;
use sm_virtio::GuestMemory;
use sm_virtio::mmio::{InterruptLine, MmioTransport, QUEUE_NOTIFY, TransportState};
use sm_virtio::{ActivateError, CannotSave, VirtioDevice};

/// Reason why a device cannot be attached, saved or restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A slot that the layout does not have.
    #[error("there is no virtio slot {slot}")]
    Slot {
        /// The requested slot.
        slot: u32,
    },
    /// Two devices in one slot.
    #[error("virtio slot {slot} is taken")]
    Taken {
        /// The requested slot.
        slot: u32,
        /// The windows that overlap.
        #[source]
        source: BusError,
    },
    /// A host resource failed, or the event loop has stopped.
    #[error("cannot {operation} the device in slot {slot}")]
    Io {
        /// The failed operation.
        operation: &'static str,
        /// The device's slot.
        slot: u32,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The hypervisor refused an interrupt line or a doorbell.
    #[error("cannot connect the device in slot {slot}")]
    Connect {
        /// The device's slot.
        slot: u32,
        /// The hypervisor's error.
        #[source]
        source: sm_hypervisor::Error,
    },
    /// Saved state does not fit.
    #[error("cannot restore the device in slot {slot}")]
    Restore {
        /// The device's slot.
        slot: u32,
        /// The element that does not fit, and the reason.
        #[source]
        source: ActivateError,
    },
    /// The device refused to be saved.
    #[error("cannot save the device in slot {slot}")]
    Save {
        /// The device's slot.
        slot: u32,
        /// The device's reason.
        #[source]
        source: CannotSave,
    },
    /// Saved state of a device that this machine does not have.
    #[error("there is saved state of a {kind} device in slot {slot}, where this machine has none")]
    Absent {
        /// The slot.
        slot: u32,
        /// Kind of the saved device.
        kind: String,
    },
    /// A device of this machine without saved state.
    #[error("there is no saved state of the {kind} device in slot {slot}")]
    NotSaved {
        /// The device's slot.
        slot: u32,
        /// The device's kind.
        kind: &'static str,
    },
    /// Saved state with a slot twice, or out of order.
    #[error("saved devices are in slots {saved:?}, this machine has {present:?}")]
    Slots {
        /// Slots in the state.
        saved: Vec<u32>,
        /// Slots of the machine.
        present: Vec<u32>,
    },
}

/// A device, its slot, and its event loop.
#[derive(Clone)]
pub struct DeviceConfig {
    slot: u32,
    device: Arc<Mutex<dyn VirtioDevice>>,
    event_loop: Option<EventLoopHandle>,
}

impl DeviceConfig {
    /// Returns a device in a slot (see [`crate::layout`]), which runs on the machine's event
    /// loop.
    #[must_use]
    pub fn new(slot: u32, device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        Self {
            slot,
            device,
            event_loop: None,
        }
    }

    /// Lets the device run on an event loop of its own, so that the others do not wait for it.
    /// The loop must live as long as the machine. Before the vCPUs run, the device has been
    /// started on it: what a restored device has for its driver is there first.
    #[must_use]
    pub fn on(mut self, event_loop: EventLoopHandle) -> Self {
        self.event_loop = Some(event_loop);
        self
    }
}

impl fmt::Debug for DeviceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceConfig")
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}

/// Saved state of one slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// The slot.
    pub slot: u32,
    /// The transport and its device.
    pub transport: TransportState,
}

/// Adapts the hypervisor's interrupt line to the transport.
struct IrqLineAdapter(Arc<dyn IrqLine>);

impl InterruptLine for IrqLineAdapter {
    fn pulse(&self) -> io::Result<()> {
        self.0.pulse().map_err(io::Error::other)
    }
}

impl MmioDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.write(offset, data);
    }
}

/// All devices of a machine, by ascending slot.
#[derive(Default)]
pub(crate) struct Devices {
    transports: Vec<Arc<MmioTransport>>,
    /// Those of the transports that have an event loop of their own.
    apart: Vec<Arc<MmioTransport>>,
}

impl Devices {
    /// Adds devices to the bus and connects interrupts and doorbells.
    pub(crate) fn attach<V: VirtualMachine>(
        mut configs: Vec<DeviceConfig>,
        vm: &V,
        bus: &mut BusBuilder,
        guest: &GuestMemory,
        event_loop: &EventLoopHandle,
    ) -> Result<Self, DeviceError> {
        configs.sort_by_key(|config| config.slot);
        let mut transports = Vec::with_capacity(configs.len());
        let mut apart = Vec::new();
        for config in configs {
            let DeviceConfig { slot, device, .. } = config;
            let is_apart = config.event_loop.is_some();
            let event_loop = config.event_loop.unwrap_or_else(|| event_loop.clone());
            if slot >= VIRTIO_SLOTS {
                return Err(DeviceError::Slot { slot });
            }
            let connect = |source| DeviceError::Connect { slot, source };
            let window = virtio_window(slot);
            let line = vm
                .irq_line(virtio_gsi(slot), IrqTrigger::Edge)
                .map_err(connect)?;
            let line = Arc::new(IrqLineAdapter(line));
            let transport = MmioTransport::new(slot, device, guest.clone(), line, event_loop)
                .map_err(|source| DeviceError::Io {
                    operation: "start",
                    slot,
                    source,
                })?;
            // Without doorbells, the write arrives on the bus.
            let doorbells = transport.doorbells().filter(|_| transport.has_doorbells());
            for (queue, fd) in doorbells {
                let doorbell = Doorbell {
                    address: window + QUEUE_NOTIFY,
                    width: Some(4),
                    value: Some(queue.into()),
                };
                vm.add_doorbell(doorbell, fd).map_err(connect)?;
            }
            bus.mmio(window, VIRTIO_WINDOW_SIZE, transport.clone())
                .map_err(|source| DeviceError::Taken { slot, source })?;
            if is_apart {
                apart.push(transport.clone());
            }
            transports.push(transport);
        }
        Ok(Self { transports, apart })
    }

    pub(crate) fn slots(&self) -> Vec<u32> {
        self.transports.iter().map(|t| t.slot()).collect()
    }

    /// Completes all work in flight. vCPUs must be out of guest code.
    pub(crate) fn quiesce(&self) -> Result<(), DeviceError> {
        for transport in &self.transports {
            transport.quiesce().map_err(|source| DeviceError::Io {
                operation: "quiesce",
                slot: transport.slot(),
                source,
            })?;
        }
        Ok(())
    }

    /// Lets devices resume.
    pub(crate) fn unquiesce(&self) {
        for transport in &self.transports {
            transport.unquiesce();
        }
    }

    /// Completes the start of devices with an event loop of their own, which otherwise is
    /// concurrent to the guest.
    pub(crate) fn start_apart(&self) -> Result<(), DeviceError> {
        for transport in &self.apart {
            transport
                .complete_start()
                .map_err(|source| DeviceError::Io {
                    operation: "start",
                    slot: transport.slot(),
                    source,
                })?;
        }
        Ok(())
    }

    /// Saves all devices, which must be quiesced.
    pub(crate) fn save(&self) -> Result<Vec<SlotState>, DeviceError> {
        let save = |transport: &Arc<MmioTransport>| {
            let slot = transport.slot();
            match transport.save() {
                Ok(transport) => Ok(SlotState { slot, transport }),
                Err(source) => Err(DeviceError::Save { slot, source }),
            }
        };
        self.transports.iter().map(save).collect()
    }

    /// Checks that `states` are of the slots of this machine.
    fn check_slots(&self, states: &[SlotState]) -> Result<(), DeviceError> {
        let saved: Vec<u32> = states.iter().map(|state| state.slot).collect();
        let present = self.slots();
        if saved == present {
            return Ok(());
        }
        if let Some(state) = states.iter().find(|state| !present.contains(&state.slot)) {
            return Err(DeviceError::Absent {
                slot: state.slot,
                kind: state.transport.device.kind.clone(),
            });
        }
        let mut transports = self.transports.iter();
        match transports.find(|transport| !saved.contains(&transport.slot())) {
            Some(transport) => Err(DeviceError::NotSaved {
                slot: transport.slot(),
                kind: transport.kind(),
            }),
            None => Err(DeviceError::Slots { saved, present }),
        }
    }

    /// Restores all devices, also in place.
    pub(crate) fn restore(&self, states: &[SlotState]) -> Result<(), DeviceError> {
        self.check_slots(states)?;
        for (transport, state) in self.transports.iter().zip(states) {
            transport
                .restore(&state.transport)
                .map_err(|source| DeviceError::Restore {
                    slot: state.slot,
                    source,
                })?;
        }
        Ok(())
    }
}
