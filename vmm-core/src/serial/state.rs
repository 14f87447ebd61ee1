//! Saved state of the console's UART.

use serde::{Deserialize, Serialize};
use vm_superio::SerialState;

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
