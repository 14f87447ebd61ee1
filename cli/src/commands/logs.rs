//! `sm logs`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read as _, Write};

use anyhow::Context as _;
use sm_runtime::logs::{LogRecord, Stream};
use sm_runtime::{Sm, Vm};

use crate::args::LogsArgs;
use crate::failure::Failure;
use crate::moment::timestamp;

pub(crate) fn logs(sm: &Sm, args: &LogsArgs) -> Result<u32, Failure> {
    let vm = sm.vm(&args.vm)?;
    if args.console {
        return console(&vm, args.tail);
    }
    if args.net {
        return network(&vm, args);
    }
    let asked_for = |record: &LogRecord| {
        let (since, until) = (args.since.unwrap_or(0), args.until.unwrap_or(u64::MAX));
        (since..=until).contains(&record.time_ns)
    };
    let mut logs = vm.logs()?;
    let mut sink = LogSink::new(args.timestamps);
    let mut tail = Tail::new(args.tail);
    while let Some(record) = logs.next_record()? {
        if asked_for(&record)
            && let Some(record) = tail.push(record)
            && !sink.write(&record)
        {
            return Ok(0);
        }
    }
    for record in tail.finish() {
        sink.write(&record);
    }
    if args.follow {
        while let Some(record) = logs.wait_record()? {
            let late = args.until.is_some_and(|until| record.time_ns > until);
            if late || (asked_for(&record) && !sink.write(&record)) {
                break;
            }
        }
    }
    Ok(0)
}

/// Prints the events of the network, a line of JSON each.
fn network(vm: &Vm, args: &LogsArgs) -> Result<u32, Failure> {
    let (since, until) = (args.since.unwrap_or(0), args.until.unwrap_or(u64::MAX));
    let mut events = vm.network_events()?;
    events.retain(|event| (since..=until).contains(&event.time_ns));
    let first = args
        .tail
        .map_or(0, |count| events.len().saturating_sub(count));
    let mut out = io::stdout().lock();
    for event in events.iter().skip(first) {
        if writeln!(out, "{}", serde_json::to_string(event)?).is_err() {
            // The reader is gone.
            break;
        }
    }
    Ok(0)
}

fn console(vm: &Vm, tail: Option<usize>) -> Result<u32, Failure> {
    let path = vm.console_log();
    let mut file =
        File::open(&path).with_context(|| format!("cannot read the console log {path:?}"))?;
    let mut out = io::stdout().lock();
    match tail {
        None => {
            // An error means that the reader is gone.
            let _ = io::copy(&mut file, &mut out);
        }
        Some(count) => {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)
                .with_context(|| format!("cannot read the console log {path:?}"))?;
            // The console's bytes need not be text.
            let _ = out.write_all(last_lines(&bytes, count));
        }
    }
    Ok(0)
}

/// Returns the last `count` lines of `bytes`; bytes after the last line feed count as a
/// line.
fn last_lines(bytes: &[u8], count: usize) -> &[u8] {
    let lines = bytes.split_inclusive(|byte| *byte == b'\n');
    let len: usize = lines.rev().take(count).map(<[u8]>::len).sum();
    bytes.get(bytes.len() - len..).unwrap_or_default()
}

/// Writes records to the stream of their origin.
struct LogSink {
    timestamps: bool,
    /// True if the last bytes of a stream did not end a line.
    mid_line: [bool; 2],
}

impl LogSink {
    fn new(timestamps: bool) -> Self {
        Self {
            timestamps,
            mid_line: [false; 2],
        }
    }

    /// Writes a record; returns false if the reader is gone.
    fn write(&mut self, record: &LogRecord) -> bool {
        let (out, index): (&mut dyn Write, usize) = match record.stream {
            Stream::Stdout => (&mut io::stdout().lock(), 0),
            // The other one, and notes about the log itself.
            _ => (&mut io::stderr().lock(), 1),
        };
        let mut write = |out: &mut dyn Write| -> io::Result<()> {
            if !self.timestamps {
                out.write_all(&record.bytes)?;
                return out.flush();
            }
            for line in record.bytes.split_inclusive(|byte| *byte == b'\n') {
                if !self.mid_line[index] {
                    write!(out, "{} ", timestamp(record.time_ns))?;
                }
                out.write_all(line)?;
                self.mid_line[index] = !line.ends_with(b"\n");
            }
            out.flush()
        };
        write(out).is_ok()
    }
}

/// Buffers the last lines.
struct Tail {
    limit: Option<usize>,
    lines: usize,
    pending: VecDeque<LogRecord>,
}

impl Tail {
    fn new(limit: Option<usize>) -> Self {
        Self {
            limit,
            lines: 0,
            pending: VecDeque::new(),
        }
    }

    /// Adds a record; returns it at once if there is no limit.
    fn push(&mut self, record: LogRecord) -> Option<LogRecord> {
        let Some(limit) = self.limit else {
            return Some(record);
        };
        // Records are split into lines, so that dropped lines need no memory.
        for line in record.bytes.split_inclusive(|byte| *byte == b'\n') {
            self.lines += usize::from(line.ends_with(b"\n"));
            let line = LogRecord::new(record.stream, record.time_ns, line.to_vec());
            self.pending.push_back(line);
        }
        // An incomplete last line counts as a line.
        let open = self
            .pending
            .back()
            .is_some_and(|r| !r.bytes.ends_with(b"\n"));
        while self.lines + usize::from(open) > limit {
            let Some(dropped) = self.pending.pop_front() else {
                break;
            };
            self.lines -= usize::from(dropped.bytes.ends_with(b"\n"));
        }
        None
    }

    fn finish(self) -> VecDeque<LogRecord> {
        self.pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(text: &str) -> LogRecord {
        LogRecord::new(Stream::Stdout, 0, text.as_bytes().to_vec())
    }

    #[test]
    fn the_console_is_bytes() {
        let bytes = b"a\n\xff\r\nc";
        assert_eq!(last_lines(bytes, 0), b"");
        assert_eq!(last_lines(bytes, 1), b"c");
        assert_eq!(last_lines(bytes, 2), b"\xff\r\nc");
        assert_eq!(last_lines(bytes, 9), bytes);
        assert_eq!(last_lines(b"a\nb\n", 1), b"b\n");
    }

    #[test]
    fn the_tail_counts_lines_not_records() {
        let mut tail = Tail::new(Some(2));
        for text in ["a\nb\nc", "d\ne\n"] {
            assert_eq!(tail.push(record(text)), None);
        }
        let text: Vec<u8> = tail.finish().into_iter().flat_map(|r| r.bytes).collect();
        assert_eq!(text, b"cd\ne\n");
        let mut last = Tail::new(Some(1));
        assert_eq!(last.push(record("a\nb")), None);
        let text: Vec<u8> = last.finish().into_iter().flat_map(|r| r.bytes).collect();
        assert_eq!(text, b"b");
        assert_eq!(Tail::new(None).push(record("x")), Some(record("x")));
    }
}
