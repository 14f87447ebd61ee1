//! The vsock device with a model of the guest's driver, compared with pumps between two
//! sockets.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a bench that cannot go on is a failed bench"
)]

#[expect(dead_code, reason = "the binary measures more")]
#[path = "../src/bin/vsock/device.rs"]
mod device;
#[expect(dead_code, reason = "the binary measures more")]
#[path = "../src/bin/vsock/pump.rs"]
mod pump;

use std::hint::black_box;
use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use sm_devices_vsock::testing::Guest;
use sm_devices_vsock::{Vsock, VsockConfig};

/// Bytes moved in one iteration.
const AMOUNT: usize = 8 << 20;

fn timed(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed())
}

/// Returns the sum of the durations of the iterations.
fn all(iterations: u64, one: impl Fn() -> anyhow::Result<Duration>) -> Duration {
    (0..iterations).map(|_| one().unwrap()).sum()
}

/// One stream, compared with a pump between two sockets with a buffer of the same size.
/// `cargo xtask bench-vsock` alternates between them, and computes ratios.
fn throughput(c: &mut Criterion) {
    let mut group = c.benchmark_group("vsock");
    group.throughput(Throughput::Bytes(AMOUNT as u64));
    group.sample_size(20);
    for (payload, buffer) in [(3732, 4 << 10), (16 << 10, 16 << 10), (64 << 10, 64 << 10)] {
        group.bench_function(format!("pump of {buffer} B"), |b| {
            b.iter_custom(|n| all(n, || pump::stream(buffer, AMOUNT)));
        });
        group.bench_function(format!("host to guest, buffers of {payload} B"), |b| {
            b.iter_custom(|n| all(n, || device::to_guest(payload, AMOUNT, false)));
        });
        group.bench_function(format!("guest to host, packets of {buffer} B"), |b| {
            let payload = u32::try_from(buffer).unwrap();
            b.iter_custom(|n| all(n, || device::to_host(payload, AMOUNT)));
        });
    }
    group.finish();
}

fn packets(c: &mut Criterion) {
    let mut group = c.benchmark_group("vsock packets");
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, request) = guest.connected();
    let mut taken = 0;
    group.bench_function("64 bytes there and back", |b| {
        b.iter(|| {
            host.write_all(&[1; 64]).unwrap();
            taken = guest.take(&request, 64, taken);
            guest.send_all(&request, &[7; 64]);
            let mut back = [0; 64];
            host.read_exact(&mut back).unwrap();
            black_box(back);
        });
    });
    group.bench_function("opening and closing a connection", |b| {
        b.iter_batched(
            || (),
            |()| {
                let (host, request) = guest.connected();
                drop(host);
                guest.closed(&request);
            },
            BatchSize::SmallInput,
        );
    });
    group.bench_function("making a device", |b| {
        b.iter(|| Vsock::new(VsockConfig::default()).unwrap());
    });
    group.finish();
}

criterion_group!(benches, throughput, packets);
criterion_main!(benches);
