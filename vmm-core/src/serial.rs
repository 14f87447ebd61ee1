//! The console: a 16550 at COM1 whose output is captured to a file.
//!
//! The file's size is bounded: after [`FILE_LIMIT`] bytes only a note and, at the end, the
//! last lines are added. The last lines are also kept in memory, for error messages.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sm_hypervisor::IrqLine;
use thiserror::Error;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use crate::bus::MmioDevice;

mod state;

pub use self::state::UartStateV1;

/// Length of the console output that is captured from the start: 4 MiB.
pub const FILE_LIMIT: u64 = 4 << 20;

/// Length of the latest console output that is kept in memory: 32 KiB.
pub const TAIL_LIMIT: usize = 32 << 10;

/// Longest line that is searched for a kernel panic.
const LINE_LIMIT: usize = 1024;

/// Start of Linux's last line in a panic.
const PANIC: &str = "Kernel panic - not syncing";

/// Reason why the console cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SerialError {
    /// Saved registers are inconsistent.
    #[error("saved state of the console does not fit: {reason}")]
    State {
        /// The element that does not fit, and the reason.
        reason: String,
    },
    /// The guest has not received the input.
    #[error("the console has room for {free} more bytes of input, not {bytes}")]
    Full {
        /// Free bytes of the UART's buffer.
        free: usize,
        /// Length of the input in bytes.
        bytes: usize,
    },
}

/// Takes a lock whose data stays usable after a panic.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Note at the end of the part of a file that is captured from the start.
const LIMIT_NOTE: &[u8] =
    b"\n[console output beyond 4 MiB is not captured; the last lines follow]\n";

/// The destination of console output.
///
/// A failed write, as on a full disk, does not end the capture: the next output is preceded
/// by the bytes that the file lacks, as far as they are still in the tail, and by a note of
/// the number of those that are not.
#[derive(Debug)]
struct Output {
    file: File,
    /// Bytes in the file.
    written: u64,
    /// Number of the latest bytes of output that the file lacks.
    missing: u64,
    /// The part of [`LIMIT_NOTE`] that is not in the file.
    note: &'static [u8],
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
        if self.written >= FILE_LIMIT {
            // After a failure, the next output tries again.
            let _ = self.write_note();
            return;
        }
        let was_complete = self.missing == 0;
        let captured = self.write_missing();
        self.missing += u64::try_from(bytes.len()).unwrap_or(0);
        let captured = captured.and_then(|()| {
            let mut rest = bytes;
            self.append(&mut rest, true)
        });
        if let Err(error) = captured
            && was_complete
        {
            tracing::warn!(%error, "console output is temporarily not captured");
        }
    }

    /// Appends `rest`, and sets it to the unwritten part. With `of_output`, the bytes are
    /// output that counted as missing.
    fn append(&mut self, rest: &mut &[u8], of_output: bool) -> io::Result<()> {
        while !rest.is_empty() {
            let count = match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            *rest = rest.get(count..).unwrap_or_default();
            let count = u64::try_from(count).unwrap_or(0);
            self.written += count;
            if of_output {
                self.missing = self.missing.saturating_sub(count);
            }
        }
        Ok(())
    }

    /// Appends the output that the file lacks, or a note of its length if the tail lacks
    /// it, too.
    fn write_missing(&mut self) -> io::Result<()> {
        if self.missing == 0 {
            return Ok(());
        }
        let missing = usize::try_from(self.missing).unwrap_or(usize::MAX);
        let in_tail = missing.min(self.tail.len());
        let lost = missing - in_tail;
        if lost > 0 {
            let note = format!("\n[{lost} bytes of console output could not be written]\n");
            self.append(&mut note.as_bytes(), false)?;
            self.missing = u64::try_from(in_tail).unwrap_or(0);
        }
        let from = self.tail.len() - in_tail;
        let latest: Vec<u8> = self.tail.range(from..).copied().collect();
        self.append(&mut latest.as_slice(), true)
    }

    fn write_note(&mut self) -> io::Result<()> {
        let mut rest = self.note;
        let written = self.append(&mut rest, false);
        self.note = rest;
        written
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
        // No later output could retry this.
        if self.written < FILE_LIMIT {
            let _ = self.write_missing();
            return;
        }
        let _ = self.write_note().and_then(|()| {
            let (first, second) = self.tail.as_slices();
            self.file.write_all(first)?;
            self.file.write_all(second)
        });
    }
}

/// The captured output of a machine's console. Clones refer to the same console.
#[derive(Clone, Debug)]
pub struct Console(Arc<Mutex<Output>>);

impl Console {
    /// Creates a console that captures to `file`, at its current position.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self(Arc::new(Mutex::new(Output {
            file,
            written: 0,
            missing: 0,
            note: LIMIT_NOTE,
            tail: VecDeque::new(),
            line: Vec::new(),
            panic: None,
        })))
    }

    /// Returns the last `lines` lines of output (of at most [`TAIL_LIMIT`] bytes).
    #[must_use]
    pub fn tail(&self, lines: usize) -> String {
        let output = lock(&self.0);
        let bytes: Vec<u8> = output.tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let mut last: Vec<&str> = text.lines().rev().take(lines).map(str::trim_end).collect();
        last.reverse();
        last.join("\n")
    }

    /// Returns the guest kernel's panic message, if it has panicked.
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
struct UartTrigger(Arc<dyn IrqLine>);

impl Trigger for UartTrigger {
    type E = sm_hypervisor::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.pulse()
    }
}

type Registers = Serial<UartTrigger, NoEvents, Console>;

/// The UART at COM1.
#[derive(Debug)]
pub(crate) struct Uart {
    registers: Mutex<Registers>,
    irq: Arc<dyn IrqLine>,
    console: Console,
}

impl Uart {
    /// Creates a UART in its reset state.
    pub(crate) fn new(irq: Arc<dyn IrqLine>, console: Console) -> Self {
        Self {
            registers: Mutex::new(Serial::new(UartTrigger(irq.clone()), console.clone())),
            irq,
            console,
        }
    }

    /// Saves the registers.
    pub(crate) fn save(&self) -> UartStateV1 {
        lock(&self.registers).state().into()
    }

    /// Restores saved registers. A pending interrupt is raised again.
    pub(crate) fn restore(&self, state: &UartStateV1) -> Result<(), SerialError> {
        state
            .check()
            .map_err(|reason| SerialError::State { reason })?;
        let state = SerialState::from(state);
        let registers = Serial::from_state(
            &state,
            UartTrigger(self.irq.clone()),
            NoEvents,
            self.console.clone(),
        )
        .map_err(|error| SerialError::State {
            reason: error.to_string(),
        })?;
        *lock(&self.registers) = registers;
        Ok(())
    }

    /// Passes input to the guest, all of it or nothing.
    pub(crate) fn input(&self, bytes: &[u8]) -> Result<(), SerialError> {
        let mut registers = lock(&self.registers);
        let free = registers.fifo_capacity();
        if bytes.len() > free {
            return Err(SerialError::Full {
                free,
                bytes: bytes.len(),
            });
        }
        if let Err(error) = registers.enqueue_raw_bytes(bytes) {
            tracing::warn!(%error, "the guest may have missed console input");
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
            tracing::debug!(%error, "a write to a console register failed");
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
    fn output_is_captured_immediately() {
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
        assert!(text.contains("is not captured"));
        assert!(text.ends_with("\nthe end\n"));
    }

    /// Returns a console whose file accepts 8 KiB until it is read, as a full disk accepts
    /// nothing until it has room.
    fn small_console() -> (Console, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        rustix::pipe::fcntl_setpipe_size(&writer, 8192).unwrap();
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(writer));
        (Console::new(file), reader)
    }

    /// Reads everything that a pipe contains.
    fn drain(reader: &mut io::PipeReader) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(count) = reader.read(&mut buffer)
            && count > 0
        {
            bytes.extend_from_slice(&buffer[..count]);
        }
        bytes
    }

    #[test]
    fn output_is_captured_again_after_a_failed_write() {
        let (mut console, mut reader) = small_console();
        let lines: Vec<u8> = (0..3000)
            .flat_map(|n| format!("{n}\n").into_bytes())
            .collect();
        for part in lines.chunks(100) {
            console.write_all(part).unwrap();
        }
        let mut seen = drain(&mut reader);
        assert!(!seen.is_empty() && seen.len() < lines.len());
        // Each output is preceded by as much of the missing part as there is room for.
        for _ in 0..10 {
            console.write_all(b"and on\n").unwrap();
            seen.extend(drain(&mut reader));
        }
        let expected = [lines, b"and on\n".repeat(10)].concat();
        assert_eq!(String::from_utf8(seen), String::from_utf8(expected));
    }

    #[test]
    fn the_last_lines_are_captured_at_the_end() {
        let (mut console, mut reader) = small_console();
        let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
        for _ in 0..8 {
            console.write_all(&line).unwrap();
        }
        console.write_all(b"Kernel panic\n").unwrap();
        assert_eq!(drain(&mut reader), line.repeat(8));
        drop(console);
        assert_eq!(drain(&mut reader), b"Kernel panic\n");
    }

    #[test]
    fn a_gap_is_noted_with_its_length() {
        let (mut console, mut reader) = small_console();
        let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
        for _ in 0..8 {
            console.write_all(&line).unwrap();
        }
        // The latest 32 KiB are still in the tail; 5 lines before them are not.
        for _ in 0..37 {
            console.write_all(&line).unwrap();
        }
        let mut seen = drain(&mut reader);
        for _ in 0..20 {
            console.write_all(b"!").unwrap();
            seen.extend(drain(&mut reader));
        }
        drop(console);
        let text = String::from_utf8(seen).unwrap();
        let note = "\n[5120 bytes of console output could not be written]\n";
        assert_eq!(text.matches("could not be written").count(), 1, "{text}");
        assert!(text.contains(note), "{text}");
        let without = text.replacen(note, "", 1);
        let expected = [line.repeat(8 + 32), b"!".repeat(20)].concat();
        assert_eq!(without.as_bytes(), expected);
    }

    #[test]
    fn a_panic_is_detected() {
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

    /// Every value that a guest brings about is restored, and others are refused.
    #[test]
    fn impossible_registers_are_refused() {
        let uart = Uart::new(Arc::new(Pulses::default()), console().0);
        let again = Uart::new(Arc::new(Pulses::default()), console().0);
        for offset in [1, 3, 4, 7, 0, 1, 2, 5, 6] {
            for value in 0..=u8::MAX {
                uart.write(offset, &[value]);
                if value % 16 == 0 {
                    let _ = uart.input(b"?");
                }
                again.restore(&uart.save()).unwrap();
                uart.read(u64::from(value % 8), &mut [0]);
                again.restore(&uart.save()).unwrap();
            }
        }
        let fresh = Uart::new(Arc::new(Pulses::default()), console().0).save();
        again.restore(&fresh).unwrap();
        type Change = fn(&mut UartStateV1);
        let changes: [(&str, Change); 6] = [
            ("interrupt enable register 0x10", |s| {
                s.interrupt_enable = 0x10
            }),
            ("identification 0x0", |s| s.interrupt_identification = 0),
            ("identification 0xc1", |s| s.interrupt_identification = 0xc1),
            ("line status 0x61", |s| s.line_status |= 1),
            ("line status 0x60", |s| s.input.push(1)),
            ("modem status 0xb1", |s| s.modem_status |= 1),
        ];
        for (reason, change) in changes {
            let mut state = fresh.clone();
            change(&mut state);
            let error = again.restore(&state).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
            assert_eq!(again.save(), fresh);
        }
    }

    #[test]
    fn input_is_accepted_as_a_whole_or_not_at_all() {
        let uart = Uart::new(Arc::new(Pulses::default()), console().0);
        uart.input(&[1; 60]).unwrap();
        assert!(matches!(
            uart.input(&[1; 10]),
            Err(SerialError::Full { free: 4, bytes: 10 })
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
