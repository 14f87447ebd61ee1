//! The process of a VM is killed at random moments: a listing afterwards is correct, and
//! nothing of the dead VM is left over.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::process::Stdio;

use super::*;

const KILLS: usize = 60;
const NAME: &str = "vm::tests::killed::a_listing_after_a_kill_is_true";
/// Variable with the directory of VMs of the process to kill.
const VICTIM: &str = "SM_TEST_VICTIM";

/// Starts, stops and removes VMs until it is killed.
fn work(directory: &Path) {
    let sm = sm_in(directory);
    for round in 0.. {
        let setup = SupervisorSetup::default().auto_remove(round % 3 == 0);
        let mut f = supervised(&sm, None, setup);
        run(&mut f);
        if round % 3 != 0 {
            let mut again = supervised_again(&sm, &f.record, setup);
            run(&mut again);
        }
        for mut vm in sm.vms().list().unwrap() {
            if round % 2 == 0 {
                vm.remove(Force::No).unwrap();
            }
        }
    }
}

/// Plays a run of a VM until it is stopped.
fn run(f: &mut Supervised) {
    let (mut agent, mut main) = f.start();
    main.send(FrameType::Stdout, b"hello");
    f.control()
        .call(&ControlCall::Stop { grace_ms: None })
        .unwrap();
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    main.exit(143);
    assert!(f.events().ends_with(&["ended 143".to_owned()]));
    f.finish();
}

/// Pseudo-random numbers with a different seed in each run.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != ".lock").collect()
}

#[test]
fn a_listing_after_a_kill_is_true() {
    if let Some(directory) = std::env::var_os(VICTIM) {
        return work(Path::new(&directory));
    }
    let directory = tempfile::tempdir().unwrap();
    let sm = sm_in(directory.path());
    let said = directory.path().join("said");
    let seed = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_nsec;
    let mut state = u64::try_from(seed).unwrap() | 1;
    // The kills hit different moments; a busy machine may need more attempts for that.
    let mut seen = BTreeMap::new();
    let mut kills = 0..20 * KILLS;
    while kills.start < KILLS || seen.len() < 3 {
        let kill = kills.next().unwrap_or_else(|| panic!("{seen:?}"));
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", NAME])
            .env(VICTIM, directory.path())
            .stdout(Stdio::null())
            .stderr(File::create(&said).unwrap())
            .spawn()
            .unwrap();
        let within = 150_000 + 10_000 * u64::try_from(kill).unwrap();
        let moment = Duration::from_micros(5000 + random(&mut state) % within);
        std::thread::sleep(moment);
        victim.kill().unwrap();
        let ended = victim.wait().unwrap();
        let context = format!("kill {kill} after {moment:?}");
        let said = fs::read_to_string(&said).unwrap();
        assert!(ended.code().is_none(), "{context}: it failed: {said}");

        let listed = sm.vms().inspect(Duration::from_secs(10));
        let Inspections { vms, damaged } =
            listed.unwrap_or_else(|error| panic!("{context}: {error}"));
        assert!(damaged.is_empty(), "{context}: {damaged:?}");
        for vm in &vms {
            assert_eq!(vm.state.status, VmStatus::Exited, "{context}: {vm:?}");
            assert!(!vm.config.auto_remove, "{context}: {vm:?}");
            let reason = vm.state.exit.as_ref().unwrap().reason;
            assert!(
                matches!(reason, ExitReason::Workload | ExitReason::Lost),
                "{context}: {vm:?}"
            );
            *seen.entry(format!("{reason:?}")).or_insert(0) += 1;
            let vm = sm.vm(vm.config.id.as_str()).unwrap();
            let mut logs = vm.logs().unwrap();
            let mut output = Vec::new();
            while let Some(record) = logs.wait_record().unwrap() {
                output.extend(record.bytes);
            }
            // All output of all runs is there if the last ended in order.
            let whole = output == b"hello" || output == b"hellohello";
            assert!(whole || (output.is_empty() && reason == ExitReason::Lost));
        }
        if vms.is_empty() {
            *seen.entry("none".to_owned()).or_insert(0) += 1;
        }
        // No sockets without a VM, and no records in creation or removal.
        assert_eq!(names(&sm.home().run().join("vms")), [""; 0], "{context}");
        let records = names(&sm.home().vms());
        assert_eq!(records.len(), vms.len(), "{context}: {records:?}");
        for mut vm in sm.vms().list().unwrap() {
            vm.remove(Force::No).unwrap();
        }
        assert_eq!(names(&sm.home().vms()), [""; 0], "{context}");
    }
}
