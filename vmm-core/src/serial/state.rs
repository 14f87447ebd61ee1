//! Saved state of the console's UART.

use serde::{Deserialize, Serialize};
use vm_superio::SerialState;

/// The interrupts that a 16550 can enable.
const INTERRUPTS: u8 = 0x0f;
/// Values of the interrupt identification register: none; an empty transmitter, received
/// data, or both. The guest reads the FIFO bits besides, which are not part of the state.
const IDENTIFICATIONS: [u8; 4] = [0x01, 0x02, 0x04, 0x06];
/// Line status: there is input.
const DATA_READY: u8 = 0x01;
/// Line status: the transmitter is empty and idle, as it always is.
const TRANSMITTER_EMPTY: u8 = 0x60;
/// Modem status: the bits of lines. Those of their changes are never set.
const MODEM_LINES: u8 = 0xf0;

/// Registers of a 16550 and the input in its buffer, version 1. The fields and their order
/// are those of snapshots and do not change; another state is another type.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartStateV1 {
    /// Divisor latch, low byte.
    pub divisor_low: u8,
    /// Divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Input that the guest has not read.
    pub input: Vec<u8>,
}

impl UartStateV1 {
    /// Checks the registers that a guest cannot set to any value. (The length of the input is
    /// checked when the state is restored.)
    ///
    /// # Errors
    /// A clause that names the first register that no guest can bring about.
    pub(super) fn check(&self) -> Result<(), String> {
        let has_input = !self.input.is_empty();
        let line_status = TRANSMITTER_EMPTY | if has_input { DATA_READY } else { 0 };
        let registers = [
            (
                "interrupt enable register",
                self.interrupt_enable,
                self.interrupt_enable & !INTERRUPTS == 0,
            ),
            (
                "interrupt identification",
                self.interrupt_identification,
                IDENTIFICATIONS.contains(&self.interrupt_identification),
            ),
            (
                "line status",
                self.line_status,
                self.line_status == line_status,
            ),
            (
                "modem status",
                self.modem_status,
                self.modem_status & !MODEM_LINES == 0,
            ),
        ];
        match registers.iter().find(|(.., possible)| !possible) {
            None => Ok(()),
            Some((name, value, _)) => Err(format!("it has the impossible {name} {value:#x}")),
        }
    }
}

impl From<SerialState> for UartStateV1 {
    fn from(live: SerialState) -> Self {
        Self {
            divisor_low: live.baud_divisor_low,
            divisor_high: live.baud_divisor_high,
            interrupt_enable: live.interrupt_enable,
            interrupt_identification: live.interrupt_identification,
            line_control: live.line_control,
            line_status: live.line_status,
            modem_control: live.modem_control,
            modem_status: live.modem_status,
            scratch: live.scratch,
            input: live.in_buffer,
        }
    }
}

impl From<&UartStateV1> for SerialState {
    fn from(saved: &UartStateV1) -> Self {
        Self {
            baud_divisor_low: saved.divisor_low,
            baud_divisor_high: saved.divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.input.clone(),
        }
    }
}
