//! Checks that a chain of diffs is equal to the machine: a guest that runs Linux is
//! captured, restored and captured again, and finally the same paused machine is captured
//! in full as well.

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use sm_event_loop::EventLoop;
use sm_hypervisor::{Hypervisor as _, Native};
use sm_snapshot::capture::{Ancestry, Capture};
use sm_snapshot::chain::Chain;
use sm_snapshot::contents;
use sm_snapshot::machine;
use sm_snapshot::restore::map_memory;
use sm_snapshot::store::SnapshotStore;
use sm_snapshot::verify::verify;
use sm_vmm_core::machine::Machine;
use vm_memory::{Bytes as _, GuestAddress};

use crate::rivals::{BenchGuest, await_output};
use crate::ticking;

const DEPTH: usize = 5;
/// Ticks of the guest between two captures.
const SIGNS: usize = 5;
const PAGE: u64 = 4096;

/// Prints the comparison; fails on any difference.
pub(crate) fn check(guest: &BenchGuest) -> Result<()> {
    let directory = tempfile::tempdir()?;
    ticking::create(directory.path(), guest)?;
    let store = SnapshotStore::open(directory.path())?;
    let host = Native::open()?;
    let mut tip = ticking::NAME.to_owned();
    let mut changed = Vec::new();
    for depth in 1..=DEPTH {
        let chain = Chain::open(&store, &tip)?;
        let event_loop = EventLoop::spawn("devices")?;
        let (mut output, console) = std::io::pipe()?;
        let mut machine = Machine::restore(
            &host,
            machine::decode(&chain)?,
            map_memory(&chain)?,
            ticking::devices(),
            File::from(OwnedFd::from(console)),
            &event_loop.handle(),
        )?;
        machine.resume()?;
        for _ in 0..SIGNS {
            await_output(&mut output, guest.sign)?;
        }
        let reader = std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        machine.pause()?;
        let state = machine.save_state()?;
        let sections = machine::encode(&state)?;
        let memory = machine.memory();
        let capture = |name: &str, ancestry| -> Result<u64> {
            let captured = Capture::begin(&store, memory, ancestry)?.finish(
                &store,
                name,
                ticking::description(&host, &state)?,
                sections.clone(),
            )?;
            Ok(captured.manifest.memory.data_pages)
        };
        tip = format!("depth-{depth}");
        changed.push(capture(&tip, Ancestry::Diff(&chain))?);
        if depth == DEPTH {
            capture("full", Ancestry::Full(&chain))?;
            let (diff, full) = (Chain::open(&store, &tip)?, Chain::open(&store, "full")?);
            if (diff.members().len(), full.members().len()) != (DEPTH + 1, 1) {
                bail!("the chains are not as deep as they should be");
            }
            verify(&diff)?;
            verify(&full)?;
            let difference = contents::compare(&diff, &full)?;
            let mut unlike = 0;
            contents::for_each_batch(&diff, |first, bytes| {
                let mut actual = vec![0; bytes.len()];
                // Memory ends below the hole for devices, so file offsets are guest
                // addresses.
                memory
                    .guest
                    .read_slice(&mut actual, GuestAddress(first * PAGE))
                    .map_err(|error| sm_snapshot::Error::Machine {
                        operation: "read the machine's memory",
                        source: Box::new(error),
                    })?;
                unlike += u64::from(actual != bytes);
                Ok(())
            })?;
            let report = json!({
                "depth": DEPTH,
                "pages": difference.pages,
                "different_from_full": difference.different,
                "batches_unlike_the_machine": unlike,
                "pages_stored": changed,
            });
            println!("{report}");
            if difference.different != 0 || unlike != 0 {
                bail!("the chain is not what the machine was");
            }
        }
        drop(machine);
        drop(event_loop);
        reader.join().ok().context("the console's reader")??;
    }
    Ok(())
}
