//! Guest memory that a thread fills on demand through Linux's userfaultfd.
//!
//! This is the alternative to mapping `memory.bin`: memory is anonymous, and the contents
//! of a page are read through [`PageSource`] on its first access, so that they can come
//! from any storage. Each first access costs a round trip through the thread, which is
//! why files are mapped by default. Requires the privilege to handle faults of the kernel
//! (`CAP_SYS_PTRACE`, or the sysctl `vm.unprivileged_userfaultfd`), because KVM accesses
//! guest memory in the kernel.
#![expect(
    unsafe_code,
    reason = "ioctls of userfaultfd (ioctl_userfaultfd(2)), which take addresses"
)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use sm_vmm_core::memory::{MachineMemory, MemoryConfig};

use crate::Error;
use crate::chain::Chain;
use crate::extents::{PAGE, Piece, Source};

/// Number of pages in the aligned block that is filled after a fault; a power of two.
const AROUND: u64 = 16;
const AROUND_LEN: usize = 64 << 10;
/// Maximum number of faults read at a time.
const BATCH: usize = 16;
/// Size of `struct uffd_msg` in bytes.
const MESSAGE: usize = 32;
const EVENT_PAGEFAULT: u8 = 0x12;
const API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;
const MODE_DONTWAKE: u64 = 1;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    zeroed: i64,
}

/// Source of page contents.
pub trait PageSource: Send + 'static {
    /// Reads pages from `first`, in RAM order, into `buffer`, whose length is a multiple
    /// of the page size. Returns `false` if all of them are zero; `buffer` is then
    /// unchanged.
    ///
    /// # Errors
    /// The pages cannot be read. The machine cannot continue then.
    fn read(&self, first: u64, buffer: &mut [u8]) -> io::Result<bool>;

    /// Returns the number of pages from `first`, at most `most`, that one read may
    /// request.
    fn run(&self, first: u64, most: u64) -> u64;
}

/// The pages of a chain of snapshots.
#[derive(Debug)]
pub struct ChainPages {
    pieces: Vec<Piece>,
    files: Vec<File>,
}

impl ChainPages {
    /// Creates a source with the pages of `chain`.
    ///
    /// # Errors
    /// A file descriptor cannot be duplicated.
    pub fn new(chain: &Chain) -> Result<Self, Error> {
        let mut files = Vec::with_capacity(chain.members().len());
        for member in chain.members() {
            let path = member.lease.dir().join("memory.bin");
            let file = member.lease.memory().try_clone();
            files.push(file.map_err(Error::io("duplicate the descriptor of", &path))?);
        }
        Ok(Self {
            pieces: chain.pieces().to_vec(),
            files,
        })
    }

    fn piece(&self, page: u64) -> Option<&Piece> {
        let after = self.pieces.partition_point(|piece| piece.first <= page);
        let piece = self.pieces.get(after.checked_sub(1)?)?;
        (page < piece.first + piece.pages).then_some(piece)
    }
}

impl PageSource for ChainPages {
    fn read(&self, first: u64, buffer: &mut [u8]) -> io::Result<bool> {
        let source = self.piece(first).map(|piece| piece.source);
        let Some(Source::Member(index)) = source else {
            return Ok(false);
        };
        let file = self.files.get(index).ok_or(io::ErrorKind::NotFound)?;
        file.read_exact_at(buffer, first * PAGE)?;
        Ok(true)
    }

    fn run(&self, first: u64, most: u64) -> u64 {
        self.piece(first).map_or(1, |piece| {
            (piece.first + piece.pages - first).min(most).max(1)
        })
    }
}

/// Callback for a failure of the pager. A thread that accesses a missing page then blocks
/// forever, so the process must be terminated.
pub type PagerFailureCallback = Box<dyn FnOnce(io::Error) + Send>;

/// The thread that fills memory. Dropping it stops the thread.
#[derive(Debug)]
pub struct Pager {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Pager {
    fn drop(&mut self) {
        // The counter cannot overflow, because it is written only once.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A mapped region in which faults are handled.
#[derive(Clone, Copy, Debug)]
struct Window {
    address: u64,
    len: u64,
    first: u64,
}

/// Creates memory of `bytes` bytes whose pages are read from `source` on first access.
///
/// # Errors
/// The system does not permit this process to handle faults, or is out of memory.
pub fn page_in(
    bytes: u64,
    source: impl PageSource,
    on_failure: PagerFailureCallback,
) -> Result<(MachineMemory, Pager), Error> {
    let failed = |operation| {
        move |error: Errno| Error::Io {
            operation,
            path: PathBuf::from("userfaultfd"),
            source: error.into(),
        }
    };
    let memory =
        MachineMemory::filled(&MemoryConfig::new(bytes)).map_err(|source| Error::Machine {
            operation: "reserve memory",
            source: Box::new(source),
        })?;
    // SAFETY: the call creates a descriptor and accesses no memory.
    let fd = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }
        .map_err(failed("open"))?;
    let mut api = Api {
        api: API,
        features: 0,
        ioctls: 0,
    };
    // SAFETY: this ioctl reads and writes a `struct uffdio_api`, which `Api` is.
    unsafe { update::<{ opcode::read_write::<Api>(0xaa, 0x3f) }, _>(&fd, &mut api) }
        .map_err(failed("agree on a version with"))?;
    let mut windows = Vec::new();
    for region in &memory.regions {
        let Some(address) = memory.host_address(region) else {
            continue;
        };
        let window = Window {
            address: address.as_ptr() as u64,
            len: region.len,
            first: region.offset / PAGE,
        };
        let mut register = Register {
            range: Range {
                start: window.address,
                len: window.len,
            },
            mode: MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the range is a mapping of this process that no code has accessed yet.
        unsafe { update::<{ opcode::read_write::<Register>(0xaa, 0) }, _>(&fd, &mut register) }
            .map_err(failed("register memory with"))?;
        windows.push(window);
    }
    let stop = Arc::new(
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed("wait for"))?,
    );
    let filler = Filler {
        fd,
        stop: Arc::clone(&stop),
        memory: memory.clone(),
        windows,
        source,
        buffer: vec![0; AROUND_LEN],
    };
    let thread = std::thread::Builder::new()
        .name("sm-pager".to_owned())
        .spawn(move || {
            if let Err(error) = filler.run() {
                on_failure(error);
            }
        })
        .map_err(|source| Error::Io {
            operation: "start a thread for",
            path: PathBuf::from("userfaultfd"),
            source,
        })?;
    let pager = Pager {
        stop,
        thread: Some(thread),
    };
    Ok((memory, pager))
}

/// # Safety
/// `value` must be the structure that the ioctl `CODE` of userfaultfd reads and writes,
/// and the addresses in it must be those of mappings that it may fill.
unsafe fn update<const CODE: rustix::ioctl::Opcode, T>(
    fd: &OwnedFd,
    value: &mut T,
) -> Result<(), Errno> {
    // SAFETY: the caller upholds the contract of this function.
    unsafe { ioctl(fd, Updater::<CODE, T>::new(value)) }
}

struct Filler<S> {
    fd: OwnedFd,
    stop: Arc<OwnedFd>,
    /// The memory, which stays mapped as long as it may be filled.
    memory: MachineMemory,
    windows: Vec<Window>,
    source: S,
    buffer: Vec<u8>,
}

impl<S: PageSource> Filler<S> {
    fn run(mut self) -> io::Result<()> {
        loop {
            let mut fds = [
                PollFd::new(&self.fd, PollFlags::IN),
                PollFd::new(&*self.stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let [faults, stop] = &fds;
            if !stop.revents().is_empty() {
                return Ok(());
            }
            if faults.revents().contains(PollFlags::IN) {
                self.faults()?;
            }
        }
    }

    fn faults(&mut self) -> io::Result<()> {
        let mut messages = [0; MESSAGE * BATCH];
        let count = match rustix::io::read(&self.fd, &mut messages) {
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let messages = messages.get(..count).unwrap_or_default();
        for message in messages.chunks_exact(MESSAGE) {
            // struct uffd_msg: event at 0, flags at 8, address at 16.
            let (Some(&event), Some(address)) = (
                message.first(),
                message.get(16..24).and_then(|bytes| bytes.try_into().ok()),
            ) else {
                continue;
            };
            if event == EVENT_PAGEFAULT {
                self.fill(u64::from_ne_bytes(address))?;
            }
        }
        Ok(())
    }

    /// Fills the page at `address`, then the rest of its block.
    fn fill(&mut self, address: u64) -> io::Result<()> {
        let Some(window) = self
            .windows
            .iter()
            .copied()
            .find(|window| (window.address..window.address + window.len).contains(&address))
        else {
            return Ok(());
        };
        let page = (address - window.address) / PAGE;
        let _ = self.pages(window, page, 1, true)?;
        let block = page / AROUND * AROUND;
        let end = (block + AROUND).min(window.len / PAGE);
        for (mut from, to) in [(block, page), (page + 1, end)] {
            while from < to {
                let run = self.source.run(window.first + from, to - from);
                from += self.pages(window, from, run, false)?;
            }
        }
        Ok(())
    }

    /// Fills at most `count` pages of one kind (data or zero), and wakes threads that wait for
    /// them if `wake` is set. Pages that are present remain unchanged. Returns the number of
    /// pages.
    fn pages(&mut self, window: Window, from: u64, count: u64, wake: bool) -> io::Result<u64> {
        // None of the pages is discarded before it is filled: it would get its contents back.
        let discarded = self.memory.discarded();
        let (is_discarded, count) = discarded.run(window.first + from, count);
        let len = usize::try_from(count * PAGE).map_err(io::Error::other)?;
        let dst = window.address + from * PAGE;
        let mode = if wake { 0 } else { MODE_DONTWAKE };
        let buffer = self
            .buffer
            .get_mut(..len)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let filled = if !is_discarded && self.source.read(window.first + from, buffer)? {
            let mut copy = Copy {
                dst,
                src: buffer.as_ptr() as u64,
                len: count * PAGE,
                mode,
                copied: 0,
            };
            // SAFETY: the destination is in a window, which is mapped for the lifetime of
            // the pager; the source is the buffer.
            unsafe { update::<{ opcode::read_write::<Copy>(0xaa, 3) }, _>(&self.fd, &mut copy) }
        } else {
            let mut zero = Zero {
                range: Range {
                    start: dst,
                    len: count * PAGE,
                },
                mode,
                zeroed: 0,
            };
            // SAFETY: the destination is in a window, which is mapped for the lifetime of
            // the pager.
            unsafe { update::<{ opcode::read_write::<Zero>(0xaa, 4) }, _>(&self.fd, &mut zero) }
        };
        drop(discarded);
        match filled {
            Ok(()) => {}
            // The page was filled for the fault of another thread, which was woken, but
            // this one may have started to wait since.
            Err(Errno::EXIST | Errno::AGAIN) if wake => self.wake(dst)?,
            Err(Errno::EXIST | Errno::AGAIN) => {}
            // The memory is being unmapped, because the machine exits.
            Err(Errno::NOENT | Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(count)
    }

    fn wake(&self, address: u64) -> io::Result<()> {
        let mut range = Range {
            start: address,
            len: PAGE,
        };
        // SAFETY: the ioctl wakes threads that wait for a page of this range, and
        // accesses no memory.
        unsafe { update::<{ opcode::read::<Range>(0xaa, 2) }, _>(&self.fd, &mut range) }
            .map_err(Into::into)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]
mod tests {
    use std::sync::Mutex;

    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;

    const BYTES: u64 = 64 << 20;

    /// Page `n` contains the number `n`, except every third page, which is zero.
    struct Numbers {
        asked: Arc<Mutex<Vec<u64>>>,
        broken_from: u64,
    }

    impl PageSource for Numbers {
        fn read(&self, first: u64, buffer: &mut [u8]) -> io::Result<bool> {
            if first >= self.broken_from {
                return Err(io::Error::other("out of reach"));
            }
            self.asked.lock().unwrap().push(first);
            if first.is_multiple_of(3) {
                return Ok(false);
            }
            for chunk in buffer.chunks_exact_mut(8) {
                chunk.copy_from_slice(&first.to_le_bytes());
            }
            Ok(true)
        }

        fn run(&self, _first: u64, _most: u64) -> u64 {
            1
        }
    }

    type Paged = (MachineMemory, Pager, Arc<Mutex<Vec<u64>>>);

    /// Returns `None`, and prints the reason, if this process may not handle faults.
    fn paged(broken_from: u64, on_failure: PagerFailureCallback) -> Option<Paged> {
        let asked = Arc::default();
        let source = Numbers {
            asked: Arc::clone(&asked),
            broken_from,
        };
        match page_in(BYTES, source, on_failure) {
            Ok((memory, pager)) => Some((memory, pager, asked)),
            Err(error) => {
                eprintln!("skipped: {error}: {:?}", std::error::Error::source(&error));
                None
            }
        }
    }

    fn at(memory: &MachineMemory, page: u64) -> u64 {
        memory
            .guest
            .read_obj(GuestAddress(page * PAGE + 8))
            .unwrap()
    }

    #[test]
    fn pages_are_filled_on_first_access_with_their_neighbours() {
        let never = |error: io::Error| panic!("{error}");
        let Some((memory, _pager, asked)) = paged(u64::MAX, Box::new(never)) else {
            return;
        };
        assert!(asked.lock().unwrap().is_empty());
        assert_eq!(at(&memory, 100), 100);
        assert_eq!(
            asked.lock().unwrap().first(),
            Some(&100),
            "the faulting page is read first"
        );
        assert_eq!((at(&memory, 99), at(&memory, 101)), (0, 101));
        assert!(asked.lock().unwrap().iter().all(|page| page / AROUND == 6));
        // Written values persist; reverting restores the contents of the source.
        memory
            .guest
            .write_obj(7u64, GuestAddress(100 * PAGE + 8))
            .unwrap();
        assert_eq!(at(&memory, 100), 7);
        memory.revert().unwrap();
        assert_eq!(at(&memory, 100), 100);
    }

    #[test]
    fn many_threads_touch_the_same_pages_at_once() {
        let never = |error: io::Error| panic!("{error}");
        let Some((memory, _pager, _)) = paged(u64::MAX, Box::new(never)) else {
            return;
        };
        std::thread::scope(|scope| {
            for start in 0..4 {
                let memory = &memory;
                scope.spawn(move || {
                    for page in (start..BYTES / PAGE).step_by(7) {
                        let holds = if page.is_multiple_of(3) { 0 } else { page };
                        assert_eq!(at(memory, page), holds);
                    }
                });
            }
        });
    }

    #[test]
    fn a_failing_source_is_reported() {
        let (send, failed) = std::sync::mpsc::channel();
        let on_failure = Box::new(move |error: io::Error| send.send(error.to_string()).unwrap());
        let Some((memory, _pager, _)) = paged(1000, on_failure) else {
            return;
        };
        assert_eq!(at(&memory, 1), 1);
        // A thread that accesses such a page blocks forever, so another thread does.
        std::thread::spawn(move || at(&memory, 5000));
        assert!(failed.recv().unwrap().contains("out of reach"));
    }
}
