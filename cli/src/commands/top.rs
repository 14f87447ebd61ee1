//! `sm top`.

use std::time::Duration;

use anyhow::bail;
use sm_runtime::{GuestProcess, Sm};

use crate::args::TopArgs;
use crate::failure::Failure;
use crate::printer::Printer;
use crate::table;

/// A column: its name in `-o`, its header, and its text.
type Column = (&'static str, &'static str, fn(&GuestProcess) -> String);

const COLUMNS: [Column; 11] = [
    ("user", "USER", user),
    ("uid", "UID", |process| process.uid.to_string()),
    ("pid", "PID", |process| process.pid.to_string()),
    ("ppid", "PPID", |process| process.ppid.to_string()),
    ("state", "S", |process| process.state.clone()),
    ("pcpu", "%CPU", cpu_share),
    ("rss", "RSS", |process| process.rss_kib.to_string()),
    ("vsz", "VSZ", |process| process.vsz_kib.to_string()),
    ("etime", "ELAPSED", |process| clock(process.age_ms)),
    ("time", "TIME", |process| clock(process.cpu_ms)),
    ("cmd", "CMD", |process| process.command.clone()),
];

/// The columns of `ps -ef`, as far as a guest has them.
const USUAL: [&str; 7] = ["user", "pid", "ppid", "pcpu", "etime", "time", "cmd"];
/// The columns of `ps aux`.
const BSD: [&str; 8] = ["user", "pid", "pcpu", "vsz", "rss", "state", "time", "cmd"];

pub(crate) fn top(sm: &Sm, args: &TopArgs, printer: &Printer) -> Result<u32, Failure> {
    let columns = columns(&args.options)?;
    let processes = sm.vm(&args.vm)?.processes()?;
    if args.format.json() {
        printer.json(&processes)?;
        return Ok(0);
    }
    let header: Vec<&str> = columns.iter().map(|(_, header, _)| *header).collect();
    let row = |process: &GuestProcess| columns.iter().map(|(_, _, text)| text(process)).collect();
    let rows: Vec<Vec<String>> = processes.iter().map(row).collect();
    printer.line(table::render_columns(&header, &rows));
    Ok(0)
}

/// Reads the options of ps that have a meaning for a guest: `-o`, `aux`, `-ef` and the like.
fn columns(options: &[String]) -> anyhow::Result<Vec<Column>> {
    let mut names: Vec<String> = USUAL.iter().map(|&name| name.to_owned()).collect();
    let mut words = options.iter();
    while let Some(word) = words.next() {
        let list = match word.as_str() {
            "-o" | "o" | "-O" | "--format" => words.next(),
            "aux" | "-aux" | "u" | "-u" => {
                names = BSD.iter().map(|&name| name.to_owned()).collect();
                continue;
            }
            other => match other.strip_prefix("-o").or(other.strip_prefix("--format=")) {
                Some(_) => Some(word),
                // Which processes are shown: here always all.
                None if other
                    .trim_start_matches('-')
                    .chars()
                    .all(|c| "aefxAwjl".contains(c)) =>
                {
                    continue;
                }
                None => {
                    bail!("\"{other}\" is no option of ps that is known here: use -o, aux or -ef")
                }
            },
        };
        let Some(list) = list else {
            bail!("-o has no list of columns: write -o pid,cmd");
        };
        let list = list
            .trim_start_matches("--format=")
            .trim_start_matches("-o");
        names = list.split(',').map(str::to_owned).collect();
    }
    names.iter().map(|name| column(name.trim())).collect()
}

fn column(name: &str) -> anyhow::Result<Column> {
    let known = match name {
        "comm" | "args" | "command" => "cmd",
        "s" | "stat" => "state",
        "%cpu" | "c" => "pcpu",
        "cputime" => "time",
        "rssize" => "rss",
        "vsize" => "vsz",
        "euser" => "user",
        "euid" => "uid",
        other => other,
    };
    let found = COLUMNS.into_iter().find(|(column, ..)| *column == known);
    match found {
        Some(column) => Ok(column),
        None => {
            let all: Vec<&str> = COLUMNS.iter().map(|(name, ..)| *name).collect();
            bail!(
                "\"{name}\" is no column here; these are: {}",
                all.join(", ")
            )
        }
    }
}

/// Names of other users are only known in the guest.
fn user(process: &GuestProcess) -> String {
    match process.uid {
        0 => "root".to_owned(),
        uid => uid.to_string(),
    }
}

/// Returns the share of one CPU since the start, in percent.
fn cpu_share(process: &GuestProcess) -> String {
    let tenths = process.cpu_ms.saturating_mul(1000) / process.age_ms.max(1);
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// Formats as ps does: `1-02:03:04` or `02:03:04`.
fn clock(ms: u64) -> String {
    let seconds = Duration::from_millis(ms).as_secs();
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let clock = format!("{hours:02}:{:02}:{:02}", seconds / 60 % 60, seconds % 60);
    match days {
        0 => clock,
        days => format!("{days}-{clock}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(options: &[&str]) -> anyhow::Result<Vec<&'static str>> {
        let options: Vec<_> = options.iter().map(|&word| word.to_owned()).collect();
        Ok(columns(&options)?
            .iter()
            .map(|(_, header, _)| *header)
            .collect())
    }

    #[test]
    fn options_of_ps_choose_columns() {
        assert_eq!(headers(&[]).unwrap(), headers(&["-ef"]).unwrap());
        assert_eq!(headers(&["aux"]).unwrap()[3], "VSZ");
        for options in [
            &["-o", "pid,args"][..],
            &["-opid,cmd"],
            &["--format=pid,comm"],
        ] {
            assert_eq!(headers(options).unwrap(), ["PID", "CMD"]);
        }
        assert!(headers(&["-o"]).is_err());
        assert!(headers(&["-o", "colour"]).is_err());
        assert!(headers(&["--sort=pid"]).is_err());
    }

    #[test]
    fn times_are_those_of_ps() {
        assert_eq!(clock(3_723_000), "01:02:03");
        assert_eq!(clock(90_000_000), "1-01:00:00");
        let busy = GuestProcess {
            cpu_ms: 1,
            age_ms: 3,
            ..GuestProcess::default()
        };
        assert_eq!(cpu_share(&busy), "33.3");
    }
}
