//! The device, accessed as by a driver.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs::{self, File};
use std::path::Path;
use std::sync::{Arc, Mutex};

use sm_devices_fs::{Fs, FsConfig, SetSharesError, Share, ShareOptions, TAG};
use sm_event_loop::EventLoop;
use sm_fs_server::testing::{ROOT, init_body, opcode, request};
use sm_virtio::GuestMemory;
use sm_virtio::VirtioDevice;
use sm_virtio::iov::Window;
use sm_virtio::queue::Span;
use sm_virtio::testing::{Driver, DriverQueue};
use vm_memory::{Bytes as _, GuestAddress};

const MEMORY: usize = 16 << 20;
const BASE: u64 = 0x1_0000;
/// Buffers of requests and replies.
const REQUEST: u64 = 1 << 20;
const REPLY: u64 = 4 << 20;

struct Guest {
    memory: GuestMemory,
    device: Arc<Mutex<Fs>>,
    driver: Driver,
    queues: Vec<DriverQueue>,
    unique: u64,
    _event_loop: EventLoop,
}

fn config(path: &Path) -> FsConfig {
    let directory = File::open(path).unwrap();
    let share = Share::new("s", directory.into(), ShareOptions::default()).unwrap();
    FsConfig::default().share(share)
}

/// Ranges of guest memory of `len` bytes in total, no two of them adjacent.
fn spans(base: u64, len: usize) -> Vec<Span> {
    let part = |at: usize| Span {
        address: GuestAddress(base + 2 * at as u64),
        len: u32::try_from((len - at).min(4096)).unwrap(),
    };
    (0..len).step_by(4096).map(part).collect()
}

impl Guest {
    fn new(config: FsConfig) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let event_loop = EventLoop::spawn("devices").unwrap();
        let device = Arc::new(Mutex::new(Fs::new(config).unwrap()));
        let driver = Driver::new(device.clone(), &memory, event_loop.handle());
        Self {
            memory,
            device,
            driver,
            queues: Vec::new(),
            unique: 0,
            _event_loop: event_loop,
        }
    }

    fn start(&mut self) {
        self.queues = self.driver.start(BASE, &[128, 1024]);
    }

    /// A guest that has mounted the share, and its number.
    fn mounted(path: &Path) -> (Self, u64) {
        let mut guest = Self::new(config(path));
        guest.start();
        guest.call(opcode::INIT, 0, &[&init_body()]).unwrap();
        let share = guest.lookup(ROOT, "s").unwrap();
        (guest, share)
    }

    fn offer(&mut self, request: &[u8], space: usize, at: u64) -> u16 {
        let readable = spans(REQUEST + at, request.len());
        let writable = spans(REPLY + at, space);
        let window = Window::new(&readable, 0, u32::MAX);
        assert!(window.copy_in(&self.memory, request));
        self.queues[1].offer(&readable, &writable).unwrap()
    }

    fn reply(&self, len: u32, space: usize, at: u64) -> Vec<u8> {
        let writable = spans(REPLY + at, space);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        let window = Window::new(&writable, 0, len);
        assert!(window.copy_out(&self.memory, &mut bytes));
        bytes
    }

    fn call(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> Result<Vec<u8>, i32> {
        self.unique += 1;
        let space = (1 << 20) + 4096;
        let bytes = request(opcode, self.unique, node, body);
        let head = self.offer(&bytes, space, 0);
        self.driver.notify(1);
        let (used, len) = self.driver.wait_used(&mut self.queues[1]);
        assert_eq!(used, head);
        parse(&self.reply(len, space, 0), self.unique)
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let reply = self.call(opcode::LOOKUP, parent, &[name.as_bytes(), b"\0"])?;
        Ok(u64::from_le_bytes(reply[..8].try_into().unwrap()))
    }

    fn open(&mut self, node: u64) -> u64 {
        let reply = self.call(opcode::OPEN, node, &[&2u64.to_le_bytes()]);
        u64::from_le_bytes(reply.unwrap()[..8].try_into().unwrap())
    }

    fn counts(&self) -> Option<sm_devices_fs::FsCounts> {
        self.device.lock().unwrap().counts()
    }
}

/// Body of a reply, or the number of its error.
fn parse(reply: &[u8], unique: u64) -> Result<Vec<u8>, i32> {
    let word = |at: usize| u32::from_le_bytes(reply[at..at + 4].try_into().unwrap());
    assert_eq!(usize::try_from(word(0)), Ok(reply.len()));
    assert_eq!(reply[8..16], unique.to_le_bytes());
    match word(4).cast_signed() {
        0 => Ok(reply[16..].to_vec()),
        error => Err(-error),
    }
}

fn read_args(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    let mut args = handle.to_le_bytes().to_vec();
    args.extend(offset.to_le_bytes());
    args.extend(size.to_le_bytes());
    args.resize(40, 0);
    args
}

#[test]
fn the_tag_is_in_configuration_space() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::new(config(folder.path()));
    let mut bytes = [0xff; 44];
    guest.driver.config(0, &mut bytes);
    assert_eq!(&bytes[..TAG.len()], TAG.as_bytes());
    assert!(bytes[TAG.len()..36].iter().all(|byte| *byte == 0));
    assert_eq!(bytes[36..40], 1u32.to_le_bytes());
    let mut beyond = [0xff; 4];
    guest.driver.config(u64::MAX - 0x200, &mut beyond);
    assert_eq!(beyond, [0; 4]);
    assert_eq!(guest.device.lock().unwrap().device_type(), 26);
}

#[test]
fn files_are_read_and_written_through_rings() {
    let folder = tempfile::tempdir().unwrap();
    let contents: Vec<u8> = (0..2_000_000u32)
        .map(|i| (i % 253).to_le_bytes()[0])
        .collect();
    fs::write(folder.path().join("f"), &contents).unwrap();
    let (mut guest, share) = Guest::mounted(folder.path());
    let file = guest.lookup(share, "f").unwrap();
    let handle = guest.open(file);
    // Short and long, the latter by workers.
    for (offset, size) in [
        (0, 10),
        (1_999_999, 4096),
        (5, 65_536),
        (7, 1 << 20),
        (1_500_000, 1 << 20),
    ] {
        let reply = guest.call(opcode::READ, file, &[&read_args(handle, offset, size)]);
        let start = usize::try_from(offset).unwrap();
        let end = (start + usize::try_from(size).unwrap()).min(contents.len());
        assert!(reply.unwrap() == contents[start..end], "{offset} {size}");
    }
    for (offset, len) in [(3, 10), (100, 300_000), (1_999_000, 1 << 20)] {
        let bytes = vec![9; len];
        let args = read_args(handle, offset, u32::try_from(len).unwrap());
        let reply = guest.call(opcode::WRITE, file, &[&args, &bytes]).unwrap();
        assert_eq!(reply[..4], u32::try_from(len).unwrap().to_le_bytes());
        let host = fs::read(folder.path().join("f")).unwrap();
        let start = usize::try_from(offset).unwrap();
        assert!(host[start..start + len] == bytes, "{offset} {len}");
    }
    let fsync = [&handle.to_le_bytes()[..], &[0; 8]].concat();
    assert_eq!(guest.call(opcode::FSYNC, file, &[&fsync]), Ok(Vec::new()));
}

#[test]
fn many_requests_are_in_execution_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let contents: Vec<u8> = (0..1_000_000u32)
        .map(|i| (i / 4096).to_le_bytes()[0])
        .collect();
    fs::write(folder.path().join("f"), &contents).unwrap();
    let (mut guest, share) = Guest::mounted(folder.path());
    let file = guest.lookup(share, "f").unwrap();
    let handle = guest.open(file);
    let space = (100 << 10) + 16;
    for round in 0..20u64 {
        let mut heads = Vec::new();
        for index in 0..8u64 {
            let args = read_args(handle, index * 100_000, 100 << 10);
            let bytes = request(opcode::READ, round * 8 + index, file, &[&args]);
            heads.push(guest.offer(&bytes, space, index << 18));
        }
        guest.driver.notify(1);
        for _ in 0..8 {
            let (head, len) = guest.driver.wait_used(&mut guest.queues[1]);
            let index = heads.iter().position(|other| *other == head).unwrap() as u64;
            let body = parse(&guest.reply(len, space, index << 18), round * 8 + index).unwrap();
            let start = usize::try_from(index * 100_000).unwrap();
            assert!(body == contents[start..start + (100 << 10)], "{index}");
        }
    }
}

#[test]
fn forgotten_nodes_need_no_reply() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "").unwrap();
    let (mut guest, share) = Guest::mounted(folder.path());
    let file = guest.lookup(share, "f").unwrap();
    let forget = request(opcode::FORGET, 7, file, &[&1u64.to_le_bytes()]);
    let readable = spans(REQUEST, forget.len());
    let window = Window::new(&readable, 0, u32::MAX);
    assert!(window.copy_in(&guest.memory, &forget));
    let head = guest.queues[0].offer(&readable, &[]).unwrap();
    guest.driver.notify(0);
    let used = guest.driver.wait_used(&mut guest.queues[0]);
    assert_eq!(used, (head, 0));
    guest.driver.transport.quiesce().unwrap();
    assert_eq!(guest.counts().unwrap().nodes, 0);
}

#[test]
fn a_pause_completes_requests_and_a_later_start_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), vec![1; 500_000]).unwrap();
    let (mut guest, share) = Guest::mounted(folder.path());
    let file = guest.lookup(share, "f").unwrap();
    let handle = guest.open(file);
    let space = (200 << 10) + 16;
    for round in 0..10u64 {
        let args = read_args(handle, 0, 200 << 10);
        let bytes = request(opcode::READ, round, file, &[&args]);
        let head = guest.offer(&bytes, space, 0);
        // The pause may come before the notification is seen, and serves the request.
        guest.driver.notify(1);
        guest.driver.transport.quiesce().unwrap();
        let (used, len) = guest.queues[1].take_used().unwrap();
        assert_eq!(used, head);
        assert_eq!(
            parse(&guest.reply(len, space, 0), round).unwrap().len(),
            200 << 10
        );
        assert!(guest.counts().is_some(), "a thread runs during a pause");
        // Offered during the pause, and served after it.
        let head = guest.offer(&bytes, space, 0);
        guest.driver.notify(1);
        assert!(guest.queues[1].take_used().is_none());
        guest.driver.transport.unquiesce();
        assert_eq!(guest.driver.wait_used(&mut guest.queues[1]).0, head);
    }
}

#[test]
fn a_device_without_shares_is_idle_and_can_be_given_some() {
    let mut guest = Guest::new(FsConfig::default());
    assert!(!guest.driver.transport.has_doorbells(), "they cost time");
    guest.start();
    guest.driver.notify(0);
    guest.driver.notify(1);
    guest.driver.transport.quiesce().unwrap();
    guest.driver.transport.unquiesce();
    assert!(guest.counts().is_some(), "it has a thread");
    assert!(guest.driver.transport.save().is_ok());
    let folder = tempfile::tempdir().unwrap();
    let shares = |guest: &Guest| {
        guest
            .device
            .lock()
            .unwrap()
            .set_shares(config(folder.path()))
    };
    shares(&guest).unwrap();
    guest.call(opcode::INIT, 0, &[&init_body()]).unwrap();
    assert!(guest.lookup(ROOT, "s").is_ok());
    assert!(matches!(shares(&guest), Err(SetSharesError::Mounted)));
    guest.call(opcode::DESTROY, 0, &[]).unwrap();
    shares(&guest).unwrap();
}

#[test]
fn a_reset_releases_everything() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "").unwrap();
    let (mut guest, share) = Guest::mounted(folder.path());
    let file = guest.lookup(share, "f").unwrap();
    guest.open(file);
    guest.driver.reset();
    assert_eq!(guest.counts(), Some(sm_devices_fs::FsCounts::default()));
    guest.start();
    assert_eq!(guest.call(opcode::GETATTR, share, &[&[0; 16]]), Err(5));
    guest.call(opcode::INIT, 0, &[&init_body()]).unwrap();
    assert!(guest.lookup(ROOT, "s").is_ok());
}

#[test]
fn a_malformed_ring_needs_a_reset() {
    let folder = tempfile::tempdir().unwrap();
    let (mut guest, _) = Guest::mounted(folder.path());
    let outside = Span {
        address: GuestAddress(1 << 40),
        len: 16,
    };
    let seen = guest.driver.line.pulses();
    guest.queues[1].offer(&[outside], &[]);
    guest.driver.notify(1);
    guest.driver.line.wait_for_pulse_after(seen);
    assert_ne!(guest.driver.status() & 0x40, 0);
    guest.driver.reset();
    guest.start();
    guest.call(opcode::INIT, 0, &[&init_body()]).unwrap();
}

#[test]
fn chains_without_space_or_request_are_returned() {
    let folder = tempfile::tempdir().unwrap();
    let (mut guest, share) = Guest::mounted(folder.path());
    let bytes = request(opcode::GETATTR, 3, share, &[&[0; 16]]);
    for space in [0, 8, 15] {
        let head = guest.offer(&bytes, space, 0);
        guest.driver.notify(1);
        assert_eq!(guest.driver.wait_used(&mut guest.queues[1]), (head, 0));
    }
    let head = guest.offer(&bytes[..20], 200, 0);
    guest.driver.notify(1);
    assert_eq!(guest.driver.wait_used(&mut guest.queues[1]), (head, 0));
    // An error has space where its body has none.
    let head = guest.offer(&bytes, 16, 0);
    guest.driver.notify(1);
    assert_eq!(guest.driver.wait_used(&mut guest.queues[1]), (head, 16));
    guest.memory.write_obj(0u8, GuestAddress(REQUEST)).unwrap();
}

#[test]
fn a_session_goes_on_after_a_restore() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "contents").unwrap();
    let (mut guest, share) = Guest::mounted(folder.path());
    let file = guest.lookup(share, "f").unwrap();
    let handle = guest.open(file);
    guest.driver.transport.quiesce().unwrap();
    let state = guest.driver.transport.save().unwrap();
    assert!(!state.device.bytes.is_empty());

    // Another machine with a copy of the memory, and the same share.
    let mut clone = Guest::new(config(folder.path()));
    let mut bytes = vec![0; MEMORY];
    guest
        .memory
        .read_slice(&mut bytes, GuestAddress(0))
        .unwrap();
    clone.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    clone.driver.transport.restore(&state).unwrap();
    let queues = guest.queues.drain(..);
    clone.queues = queues
        .map(|queue| queue.moved_to(clone.memory.clone()))
        .collect();
    clone.unique = guest.unique;
    let read = clone.call(opcode::READ, file, &[&read_args(handle, 0, 100)]);
    assert_eq!(read.unwrap(), b"contents");
    assert_eq!(clone.lookup(share, "f"), Ok(file));

    // In place, on the device in use.
    clone.driver.transport.quiesce().unwrap();
    clone.driver.transport.restore(&state).unwrap();
    // A machine without the share cannot go on.
    let other = Guest::new(FsConfig::default());
    assert!(other.driver.transport.restore(&state).is_err());
    let mut wrong = state.clone();
    wrong.device.bytes.pop();
    assert!(clone.driver.transport.restore(&wrong).is_err());
}
