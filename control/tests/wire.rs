//! The JSON form of messages. Clients of other versions and in other languages read it,
//! so every change of it must be deliberate.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fmt::Debug;
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sm_control::config::{LaunchConfig, NetworkConfigV1, RestartPolicy};
use sm_control::exit::{ExitReason, ExitRecord, FailureCause};
use sm_control::id::VmId;
use sm_control::launch::{
    BalloonReport, ControlAnswer, ControlCall, DiskSegment, HealthReport, HealthResult,
    HealthStatus, ImageSource, LaunchPurpose, LaunchRequest, LaunchRequestError, Paging,
    RestartProgress, SnapshotReport, Stage, StageTimes, StartSource, Status, VmIdentityReport,
    VmmReport,
};
use sm_control::publish::{PortStats, Publication, PublishedPort};
use sm_control::timings::Phase;
use sm_control::workload::Workload;

/// Asserts that `value` serialises to `form` and that `form` deserialises to `value`.
#[track_caller]
fn is<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T, form: &Value) {
    assert_eq!(serde_json::to_value(value).unwrap(), *form);
    assert_eq!(serde_json::from_value::<T>(form.clone()).unwrap(), *value);
}

fn id() -> VmId {
    VmId::parse(&"ab".repeat(32)).unwrap()
}

fn config() -> LaunchConfig {
    LaunchConfig {
        id: id(),
        name: "web".into(),
        image: "nginx".into(),
        image_digest: "sha256:00".into(),
        created_ns: 1,
        workload: Workload {
            argv: vec!["/bin/true".into()],
            cwd: "/".into(),
            hostname: "web".into(),
            stop_signal: 15,
            ..Workload::default()
        },
        memory: 1 << 28,
        memory_limit: None,
        cpus: 2,
        kernel: PathBuf::from("/k"),
        auto_remove: true,
        read_only: false,
        stop_timeout_ms: 10_000,
        publish: vec!["8080:80".parse().unwrap()],
        publish_wait_ms: 1000,
        labels: [("a".to_owned(), "b".to_owned())].into(),
        restart: RestartPolicy::Always,
        health: None,
        expire_ms: None,
        network: NetworkConfigV1::default(),
    }
}

fn config_form() -> Value {
    json!({
        "id": "ab".repeat(32), "name": "web", "image": "nginx", "image_digest": "sha256:00",
        "created_ns": 1,
        "workload": {
            "argv": ["/bin/true"], "env": [], "cwd": "/", "user": "", "tty": false,
            "stdin": false, "hostname": "web", "stop_signal": 15,
        },
        "memory": 1 << 28, "memory_limit": null, "cpus": 2, "kernel": "/k", "auto_remove": true,
        "read_only": false, "stop_timeout_ms": 10_000,
        "publish": [{"host": {"tcp": "127.0.0.1:8080"}, "guest": 80}],
        "publish_wait_ms": 1000, "labels": {"a": "b"}, "restart": "always",
        "health": null, "expire_ms": null, "network": {"mode": "user", "mtu": 1500},
    })
}

#[test]
fn a_configuration() {
    is(&config(), &config_form());
}

#[test]
fn publications() {
    let form = |publication: Publication| serde_json::to_value(publication).unwrap();
    assert_eq!(
        form(Publication::unix("/s:80").unwrap()),
        json!({"host": {"unix": "/s"}, "guest": 80})
    );
    assert_eq!(
        form(Publication::handoff("/s").unwrap()),
        json!({"host": {"handoff": "/s"}, "guest": 0})
    );
    assert_eq!(
        form(Publication::hybrid("/s").unwrap()),
        json!({"host": {"hybrid": "/s"}, "guest": 0})
    );
    assert_eq!(
        form(Publication::tls("8443:443,name=a.test").unwrap()),
        json!({"host": {"tls": {
            "address": "127.0.0.1:8443", "certificate": null, "key": null,
            "names": ["a.test"], "protocols": [], "servers": [],
        }}, "guest": 443})
    );
}

#[test]
fn ends() {
    let lost = json!({
        "status": 137, "reason": "lost", "oom_killed": false, "finished_ns": 0,
        "started_ns": 0, "message": "the VMM process ended without leaving an exit status",
    });
    is(&ExitRecord::lost(), &lost);
    for (reason, form) in [
        (ExitReason::Workload, "workload"),
        (ExitReason::StartFailed, "start_failed"),
        (ExitReason::GuestFailed, "guest_failed"),
        (ExitReason::Destroyed, "destroyed"),
        (ExitReason::Lost, "lost"),
    ] {
        is(&reason, &json!(form));
    }
    let later: ExitReason = serde_json::from_value(json!("of_a_later_version")).unwrap();
    assert_eq!(later, ExitReason::Other);
    let later: FailureCause = serde_json::from_value(json!("of_a_later_version")).unwrap();
    assert_eq!(later, FailureCause::Other);
    is(
        &ExitRecord {
            cause: Some(FailureCause::AutomaticSnapshot),
            ..ExitRecord::lost()
        },
        &json!({
            "status": 137, "reason": "lost", "cause": "automatic_snapshot",
            "oom_killed": false, "finished_ns": 0, "started_ns": 0,
            "message": "the VMM process ended without leaving an exit status",
        }),
    );
    // Older records lack these members.
    let short = json!({"status": 3, "reason": "workload", "finished_ns": 7});
    let read: ExitRecord = serde_json::from_value(short).unwrap();
    assert_eq!((read.status, read.started_ns, read.message), (3, 0, None));
}

#[test]
fn a_launch_request() {
    let request = LaunchRequest {
        version: "1".into(),
        data: "/data".into(),
        run: "/run".into(),
        cache: "/cache".into(),
        config: config(),
        purpose: LaunchPurpose::Workload,
        cmdline: String::new(),
        source: StartSource::Image(ImageSource {
            root: vec![DiskSegment {
                path: "/d".into(),
                offset: 0,
                len: 4096,
            }],
            modules: None,
            cold: false,
        }),
        paging: Paging::Map,
        root_disk: None,
        upper_size: None,
        shm_size: Some(4096),
        mounts: Vec::new(),
        attach: true,
        columns: 80,
        rows: 25,
        start_timeout_ms: 60_000,
        phases: Vec::new(),
        existing: true,
        restarts: RestartProgress {
            count: 2,
            delay_ms: 200,
        },
    };
    let form = json!({
        "version": "1", "data": "/data", "run": "/run", "cache": "/cache",
        "config": config_form(), "purpose": "workload", "cmdline": "",
        "source": {"image": {
            "root": [{"path": "/d", "offset": 0, "len": 4096}], "modules": null, "cold": false,
        }},
        "paging": "map", "root_disk": null, "upper_size": null, "shm_size": 4096,
        "mounts": [], "attach": true, "columns": 80, "rows": 25,
        "start_timeout_ms": 60_000, "phases": [], "existing": true,
        "restarts": {"count": 2, "delay_ms": 200},
    });
    assert_eq!(serde_json::to_value(&request).unwrap(), form);
    let read: LaunchRequest = serde_json::from_value(form.clone()).unwrap();
    assert_eq!((read.config, read.source), (request.config, request.source));
    let read = |form: &Value| LaunchRequest::from_json(form.to_string().as_bytes());
    let other = read(&form).unwrap_err();
    assert!(matches!(other, LaunchRequestError::OtherVersion(version) if version == "1"));
    let mut own = form;
    own["version"] = json!(sm_control::VERSION);
    assert_eq!(read(&own).unwrap().cache, request.cache);
    let unknown = json!({"version": sm_control::VERSION, "members": "unknown"});
    let unknown = read(&unknown).unwrap_err();
    assert!(matches!(unknown, LaunchRequestError::Json(_)), "{unknown}");
    is(
        &StartSource::Snapshot("s".into()),
        &json!({"snapshot": "s"}),
    );
    is(
        &StartSource::IdentityReport("s".into()),
        &json!({"identity_report": "s"}),
    );
    is(&Paging::Prefault, &json!("prefault"));
    is(&Paging::Userfault, &json!("userfault"));
}

#[test]
fn reports() {
    is(&VmmReport::Hello, &json!("hello"));
    let phase = Phase::at("agent ready", 5);
    is(
        &VmmReport::Phase(phase),
        &json!({"phase": {"name": "agent ready", "at_ns": 5}}),
    );
    is(&VmmReport::Warning("w".into()), &json!({"warning": "w"}));
    is(
        &VmmReport::Started { pid: 2 },
        &json!({"started": {"pid": 2}}),
    );
    is(
        &VmmReport::IdentityReport(VmIdentityReport::default()),
        &json!({"evidence": {
            "random": "", "uuid": "", "machine_id": "", "boot_id": "", "epoch": "",
            "hostname": "", "mac": null, "realtime_ns": 0, "clock_error_ns": 0,
        }}),
    );
    let ended = serde_json::to_value(VmmReport::Ended(ExitRecord::lost())).unwrap();
    assert_eq!(ended["ended"]["status"], 137);
}

#[test]
fn calls() {
    for (call, form) in [
        (ControlCall::Status, json!("status")),
        (
            ControlCall::Attach { stdin: true },
            json!({"attach": {"stdin": true}}),
        ),
        (
            ControlCall::Signal { signal: 9 },
            json!({"signal": {"signal": 9}}),
        ),
        (
            ControlCall::Stop { grace_ms: None },
            json!({"stop": {"grace_ms": null}}),
        ),
        (
            ControlCall::Stop { grace_ms: Some(1) },
            json!({"stop": {"grace_ms": 1}}),
        ),
        (ControlCall::Destroy, json!("destroy")),
        (ControlCall::Pause, json!("pause")),
        (ControlCall::Resume, json!("resume")),
        (
            ControlCall::LimitMemory { bytes: Some(7) },
            json!({"limit_memory": {"bytes": 7}}),
        ),
        (ControlCall::Stats, json!("stats")),
        (
            ControlCall::Profile { on: true },
            json!({"profile": {"on": true}}),
        ),
        (
            ControlCall::Snapshot {
                name: "s".into(),
                stop: false,
                ephemeral: true,
            },
            json!({"snapshot": {"name": "s", "stop": false, "ephemeral": true}}),
        ),
        (ControlCall::Reset, json!("reset")),
        (ControlCall::Wait, json!("wait")),
        (ControlCall::Follow, json!("follow")),
    ] {
        is(&call, &form);
    }
    // A call of a later version does not parse.
    assert!(serde_json::from_value::<ControlCall>(json!("moonlight")).is_err());
}

#[test]
fn answers() {
    is(&ControlAnswer::Done, &json!("done"));
    is(&ControlAnswer::Error("e".into()), &json!({"error": "e"}));
    let status = Status {
        stage: Stage::Running,
        paused: false,
        lacks_space: false,
        vmm_pid: 7,
        epoch: "e".into(),
        started_ns: 1,
        clients: 2,
        published: vec![PublishedPort::new(
            "8080:80".parse().unwrap(),
            PortStats::default(),
        )],
        restarting: false,
        restarts: 3,
        health: Some(HealthReport {
            status: HealthStatus::Unhealthy,
            failing_streak: 3,
            results: vec![HealthResult {
                start_ns: 1,
                end_ns: 2,
                exit_code: 7,
                output: "o".into(),
            }],
        }),
        balloon: Some(BalloonReport {
            target: 5,
            size: 6,
            returned: 8,
        }),
    };
    is(
        &ControlAnswer::Status(status),
        &json!({"status": {
            "stage": "running", "paused": false, "lacks_space": false, "vmm_pid": 7, "epoch": "e",
            "started_ns": 1, "clients": 2,
            "published": [{
                "host": {"tcp": "127.0.0.1:8080"}, "guest": 80,
                "connections": {
                    "accepted": 0, "active": 0, "refused": 0, "evicted": 0,
                    "unanswered": 0, "to_guest": 0, "from_guest": 0,
                },
            }],
            "restarting": false, "restarts": 3,
            "health": {"status": "unhealthy", "failing_streak": 3, "log": [
                {"start_ns": 1, "end_ns": 2, "exit_code": 7, "output": "o"},
            ]},
            "balloon": {"target": 5, "size": 6, "returned": 8},
        }}),
    );
    is(&Stage::Starting, &json!("starting"));
    is(&Stage::Ending, &json!("ending"));
    let times = StageTimes {
        stage: "s".into(),
        count: 1,
        total_ns: 2,
        p50_ns: 3,
        p90_ns: 4,
        p99_ns: 5,
        max_ns: 6,
    };
    is(
        &ControlAnswer::Profile(vec![times]),
        &json!({"profile": [{
            "stage": "s", "count": 1, "total_ns": 2, "p50_ns": 3, "p90_ns": 4,
            "p99_ns": 5, "max_ns": 6,
        }]}),
    );
    is(
        &ControlAnswer::Snapshot(SnapshotReport::default()),
        &json!({"snapshot": {
            "name": "", "pages": 0, "parent": null, "frozen_us": 0, "paused_us": 0,
        }}),
    );
}
