//! `bench-restore` works: whole commands, and QEMU with the same guest.

use std::path::PathBuf;
use std::process::Command;

use sm_e2e::{Done, Home, binary, image};

fn path(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is set"));
    path.into()
}

#[test]
fn restoring_is_measured_phase_by_phase_and_against_qemu() {
    let home = Home::new();
    let bench = |arguments: &[&str]| -> Done {
        let mut bench = Command::new(path("SM_BENCH_RESTORE"));
        bench
            .args(arguments)
            .env("XDG_DATA_HOME", home.data())
            .env("XDG_RUNTIME_DIR", home.run_dir());
        bench.output().unwrap().into()
    };
    let (sm, kernel) = (binary(), path("SM_KERNEL"));
    let initramfs = path("SM_BENCH_INITRAMFS");
    let text = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let measured = bench(&[
        "path",
        "--sm",
        &text(&sm),
        "--image",
        &image("busybox"),
        "--kernel",
        &text(&kernel),
        "--initramfs",
        &text(&initramfs),
        "--iterations",
        "2",
        "--memory",
        "128",
        "--vcpus",
        "1",
        "--vs",
        "qemu",
    ])
    .exits(0);
    let report = measured.json();
    let series = &report["comparisons"][0]["series"];
    let phases = |n: usize| -> Vec<&str> {
        let phases = series[n]["phases"].as_array().unwrap();
        phases.iter().map(|p| p["name"].as_str().unwrap()).collect()
    };
    assert!(phases(0).contains(&"state restored"), "{:?}", phases(0));
    assert!(phases(1).contains(&"root attached"), "{:?}", phases(1));
    assert!(
        phases(2).contains(&"kernel reached init"),
        "{:?}",
        phases(2)
    );
    for phase in [
        "hypervisor objects",
        "devices made",
        "agent answered",
        "first output",
    ] {
        assert!(phases(0).contains(&phase), "{:?}", phases(0));
    }
    let contest = &report["comparisons"][1]["series"];
    for (n, subject) in ["sm", "qemu"].into_iter().enumerate() {
        assert_eq!(contest[n]["subject"], subject);
        let took = contest[n]["total"]["micros"].as_array().unwrap();
        assert_eq!(took.len(), 2);
        assert!(took.iter().all(|micros| micros.as_f64().unwrap() > 0.0));
    }
    let saved = home.data().join("report.json");
    std::fs::write(&saved, &measured.stdout).unwrap();
    let page = home.data().join("report.html");
    let rendered = bench(&["render", &text(&saved), "--html", &text(&page)]).exits(0);
    assert!(rendered.out().contains("times as long as qemu"));
    assert!(std::fs::read_to_string(page).unwrap().contains("<svg "));
}

/// A chain of five diffs, a full capture of the same paused machine, and the machine
/// itself are equal, bit for bit.
#[test]
fn five_diffs_are_equal_to_the_machine() {
    let mut bench = Command::new(path("SM_BENCH_RESTORE"));
    bench
        .arg("depth")
        .arg("--kernel")
        .arg(path("SM_KERNEL"))
        .arg("--initramfs")
        .arg(path("SM_BENCH_INITRAMFS"));
    let done: Done = bench.output().unwrap().into();
    let compared = done.exits(0).json();
    println!("{compared}");
    assert_eq!(compared["depth"], 5);
    assert_eq!(compared["pages"], (128 << 20) / 4096);
    assert_eq!(compared["different_from_full"], 0);
    let stored = compared["pages_stored"].as_array().unwrap();
    assert!(stored.iter().all(|pages| pages.as_u64().unwrap() > 0));
}
