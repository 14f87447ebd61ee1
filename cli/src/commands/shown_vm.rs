//! VMs with the names that Docker's templates and JSON have for containers.

use serde_json::{Map, Value, json};
use sm_runtime::publish::HostEnd;
use sm_runtime::{
    ExitRecord, Inspection, MountKindView, MountView, Publication, VmConfig, VmStatus,
};

use crate::failure::Failure;
use crate::listing::joined;
use crate::moment::timestamp;

/// The time that Docker shows for one that never came.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// Returns the members of a row of `sm ps` for templates; `cells` are those of the table.
pub(super) fn row(vm: &Inspection, cells: [String; 7]) -> Value {
    let [id, image, command, running_for, status, ports, name] = cells;
    let config = &vm.config;
    let mounts = vm.storage.mounts.iter().map(mount_name);
    let mounts: Vec<String> = mounts.collect();
    json!({
        "ID": id, "Image": image, "Command": command, "RunningFor": running_for,
        "Status": status, "Ports": ports, "Names": name,
        "State": vm.state.status.as_str(),
        "CreatedAt": time(config.created),
        "Labels": joined(&config.labels),
        "Mounts": mounts.join(","),
        "LocalVolumes": vm.storage.mounts.iter().filter(|m| m.kind == MountKindView::Volume).count(),
        "LabelMap": config.labels,
        "Memory": memory(config), "CPUs": config.cpus,
        "RestartPolicy": config.restart,
        "RestartCount": vm.state.restarts,
    })
}

/// Returns the JSON of `sm inspect`: that of the library, and `Id`, `Name`, `Created`,
/// `Image`, `State`, `Config`, `HostConfig` and `RestartCount` as in Docker's.
pub(super) fn inspection(vm: &Inspection) -> Result<Value, Failure> {
    let mut shown = serde_json::to_value(vm)?;
    let config = &vm.config;
    let (workload, network) = (&config.workload, &config.network);
    let extra_hosts = network.hosts.iter();
    let extra_hosts: Vec<String> = extra_hosts
        .map(|(address, name)| format!("{name}:{address}"))
        .collect();
    let dockers = json!({
        "Id": config.id,
        "Name": config.name,
        "Created": time(config.created),
        "Image": config.image_digest,
        "RestartCount": vm.state.restarts,
        "State": state(vm),
        "Mounts": vm.storage.mounts.iter().map(mount).collect::<Vec<_>>(),
        "NetworkSettings": network_settings(vm),
        "Config": {
            "Image": config.image, "Cmd": workload.argv, "Env": workload.env,
            "User": workload.user, "WorkingDir": workload.cwd, "Tty": workload.tty,
            "OpenStdin": workload.stdin, "Hostname": workload.hostname,
            "Labels": config.labels,
        },
        "HostConfig": {
            "AutoRemove": config.auto_remove, "Memory": memory(config),
            "NanoCpus": u64::from(config.cpus).saturating_mul(1_000_000_000),
            "ReadonlyRootfs": config.read_only,
            "NetworkMode": network.mode.as_str(), "Dns": network.dns,
            "DnsSearch": network.dns_search, "DnsOptions": network.dns_options,
            "ExtraHosts": extra_hosts,
            "RestartPolicy": {"Name": policy_name(&config.restart.to_string()),
                "MaximumRetryCount": retries(&config.restart.to_string())},
        },
    });
    if let (Value::Object(shown), Value::Object(dockers)) = (&mut shown, dockers) {
        shown.extend(dockers);
    }
    Ok(shown)
}

/// Returns the published ports by those of the guest, and the network. A guest's addresses are
/// the same in all VMs, and of no use on the host.
fn network_settings(vm: &Inspection) -> Value {
    let mut ports = Map::new();
    for port in &vm.state.published {
        let Publication { host, guest, .. } = &port.publication;
        let address = match host {
            HostEnd::Tcp(address) => address,
            HostEnd::Tls(end) => &end.address,
            _ => continue,
        };
        // The first port on which the guest listens has no number.
        let Some(guest) = guest else { continue };
        let host = json!({"HostIp": address.ip(), "HostPort": address.port().to_string()});
        let entry = ports.entry(format!("{guest}/tcp"));
        let hosts = entry.or_insert_with(|| json!([]));
        if let Value::Array(hosts) = hosts {
            hosts.push(host);
        }
    }
    let mut networks = Map::new();
    let network = &vm.config.network;
    networks.insert(
        network.mode.as_str().to_owned(),
        json!({"MacAddress": network.mac.as_deref().unwrap_or_default()}),
    );
    json!({
        "Ports": ports,
        "MacAddress": network.mac.as_deref().unwrap_or_default(),
        "Networks": networks,
    })
}

/// Returns the memory that a VM may use.
fn memory(config: &VmConfig) -> u64 {
    config.memory_limit.unwrap_or(config.memory_bytes)
}

fn state(vm: &Inspection) -> Value {
    let state = &vm.state;
    // While the VM runs, the end of its previous run.
    let exit = state.exit.as_ref().or(state.last_exit.as_ref());
    let is_up = matches!(
        state.status,
        VmStatus::Running | VmStatus::Paused | VmStatus::Ending | VmStatus::Restarting
    );
    let started = match state.status {
        VmStatus::Restarting => exit.and_then(ExitRecord::started),
        _ => state.started,
    };
    let mut shown = Map::new();
    let mut set = |name: &str, value: Value| shown.insert(name.to_owned(), value);
    set("Status", json!(dockers_status(state.status)));
    set("Running", json!(is_up));
    set("Paused", json!(state.status == VmStatus::Paused));
    set("Restarting", json!(state.status == VmStatus::Restarting));
    set("OOMKilled", json!(exit.is_some_and(|exit| exit.oom_killed)));
    set("Dead", json!(false));
    set("Pid", json!(state.pid.unwrap_or(0)));
    set("ExitCode", json!(exit.map_or(0, |exit| exit.status)));
    let error = exit.and_then(|exit| exit.message.as_deref());
    set("Error", json!(error.unwrap_or_default()));
    set(
        "StartedAt",
        json!(started.map_or_else(|| NEVER.to_owned(), time)),
    );
    let finished = exit.and_then(ExitRecord::finished);
    set(
        "FinishedAt",
        json!(finished.map_or_else(|| NEVER.to_owned(), time)),
    );
    if let Some(health) = &state.health {
        let at = |ns: u64| timestamp(ns);
        let log = health.results.iter().map(|result| {
            json!({
                "Start": at(result.start_ns), "End": at(result.end_ns),
                "ExitCode": result.exit_code, "Output": result.output,
            })
        });
        let log: Vec<Value> = log.collect();
        shown.insert(
            "Health".to_owned(),
            json!({
                "Status": health.status.as_str(), "FailingStreak": health.failing_streak,
                "Log": log,
            }),
        );
    }
    Value::Object(shown)
}

/// Returns the name of a volume, or the path of the host.
fn mount_name(mount: &MountView) -> String {
    match (&mount.name, &mount.source) {
        (Some(name), _) => name.clone(),
        (None, Some(source)) => source.display().to_string(),
        (None, None) => mount.kind.as_str().to_owned(),
    }
}

fn mount(mount: &MountView) -> Value {
    let source = mount.source.as_ref();
    let source = source.map(|path| path.display().to_string());
    json!({
        "Type": mount.kind.as_str(),
        "Name": mount.name.as_deref().unwrap_or_default(),
        "Source": source.unwrap_or_default(),
        "Destination": mount.target,
        "Mode": if mount.read_only { "ro" } else { "" },
        "RW": !mount.read_only,
    })
}

/// Returns Docker's word for a status; it has none for some of ours.
fn dockers_status(status: VmStatus) -> &'static str {
    match status {
        VmStatus::Starting | VmStatus::Ending => VmStatus::Running.as_str(),
        other => other.as_str(),
    }
}

fn policy_name(policy: &str) -> &str {
    policy.split_once(':').map_or(policy, |(name, _)| name)
}

fn retries(policy: &str) -> u32 {
    let max = policy.split_once(':').and_then(|(_, max)| max.parse().ok());
    max.unwrap_or(0)
}

fn time(time: std::time::SystemTime) -> String {
    let since = time
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    timestamp(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_split() {
        assert_eq!(
            (policy_name("on-failure:3"), retries("on-failure:3")),
            ("on-failure", 3)
        );
        assert_eq!((policy_name("always"), retries("always")), ("always", 0));
    }
}
