//! Power off and reset by the guest: ACPI sleep and reset registers, and further reset
//! methods of PCs that kernels try.

use std::sync::Arc;

use crate::bus::{BusBuilder, BusError, MmioDevice};
use crate::exit::{ExitLatch, MachineExit};

/// Port of the ACPI sleep control register (ACPI 6.5 section 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Port of the ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// Port of the ACPI reset register.
pub const RESET_PORT: u16 = 0x602;
/// Value of the reset register that causes a reset.
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of the S5 state.
pub const SLEEP_TYPE_S5: u8 = 5;

/// `SLP_EN` in the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;

const KEYBOARD_COMMAND_PORT: u16 = 0x64;
const KEYBOARD_PULSE_RESET: u8 = 0xfe;
const RESET_CONTROL_PORT: u16 = 0xcf9;
/// `RST_CPU` in the reset control register.
const RESET_CONTROL_CPU: u8 = 1 << 2;

/// Sleep control, sleep status, reset.
struct AcpiRegisters(Arc<ExitLatch>);

impl MmioDevice for AcpiRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // The machine has not woken from sleep, and nothing is pending.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let register = u64::from(SLEEP_CONTROL_PORT) + offset;
        let value = data.first().copied().unwrap_or(0);
        if register == u64::from(SLEEP_CONTROL_PORT)
            && value & SLEEP_ENABLE != 0
            && (value >> 2) & 7 == SLEEP_TYPE_S5
        {
            self.0.report(MachineExit::PowerOff);
        } else if register == u64::from(RESET_PORT) && value == RESET_VALUE {
            self.0.report(MachineExit::Reset);
        }
    }
}

/// The reset line of the keyboard controller, and no other function of it.
struct KeyboardReset(Arc<ExitLatch>);

impl MmioDevice for KeyboardReset {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // The input buffer is empty: a kernel that wants to reset need not wait.
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [KEYBOARD_PULSE_RESET] {
            self.0.report(MachineExit::Reset);
        }
    }
}

/// The chipset's reset control register.
struct ResetControl(Arc<ExitLatch>);

impl MmioDevice for ResetControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|v| v & RESET_CONTROL_CPU != 0) {
            self.0.report(MachineExit::Reset);
        }
    }
}

/// Adds all power registers to the bus.
///
/// # Errors
/// Ports that are already used.
pub(crate) fn attach(bus: &mut BusBuilder, exit: &Arc<ExitLatch>) -> Result<(), BusError> {
    bus.pio(SLEEP_CONTROL_PORT, 3, Arc::new(AcpiRegisters(exit.clone())))?;
    bus.pio(
        KEYBOARD_COMMAND_PORT,
        1,
        Arc::new(KeyboardReset(exit.clone())),
    )?;
    bus.pio(RESET_CONTROL_PORT, 1, Arc::new(ResetControl(exit.clone())))
}

#[cfg(test)]
mod tests {
    use sm_hypervisor::Bus;

    use super::*;

    fn after_write(port: u16, value: u8) -> Option<MachineExit> {
        let exit = Arc::new(ExitLatch::new().unwrap());
        let mut bus = BusBuilder::default();
        attach(&mut bus, &exit).unwrap();
        bus.build().pio_write(port, &[value]);
        exit.reason().cloned()
    }

    #[test]
    fn only_the_documented_values_act() {
        let off = SLEEP_ENABLE | SLEEP_TYPE_S5 << 2;
        for (port, value, expected) in [
            (SLEEP_CONTROL_PORT, off, Some(MachineExit::PowerOff)),
            (SLEEP_CONTROL_PORT, SLEEP_TYPE_S5 << 2, None),
            (SLEEP_CONTROL_PORT, SLEEP_ENABLE | 3 << 2, None),
            (SLEEP_STATUS_PORT, off, None),
            (RESET_PORT, RESET_VALUE, Some(MachineExit::Reset)),
            (RESET_PORT, 0, None),
            (0x64, 0xfe, Some(MachineExit::Reset)),
            (0x64, 0xd1, None),
            (0xcf9, 6, Some(MachineExit::Reset)),
            (0xcf9, 2, None),
        ] {
            assert_eq!(after_write(port, value), expected, "{port:#x} {value:#x}");
        }
    }

    #[test]
    fn status_registers_read_as_idle() {
        let exit = Arc::new(ExitLatch::new().unwrap());
        let mut bus = BusBuilder::default();
        attach(&mut bus, &exit).unwrap();
        let bus = bus.build();
        for port in [SLEEP_STATUS_PORT, 0x64, 0xcf9] {
            let mut data = [0xff];
            bus.pio_read(port, &mut data);
            assert_eq!(data, [0]);
        }
    }
}
