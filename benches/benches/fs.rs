//! The file server without a guest: looking up files, beside opening each of them, which is
//! how servers work that hold a descriptor per inode; and reading, beside the system call.
//! Everything is in the caches of the host.
#![expect(clippy::unwrap_used, reason = "a bench on data of its own making")]

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use sm_fs_server::testing::{FuseDriver, opcode, request};
use sm_fs_server::{FsConfig, Served, Server, Share, ShareOptions, SliceBuffers};

const FILES: usize = 5000;

fn name(index: usize) -> String {
    format!("file-{index:05}")
}

/// A server of a directory with files, and the number of the directory.
fn server(directory: &std::path::Path) -> (Server, u64) {
    let directory = File::open(directory).unwrap();
    let share = Share::new("s", directory.into(), ShareOptions::default()).unwrap();
    let server = Server::new(FsConfig::default().share(share)).unwrap();
    let mut driver = FuseDriver::started(server);
    let share = driver.walk("s").unwrap().node;
    (driver.server, share)
}

fn serve(server: &mut Server, request: &[u8], space: &mut [u8]) -> usize {
    let mut buffers = SliceBuffers::new(request, space);
    match server.serve(&mut buffers) {
        Served::Reply(len) => len,
        Served::NoReply => 0,
        Served::Job(job) => job.run(&mut buffers),
    }
}

fn lookups(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    for index in 0..FILES {
        fs::write(folder.path().join(name(index)), "").unwrap();
    }
    let (mut server, share) = server(folder.path());
    let requests: Vec<Vec<u8>> = (0..FILES)
        .map(|index| {
            let name = name(index) + "\0";
            request(opcode::LOOKUP, 1, share, &[name.as_bytes()])
        })
        .collect();
    let mut group = criterion.benchmark_group("fs/lookup");
    group.throughput(Throughput::Elements(1));
    let mut space = [0; 4096];
    let mut next = 0;
    let mut forget = request(opcode::FORGET, 1, 0, &[&1u64.to_le_bytes()]);
    group.bench_function("server", |bencher| {
        bencher.iter(|| {
            let len = serve(&mut server, &requests[next % FILES], &mut space);
            assert_eq!(len, 144);
            // The number of the node, which is the first of the reply's body.
            forget[16..24].copy_from_slice(&space[16..24]);
            next += 1;
            serve(&mut server, &forget, &mut space)
        });
    });
    let directory: OwnedFd = File::open(folder.path()).unwrap().into();
    let names: Vec<std::ffi::CString> = (0..FILES)
        .map(|index| std::ffi::CString::new(name(index)).unwrap())
        .collect();
    group.bench_function("open per inode", |bencher| {
        bencher.iter(|| {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let name = &names[next % FILES];
            let file = rustix::fs::openat(&directory, name, flags, Mode::empty()).unwrap();
            next += 1;
            let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
            rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, mask).unwrap()
        });
    });
    group.finish();
}

fn reads(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), vec![1; 4 << 20]).unwrap();
    let (server, _) = server(folder.path());
    let mut driver = FuseDriver::new(server);
    let file = driver.walk("s/f").unwrap().node;
    let handle = driver.open(file, false).unwrap();
    let mut server = driver.server;
    let host = File::open(folder.path().join("f")).unwrap();
    for (size, text) in [(4096u32, "4k"), (1 << 20, "1m")] {
        let mut args = [0; 40];
        args[..8].copy_from_slice(&handle.to_le_bytes());
        args[16..20].copy_from_slice(&size.to_le_bytes());
        let request = request(opcode::READ, 1, file, &[&args]);
        let mut space = vec![0; (1 << 20) + 16];
        let mut group = criterion.benchmark_group(format!("fs/read {text}"));
        group.throughput(Throughput::Bytes(size.into()));
        group.bench_function("server", |bencher| {
            bencher.iter(|| serve(&mut server, &request, &mut space));
        });
        let len = usize::try_from(size).unwrap();
        group.bench_function("pread", |bencher| {
            bencher.iter(|| host.read_at(&mut space[..len], 0).unwrap());
        });
        group.finish();
    }
}

criterion_group!(benches, lookups, reads);
criterion_main!(benches);
