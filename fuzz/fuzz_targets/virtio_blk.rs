//! Arbitrary requests to a block device, in any ring: it answers or needs a reset.
#![no_main]

use std::fs::File;
use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use sm_event_loop::EventLoop;
use sm_virtio::GuestMemory;
use sm_virtio::testing::Driver;
use sm_vmm_core::virtio::blk::{Access, Block};
use sm_vmm_core::virtio::disk::{Disk, FileSegment};
use vm_memory::{Bytes as _, GuestAddress};

static LOOP: LazyLock<EventLoop> =
    LazyLock::new(|| EventLoop::spawn("fuzz").expect("a thread can be had"));
const MEMORY: usize = 1 << 16;
/// The ring comes first, so that the input's first bytes are its descriptors.
const RING: u64 = 0;
const SIZE: u16 = 16;
const DISK: u64 = 1 << 16;

static FILE: LazyLock<File> = LazyLock::new(|| {
    let file = tempfile::tempfile().expect("a temporary file");
    file.set_len(DISK).expect("64 KiB");
    file
});

fn disk(writable: bool) -> Disk {
    let file = FILE.try_clone().expect("a descriptor");
    if writable {
        return Disk::raw(file, false).expect("a length");
    }
    let segment = FileSegment {
        file,
        offset: 0,
        len: DISK,
    };
    Disk::composite(vec![segment]).expect("whole sectors")
}

fuzz_target!(|data: &[u8]| {
    let [writable, contents @ ..] = data else {
        return;
    };
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    let access = if writable % 2 == 1 {
        Access::ReadWrite
    } else {
        Access::ReadOnly
    };
    let block = Block::new(disk(writable % 4 == 1), access, "fuzz");
    let driver = Driver::new(Arc::new(Mutex::new(block)), &memory, LOOP.handle());
    driver.start(RING, &[SIZE]);
    let contents = &contents[..contents.len().min(MEMORY)];
    memory
        .write_slice(contents, GuestAddress(RING))
        .expect("it fits");
    driver.notify(0);
    // Serves the queued requests, and waits for them.
    driver.transport.quiesce().expect("the loop runs");
    driver.transport.unquiesce();
    driver.reset();
});
