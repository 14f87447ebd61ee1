//! The library, as used by another program.
//!
//! This program is its own VMM (`run_vmm_if_asked`), so it has its own `main`.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use sm_e2e::{image, unique};
use sm_runtime::session::{Event, Stdin};
use sm_runtime::{AfterSnapshot, Error, ErrorKind, Force, Image, OptionError, RunOptions, Sm, Vm};

fn main() -> ExitCode {
    sm_runtime::run_vmm_if_asked();
    let trial = |name: &str, test: fn()| {
        Trial::test(name, move || {
            // The panic message is printed, and only this test fails.
            std::panic::catch_unwind(test).map_err(|_| Failed::from("it panicked, see above"))
        })
    };
    let mut tests = vec![
        trial("a_workload_runs_and_tells_how_it_ended", workload),
        trial("commands_run_beside_it", exec),
        trial("input_and_output_are_streams", streams),
        trial("clones_begin_where_the_closure_ended", warm_up),
        trial("forks_are_distinct_and_can_be_reset", fork_and_reset),
        trial("mistakes_are_errors_that_tell", mistakes),
    ];
    // Several names are accepted, as by other test programs.
    let (options, names): (Vec<_>, Vec<_>) =
        std::env::args().partition(|word| word.starts_with('-'));
    let names = names.get(1..).unwrap_or_default();
    tests.retain(|test| names.is_empty() || names.iter().any(|name| test.name().contains(name)));
    let arguments = Arguments::from_iter(std::iter::once("api".to_owned()).chain(options));
    libtest_mimic::run(&arguments, tests).exit_code()
}

fn sm() -> &'static Sm {
    static SM: OnceLock<(tempfile::TempDir, Sm)> = OnceLock::new();
    let (_, sm) = SM.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let sm = Sm::builder().below(directory.path()).build().unwrap();
        (directory, sm)
    });
    sm
}

fn busybox() -> Image {
    sm().image(&image("busybox")).unwrap()
}

fn options() -> RunOptions {
    RunOptions::new().memory(128 << 20)
}

/// A VM that is removed when the test ends.
struct Running(Vm);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.remove(Force::Yes);
    }
}

fn sleeping() -> Running {
    Running(busybox().run(options().command(["sleep", "1000"])).unwrap())
}

fn text(vm: &Vm, command: &[&str]) -> String {
    let output = vm.exec(command.iter().copied()).output().unwrap();
    assert_eq!(output.status, 0, "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn workload() {
    let mut options = options()
        .command(["sh", "-c", "echo out; echo err >&2; exit 7"])
        .name(unique("api"));
    let mut vm = busybox().run(options.clone()).unwrap();
    let ended = vm.wait().unwrap();
    assert_eq!(ended.status, 7, "{ended:?}");
    vm.remove(Force::No).unwrap();
    assert!(sm().vm(vm.name()).is_err(), "it is gone");

    options = options.attach(true);
    let mut vm = Running(busybox().run(options).unwrap());
    let session = vm.0.take_session().unwrap();
    let output = session.output().unwrap();
    assert_eq!(
        (output.status, &*output.stdout, &*output.stderr),
        (7, &b"out\n"[..], &b"err\n"[..])
    );
}

fn exec() {
    let vm = sleeping();
    let output =
        vm.0.exec([
            "sh",
            "-c",
            "pwd; id -u; echo $A; cat /staged; echo no >&2; exit 3",
        ])
        .cwd("/tmp")
        .user("1000")
        .env(["A=b c"])
        .stage_file("/staged", 0o644, b"from the host\n".to_vec())
        .output()
        .unwrap();
    assert_eq!(output.status, 3);
    let out = String::from_utf8_lossy(&output.stdout);
    assert_eq!(out, "/tmp\n1000\nb c\nfrom the host\n");
    assert_eq!(output.stderr, b"no\n");
    let late =
        vm.0.exec(["sleep", "1000"])
            .timeout(Duration::from_millis(500));
    assert_eq!(late.output().unwrap().status, 124);
    let missing = vm.0.exec(["no-such-command"]).output().unwrap();
    assert_eq!(missing.status, 127);
}

fn streams() {
    let vm = sleeping();
    let session = vm.0.exec(["cat"]).stdin(true).start().unwrap();
    let mut stdin = Stdin::new(session.writer());
    // This exceeds the sum of all buffers on the path.
    let sent: Vec<u8> = (0..20_000_000_u32).map(|n| (n % 251) as u8).collect();
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            stdin.write_all(&sent).unwrap();
            drop(stdin);
        });
        session.output().unwrap()
    });
    assert_eq!(output.status, 0);
    assert!(output.stdout == sent, "every byte came back");

    let script = "trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.1; done";
    let mut session = vm.0.exec(["sh", "-c", script]).tty(80, 24).start().unwrap();
    let mut shown = String::new();
    let mut status = None;
    while status.is_none() {
        match session.next_event().unwrap().expect("the session goes on") {
            Event::Stdout(bytes) => {
                let before = shown.contains("ready");
                shown.push_str(&String::from_utf8_lossy(bytes));
                if !before && shown.contains("ready") {
                    session.writer().resize(100, 40).unwrap();
                }
            }
            Event::Exit(code) => status = Some(code),
            _ => {}
        }
    }
    assert_eq!(status, Some(4));
    assert!(shown.contains("40 100"), "{shown:?}");
}

fn warm_up() {
    let name = unique("warm");
    let script = "until [ -e /tmp/warm ]; do sleep 0.1; done; \
                  while [ ! -e /tmp/end ]; do sleep 0.1; done; cat /tmp/warm; exit 6";
    let (snapshot, said) = busybox()
        .warm_up(options().command(["sh", "-c", script]), &name, |vm| {
            Ok(text(vm, &["sh", "-c", "echo was here | tee /tmp/warm"]))
        })
        .unwrap();
    assert_eq!((snapshot.name(), &*said), (&*name, "was here\n"));
    let mut clones: Vec<_> = (0..3)
        .map(|_| Running(snapshot.run(&RunOptions::new()).unwrap()))
        .collect();
    let mut identities = BTreeSet::new();
    for Running(clone) in &mut clones {
        identities.insert(text(clone, &["cat", "/etc/machine-id"]));
        assert_eq!(text(clone, &["cat", "/tmp/warm"]), "was here\n");
        text(clone, &["touch", "/tmp/end"]);
        assert_eq!(clone.wait().unwrap().status, 6);
    }
    assert_eq!(identities.len(), 3);
    let refused = snapshot.run(&RunOptions::new().memory(1 << 30));
    assert!(refused.unwrap_err().to_string().contains("memory"));
    drop(clones);
    drop(snapshot);
    sm().snapshots().remove(&name).unwrap();
    assert!(sm().snapshot(&name).is_err());
}

fn fork_and_reset() {
    let original = sleeping();
    text(&original.0, &["sh", "-c", "echo 1 >/tmp/n"]);
    let forks = original.0.fork(2, &RunOptions::new()).unwrap();
    assert!(forks.error.is_none(), "{forks:?}");
    let forks: Vec<_> = forks.vms.into_iter().map(Running).collect();
    let mut identities = BTreeSet::new();
    for Running(fork) in &forks {
        for _ in 0..2 {
            assert_eq!(text(fork, &["cat", "/tmp/n"]), "1\n");
            text(fork, &["sh", "-c", "echo 2 >/tmp/n"]);
            assert!(identities.insert(text(fork, &["cat", "/etc/machine-id"])));
            fork.reset().unwrap();
        }
    }
    let name = unique("proof");
    original.0.snapshot(&name, AfterSnapshot::End).unwrap();
    let proof = sm().snapshots().prove_distinct(&name, 3, |_| {}).unwrap();
    assert!(
        proof.twins.is_empty() && proof.clones.len() == 3,
        "{proof:?}"
    );
    sm().snapshots().remove(&name).unwrap();
}

fn mistakes() {
    let nowhere = sm().image("oci:/no/such/layout");
    assert!(matches!(nowhere, Err(Error::Image(_))), "{nowhere:?}");
    let small = busybox().run(RunOptions::new().memory(1 << 20));
    assert!(
        matches!(small, Err(Error::Option(OptionError::Memory { .. }))),
        "{small:?}"
    );
    let missing = busybox().run(options().command(["no-such-command"]));
    let error = missing.unwrap_err();
    assert_eq!(error.exit_status(), 127, "{error:?}");
    assert_eq!(error.kind(), ErrorKind::Command);
    let name = unique("api");
    let _first = Running(
        busybox()
            .run(options().name(&name).command(["sleep", "1000"]))
            .unwrap(),
    );
    let second = busybox().run(options().name(&name));
    assert!(matches!(second, Err(Error::Record(_))), "{second:?}");
    assert_eq!(second.unwrap_err().kind(), ErrorKind::AlreadyExists);
    let ended = busybox().run(options().command(["true"]));
    let mut ended = Running(ended.unwrap());
    ended.0.wait().unwrap();
    let late = ended.0.exec(["true"]).output();
    assert!(matches!(late, Err(Error::NotRunning(_))), "{late:?}");
}
