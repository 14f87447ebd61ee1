//! `sm run` and `sm create`.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use serde::Serialize;
use sm_runtime::image::Image;
use sm_runtime::publish::Ports;
use sm_runtime::timings::Phase;
use sm_runtime::workload::{Overrides, Rlimit};
use sm_runtime::{
    ExitReason, ExitRecord, HealthCheck, HealthOptions, RunOptions, SignalSender, Sm, Vm,
};

use super::images;
use crate::args::{CreateArgs, LifeArgs, PrivilegeArgs, RunArgs, SecurityOption};
use crate::failure::{Failure, hint_of_cause};
use crate::printer::Printer;
use crate::stream::{self, End, Remote, Wiring};
use crate::units::{parse_label, read_label_file};
use crate::{terminal, timings};

/// Time for a workload to end after the reader of its output is gone.
const ABANDON_GRACE: Duration = Duration::from_secs(1);

/// The output of `--json` about a VM.
#[derive(Serialize)]
struct Report<'a> {
    id: &'a str,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit: Option<&'a ExitRecord>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    timings: Vec<timings::Step>,
}

pub(crate) fn run(begin: Phase, sm: &Sm, args: RunArgs, printer: &Printer) -> Result<u32, Failure> {
    let create = &args.create;
    let process = &create.process;
    if process.tty && !args.detach && process.interactive && !io::stdin().is_terminal() {
        return Err(anyhow!(
            "standard input is not a terminal: leave out -t, or run this from a terminal"
        )
        .into());
    }
    refuse_unsupported(create)?;
    let id_file = IdFile::create(create.life.cidfile.as_deref())?;
    let options = |begin| anyhow::Ok(options(begin, create)?.attach(!args.detach));
    let mut vm = match &create.from {
        Some(name) => {
            let snapshot = sm.snapshot(name)?;
            if snapshot.config().workload.tty && !args.detach && !io::stdin().is_terminal() {
                return Err(anyhow!(
                    "the workload of snapshot \"{name}\" runs on a terminal: \
                     add -d, or run this from a terminal"
                )
                .into());
            }
            snapshot.run(&options(begin)?)?
        }
        None => open(sm, create, printer)?.run(options(begin)?)?,
    };
    id_file.write(&vm)?;
    if let Some(path) = &args.pid_file
        && let Some(pid) = vm.inspect()?.state.pid
    {
        std::fs::write(path, format!("{pid}\n"))
            .with_context(|| format!("cannot write the process ID to {path:?}"))?;
    }
    for warning in vm.warnings() {
        printer.note(format_args!("sm: {warning}"));
    }
    if args.detach {
        print_identity(&vm, create.json, printer)?;
        return Ok(0);
    }
    foreground(&mut vm, &args, printer)
}

/// Creates a VM without starting it.
pub(crate) fn create(
    begin: Phase,
    sm: &Sm,
    args: &CreateArgs,
    printer: &Printer,
) -> Result<u32, Failure> {
    refuse_unsupported(args)?;
    let id_file = IdFile::create(args.life.cidfile.as_deref())?;
    let vm = match &args.from {
        Some(name) => sm.snapshot(name)?.create(&options(begin, args)?)?,
        None => open(sm, args, printer)?.create(options(begin, args)?)?,
    };
    id_file.write(&vm)?;
    print_identity(&vm, args.json, printer)?;
    Ok(0)
}

fn open(sm: &Sm, args: &CreateArgs, printer: &Printer) -> Result<Image, Failure> {
    images::open(sm, &args.image, args.pull, args.platform.as_ref(), printer)
}

fn refuse_unsupported(args: &CreateArgs) -> anyhow::Result<()> {
    if let Some(device) = args.privileges.device.first() {
        bail!(
            "device \"{device}\" cannot be given to a VM: a guest has its own kernel and \
             reaches no hardware of the host. Leave out --device"
        );
    }
    Ok(())
}

fn print_identity(vm: &Vm, json: bool, printer: &Printer) -> Result<(), Failure> {
    if json {
        return printer.json(&Report {
            id: vm.id().as_str(),
            name: vm.name(),
            exit: None,
            timings: timings::steps(vm.phases()),
        });
    }
    printer.line(vm.id());
    Ok(())
}

/// The file of `--cidfile`. It is created before the VM, as one that exists belongs to
/// another VM, and removed if there is no VM in the end.
struct IdFile(Option<(PathBuf, File)>);

impl IdFile {
    fn create(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Ok(Self(None));
        };
        let file = File::create_new(path).with_context(|| {
            format!("cannot create {path:?} for the VM's ID: remove it if its VM is gone")
        })?;
        Ok(Self(Some((path.to_owned(), file))))
    }

    fn write(mut self, vm: &Vm) -> anyhow::Result<()> {
        if let Some((path, mut file)) = self.0.take() {
            file.write_all(vm.id().as_str().as_bytes())
                .with_context(|| format!("cannot write the VM's ID to {path:?}"))?;
        }
        Ok(())
    }
}

impl Drop for IdFile {
    fn drop(&mut self) {
        if let Some((path, _)) = self.0.take() {
            // The failure of the start is the message for the user.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn foreground(vm: &mut Vm, args: &RunArgs, printer: &Printer) -> Result<u32, Failure> {
    let session = vm
        .take_session()
        .context("the VM was not started attached")?;
    let mut phases = vm.phases().to_vec();
    // The streams are those of the request, or of the snapshot.
    let wiring = Wiring {
        stdin: vm.config().workload.stdin,
        tty: vm.config().workload.tty,
    };
    let end = stream::run(session, wiring, &Workload::of(vm), &mut phases)?;
    let (status, exit) = match end {
        End::Exited { status, vm } => (status, vm),
        End::Detached => {
            printer.note(format_args!(
                "Detached; the VM continues as \"{}\"",
                vm.name()
            ));
            return Ok(0);
        }
        // The VM's process was killed.
        End::Lost => {
            let exit = vm.wait().ok();
            if exit.is_none() {
                printer.note("sm: the VM's process ended unexpectedly");
            }
            (exit.as_ref().map_or(137, |exit| exit.status), exit)
        }
    };
    if let Some(exit) = &exit {
        phases.clone_from(&with_all(&phases, exit));
        explain(exit, printer);
    }
    if args.timings && !args.create.json {
        printer.note(timings::render(&phases));
    }
    if args.create.json {
        let report = Report {
            id: vm.id().as_str(),
            name: vm.name(),
            exit: exit.as_ref(),
            timings: timings::steps(&phases),
        };
        printer.note_json(&report)?;
    }
    Ok(status)
}

/// Returns all phases: those of the exit record, if it has any.
fn with_all(seen: &[Phase], exit: &ExitRecord) -> Vec<Phase> {
    let mut phases = if exit.phases.is_empty() {
        seen.to_vec()
    } else {
        exit.phases.clone()
    };
    phases.push(Phase::now("command ends"));
    phases
}

/// Explains the end of the VM, unless the workload exited by itself.
fn explain(exit: &ExitRecord, printer: &Printer) {
    if exit.reason == ExitReason::Workload && !exit.oom_killed {
        return;
    }
    if let Some(message) = &exit.message {
        printer.note(format_args!("sm: {message}"));
    }
    if let Some(hint) = exit.cause.and_then(hint_of_cause) {
        printer.note(format_args!("  hint: {hint}"));
    }
}

/// A workload, controlled through the control socket, on which signals do not wait behind
/// input.
#[derive(Clone)]
pub(super) struct Workload(SignalSender);

impl Workload {
    pub(super) fn of(vm: &Vm) -> Self {
        Self(vm.signals())
    }
}

impl Remote for Workload {
    fn signal(&self, signal: u8) {
        // An error means that the workload has just ended.
        let _ = self.0.send(signal);
    }

    fn abandon(&self) {
        let _ = self.0.stop(ABANDON_GRACE);
    }
}

fn options(begin: Phase, args: &CreateArgs) -> anyhow::Result<RunOptions> {
    let process = &args.process;
    let mut overrides = Overrides::default();
    overrides.command.clone_from(&args.command);
    overrides.entrypoint.clone_from(&args.entrypoint);
    overrides.env = process.environment()?;
    overrides.user.clone_from(&process.user);
    overrides.groups.clone_from(&args.group_add);
    overrides.cwd.clone_from(&process.workdir);
    overrides.hostname.clone_from(&args.hostname);
    overrides.stop_signal.clone_from(&args.stop_signal);
    overrides.tty = process.tty;
    overrides.stdin = process.interactive;
    let rlimits = args.ulimit.iter().map(|text| parse_ulimit(text));
    overrides.rlimits = rlimits.collect::<anyhow::Result<_>>()?;
    privileges(&args.privileges, &mut overrides);
    let (columns, rows) = terminal::size().unwrap_or((80, 24));
    let mut options = RunOptions::new()
        .overrides(overrides)
        .cmdline(args.kernel_args.as_str())
        .cold(args.cold)
        .paging(args.paging.into())
        .auto_remove(args.rm)
        .read_only(args.read_only)
        .terminal_size(columns, rows)
        .start_timeout(Duration::from_secs(args.start_timeout))
        .publish_wait(args.publish_wait)
        .network(args.network.options())
        .phases(vec![begin]);
    options = life(&args.life, options)?;
    // Omitted options must not count as requests for the default.
    if let Some(memory) = args.memory {
        options = options.memory(memory);
    }
    if let Some(cpus) = args.cpus {
        options = options.cpus(cpus);
    }
    if let Some(size) = args.shm_size {
        options = options.shm_size(size);
    }
    if let Some(storage) = args.root_storage() {
        options = options.root(storage);
    }
    if let Some(seconds) = args.stop_timeout {
        options = options.stop_timeout(Duration::from_secs(seconds));
    }
    if let Some(name) = &args.name {
        options = options.name(name.as_str());
    }
    if let Some(kernel) = &args.kernel {
        options = options.kernel(kernel);
    }
    for mount in args.volume.iter().chain(&args.mount).chain(&args.tmpfs) {
        options = options.mount(mount.clone());
    }
    for (vm, read_only) in &args.volumes_from {
        options = options.volumes_from(vm.as_str(), *read_only);
    }
    let plain = args.publish.iter().flat_map(|Ports(ports)| ports);
    let ports = plain.chain(&args.publish_tls);
    let sockets = args.publish_unix.iter().chain(&args.handoff);
    for publication in ports.chain(sockets).chain(&args.hybrid_vsock) {
        options = options.publish(publication.clone());
    }
    Ok(options)
}

/// Applies the options about the workload's privileges.
fn privileges(args: &PrivilegeArgs, overrides: &mut Overrides) {
    overrides.cap_add.clone_from(&args.cap_add);
    overrides.cap_drop.clone_from(&args.cap_drop);
    overrides.privileged = args.privileged;
    for option in &args.security_opt {
        if let SecurityOption::NoNewPrivileges(yes) = option {
            overrides.no_new_privileges = *yes;
        }
    }
    overrides.sysctls.clone_from(&args.sysctl);
}

/// Applies the options about a VM's life.
fn life(args: &LifeArgs, options: RunOptions) -> anyhow::Result<RunOptions> {
    let mut options = options.restart(args.restart);
    for path in &args.label_file {
        for (name, value) in read_label_file(path)? {
            options = options.label(name, value);
        }
    }
    for label in &args.label {
        let (name, value) = parse_label(label)?;
        options = options.label(name, value);
    }
    if let Some(expire) = args.expire {
        options = options.expire(expire);
    }
    let mut health = HealthOptions::default();
    health.disabled = args.no_healthcheck;
    if let Some(line) = &args.health_cmd {
        health.command = HealthCheck::shell(line).command;
    }
    health.interval = args.health_interval;
    health.timeout = args.health_timeout;
    health.start_period = args.health_start_period;
    health.retries = args.health_retries;
    Ok(options.health(health))
}

/// Parses `nofile=1024:2048`; `unlimited` or -1 means no limit.
fn parse_ulimit(text: &str) -> anyhow::Result<Rlimit> {
    let bad = || anyhow!("\"{text}\" is not a limit: write NAME=SOFT or NAME=SOFT:HARD");
    let (name, limits) = text.split_once('=').ok_or_else(bad)?;
    let number = |limit: &str| match limit {
        "unlimited" | "-1" => Ok(u64::MAX),
        digits => digits.parse().map_err(|_| bad()),
    };
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    Ok(Rlimit {
        name: name.to_ascii_lowercase(),
        soft: number(soft)?,
        hard: number(hard)?,
    })
}

/// Exit status of a command whose VM has ended.
pub(super) const EXIT_VM_ENDED: u32 = 128 + 9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read() {
        let limit = parse_ulimit("NOFILE=1024:unlimited").unwrap();
        assert_eq!(
            (limit.name.as_str(), limit.soft, limit.hard),
            ("nofile", 1024, u64::MAX)
        );
        assert!(parse_ulimit("nofile").is_err());
        assert!(parse_ulimit("nofile=x").is_err());
    }
}
