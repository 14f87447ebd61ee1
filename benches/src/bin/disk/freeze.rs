//! The time of a freeze, by the capacity of the disk and the number of its clusters.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use sm_vmm_core::virtio::layered::{CLUSTER, DiskLayer, LayeredDisk};

use super::disks::Bench;

/// Longest time in milliseconds.
const GOAL_MS: f64 = 5.0;

/// Capacities in GiB, clusters that were written, and layers.
const DISKS: [(u64, u64, usize); 6] = [
    (1, 0, 1),
    (64, 0, 1),
    (1024, 0, 1),
    (64, 10_000, 1),
    (64, 1_000_000, 1),
    (64, 1_000_000, 16),
];

#[derive(Debug, Serialize)]
pub(crate) struct Freeze {
    gib: u64,
    clusters: u64,
    layers: usize,
    p50_ms: f64,
    max_ms: f64,
}

/// Measures freezes of disks whose data was not flushed.
pub(crate) fn measure(bench: &mut Bench, rounds: usize) -> Result<Vec<Freeze>> {
    println!("freeze, with a new file each time ({rounds} of each; goal: {GOAL_MS} ms)");
    println!("  capacity   clusters   layers   p50 ms   max ms");
    let mut rows = Vec::new();
    for (gib, clusters, layers) in DISKS {
        let lowest = DiskLayer::create(bench.file()?, bench.id(), None, gib << 30)?;
        let mut disk = LayeredDisk::new(vec![lowest])?;
        while disk.layers() < layers {
            disk = bench.above(&disk)?;
        }
        // Allocated, so that the file has as many extents as for data, but not written.
        let each = (1 << 20) / CLUSTER;
        for number in 0..clusters / each {
            disk.write_zeroes(number * (2 << 20), each * CLUSTER, false)?;
        }
        let mut times = Vec::new();
        for _ in 0..rounds {
            let begun = Instant::now();
            let frozen = bench.above(&disk)?;
            times.push(begun.elapsed().as_secs_f64() * 1e3);
            drop(frozen);
        }
        let row = Freeze {
            gib,
            clusters,
            layers,
            max_ms: times.iter().copied().fold(0.0, f64::max),
            p50_ms: super::median(&mut times),
        };
        let missed = if row.max_ms > GOAL_MS { "  MISSED" } else { "" };
        println!(
            "  {gib:>4} GiB {clusters:>12} {layers:>8} {:>8.3} {:>8.3}{missed}",
            row.p50_ms, row.max_ms
        );
        rows.push(row);
    }
    Ok(rows)
}
