//! Kicks.

use std::sync::Arc;
use std::sync::mpsc::channel;

use sm_hypervisor::Vcpu as _;

use crate::bench::{Backend, Bench, Recorder, SHARED, run_to_stop};
use crate::guests;

pub(crate) fn a_kick_before_running_takes_effect<H: Backend>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, guests::ports());
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    bus.stop();
    bus.stop();
    run_to_stop(&mut vcpu, &bus);
    assert_eq!(bus.take(), [], "the guest has not run");
    // Both kicks were one: now the guest runs to its end.
    run_to_stop(&mut vcpu, &bus);
    assert_eq!(bus.take().len(), 10);
}

pub(crate) fn a_kick_ends_a_spin<H: Backend>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, guests::spin());
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    let (running, runs) = channel();
    bus.on(0x12, move || {
        // No receiver exists at the end.
        let _ = running.send(());
    });
    let mut counts = Vec::new();
    std::thread::scope(|scope| {
        let bus = &bus;
        let (again, turns) = channel();
        scope.spawn(move || {
            while turns.recv().is_ok() {
                // Reports from before the last stop.
                while runs.try_recv().is_ok() {}
                runs.recv().unwrap();
                runs.recv().unwrap();
                bus.stop();
            }
        });
        for _ in 0..3 {
            again.send(()).unwrap();
            run_to_stop(&mut vcpu, bus);
            counts.push(u64::from_le_bytes(bench.get(SHARED, 8).try_into().unwrap()));
        }
    });
    // The guest continued each time.
    assert!(counts.is_sorted_by(|a, b| a < b), "{counts:?}");
}

/// A kick while the bus answers a read: the value has arrived in the guest's
/// register before `run` returns, and is not read again.
pub(crate) fn a_kick_in_an_access_leaves_it_complete<H: Backend>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, guests::ports());
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    let bus = Arc::new(bus);
    // Every access of the guest is the last before a pause.
    let weak = Arc::downgrade(&bus);
    let kick = move || {
        if let Some(bus) = weak.upgrade() {
            bus.stop();
        }
    };
    bus.on(0x10, kick.clone());
    bus.on(0x12, kick);
    let mut positions = Vec::new();
    for _ in 0..7 {
        run_to_stop(&mut vcpu, &bus);
        positions.push(vcpu.save().unwrap().general.rip);
    }
    assert!(positions.is_sorted_by(|a, b| a < b), "{positions:x?}");
    assert_eq!(bus.take().len(), 10, "no access was repeated");
}

pub(crate) fn a_kick_of_a_dead_vcpu_is_harmless<H: Backend>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, guests::reads());
    let bus = Recorder::default();
    let vcpu = bench.boot(&bus);
    drop(vcpu);
    bus.stop();
    drop(bench);
    bus.stop();
}
