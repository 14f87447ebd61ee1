//! The vsock device with a model of the guest's driver, against pumps between two
//! sockets: one with the same buffers, and the usual one with 16 KiB.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a bench that cannot go on is a failed bench"
)]

use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{JoinHandle, spawn};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use sm_devices_vsock::testing::Guest;
use sm_devices_vsock::{Vsock, VsockConfig};

/// Bytes moved in one iteration.
const AMOUNT: usize = 8 << 20;
const CHUNK: usize = 64 << 10;

/// Writes [`AMOUNT`] bytes whenever it is told to.
fn writer(mut to: UnixStream) -> (std::sync::mpsc::Sender<()>, JoinHandle<()>) {
    let (go, gone) = std::sync::mpsc::channel();
    let thread = spawn(move || {
        let chunk = vec![7; CHUNK];
        while gone.recv().is_ok() {
            for _ in 0..AMOUNT / CHUNK {
                to.write_all(&chunk).unwrap();
            }
        }
    });
    (go, thread)
}

fn drain(from: &mut UnixStream, mut left: usize) {
    let mut chunk = vec![0; CHUNK];
    while left > 0 {
        let most = left.min(CHUNK);
        left -= from.read(&mut chunk[..most]).unwrap();
    }
}

/// A thread that copies from one socket to another.
fn pump(mut from: UnixStream, mut to: UnixStream, buffer: usize) -> JoinHandle<()> {
    spawn(move || {
        let mut chunk = vec![0; buffer];
        while let Ok(count @ 1..) = from.read(&mut chunk) {
            to.write_all(&chunk[..count]).unwrap();
        }
    })
}

fn throughput(c: &mut Criterion) {
    let mut group = c.benchmark_group("vsock");
    group.throughput(Throughput::Bytes(AMOUNT as u64));
    group.sample_size(20);

    let mut guest = Guest::new(VsockConfig::default());
    let (host, request) = guest.connected();
    let (go, thread) = writer(host);
    let mut taken = 0;
    group.bench_function("host to guest", |b| {
        b.iter(|| {
            go.send(()).unwrap();
            taken = guest.take(&request, AMOUNT as u64, taken);
        });
    });
    drop(go);
    thread.join().unwrap();

    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, request) = guest.connected();
    let data = vec![7; AMOUNT];
    group.bench_function("guest to host", |b| {
        b.iter(|| {
            std::thread::scope(|scope| {
                scope.spawn(|| drain(&mut host, AMOUNT));
                guest.give(&request, &data);
            });
        });
    });

    for (name, buffer) in [("pump with 64 KiB", CHUNK), ("pump with 16 KiB", 16 << 10)] {
        let (near, from) = UnixStream::pair().unwrap();
        let (to, mut far) = UnixStream::pair().unwrap();
        let pump = pump(from, to, buffer);
        let (go, thread) = writer(near);
        group.bench_function(name, |b| {
            b.iter(|| {
                go.send(()).unwrap();
                drain(&mut far, AMOUNT);
            });
        });
        drop(go);
        thread.join().unwrap();
        pump.join().unwrap();
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
            guest.give(&request, &[7; 64]);
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
