//! `sm ps`, `inspect` and `stats`.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::anyhow;
use serde::{Serialize, Serializer};
use sm_runtime::id::{SHORT_LEN, VmId};
use sm_runtime::publish::{HostEnd, PublishedPort};
use sm_runtime::{
    Damaged, Error, GuestStats, HealthStatus, Inspection, Inspections, Sm, StateView, Vm, VmState,
    VmStatus,
};

use super::shown_vm;
use crate::args::{InspectArgs, PortArgs, PsArgs, StatsArgs};
use crate::failure::{FAILED, Failure};
use crate::filter::{Filters, OF_VMS};
use crate::listing::{Form, Listing};
use crate::printer::Printer;
use crate::table;
use crate::template::Template;
use crate::units::{format_age, format_size};

/// Longest command in a table.
const COMMAND_WIDTH: usize = 30;

/// Time limit for the answers of VMs.
pub(super) const PS_TIMEOUT: Duration = Duration::from_secs(5);

/// A VM in the output of `sm ps --json`.
#[derive(Serialize)]
struct Row<'a> {
    id: &'a str,
    name: &'a str,
    image: &'a str,
    command: &'a [String],
    created_ns: u64,
    memory: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_limit: Option<u64>,
    cpus: u32,
    labels: &'a BTreeMap<String, String>,
    #[serde(flatten)]
    state: &'a StateView,
}

pub(crate) fn ps(sm: &Sm, args: &PsArgs, printer: &Printer) -> Result<u32, Failure> {
    let filters = Filters::parse(&args.filter, OF_VMS)?;
    let form = args.list.form()?;
    let Inspections {
        mut vms,
        mut damaged,
        ..
    } = sm.vms().inspect(PS_TIMEOUT)?;
    // As for Docker, these conditions make -a unnecessary.
    let last = args.last.or(args.latest.then_some(1));
    let all = args.all || last.is_some() || filters.has("status") || filters.has("exited");
    vms.retain(|vm| (all || is_up(vm.state.status)) && filters.match_vm(vm));
    if let Some(last) = last {
        vms.truncate(last);
    }
    let short = |id: &VmId| match args.no_trunc {
        true => id.as_str().to_owned(),
        false => id.short().to_owned(),
    };
    if !filters.is_empty() || matches!(form, Form::Lines(_)) {
        damaged.clear();
    }
    let states: Vec<_> = damaged.iter().map(StateView::damaged).collect();
    let vms = vms.iter().map(ListedVm::Readable);
    let damaged = damaged.iter().zip(&states);
    let rows: Vec<_> = vms
        .chain(damaged.map(|(damaged, state)| ListedVm::Damaged(damaged, state)))
        .collect();
    let now = SystemTime::now();
    let listing = Listing {
        header: &[
            "VM ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAME",
        ],
        name: &|vm: &ListedVm<'_>| short(vm.id()),
        cells: &|vm| match vm {
            ListedVm::Readable(vm) => row(vm, now, args.no_trunc).into(),
            ListedVm::Damaged(damaged, _) => {
                let status = match damaged.later {
                    true => format!("Unsupported: {}", damaged.reason),
                    false => format!("Damaged: {}", damaged.reason),
                };
                let mut cells = vec!["-".to_owned(); 7];
                cells.splice(0..1, [short(&damaged.id)]);
                cells.splice(4..5, [status]);
                cells
            }
        },
        members: &|vm| match vm {
            ListedVm::Readable(vm) => shown_vm::row(vm, row(vm, now, args.no_trunc)),
            ListedVm::Damaged(..) => serde_json::Value::Null,
        },
    };
    listing.print(&rows, &form, printer)?;
    Ok(0)
}

/// Returns true for VMs that are listed without -a: those with a process.
fn is_up(status: VmStatus) -> bool {
    !matches!(status, VmStatus::Created | VmStatus::Exited)
}

/// A VM in a list.
enum ListedVm<'a> {
    Readable(&'a Inspection),
    Damaged(&'a Damaged, &'a StateView),
}

impl ListedVm<'_> {
    fn id(&self) -> &VmId {
        match self {
            Self::Readable(vm) => &vm.config.id,
            Self::Damaged(damaged, _) => &damaged.id,
        }
    }
}

impl Serialize for ListedVm<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let none = BTreeMap::new();
        let row = match self {
            Self::Readable(vm) => Row {
                id: vm.config.id.as_str(),
                name: &vm.config.name,
                image: &vm.config.image,
                command: &vm.config.workload.argv,
                created_ns: since_epoch_ns(vm.config.created),
                memory: vm.config.memory_bytes,
                memory_limit: vm.config.memory_limit,
                cpus: vm.config.cpus,
                labels: &vm.config.labels,
                state: &vm.state,
            },
            Self::Damaged(damaged, state) => Row {
                id: damaged.id.as_str(),
                name: "",
                image: "",
                command: &[],
                created_ns: 0,
                memory: 0,
                memory_limit: None,
                cpus: 0,
                labels: &none,
                state,
            },
        };
        row.serialize(serializer)
    }
}

fn row(vm: &Inspection, now: SystemTime, no_trunc: bool) -> [String; 7] {
    let config = &vm.config;
    let mut command = config.workload.argv.join(" ");
    if !no_trunc && command.chars().count() > COMMAND_WIDTH {
        command = command.chars().take(COMMAND_WIDTH - 1).collect();
        command.push('…');
    }
    let id = if no_trunc {
        config.id.as_str()
    } else {
        config.id.short()
    };
    [
        id.to_owned(),
        config.image.clone(),
        format!("\"{}\"", command.escape_debug()),
        format!(
            "{} ago",
            format_age(now.duration_since(config.created).unwrap_or_default())
        ),
        status(vm, now),
        ports(&vm.state.published),
        config.name.clone(),
    ]
}

fn ports(published: &[PublishedPort]) -> String {
    let ports = published.iter().map(|port| port.publication.to_string());
    let ports: Vec<_> = ports.collect();
    ports.join(", ")
}

/// Prints one line for each published port (`sm port`).
pub(crate) fn port(sm: &Sm, args: &PortArgs, printer: &Printer) -> Result<u32, Failure> {
    let vm = sm.vm(&args.vm)?;
    let mut published = vm.inspect()?.state.published;
    if let Some(word) = &args.port {
        let (number, protocol) = word.split_once('/').unwrap_or((word, "tcp"));
        let wanted: u16 = number
            .parse()
            .map_err(|_| anyhow!("\"{word}\" is not a port: write a number, such as 80"))?;
        if protocol != "tcp" {
            return Err(anyhow!("\"{word}\" is not published: only TCP ports can be").into());
        }
        // Port 0 is that of a publication whose port in the guest is not fixed, as in JSON.
        published.retain(|port| port.publication.guest.map_or(0, NonZeroU16::get) == wanted);
        if published.is_empty() {
            return Err(anyhow!(
                "port {wanted} of VM \"{}\" is not published: see \"sm port {}\"",
                vm.name(),
                vm.name()
            )
            .into());
        }
    }
    if args.format.json() {
        printer.json(&published)?;
        return Ok(0);
    }
    for PublishedPort { publication, .. } in &published {
        match args.port.is_some() {
            true => printer.line(&publication.host),
            false => printer.line(format_args!(
                "{} -> {}{}",
                publication.guest_end(),
                publication.host,
                own_certificate(&publication.host)
            )),
        }
    }
    Ok(0)
}

/// Describes the path of the VM's self-signed certificate, for clients to trust.
fn own_certificate(host: &HostEnd) -> String {
    match host {
        HostEnd::Tls(end) if end.key.is_none() => end.certificate.as_ref(),
        _ => None,
    }
    .map(|path| format!(" (self-signed certificate: {})", path.display()))
    .unwrap_or_default()
}

fn status(vm: &Inspection, now: SystemTime) -> String {
    let state = &vm.state;
    match (state.status, &state.exit) {
        (VmStatus::Exited, Some(exit)) => format!(
            "Exited ({}) {} ago",
            exit.status,
            elapsed(exit.finished(), now)
        ),
        (VmStatus::Restarting, _) => match &state.last_exit {
            Some(exit) => format!(
                "Restarting ({}) {} ago",
                exit.status,
                elapsed(exit.finished(), now)
            ),
            None => "Restarting".to_owned(),
        },
        (VmStatus::Running, _) => match &state.health {
            Some(health) => {
                let health = match health.status {
                    HealthStatus::Starting => "health: starting",
                    other => other.as_str(),
                };
                format!("Up {} ({health})", elapsed(state.started, now))
            }
            None => format!("Up {}", elapsed(state.started, now)),
        },
        (VmStatus::Paused, _) => {
            let problem = state.problem.as_ref();
            let why = problem.map_or_else(String::new, |problem| format!(": {problem}"));
            format!("Up {} (paused{why})", elapsed(state.started, now))
        }
        (other, _) => {
            let mut text = other.to_string();
            if let Some(first) = text.get_mut(..1) {
                first.make_ascii_uppercase();
            }
            if let Some(problem) = &state.problem {
                text.push_str(": ");
                text.push_str(problem);
            }
            text
        }
    }
}

fn since_epoch_ns(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Formats the time that has passed; the epoch stands for an unknown time.
fn elapsed(since: Option<SystemTime>, now: SystemTime) -> String {
    let since = since.unwrap_or(UNIX_EPOCH);
    format_age(now.duration_since(since).unwrap_or_default())
}

pub(crate) fn inspect(sm: &Sm, args: &InspectArgs, printer: &Printer) -> Result<u32, Failure> {
    let template = args.format.as_deref();
    let template = template.filter(|text| *text != "json").map(Template::parse);
    let template = template.transpose()?;
    let mut found = Vec::new();
    let mut status = 0;
    for query in &args.vms {
        match sm.vm(query).and_then(|vm| vm.inspect()) {
            Ok(inspection) => found.push(shown_vm::inspection(&inspection)?),
            Err(error) => {
                printer.error(&error.into());
                status = FAILED;
            }
        }
    }
    match template {
        Some(template) => {
            for line in template.render(&found)? {
                printer.line(line);
            }
        }
        None => printer.json(&found)?,
    }
    Ok(status)
}

pub(crate) fn stats(sm: &Sm, args: &StatsArgs, printer: &Printer) -> Result<u32, Failure> {
    if args.profile {
        return profile(sm, args, printer);
    }
    let (mut rows, mut status) = (Vec::new(), 0);
    let vms: Vec<Result<Vm, Error>> = match args.vms.as_slice() {
        [] => {
            let mut running = sm.vms().list()?;
            running.retain(|vm| matches!(vm.state(), Ok(VmState::Running)));
            running.into_iter().map(Ok).collect()
        }
        queries => queries.iter().map(|query| sm.vm(query)).collect(),
    };
    for vm in vms {
        let figures = vm.and_then(|vm| {
            Ok(Figures {
                id: vm.id().as_str().to_owned(),
                name: vm.name().to_owned(),
                stats: vm.stats()?,
            })
        });
        match figures {
            Ok(figures) => rows.push(figures),
            // It has ended meanwhile.
            Err(Error::NotRunning(_)) if args.vms.is_empty() => {}
            Err(error) => {
                printer.error(&error.into());
                status = FAILED;
            }
        }
    }
    if args.format.json() {
        match (args.vms.len(), rows.as_slice()) {
            // The form for a single VM, of which programs know the name.
            (1, [one]) => printer.json(one)?,
            (1, _) => {}
            (_, all) => printer.json(&all)?,
        }
        return Ok(status);
    }
    if rows.is_empty() && status != 0 {
        return Ok(status);
    }
    let rows: Vec<_> = rows.iter().map(Figures::cells).collect();
    printer.line(table::render(
        [
            "VM ID",
            "NAME",
            "MEMORY USED",
            "MEMORY",
            "PROCESSES",
            "CPU TIME",
            "OOM KILLS",
        ],
        &rows,
    ));
    Ok(status)
}

/// The figures of a VM.
#[derive(Serialize)]
struct Figures {
    id: String,
    name: String,
    #[serde(flatten)]
    stats: GuestStats,
}

impl Figures {
    fn cells(&self) -> [String; 7] {
        let stats = &self.stats;
        let used = stats
            .memory_total_kib
            .saturating_sub(stats.memory_available_kib);
        let kib = |kib: u64| format_size(kib.saturating_mul(1024));
        [
            self.id.get(..SHORT_LEN).unwrap_or(&self.id).to_owned(),
            self.name.clone(),
            kib(used),
            kib(stats.memory_total_kib),
            stats.processes.to_string(),
            format!("{:.3} s", Duration::from_micros(stats.cpu_us).as_secs_f64()),
            stats.oom_kills.to_string(),
        ]
    }
}

/// Measures the stages of a VM's connections (`sm stats --profile`).
fn profile(sm: &Sm, args: &StatsArgs, printer: &Printer) -> Result<u32, Failure> {
    let [query] = args.vms.as_slice() else {
        return Err(anyhow!("--profile measures one VM at a time").into());
    };
    let vm = sm.vm(query)?;
    vm.start_profile()?;
    let seconds = args.interval;
    printer.note(format_args!("measuring for {seconds} s"));
    std::thread::sleep(Duration::from_secs(seconds));
    let times = vm.end_profile()?;
    if args.format.json() {
        printer.json(&times)?;
        return Ok(0);
    }
    let shown =
        |ns: u64, unit: f64| format!("{:.1}", Duration::from_nanos(ns).as_secs_f64() * unit);
    let micros = |ns| shown(ns, 1e6);
    let rows: Vec<_> = times
        .iter()
        .map(|stage| {
            [
                stage.stage.clone(),
                stage.count.to_string(),
                shown(stage.total_ns, 1e3),
                micros(stage.p50_ns),
                micros(stage.p90_ns),
                micros(stage.p99_ns),
                micros(stage.max_ns),
            ]
        })
        .collect();
    printer.line(table::render(
        [
            "STAGE",
            "COUNT",
            "TOTAL (ms)",
            "P50 (us)",
            "P90 (us)",
            "P99 (us)",
            "MAX (us)",
        ],
        &rows,
    ));
    Ok(0)
}
