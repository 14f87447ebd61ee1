//! The forms of a VM's configuration that other versions of the program read: records,
//! sections of snapshots and printed JSON.
//!
//! The constants are what programs have written. A new member gets a default and a
//! constant of its own; an existing constant is never changed.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use sm_control::config::{
    ConfigView, HealthCheck, LaunchConfig, NetworkConfigV1, RecordConfigV1, RecordFormError,
    RestartPolicy, SettingsSourceV1, StartSettingsV1, StoredConfigV1, VmConfig,
};
use sm_control::id::VmId;
use sm_control::privileges::{GuestCapabilities, Privileges};
use sm_control::publish::Publication;
use sm_control::workload::{Rlimit, Sysctl, Workload};

/// A configuration in which every member differs from its default.
fn config() -> VmConfig {
    let mut config = VmConfig::new(VmId::parse(&"ab".repeat(32)).unwrap(), "web");
    config.image = "nginx".into();
    config.image_digest = "sha256:00".into();
    config.created = UNIX_EPOCH + Duration::from_nanos(1_700_000_000_000_000_001);
    config.workload = Workload {
        argv: vec!["/bin/true".into()],
        env: vec!["A=b".into()],
        cwd: "/srv".into(),
        user: "www".into(),
        groups: vec!["audio".into()],
        tty: true,
        stdin: true,
        hostname: "box".into(),
        stop_signal: 3,
        rlimits: vec![Rlimit {
            name: "nofile".into(),
            soft: 10,
            hard: u64::MAX,
        }],
        privileges: Privileges::default(),
        sysctls: Vec::new(),
    };
    config.memory_bytes = 1 << 28;
    config.cpus = 2;
    config.kernel = "/k".into();
    config.auto_remove = true;
    config.read_only = true;
    config.stop_timeout = Duration::from_millis(1500);
    config.publish = vec![
        "8080:80".parse().unwrap(),
        Publication::tls("8443:443,name=a.test,alpn=h2").unwrap(),
        Publication::unix("/s:80").unwrap(),
        Publication::handoff("/h").unwrap(),
        Publication::hybrid("/y").unwrap(),
    ];
    config.publish_wait = Duration::from_millis(2500);
    config.network = NetworkConfigV1::none();
    config
}

/// The members of records since version 0.1.0, and of snapshots.
fn form() -> Value {
    json!({
        "id": "ab".repeat(32), "name": "web", "image": "nginx", "image_digest": "sha256:00",
        "created_ns": 1_700_000_000_000_000_001_u64,
        "workload": {
            "argv": ["/bin/true"], "env": ["A=b"], "cwd": "/srv", "user": "www",
            "groups": ["audio"], "tty": true, "stdin": true, "hostname": "box",
            "stop_signal": 3,
            "rlimits": [{"name": "nofile", "soft": 10, "hard": u64::MAX}],
        },
        "memory": 1 << 28, "cpus": 2, "kernel": "/k", "auto_remove": true,
        "read_only": true, "stop_timeout_ms": 1500,
        "publish": [
            {"host": {"tcp": "127.0.0.1:8080"}, "guest": 80},
            {"host": {"tls": {
                "address": "127.0.0.1:8443", "certificate": null, "key": null,
                "names": ["a.test"], "protocols": ["h2"], "servers": [],
            }}, "guest": 443},
            {"host": {"unix": "/s"}, "guest": 80},
            {"host": {"handoff": "/h"}, "guest": 0},
            {"host": {"hybrid": "/y"}, "guest": 0},
        ],
        "publish_wait_ms": 2500,
    })
}

/// Removes members that early versions did not write.
fn early(mut form: Value) -> Value {
    let members = form.as_object_mut().unwrap();
    members.remove("publish");
    members.remove("publish_wait_ms");
    let workload = members["workload"].as_object_mut().unwrap();
    workload.remove("groups");
    workload.remove("rlimits");
    form
}

/// The configuration that [`early`] leaves.
fn early_config() -> VmConfig {
    let mut config = config();
    config.publish.clear();
    config.publish_wait = Duration::from_secs(1);
    config.workload.groups.clear();
    config.workload.rlimits.clear();
    config
}

#[test]
fn records_are_written_and_read() {
    let mut numbered = form();
    numbered["version"] = json!(1);
    let written = serde_json::to_value(RecordConfigV1::from(config())).unwrap();
    assert_eq!(written, numbered);
    let read = |form: &Value| VmConfig::from_record(form.to_string().as_bytes());
    assert_eq!(read(&numbered).unwrap(), config());
    // Records had no version at first, and fewer members.
    assert_eq!(read(&form()).unwrap(), config());
    assert_eq!(read(&early(form())).unwrap(), early_config());
}

#[test]
fn limits_of_privileges_are_written_and_read() {
    let mut config = config();
    config.workload.privileges = Privileges {
        capabilities: GuestCapabilities::named("KILL"),
        no_new_privileges: true,
    };
    config.workload.sysctls = vec![Sysctl {
        path: "net/core/somaxconn".into(),
        value: "9".into(),
    }];
    let written = serde_json::to_value(RecordConfigV1::from(config.clone())).unwrap();
    let workload = &written["workload"];
    assert_eq!(
        workload["privileges"],
        json!({"capabilities": ["KILL"], "no_new_privileges": true})
    );
    assert_eq!(
        workload["sysctls"],
        json!([{"path": "net/core/somaxconn", "value": "9"}])
    );
    let read = VmConfig::from_record(written.to_string().as_bytes()).unwrap();
    assert_eq!(read, config);
}

#[test]
fn records_of_later_versions_are_refused_by_number() {
    let read = |form: &Value| VmConfig::from_record(form.to_string().as_bytes()).unwrap_err();
    let error = read(&json!({"version": 2, "members": "unknown"}));
    assert!(matches!(error, RecordFormError::UnknownVersion(2)));
    assert!(error.to_string().contains("version 2"), "{error}");
    let mut short = form();
    short.as_object_mut().unwrap().remove("memory");
    assert!(matches!(read(&short), RecordFormError::Json(_)));
}

#[test]
fn sections_of_snapshots_are_written_and_read() {
    let section = StoredConfigV1::from(config());
    assert_eq!(serde_json::to_value(&section).unwrap(), form());
    let read = |form| VmConfig::from(serde_json::from_value::<StoredConfigV1>(form).unwrap());
    assert_eq!(read(form()), config());
    assert_eq!(read(early(form())), early_config());
}

/// A configuration with the members of a VM's life, which are later than [`config`].
fn living() -> VmConfig {
    let mut config = config();
    config.labels = [("role".to_owned(), "web".to_owned())].into();
    config.restart = RestartPolicy::OnFailure { max: 3 };
    config.health = Some(HealthCheck {
        start_period_ms: 500,
        ..HealthCheck::shell("test -e /ok")
    });
    config.expire = Some(Duration::from_secs(60));
    config.memory_limit = Some(1 << 27);
    config
}

/// The members of [`living`].
fn living_form() -> Value {
    let mut form = form();
    form["labels"] = json!({"role": "web"});
    form["restart"] = json!("on-failure:3");
    form["health"] = json!({
        "command": ["/bin/sh", "-c", "test -e /ok"], "interval_ms": 30_000,
        "timeout_ms": 30_000, "start_period_ms": 500, "retries": 3,
    });
    form["expire_ms"] = json!(60_000);
    form["memory_limit"] = json!(1 << 27);
    form
}

#[test]
fn members_of_a_life_are_written_and_read() {
    let section = StoredConfigV1::from(living());
    assert_eq!(serde_json::to_value(&section).unwrap(), living_form());
    let read: StoredConfigV1 = serde_json::from_value(living_form()).unwrap();
    assert_eq!(VmConfig::from(read), living());
}

#[test]
fn records_keep_the_settings_of_starts() {
    let start = StartSettingsV1 {
        source: SettingsSourceV1::Image { cold: true },
        cmdline: "quiet".into(),
        paging: sm_control::launch::Paging::Prefault,
        root_disk: None,
        upper_size: Some(1),
        mounts: Vec::new(),
        volumes_in_root: Vec::new(),
        shm_size: Some(2),
        start_timeout_ms: 7,
    };
    let record = RecordConfigV1 {
        start: Some(start.clone()),
        ..RecordConfigV1::from(living())
    };
    let mut form = living_form();
    form["version"] = json!(1);
    form["start"] = json!({
        "source": {"image": {"cold": true}}, "cmdline": "quiet", "paging": "prefault",
        "upper_size": 1, "shm_size": 2, "start_timeout_ms": 7,
    });
    assert_eq!(serde_json::to_value(&record).unwrap(), form);
    let read = RecordConfigV1::from_record(form.to_string().as_bytes()).unwrap();
    assert_eq!(read, record);
    // Early records have names for the guest here.
    let mut names = form.clone();
    names["start"]["extra_hosts"] = json!([["10.0.0.1", "a"]]);
    names["start"]["nameservers"] = json!(["10.0.0.2"]);
    let read = RecordConfigV1::from_record(names.to_string().as_bytes()).unwrap();
    assert_eq!(read.start, record.start);
    let mut network = NetworkConfigV1::none();
    network.hosts = vec![("10.0.0.1".into(), "a".into())];
    network.dns = vec!["10.0.0.2".parse().unwrap()];
    assert_eq!(read.config.network, network);
    // Early records have none, and small ones have defaults.
    let early = RecordConfigV1::from_record(early(self::form()).to_string().as_bytes()).unwrap();
    assert_eq!(early.start, None);
    form["start"] = json!({"source": {"snapshot": "warm"}, "start_timeout_ms": 7});
    let read = RecordConfigV1::from_record(form.to_string().as_bytes()).unwrap();
    let source = SettingsSourceV1::Snapshot("warm".to_owned());
    assert_eq!(read.start.unwrap().source, source);
}

#[test]
fn networks_are_written_and_read() {
    let mut config = config();
    let mut form = form();
    // Without members, it is the default of an early version: none.
    config.network = NetworkConfigV1::default();
    form["network"] = json!({"mode": "user", "mtu": 1500});
    assert_eq!(
        serde_json::to_value(StoredConfigV1::from(config.clone())).unwrap(),
        form
    );
    let network = &mut config.network;
    network.allow = vec!["tcp:example.com:443".into()];
    network.deny = vec!["10.0.0.0/8".into()];
    network.dns = vec!["10.0.0.2".parse().unwrap()];
    network.dns_search = vec!["a.example".into()];
    network.dns_options = vec!["ndots:2".into()];
    network.hosts = vec![("host-gateway".into(), "host".into())];
    network.mac = Some("02:00:00:00:00:07".into());
    network.mtu = 9000;
    network.rate = std::num::NonZeroU64::new(7);
    network.capture = Some("/p".into());
    form["network"] = json!({
        "mode": "user", "allow": ["tcp:example.com:443"], "deny": ["10.0.0.0/8"],
        "dns": ["10.0.0.2"], "dns_search": ["a.example"], "dns_options": ["ndots:2"],
        "hosts": [["host-gateway", "host"]], "mac": "02:00:00:00:00:07", "mtu": 9000,
        "rate": 7, "capture": "/p",
    });
    assert_eq!(
        serde_json::to_value(StoredConfigV1::from(config.clone())).unwrap(),
        form
    );
    let read: StoredConfigV1 = serde_json::from_value(form).unwrap();
    assert_eq!(VmConfig::from(read), config);
}

#[test]
fn the_printed_form_is_that_of_scripts() {
    let mut form = living_form();
    form["network"] = json!({"mode": "none", "mtu": 1500});
    assert_eq!(
        serde_json::to_value(ConfigView::from(living())).unwrap(),
        form
    );
}

#[test]
fn launch_requests_lose_nothing() {
    let sent = serde_json::to_vec(&LaunchConfig::from(living())).unwrap();
    let received: LaunchConfig = serde_json::from_slice(&sent).unwrap();
    assert_eq!(VmConfig::from(received.clone()), living());
    assert_eq!(StoredConfigV1::from(received), living().into());
}

#[test]
fn times_and_durations_beyond_the_forms_are_limited() {
    let mut far = config();
    far.stop_timeout = Duration::MAX;
    far.publish_wait = Duration::MAX;
    far.created = UNIX_EPOCH - Duration::from_secs(1);
    let launch = LaunchConfig::from(far);
    assert_eq!(
        (
            launch.created_ns,
            launch.stop_timeout_ms,
            launch.publish_wait_ms
        ),
        (0, u64::MAX, u32::MAX)
    );
    // Any number in a file is a time.
    let latest = LaunchConfig {
        created_ns: u64::MAX,
        ..launch
    };
    assert!(VmConfig::from(latest).created > UNIX_EPOCH);
}
