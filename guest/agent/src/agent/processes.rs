//! The list of processes in the guest.

use std::fs;

use rustix::process::Pid;
use sm_event_loop::Key;
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::exec::GuestProcess;

use super::Agent;

/// Most processes in a list.
const MAX_PROCESSES: usize = 2000;
/// Most bytes of a command line in a list.
const MAX_COMMAND: usize = 1000;
/// Unit of times in `/proc/PID/stat`: `USER_HZ` is 100 on all architectures of Linux.
const TICKS_PER_SECOND: u64 = 100;

impl Agent {
    /// Answers session `key` with the processes of a container.
    pub(super) fn list_processes(&mut self, key: Key, id: &ContainerId) {
        let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let uptime_ms = milliseconds(uptime.split(' ').next().unwrap_or_default());
        let container = self.containers.named(id).ok();
        // The process that waits to become the main command is the agent's.
        let waiting = container.as_ref().and_then(|(_, container)| {
            let workload = &container.workload;
            workload.init().filter(|_| workload.main().is_none())
        });
        let pids = container.map_or_else(Vec::new, |(_, container)| container.cgroup.processes());
        let pids = pids.into_iter();
        let pids = pids.filter(|pid| Some(*pid) != waiting).take(MAX_PROCESSES);
        let mut found: Vec<GuestProcess> = pids.filter_map(|pid| process(pid, uptime_ms)).collect();
        found.sort_by_key(|process| process.pid);
        if let Some(session) = self.sessions.get_mut(key) {
            match serde_json::to_vec(&found) {
                Ok(json) => session.answer(&json),
                Err(error) => session.refuse(125, &format!("list processes: {error}")),
            }
        }
    }
}

/// Describes a process; `None` if it has exited.
fn process(pid: Pid, uptime_ms: u64) -> Option<GuestProcess> {
    let directory = format!("/proc/{}", pid.as_raw_nonzero());
    let read = |name: &str| fs::read_to_string(format!("{directory}/{name}")).ok();
    let status = read("status")?;
    let stat = Stat::parse(&read("stat")?)?;
    let arguments = fs::read(format!("{directory}/cmdline")).unwrap_or_default();
    let ppid = match innermost(&read_status_of(stat.ppid), "NSpid") {
        // Its parent is outside the workload's PID namespace.
        Some((_, 1)) | None => 0,
        Some((ppid, _)) => ppid,
    };
    Some(GuestProcess {
        pid: innermost(&status, "NSpid")?.0,
        ppid,
        uid: words(&status, "Uid").nth(1)?.parse().ok()?,
        state: stat.state,
        cpu_ms: stat.cpu_ms,
        age_ms: uptime_ms.saturating_sub(stat.start_ms),
        rss_kib: crate::cgroup::field(&status, "VmRSS"),
        vsz_kib: crate::cgroup::field(&status, "VmSize"),
        command: command(&arguments, &stat.name),
    })
}

fn read_status_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default()
}

/// Returns the words after `name:`.
fn words<'a>(status: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let line = status.lines().find_map(|line| {
        let (key, rest) = line.split_once(':')?;
        (key == name).then_some(rest)
    });
    line.unwrap_or_default().split_whitespace()
}

/// Returns the last number after `name:`, and how many there are: one for each PID
/// namespace.
fn innermost(status: &str, name: &str) -> Option<(u32, usize)> {
    let numbers: Vec<u32> = words(status, name)
        .filter_map(|word| word.parse().ok())
        .collect();
    Some((*numbers.last()?, numbers.len()))
}

/// The used members of `/proc/PID/stat` (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    state: String,
    ppid: u32,
    cpu_ms: u64,
    start_ms: u64,
}

impl Stat {
    fn parse(stat: &str) -> Option<Self> {
        // The name may contain parentheses and spaces.
        let (before, after) = stat.rsplit_once(')')?;
        let (_, name) = before.split_once('(')?;
        let members: Vec<&str> = after.split_whitespace().collect();
        // The numbers in proc(5) begin at 3 here.
        let ticks = |number: usize| members.get(number - 3)?.parse::<u64>().ok();
        let ms = |ticks: u64| ticks.saturating_mul(1000 / TICKS_PER_SECOND);
        Some(Self {
            name: name.to_owned(),
            state: (*members.first()?).to_owned(),
            ppid: members.get(1)?.parse().ok()?,
            cpu_ms: ms(ticks(14)?.saturating_add(ticks(15)?)),
            start_ms: ms(ticks(22)?),
        })
    }
}

/// Returns the text of a command line, whose arguments end with NUL.
fn command(arguments: &[u8], name: &str) -> String {
    let kept = arguments.get(..MAX_COMMAND).unwrap_or(arguments);
    let text = String::from_utf8_lossy(kept).replace('\0', " ");
    match text.trim_end() {
        "" => format!("[{name}]"),
        text => text.to_owned(),
    }
}

/// Converts seconds with a fraction.
fn milliseconds(seconds: &str) -> u64 {
    let (whole, fraction) = seconds.split_once('.').unwrap_or((seconds, ""));
    let whole: u64 = whole.parse().unwrap_or(0);
    let hundredths: u64 = fraction.get(..2).and_then(|f| f.parse().ok()).unwrap_or(0);
    whole.saturating_mul(1000).saturating_add(hundredths * 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_is_a_name() {
        let rest = "S 7 1 1 0 -1 4194560 9 9 0 0 150 50 0 0 20 0 1 0 300 1 1";
        let stat = Stat::parse(&format!("42 (a) b (c)) {rest}")).unwrap();
        assert_eq!(stat.name, "a) b (c)");
        assert_eq!((stat.state.as_str(), stat.ppid), ("S", 7));
        assert_eq!((stat.cpu_ms, stat.start_ms), (2000, 3000));
        assert_eq!(Stat::parse("42 (a"), None);
    }

    #[test]
    fn this_process_is_described() {
        let own = process(rustix::process::getpid(), u64::MAX).unwrap();
        assert!(own.rss_kib > 0 && own.vsz_kib >= own.rss_kib, "{own:?}");
        assert_eq!(own.state.len(), 1);
        assert!(!own.command.is_empty() && !own.command.contains('\0'));
    }

    #[test]
    fn the_innermost_number_is_that_of_the_workload() {
        let status = "Name:\tx\nNSpid:\t120\t7\t1\nUid:\t0\t5\t0\t0\n";
        assert_eq!(innermost(status, "NSpid"), Some((1, 3)));
        assert_eq!(innermost("", "NSpid"), None);
        assert_eq!(words(status, "Uid").nth(1), Some("5"));
        assert_eq!(milliseconds("12.34"), 12_340);
        assert_eq!(command(b"a\0b c\0", "x"), "a b c");
        assert_eq!(command(b"", "kworker"), "[kworker]");
    }
}
