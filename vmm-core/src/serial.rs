//! The console: a 16550 at COM1 whose output is captured to a file.
//!
//! The file's size is bounded: after [`FILE_LIMIT`] bytes only a notice and, at
//! the end, the last lines are added. The last lines are also kept in memory,
//! for error messages.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use sm_hypervisor::IrqLine;
use thiserror::Error;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use crate::bus::MmioDevice;

/// Bytes of console output that are captured from the start: 4 MiB.
pub const FILE_LIMIT: u64 = 4 << 20;

/// Bytes of the latest console output kept in memory: 32 KiB.
pub const TAIL_LIMIT: usize = 32 << 10;

/// Longest line that is searched for a kernel panic.
const LINE_LIMIT: usize = 1024;

/// What Linux prints when it gives up.
const PANIC: &str = "Kernel panic - not syncing";

/// Why the console cannot be used.
#[derive(Debug, Error)]
pub enum SerialError {
    /// Saved registers contradict each other.
    #[error("saved state of the console does not fit: {reason}")]
    State {
        /// What does not fit.
        reason: String,
    },
    /// The guest may not have got all input.
    #[error("the console takes {room} more bytes of input, not {bytes}")]
    Full {
        /// Bytes it takes.
        room: usize,
        /// Bytes offered.
        bytes: usize,
    },
}

/// Takes a lock whose data stays usable whatever a panicking thread did.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where console output goes.
#[derive(Debug)]
struct Output {
    file: File,
    written: u64,
    /// Writing failed or the limit is reached: only the tail is kept.
    closed: bool,
    tail: VecDeque<u8>,
    line: Vec<u8>,
    panic: Option<String>,
}

impl Output {
    fn push(&mut self, bytes: &[u8]) {
        self.write_file(bytes);
        let excess = (self.tail.len() + bytes.len()).saturating_sub(TAIL_LIMIT);
        self.tail.drain(..excess.min(self.tail.len()));
        self.tail.extend(bytes);
        for &byte in bytes {
            self.watch_for_panic(byte);
        }
    }

    fn write_file(&mut self, bytes: &[u8]) {
        if self.closed {
            return;
        }
        if self.written >= FILE_LIMIT {
            self.closed = true;
            let notice = "\n[console output beyond 4 MiB is not kept; the last lines follow]\n";
            let _ = self.file.write_all(notice.as_bytes());
            return;
        }
        self.written += u64::try_from(bytes.len()).unwrap_or(0);
        if let Err(error) = self.file.write_all(bytes) {
            self.closed = true;
            tracing::warn!(%error, "console output can no longer be captured");
        }
    }

    fn watch_for_panic(&mut self, byte: u8) {
        if byte != b'\n' {
            if self.line.len() < LINE_LIMIT {
                self.line.push(byte);
            }
            return;
        }
        if self.panic.is_none() {
            let line = String::from_utf8_lossy(&self.line);
            if let Some(at) = line.find(PANIC) {
                self.panic = Some(line[at..].trim_end().to_owned());
            }
        }
        self.line.clear();
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.written >= FILE_LIMIT {
            let (first, second) = self.tail.as_slices();
            let _ = self
                .file
                .write_all(first)
                .and_then(|()| self.file.write_all(second));
        }
    }
}

/// The captured output of a machine's console. Clones are of the same console.
#[derive(Clone, Debug)]
pub struct Console(Arc<Mutex<Output>>);

impl Console {
    /// A console that captures to `file`, at its current position.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self(Arc::new(Mutex::new(Output {
            file,
            written: 0,
            closed: false,
            tail: VecDeque::new(),
            line: Vec::new(),
            panic: None,
        })))
    }

    /// The last `lines` lines of output (of at most [`TAIL_LIMIT`] bytes).
    #[must_use]
    pub fn tail(&self, lines: usize) -> String {
        let output = lock(&self.0);
        let bytes: Vec<u8> = output.tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let mut last: Vec<&str> = text.lines().rev().take(lines).map(str::trim_end).collect();
        last.reverse();
        last.join("\n")
    }

    /// The guest kernel's last words, if it has panicked.
    #[must_use]
    pub fn guest_panic(&self) -> Option<String> {
        lock(&self.0).panic.clone()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = sm_hypervisor::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.pulse()
    }
}

/// The UART's registers, see `vm_superio::SerialState`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartState {
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

type Registers = Serial<Line, NoEvents, Console>;

/// The UART at COM1.
#[derive(Debug)]
pub(crate) struct Uart {
    registers: Mutex<Registers>,
    irq: Arc<dyn IrqLine>,
    console: Console,
}

impl Uart {
    /// A UART after reset.
    pub(crate) fn new(irq: Arc<dyn IrqLine>, console: Console) -> Self {
        Self {
            registers: Mutex::new(Serial::new(Line(irq.clone()), console.clone())),
            irq,
            console,
        }
    }

    /// The registers, for saving.
    pub(crate) fn save(&self) -> UartState {
        let state = lock(&self.registers).state();
        UartState {
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }

    /// Puts saved registers back. An interrupt that was pending is raised again.
    pub(crate) fn restore(&self, state: &UartState) -> Result<(), SerialError> {
        let state = SerialState {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        let registers = Serial::from_state(
            &state,
            Line(self.irq.clone()),
            NoEvents,
            self.console.clone(),
        )
        .map_err(|error| SerialError::State {
            reason: error.to_string(),
        })?;
        *lock(&self.registers) = registers;
        Ok(())
    }

    /// Hands input to the guest, all of it or nothing.
    pub(crate) fn input(&self, bytes: &[u8]) -> Result<(), SerialError> {
        let mut registers = lock(&self.registers);
        let room = registers.fifo_capacity();
        if bytes.len() > room {
            return Err(SerialError::Full {
                room,
                bytes: bytes.len(),
            });
        }
        if let Err(error) = registers.enqueue_raw_bytes(bytes) {
            tracing::warn!(%error, "the console could not signal input");
        }
        Ok(())
    }
}

impl MmioDevice for Uart {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Registers are bytes; wider accesses have no meaning.
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = lock(&self.registers).read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), &[byte]) = (u8::try_from(offset), data)
            && let Err(error) = lock(&self.registers).write(offset, byte)
        {
            tracing::debug!(%error, "the console missed something");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom};
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Debug, Default)]
    struct Pulses(AtomicU32);

    impl IrqLine for Pulses {
        fn pulse(&self) -> Result<(), sm_hypervisor::Error> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    fn console() -> (Console, File) {
        let file = tempfile::tempfile().unwrap();
        (Console::new(file.try_clone().unwrap()), file)
    }

    fn contents(mut file: File) -> String {
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn output_is_captured_as_it_comes() {
        let (console, file) = console();
        let uart = Uart::new(Arc::new(Pulses::default()), console.clone());
        for byte in b"one\ntwo\nthree" {
            uart.write(0, &[*byte]);
        }
        assert_eq!(contents(file), "one\ntwo\nthree");
        assert_eq!(console.tail(2), "two\nthree");
        assert_eq!(console.tail(100), "one\ntwo\nthree");
    }

    #[test]
    fn the_file_is_bounded_and_ends_with_the_last_lines() {
        let (mut console, file) = console();
        let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
        for _ in 0..(6 << 10) {
            console.write_all(&line).unwrap();
        }
        console.write_all(b"the end\n").unwrap();
        assert_eq!(console.tail(1), "the end");
        drop(console);
        let text = contents(file);
        assert!(text.len() < (4 << 20) + TAIL_LIMIT + 200);
        assert!(text.contains("is not kept"));
        assert!(text.ends_with("\nthe end\n"));
    }

    #[test]
    fn a_panic_is_noticed() {
        let (mut console, _file) = console();
        console
            .write_all(b"all is well\n[    1.0] Kernel pa")
            .unwrap();
        assert_eq!(console.guest_panic(), None);
        console
            .write_all(b"nic - not syncing: No init found.\r\nKernel panic - not syncing: again\n")
            .unwrap();
        assert_eq!(
            console.guest_panic().unwrap(),
            "Kernel panic - not syncing: No init found."
        );
    }

    #[test]
    fn registers_survive_save_and_restore() {
        let pulses = Arc::new(Pulses::default());
        let uart = Uart::new(pulses.clone(), console().0);
        uart.write(1, &[1]); // received data interrupt
        uart.write(7, &[0x5a]);
        uart.input(b"hello").unwrap();
        let state = uart.save();
        let raised = pulses.0.load(Ordering::Relaxed);
        assert_eq!(raised, 1);

        let again = Uart::new(pulses.clone(), console().0);
        again.restore(&state).unwrap();
        assert_eq!(again.save(), state);
        assert_eq!(pulses.0.load(Ordering::Relaxed), raised + 1);
        let mut byte = [0];
        again.read(0, &mut byte);
        assert_eq!(byte, *b"h");

        let mut bad = state;
        bad.input = vec![0; 100_000];
        assert!(matches!(
            again.restore(&bad),
            Err(SerialError::State { .. })
        ));
    }

    #[test]
    fn input_is_taken_whole_or_not_at_all() {
        let uart = Uart::new(Arc::new(Pulses::default()), console().0);
        uart.input(&[1; 60]).unwrap();
        assert!(matches!(
            uart.input(&[1; 10]),
            Err(SerialError::Full { room: 4, bytes: 10 })
        ));
        assert_eq!(uart.save().input.len(), 60);
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let uart = Uart::new(Arc::new(Pulses::default()), console().0);
        uart.write(0, b"ab");
        let mut data = [0xff; 4];
        uart.read(5, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
