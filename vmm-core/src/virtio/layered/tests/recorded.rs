//! A file in memory that records what is done to it, and fails on demand.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::virtio::storage::Storage;

/// An operation on the file, in order.
#[derive(Clone, Debug)]
pub(super) enum Operation {
    Store(u64, Vec<u8>),
    Zero(Range<u64>),
    Sync,
}

/// A file in memory that records what is done to it.
#[derive(Debug, Default)]
pub(super) struct Recorded {
    file: Mutex<Vec<u8>>,
    pub(super) operations: Arc<Mutex<Vec<Operation>>>,
    /// The time of each operation, by a clock that files may share.
    pub(super) times: Arc<Mutex<Vec<usize>>>,
    pub(super) clock: Arc<AtomicUsize>,
    /// Fails calls for which it returns an error.
    pub(super) fail: Arc<Mutex<Option<Failure>>>,
}

/// A failure of the file, by the operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure {
    pub(super) applies: fn(&Operation) -> bool,
    pub(super) kind: io::ErrorKind,
}

impl Recorded {
    pub(super) fn holding(bytes: Vec<u8>) -> Self {
        Self {
            file: Mutex::new(bytes),
            ..Self::default()
        }
    }

    fn note(&self, operation: Operation) -> io::Result<()> {
        let failure = *self.fail.lock().unwrap();
        if let Some(failure) = failure.filter(|failure| (failure.applies)(&operation)) {
            return Err(failure.kind.into());
        }
        operation.apply(&mut self.file.lock().unwrap());
        self.operations.lock().unwrap().push(operation);
        let time = self.clock.fetch_add(1, Ordering::Relaxed);
        self.times.lock().unwrap().push(time);
        Ok(())
    }
}

impl Operation {
    pub(super) fn apply(&self, file: &mut [u8]) {
        match self {
            Self::Store(at, bytes) => file[*at as usize..][..bytes.len()].copy_from_slice(bytes),
            Self::Zero(range) => file[range.start as usize..range.end as usize].fill(0),
            Self::Sync => {}
        }
    }

    /// The operation in parts of a sector, which a disk writes or does not write.
    pub(super) fn sectors(&self) -> Vec<Self> {
        match self {
            Self::Store(at, bytes) => (*at..)
                .step_by(SECTOR as usize)
                .zip(bytes.chunks(SECTOR as usize))
                .map(|(at, bytes)| Self::Store(at, bytes.to_vec()))
                .collect(),
            Self::Zero(range) => range
                .clone()
                .step_by(SECTOR as usize)
                .map(|at| Self::Zero(at..at + SECTOR))
                .collect(),
            Self::Sync => Vec::new(),
        }
    }
}

impl Storage for Recorded {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.lock().unwrap().len() as u64)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }

    fn extend(&self, len: u64) -> io::Result<()> {
        self.file.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }

    fn read(&self, memory: &GuestMemory, window: Window<'_>, at: u64) -> io::Result<()> {
        let file = self.file.lock().unwrap();
        let bytes = &file[at as usize..][..window.len() as usize];
        assert!(window.copy_in(memory, bytes));
        Ok(())
    }

    fn read_cached(&self, memory: &GuestMemory, window: Window<'_>, at: u64) -> io::Result<bool> {
        self.read(memory, window, at).map(|()| true)
    }

    fn write(&self, memory: &GuestMemory, window: Window<'_>, at: u64) -> io::Result<()> {
        let mut bytes = vec![0; window.len() as usize];
        assert!(window.copy_out(memory, &mut bytes));
        self.store(&bytes, at)
    }

    fn load(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let file = self.file.lock().unwrap();
        bytes.copy_from_slice(&file[at as usize..][..bytes.len()]);
        Ok(())
    }

    fn store(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.note(Operation::Store(at, bytes.to_vec()))
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.note(Operation::Zero(range))
    }

    fn zero(&self, _: Range<u64>) -> io::Result<()> {
        // The way of a file system that cannot.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&self) -> io::Result<()> {
        self.note(Operation::Sync)
    }

    /// By pages, as file systems do.
    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let file = self.file.lock().unwrap();
        let mut at = range.start;
        while at < range.end {
            let end = (at / CLUSTER * CLUSTER + CLUSTER).min(range.end);
            if file[at as usize..end as usize]
                .iter()
                .any(|byte| *byte != 0)
            {
                return Ok(Some(at..range.end));
            }
            at = end;
        }
        Ok(None)
    }
}
