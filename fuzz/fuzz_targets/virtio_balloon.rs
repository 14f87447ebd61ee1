//! Arbitrary requests to a balloon, in any ring: it answers or needs a reset, and the memory
//! of a machine that was restored from a file has the file's contents after a revert.
#![no_main]

use std::fs::File;
use std::io::Write as _;
use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use sm_event_loop::EventLoop;
use sm_virtio::testing::Driver;
use sm_vmm_core::memory::{FileExtent, MIN_MEMORY, MachineMemory, MemoryConfig};
use sm_vmm_core::virtio::balloon::Balloon;
use vm_memory::{Bytes as _, GuestAddress};

static LOOP: LazyLock<EventLoop> =
    LazyLock::new(|| EventLoop::spawn("fuzz").expect("a thread can be had"));
/// The rings come first, so that the input's first bytes are descriptors; 64 KiB of input
/// follow.
const INPUT: usize = 1 << 16;
const SIZES: [u16; 3] = [16, 16, 32];
/// Memory that is a file's, with a byte of it for each page.
const FILE_AT: u64 = 1 << 20;
const PAGES: u64 = 64;

static FILE: LazyLock<Arc<File>> = LazyLock::new(|| {
    let mut file = tempfile::tempfile().expect("a temporary file");
    for page in 1..=64 {
        file.write_all(&[page; 4096]).expect("64 pages");
    }
    Arc::new(file)
});

fuzz_target!(|data: &[u8]| {
    let extent = FileExtent {
        offset: FILE_AT,
        len: PAGES * 4096,
        file: Arc::clone(&FILE),
        file_offset: 0,
    };
    let config = MemoryConfig::new(MIN_MEMORY);
    let memory = MachineMemory::from_files(&config, &[extent]).expect("memory");
    let mut balloon = Balloon::new();
    balloon.manage(memory.clone()).expect("a page map");
    let driver = Driver::new(
        Arc::new(Mutex::new(balloon)),
        &memory.guest,
        LOOP.handle(),
    );
    driver.start(0, &SIZES);
    for page in 0..PAGES / 2 {
        let at = GuestAddress(FILE_AT + page * 8192);
        memory.guest.write_obj(0xffu8, at).expect("memory");
    }
    let input = &data[..data.len().min(INPUT)];
    memory
        .guest
        .write_slice(input, GuestAddress(0))
        .expect("it fits");
    for queue in 0..3 {
        driver.notify(queue);
    }
    // Serves the queued requests, and waits for them.
    driver.transport.quiesce().expect("the loop runs");
    driver.transport.unquiesce();
    driver.reset();
    memory.revert().expect("the file is there");
    for page in 0..PAGES {
        let at = GuestAddress(FILE_AT + page * 4096);
        let byte: u8 = memory.guest.read_obj(at).expect("memory");
        assert_eq!(u64::from(byte), page + 1);
    }
});
