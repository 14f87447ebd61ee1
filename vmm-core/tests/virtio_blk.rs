//! The block device, accessed as by a driver.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use sm_event_loop::EventLoop;
use sm_virtio::iov::Window;
use sm_virtio::queue::Span;
use sm_virtio::testing::{Driver, DriverQueue};
use sm_virtio::{GuestMemory, VirtioDevice as _};
use sm_vmm_core::virtio::blk::{Access, Block};
use sm_vmm_core::virtio::disk::{Disk, FileSegment};
use sm_vmm_core::virtio::layered::{DiskLayer, LayeredDisk};
use vm_memory::{Bytes as _, GuestAddress};

const MEMORY: usize = 16 << 20;
const BASE: u64 = 0x1_0000;
/// Addresses of requests' headers, status bytes and indirect tables, one for each
/// descriptor, and of data.
const HEADERS: u64 = 0x2_0000;
const STATUS: u64 = 0x3_0000;
const TABLE: u64 = 0x4_0000;
const DATA: u64 = 0x10_0000;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const UNTOUCHED: u8 = 0xee;

struct Bench {
    block: Arc<Mutex<Block>>,
    driver: Driver,
    queue: DriverQueue,
    memory: GuestMemory,
    /// Number of the next request.
    next: u64,
    _event_loop: EventLoop,
}

fn span(address: u64, len: u32) -> Span {
    Span {
        address: GuestAddress(address),
        len,
    }
}

fn bench(disk: Disk, access: Access) -> Bench {
    bench_with(MEMORY, disk, access)
}

fn bench_with(memory: usize, disk: Disk, access: Access) -> Bench {
    bench_of(memory, |disk| Block::new(disk, access, "a-disk"), disk)
}

fn bench_of(memory: usize, block: impl FnOnce(Disk) -> Block, disk: Disk) -> Bench {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), memory)]).unwrap();
    let event_loop = EventLoop::spawn("test").unwrap();
    let block = Arc::new(Mutex::new(block(disk)));
    let driver = Driver::new(block.clone(), &memory, event_loop.handle());
    let queue = driver.start(BASE, &[256]).remove(0);
    Bench {
        block,
        driver,
        queue,
        memory,
        next: 0,
        _event_loop: event_loop,
    }
}

fn file(contents: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(contents).unwrap();
    file
}

fn raw(contents: &[u8]) -> (File, Disk) {
    let file = file(contents);
    let disk = Disk::raw(file.try_clone().unwrap(), false).unwrap();
    (file, disk)
}

/// A disk of two layers, of which the lower one has `contents`.
fn layered(contents: &[u8]) -> Disk {
    let capacity = u64::try_from(contents.len()).unwrap();
    let file = || tempfile::tempfile().unwrap();
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), contents.len())]).unwrap();
    memory.write_slice(contents, GuestAddress(0)).unwrap();
    let all = [span(0, u32::try_from(contents.len()).unwrap())];
    let layer = DiskLayer::create(file(), [1; 16], None, capacity).unwrap();
    let base = LayeredDisk::new(vec![layer]).unwrap();
    base.write(&memory, Window::new(&all, 0, u32::MAX), 0)
        .unwrap();
    Disk::layered(base.freeze(file(), [2; 16], capacity).unwrap())
}

impl Bench {
    /// Offers a request; returns its head and the address of its status.
    fn offer(&mut self, kind: u32, sector: u64, out: &[Span], input: &[Span]) -> (u16, u64) {
        let number = self.next % 256;
        self.next += 1;
        let (header, status) = (HEADERS + 16 * number, STATUS + number);
        let words = u128::from(kind) | u128::from(sector) << 64;
        let address = GuestAddress(header);
        self.memory
            .write_slice(&words.to_le_bytes(), address)
            .unwrap();
        self.memory
            .write_obj(UNTOUCHED, GuestAddress(status))
            .unwrap();
        let mut readable = vec![span(header, 16)];
        readable.extend(out);
        let mut writable = input.to_vec();
        writable.push(span(status, 1));
        let table = TABLE + 256 * number;
        let head = self.queue.offer_indirect(table, &readable, &writable);
        (head.unwrap(), status)
    }

    fn status(&self, at: u64) -> u8 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Executes a request; returns its status and the number of bytes written before it.
    fn request(&mut self, kind: u32, sector: u64, out: &[Span], input: &[Span]) -> (u8, u32) {
        let (head, status) = self.offer(kind, sector, out, input);
        self.driver.notify(0);
        let (used, len) = self.driver.wait_used(&mut self.queue);
        assert_eq!(used, head);
        assert!(len > 0, "the status is written");
        (self.status(status), len - 1)
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    fn capacity(&self) -> u64 {
        let mut bytes = [0; 8];
        self.driver.config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

#[test]
fn each_request_gets_its_status() {
    let (_file, disk) = raw(&[3; 8192]);
    let mut bench = bench(disk, Access::ReadWrite);
    let data = [span(DATA, 512)];
    assert_eq!(bench.capacity(), 16);
    assert_eq!(bench.request(IN, 15, &[], &data), (OK, 512));
    assert_eq!(bench.get(DATA, 512), [3; 512]);
    assert_eq!(
        bench.request(IN, 16, &[], &data),
        (IOERR, 0),
        "past the end"
    );
    assert_eq!(bench.request(OUT, 16, &data, &[]), (IOERR, 0));
    assert_eq!(bench.request(IN, u64::MAX, &[], &data), (IOERR, 0));
    let half = [span(DATA, 256)];
    assert_eq!(
        bench.request(IN, 0, &[], &half),
        (IOERR, 0),
        "half a sector"
    );
    assert_eq!(bench.request(OUT, 0, &half, &[]), (IOERR, 0));
    assert_eq!(bench.request(IN, 0, &[], &[]), (OK, 0), "nothing at all");
    assert_eq!(bench.request(FLUSH, 0, &[], &[]), (OK, 0));
    assert_eq!(bench.request(77, 0, &[], &data), (UNSUPPORTED, 0));
    let id = [span(DATA, 7), span(DATA + 7, 64)];
    assert_eq!(bench.request(GET_ID, 0, &[], &id), (OK, 20));
    assert_eq!(&bench.get(DATA, 20)[..7], b"a-disk\0");
}

#[test]
fn a_header_may_be_split_and_must_exist() {
    let (_file, disk) = raw(&[3; 8192]);
    let mut bench = bench(disk, Access::ReadWrite);
    bench.put(HEADERS, &[0; 16]);
    let (parts, answer) = (
        [span(HEADERS, 5), span(HEADERS + 5, 11)],
        [span(DATA, 512), span(STATUS, 1)],
    );
    for (header, expected) in [(&parts[..], OK), (&parts[..1], IOERR)] {
        bench.queue.offer(header, &answer).unwrap();
        bench.driver.notify(0);
        bench.driver.wait_used(&mut bench.queue);
        assert_eq!(bench.status(STATUS), expected);
    }
    // A chain without room for a status cannot be answered.
    let seen = bench.driver.line.pulses();
    bench.queue.offer(&parts, &[]).unwrap();
    bench.driver.notify(0);
    bench.driver.line.wait_for_pulse_after(seen);
    assert_ne!(bench.driver.status() & 64, 0, "needs a reset");
}

#[test]
fn ranges_are_zeroed_and_checked() {
    let (file, disk) = raw(&[9; 64 << 10]);
    let mut bench = bench(disk, Access::ReadWrite);
    let range = |sector: u64, count: u32, flags: u32| {
        let bytes = u128::from(sector) | u128::from(count) << 64 | u128::from(flags) << 96;
        bytes.to_le_bytes()
    };
    let mut run = |kind, ranges: &[[u8; 16]], len| {
        bench.put(DATA, ranges.as_flattened());
        bench.request(kind, 0, &[span(DATA, len)], &[]).0
    };
    assert_eq!(run(WRITE_ZEROES, &[range(0, 1, 0), range(8, 8, 1)], 32), OK);
    let discarded = run(DISCARD, &[range(16, 8, 0)], 16);
    assert!([OK, UNSUPPORTED].contains(&discarded), "{discarded}");
    for (kind, range, expected) in [
        (DISCARD, range(0, 8, 1), UNSUPPORTED),
        (DISCARD, range(0, 8, 2), UNSUPPORTED),
        (WRITE_ZEROES, range(0, 8, 4), UNSUPPORTED),
        (WRITE_ZEROES, range(120, 9, 0), IOERR),
        (WRITE_ZEROES, range(u64::MAX, 1, 0), IOERR),
        (DISCARD, range(0, u32::MAX, 0), IOERR),
    ] {
        assert_eq!(run(kind, &[range], 16), expected);
    }
    assert_eq!(run(DISCARD, &[range(0, 1, 0)], 15), IOERR);
    assert_eq!(run(DISCARD, &[], 0), IOERR);
    assert_eq!(run(DISCARD, &[range(0, 1, 0); 17], 17 * 16), IOERR);
    let mut whole = Vec::new();
    (&file).seek(SeekFrom::Start(0)).unwrap();
    (&file).read_to_end(&mut whole).unwrap();
    for (sector, bytes) in whole.chunks(512).enumerate() {
        let zero = sector == 0
            || (8..16).contains(&sector)
            || (discarded == OK && (16..24).contains(&sector));
        assert_eq!(bytes, [if zero { 0 } else { 9 }; 512], "sector {sector}");
    }
}

#[test]
fn an_image_is_attached_while_the_machine_runs() {
    let mut bench = bench(Disk::empty(), Access::ReadOnly);
    let data = [span(DATA, 1024)];
    assert_eq!(bench.capacity(), 0);
    assert_eq!(bench.request(IN, 0, &[], &data), (IOERR, 0));
    let seen = bench.driver.line.pulses();
    bench.driver.acknowledge();
    let generation = bench.driver.read(0xfc);
    let segments = [b'a', b'b'].map(|byte| FileSegment {
        file: file(&[byte; 512]),
        offset: 0,
        len: 512,
    });
    let disk = Disk::composite(segments.into()).unwrap();
    bench.block.lock().unwrap().set_disk(disk);
    bench.driver.line.wait_for_pulse_after(seen);
    assert_eq!(bench.driver.acknowledge(), 2, "the configuration changed");
    assert_ne!(bench.driver.read(0xfc), generation);
    assert_eq!(bench.capacity(), 2);
    assert_eq!(bench.request(IN, 0, &[], &data), (OK, 1024));
    assert_eq!(bench.get(DATA, 512), [b'a'; 512]);
    assert_eq!(bench.get(DATA + 512, 512), [b'b'; 512]);
    assert_eq!(bench.request(OUT, 0, &data, &[]), (IOERR, 0), "read-only");
    assert_eq!(bench.request(FLUSH, 0, &[], &[]), (OK, 0));
}

/// Requests on threads finish in any order; all of them finish, and a pause waits for them.
#[test]
fn a_full_queue_of_writes_is_drained_by_a_pause() {
    let (file, disk) = raw(&vec![0; 256 * 4096]);
    let mut bench = bench(disk, Access::ReadWrite);
    for round in 1..4u8 {
        let mut offered = Vec::new();
        for block in 0..256u64 {
            let at = DATA + 4096 * block;
            let byte = block.to_le_bytes()[0] ^ round;
            bench.put(at, &[byte; 4096]);
            offered.push(bench.offer(OUT, 8 * block, &[span(at, 4096)], &[]));
        }
        bench.driver.notify(0);
        bench.driver.transport.quiesce().unwrap();
        let mut back = Vec::new();
        while let Some((head, len)) = bench.queue.take_used() {
            assert_eq!(len, 1);
            back.push(head);
        }
        assert_eq!(back.len(), 256, "none is left in flight");
        for (_, status) in offered {
            assert_eq!(bench.status(status), OK);
        }
        bench.driver.transport.unquiesce();
        let mut whole = Vec::new();
        (&file).seek(SeekFrom::Start(0)).unwrap();
        (&file).read_to_end(&mut whole).unwrap();
        for (block, bytes) in (0u64..).zip(whole.chunks(4096)) {
            assert!(
                bytes == [block.to_le_bytes()[0] ^ round; 4096],
                "block {block}"
            );
        }
    }
}

#[test]
fn a_device_works_after_a_reset_during_writes() {
    let (_file, disk) = raw(&vec![5; 1 << 20]);
    let mut bench = bench(disk, Access::ReadWrite);
    for _ in 0..4 {
        for block in 0..64 {
            bench.offer(OUT, 8 * block, &[span(DATA, 4096)], &[]);
        }
        bench.driver.notify(0);
        bench.driver.reset();
        bench.queue = bench.driver.start(BASE, &[256]).remove(0);
        let data = [span(DATA, 512)];
        assert_eq!(bench.request(IN, 2000, &[], &data), (OK, 512));
        assert_eq!(bench.get(DATA, 512), [5; 512]);
    }
}

/// More than one slice of reads: the device continues with the rest without a notification.
#[test]
fn a_long_queue_of_reads_is_served_to_the_end() {
    let contents: Vec<u8> = (0u8..=250).cycle().take(8 << 20).collect();
    let segment = FileSegment {
        file: file(&contents),
        offset: 0,
        len: 8 << 20,
    };
    let mut bench = bench(Disk::composite(vec![segment]).unwrap(), Access::ReadOnly);
    const PART: u32 = 128 << 10;
    // Four slices: a notification and the start of the device account for two at most.
    for part in (0..64).chain(0..64) {
        let at = DATA + u64::from(PART) * part;
        bench.offer(IN, u64::from(PART) / 512 * part, &[], &[span(at, PART)]);
    }
    bench.driver.notify(0);
    for _ in 0..128 {
        let (_, len) = bench.driver.wait_used(&mut bench.queue);
        assert_eq!(len, PART + 1);
    }
    assert!(bench.get(DATA, 8 << 20) == contents);
}

/// A chain may name the same memory repeatedly, so that it is nearly 4 GiB long in a small
/// machine. The request before it is not published yet.
#[test]
fn the_longest_possible_read_is_served_beside_a_short_one() {
    let memory = 18 << 20;
    // Bytes past the end of the file read as zero.
    let whole = u32::MAX / 512 * 512;
    let segment = FileSegment {
        file: file(&[7; 512]),
        offset: 0,
        len: whole.into(),
    };
    let disk = Disk::composite(vec![segment]).unwrap();
    let mut bench = bench_with(memory, disk, Access::ReadOnly);
    // With header and status, these fill the largest indirect table.
    let part = whole / 253;
    let mut parts = vec![span(DATA, part); 253];
    parts.push(span(DATA, whole - 253 * part));
    let (_, short_status) = bench.offer(IN, 0, &[], &[span(DATA - 512, 512)]);
    let (_, long_status) = bench.offer(IN, 0, &[], &parts);
    bench.driver.notify(0);
    let mut used = [0; 2].map(|_| bench.driver.wait_used(&mut bench.queue).1);
    used.sort_unstable();
    assert_eq!(used, [512 + 1, whole + 1]);
    assert_eq!(bench.status(short_status), OK);
    assert_eq!(bench.status(long_status), OK);
    assert_eq!(bench.get(DATA - 512, 512), [7; 512]);
}

#[derive(Clone, Debug)]
struct Io {
    write: bool,
    sector: u64,
    lens: Vec<u32>,
    byte: u8,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The disk is an array of bytes, for any division into requests.
    #[test]
    fn a_writable_disk_is_an_array_of_bytes(
        is_layered: bool,
        requests in prop::collection::vec(
            (any::<bool>(), 0u64..40, prop::collection::vec(1u32..1024, 0..6), any::<u8>())
                .prop_map(|(write, sector, lens, byte)| Io { write, sector, lens, byte }),
            1..40,
        ),
    ) {
        let mut model = vec![1u8; 32 * 512];
        let disk = if is_layered { layered(&model) } else { raw(&model).1 };
        let mut bench = bench(disk, Access::ReadWrite);
        for Io { write, sector, mut lens, byte } in requests {
            // Whole sectors in all.
            let total: u32 = lens.iter().sum();
            lens.push(total.next_multiple_of(512) - total);
            let len = usize::try_from(lens.iter().sum::<u32>()).unwrap();
            let mut at = DATA;
            let spans: Vec<Span> = lens
                .iter()
                .map(|&len| {
                    let part = span(at, len);
                    at += u64::from(len) + 3;
                    part
                })
                .collect();
            let start = usize::try_from(sector * 512).unwrap();
            let place = model.get_mut(start..start + len);
            bench.put(DATA, &vec![byte; len + 64]);
            if write {
                let (status, _) = bench.request(OUT, sector, &spans, &[]);
                prop_assert_eq!(status == OK, place.is_some());
                if let Some(place) = place {
                    place.fill(byte);
                }
            } else {
                let (status, _) = bench.request(IN, sector, &[], &spans);
                prop_assert_eq!(status == OK, place.is_some());
                if let Some(place) = place {
                    let read: Vec<u8> = spans
                        .iter()
                        .flat_map(|s| bench.get(s.address.0, usize::try_from(s.len).unwrap()))
                        .collect();
                    prop_assert_eq!(&*place, &read[..]);
                }
            }
        }
    }
}

/// Runs the test `name` again on a tmpfs of 256 KiB in a mount namespace of its own;
/// returns its directory in that run.
fn small_disk(name: &str) -> Option<std::path::PathBuf> {
    const OWN: &str = "SM_TEST_SMALL_DISK";
    if let Some(disk) = std::env::var_os(OWN) {
        return Some(disk.into());
    }
    let at = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new("unshare");
    // Users other than root may mount in a user namespace.
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let mount = format!("mount -t tmpfs -o size=256k none \"${OWN}\" && exec \"$0\" \"$@\"");
    let ran = command
        .args(["--mount", "sh", "-c", &mount])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", name])
        .env(OWN, at.path())
        .output()
        .unwrap();
    assert!(ran.status.success(), "{ran:?}");
    assert!(String::from_utf8_lossy(&ran.stdout).contains("1 passed"));
    None
}

#[test]
fn requests_without_space_are_held() {
    let Some(disk) = small_disk("requests_without_space_are_held") else {
        return;
    };
    let filler = disk.join("filler");
    std::fs::write(&filler, vec![1; 200 << 10]).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(disk.join("layer"))
        .unwrap();
    let layer = DiskLayer::create(file, [1; 16], None, 1 << 20).unwrap();
    let layers = Disk::layered(LayeredDisk::new(vec![layer]).unwrap());
    let (full, is_full) = std::sync::mpsc::channel();
    let mut bench = bench_of(
        MEMORY,
        |disk| {
            Block::new(disk, Access::ReadWrite, "a-disk").hold_without_space(move || {
                full.send(()).unwrap();
            })
        },
        layers,
    );
    let data = [span(DATA, 128 << 10)];
    bench.put(DATA, &[7; 128 << 10]);
    let (head, status) = bench.offer(OUT, 0, &data, &[]);
    bench.driver.notify(0);
    is_full.recv().unwrap();
    // Others are answered, and it is not lost by a pause without more space.
    let small = [span(DATA + (1 << 20), 512)];
    assert_eq!(bench.request(IN, 1024, &[], &small), (OK, 512));
    bench.driver.transport.quiesce().unwrap();
    let error = bench.block.lock().unwrap().save().unwrap_err();
    assert!(error.to_string().contains("no space"), "{error}");
    bench.driver.transport.unquiesce();
    is_full.recv().unwrap();
    assert_eq!(bench.status(status), UNTOUCHED);
    std::fs::remove_file(&filler).unwrap();
    bench.driver.transport.quiesce().unwrap();
    bench.driver.transport.unquiesce();
    let (used, _) = bench.driver.wait_used(&mut bench.queue);
    assert_eq!((used, bench.status(status)), (head, OK));
    bench.put(DATA, &[0; 128 << 10]);
    assert_eq!(bench.request(IN, 0, &[], &data), (OK, 128 << 10));
    assert!(bench.get(DATA, 128 << 10) == [7; 128 << 10]);
    bench.driver.transport.quiesce().unwrap();
    bench.block.lock().unwrap().save().unwrap();
}

#[test]
fn a_queue_may_be_small() {
    let (_file, disk) = raw(&[3; 8192]);
    let block = Block::new(disk, Access::ReadWrite, "a-disk").queue_size(50);
    assert_eq!(block.queue_sizes(), [64]);
    let mut bytes = [0; 4];
    block.read_config(12, &mut bytes);
    assert_eq!(u32::from_le_bytes(bytes), 62);
}

/// The index of a layer is written by a flush only.
#[test]
fn flushes_of_a_disk_that_nobody_uses_later_do_nothing() {
    for ignore in [false, true] {
        let file = tempfile::tempfile().unwrap();
        let layer = DiskLayer::create(file.try_clone().unwrap(), [1; 16], None, 1 << 20).unwrap();
        let disk = Disk::layered(LayeredDisk::new(vec![layer]).unwrap());
        let block = |disk| Block::new(disk, Access::ReadWrite, "a-disk").ignore_flushes(ignore);
        let mut bench = bench_of(MEMORY, block, disk);
        let data = [span(DATA, 4096)];
        bench.put(DATA, &[7; 4096]);
        assert_eq!(bench.request(OUT, 0, &data, &[]), (OK, 0));
        assert_eq!(bench.request(FLUSH, 0, &[], &[]), (OK, 0));
        let again = DiskLayer::open(file.try_clone().unwrap()).unwrap();
        let again = LayeredDisk::new(vec![again]).unwrap();
        assert_eq!(again.is_unchanged(), ignore);
        // A snapshot of the machine makes it durable itself.
        let disk = Arc::clone(bench.block.lock().unwrap().disk());
        disk.flush().unwrap();
        let again = LayeredDisk::new(vec![DiskLayer::open(file).unwrap()]).unwrap();
        assert!(!again.is_unchanged());
    }
}
