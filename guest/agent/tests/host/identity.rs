//! Tests of a guest's identity with various files in the image and actions of the
//! workload.

use std::os::unix::fs::symlink;
use std::path::Path;

use sm_guest_proto::control::{ControlReply, ControlRequest, GuestDns, Refresh};

use crate::client::{run, shell};
use crate::lifecycle::identity_report;
use crate::{Agent, Test};

pub(crate) const TESTS: &[Test] = &[
    (
        "the_images_machine_id_is_never_visible",
        the_images_machine_id_is_never_visible,
    ),
    (
        "identity_survives_the_actions_of_systemd",
        identity_survives_the_actions_of_systemd,
    ),
    (
        "identity_files_that_link_to_each_other",
        identity_files_that_link_to_each_other,
    ),
    (
        "names_are_those_of_the_last_refresh",
        names_are_those_of_the_last_refresh,
    ),
];

/// Clones with the image's own machine ID would share it, and an image may have any kind
/// of file at its path.
fn the_images_machine_id_is_never_visible() {
    type Build = fn(&Path);
    let builds: [(&str, Build); 4] = [
        ("a directory", |etc| {
            std::fs::create_dir_all(etc.join("machine-id/deep")).unwrap();
        }),
        ("a link to a device", |etc| {
            symlink("/dev/null", etc.join("machine-id")).unwrap();
        }),
        ("a link to nothing", |etc| {
            symlink("/var/lib/id", etc.join("machine-id")).unwrap();
        }),
        ("an identity", |etc| {
            std::fs::write(etc.join("machine-id"), "0".repeat(32)).unwrap();
        }),
    ];
    for (what, build) in builds {
        let agent = Agent::bare();
        let image = tempfile::tempdir().unwrap();
        let etc = image.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        build(&etc);
        let mut plan = agent.plan();
        plan.lower = image.path().to_str().unwrap().into();
        let mut control = agent.control();
        let attached = control.ask(&ControlRequest::AttachRoot(plan));
        assert_eq!(attached, ControlReply::Done, "{what}");
        let machine_id = "0123456789abcdef0123456789abcdef";
        control.ask(&ControlRequest::Refresh(Refresh {
            machine_id: machine_id.into(),
            ..Refresh::default()
        }));
        assert_eq!(identity_report(&agent).machine_id, machine_id, "{what}");
        let null = std::fs::metadata("/dev/null").unwrap();
        assert!(!null.is_file(), "{what}: the device stays one");
    }
}

/// systemd commits a machine ID that is a mount point: it unmounts it and writes it to
/// the file below. It mounts a file system over a `/run` that is not a mount point.
fn identity_survives_the_actions_of_systemd() {
    let agent = Agent::attached();
    let script = "
        if grep -q ' /etc/machine-id ' /proc/mounts; then
            id=$(cat /etc/machine-id); umount /etc/machine-id; echo $id >/etc/machine-id
        fi
        grep -q ' /run ' /proc/mounts || mount -t tmpfs run /run
        mount -o remount,ro / && mount -o remount,rw / && echo done";
    assert_eq!(run(agent.path(), &shell(script)).text(), "done\n");
    let refresh = Refresh {
        machine_id: "89abcdef0123456789abcdef01234567".into(),
        epoch: "31234567-89ab-4def-8123-456789abcdef".into(),
        ..Refresh::default()
    };
    agent.control().ask(&ControlRequest::Refresh(refresh));
    let identity_report = identity_report(&agent);
    assert_eq!(
        identity_report.machine_id,
        "89abcdef0123456789abcdef01234567"
    );
    assert_eq!(
        identity_report.epoch,
        "31234567-89ab-4def-8123-456789abcdef"
    );
}

/// Starts an agent with the image that `build` creates.
fn with_image(build: impl FnOnce(&Path)) -> Agent {
    let agent = Agent::bare();
    let image = tempfile::tempdir().unwrap();
    std::fs::create_dir(image.path().join("etc")).unwrap();
    build(image.path());
    let mut plan = agent.plan();
    plan.lower = image.path().to_str().unwrap().into();
    let attached = agent.control().ask(&ControlRequest::AttachRoot(plan));
    assert_eq!(attached, ControlReply::Done);
    agent
}

fn named(nameservers: &[&str]) -> ControlRequest {
    let nameservers = nameservers.iter().map(|server| server.parse().unwrap());
    ControlRequest::Refresh(Refresh {
        dns: GuestDns {
            nameservers: nameservers.collect(),
            search: vec!["corp.example".into()],
            options: vec!["ndots:2".into()],
        },
        hosts: vec![("10.1.2.3".into(), "other other.example".into())],
        ..Refresh::default()
    })
}

fn names_are_those_of_the_last_refresh() {
    const PATHS: [&str; 2] = ["etc/resolv.conf", "etc/hosts"];
    type Build = fn(&Path, &str);
    let images: [Build; 7] = [
        |_, _| {},
        |image, path| std::fs::write(image.join(path), "search own").unwrap(),
        |image, path| symlink("/run/systemd/resolve/stub-resolv.conf", image.join(path)).unwrap(),
        |image, path| symlink("/etc/dangling", image.join(path)).unwrap(),
        |image, path| symlink("/dev/null", image.join(path)).unwrap(),
        |image, path| std::fs::create_dir(image.join(path)).unwrap(),
        |image, path| {
            std::fs::create_dir(image.join("lib")).unwrap();
            std::fs::write(image.join("lib/linked"), "search linked").unwrap();
            symlink("../lib/linked", image.join(path)).unwrap();
        },
    ];
    for (number, build) in images.into_iter().enumerate() {
        for path in PATHS {
            let agent = with_image(|image| build(image, path));
            let [resolv_conf, hosts] = PATHS.map(|path| agent.text(path));
            assert_eq!(resolv_conf, "", "{number} {path}");
            assert!(hosts.starts_with("127.0.0.1\tlocalhost\n::1\tlocalhost "));
            agent.control().ask(&named(&["10.9.9.9", "fe80::9"]));
            let [resolv_conf, hosts] = PATHS.map(|path| agent.text(path));
            let expected = "nameserver 10.9.9.9\nnameserver fe80::9\nsearch corp.example\n\
                            options ndots:2\n";
            assert_eq!(resolv_conf, expected, "{number} {path}");
            let last = hosts.lines().last();
            assert_eq!(
                last,
                Some("10.1.2.3\tother other.example"),
                "{number} {path}"
            );
            // The workload's own content does not outlive the next refresh.
            agent.overwrite(path, "search mine\n");
            assert_eq!(agent.text(path), "search mine\n");
            agent.control().ask(&named(&[]));
            let [resolv_conf, hosts] = PATHS.map(|path| agent.text(path));
            let expected = "search corp.example\noptions ndots:2\n";
            assert_eq!(resolv_conf, expected, "{number} {path}");
            assert!(hosts.contains("127.0.1.1\tbox\n"), "{number} {path}");
        }
    }
}

fn identity_files_that_link_to_each_other() {
    const NAMES: [&str; 4] = ["hosts", "hostname", "resolv.conf", "machine-id"];
    let targets = NAMES.iter().chain(&["../run/sm-epoch", "../run/x"]);
    for (name, target) in NAMES
        .iter()
        .flat_map(|name| targets.clone().map(move |target| (name, target)))
        .filter(|(name, target)| name != target)
    {
        let agent = with_image(|image| symlink(target, image.join("etc").join(name)).unwrap());
        let refresh = Refresh {
            machine_id: "89abcdef0123456789abcdef01234567".into(),
            hostname: "clone".into(),
            dns: GuestDns {
                nameservers: vec!["10.9.9.9".parse().unwrap()],
                ..GuestDns::default()
            },
            ..Refresh::default()
        };
        agent.control().ask(&ControlRequest::Refresh(refresh));
        let text = |name: &str| agent.text(&format!("etc/{name}"));
        let what = format!("{name} -> {target}");
        assert_eq!(
            text("machine-id"),
            "89abcdef0123456789abcdef01234567\n",
            "{what}"
        );
        assert_eq!(text("hostname"), "clone\n", "{what}");
        assert_eq!(text("resolv.conf"), "nameserver 10.9.9.9\n", "{what}");
        assert!(text("hosts").contains("127.0.1.1\tclone\n"), "{what}");
    }
}
