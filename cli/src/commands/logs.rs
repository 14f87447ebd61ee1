//! `sm logs`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};

use anyhow::Context as _;
use sm_runtime::Vm;
use sm_runtime::home::Home;
use sm_runtime::logs::{LogRecord, Stream};

use crate::args::LogsArgs;
use crate::failure::Failure;

pub(crate) fn logs(home: &Home, args: &LogsArgs) -> Result<u32, Failure> {
    let vm = Vm::find(home, &args.vm)?;
    if args.console {
        return console(&vm, args.tail);
    }
    let mut logs = vm.logs()?;
    let mut sink = Sink::new(args.timestamps);
    let mut held = Tail::new(args.tail);
    while let Some(record) = logs.next_record()? {
        if let Some(record) = held.push(record)
            && !sink.write(&record)
        {
            return Ok(0);
        }
    }
    for record in held.finish() {
        sink.write(&record);
    }
    if args.follow {
        while let Some(record) = logs.wait_record()? {
            if !sink.write(&record) {
                break;
            }
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
            // A reader that has gone away wants no more.
            let _ = io::copy(&mut file, &mut out);
        }
        Some(count) => {
            let text = io::read_to_string(&mut file)
                .with_context(|| format!("cannot read the console log {path:?}"))?;
            let lines: Vec<&str> = text.lines().collect();
            for line in lines.iter().skip(lines.len().saturating_sub(count)) {
                let _ = writeln!(out, "{line}");
            }
        }
    }
    Ok(0)
}

/// Writes records to the stream they came from.
struct Sink {
    timestamps: bool,
    /// The last bytes written to a stream did not end a line.
    mid_line: [bool; 2],
}

impl Sink {
    fn new(timestamps: bool) -> Self {
        Self {
            timestamps,
            mid_line: [false; 2],
        }
    }

    /// `false` when nobody reads any more.
    fn write(&mut self, record: &LogRecord) -> bool {
        let (out, index): (&mut dyn Write, usize) = match record.stream {
            Stream::Stdout => (&mut io::stdout().lock(), 0),
            Stream::Stderr => (&mut io::stderr().lock(), 1),
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

/// Holds back all but the last lines.
struct Tail {
    limit: Option<usize>,
    lines: usize,
    held: VecDeque<LogRecord>,
}

impl Tail {
    fn new(limit: Option<usize>) -> Self {
        Self {
            limit,
            lines: 0,
            held: VecDeque::new(),
        }
    }

    /// Takes a record; gives it back at once if nothing is to be held.
    fn push(&mut self, record: LogRecord) -> Option<LogRecord> {
        let Some(limit) = self.limit else {
            return Some(record);
        };
        // Cut into lines, so that whole records need not be kept.
        for line in record.bytes.split_inclusive(|byte| *byte == b'\n') {
            self.lines += usize::from(line.ends_with(b"\n"));
            self.held.push_back(LogRecord {
                bytes: line.to_vec(),
                ..record
            });
        }
        while self.lines > limit {
            if let Some(dropped) = self.held.pop_front() {
                self.lines -= usize::from(dropped.bytes.ends_with(b"\n"));
            }
        }
        None
    }

    fn finish(self) -> VecDeque<LogRecord> {
        self.held
    }
}

/// `2026-01-31T12:00:00.123456789Z` (RFC 3339, UTC).
fn timestamp(nanoseconds: u64) -> String {
    let (seconds, fraction) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to civil date in the proleptic Gregorian calendar, counting years
    // from March so that the leap day is the last.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{fraction:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(text: &str) -> LogRecord {
        LogRecord {
            stream: Stream::Stdout,
            time_ns: 0,
            bytes: text.as_bytes().to_vec(),
        }
    }

    #[test]
    fn the_tail_counts_lines_not_records() {
        let mut tail = Tail::new(Some(2));
        for text in ["a\nb\nc", "d\ne\n"] {
            assert_eq!(tail.push(record(text)), None);
        }
        let text: Vec<u8> = tail.finish().into_iter().flat_map(|r| r.bytes).collect();
        assert_eq!(text, b"cd\ne\n");
        assert_eq!(Tail::new(None).push(record("x")), Some(record("x")));
    }

    #[test]
    fn timestamps_are_rfc_3339() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(
            timestamp(1_709_210_096_000_000_007),
            "2024-02-29T12:34:56.000000007Z"
        );
    }
}
