//! A VM that is created before it is needed.
//!
//! `KVM_CREATE_VM` can block for a long time: in Linux 6.1 until a kernel thread of the VM
//! starts (`kvm_vm_create_worker_thread`), 10 to 26 ms in the lab. A program that starts
//! for one VM does its other work in the meantime.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use kvm_ioctls::{Error, VmFd};

use super::KvmShared;

/// The thread only calls into the kernel.
const STACK: usize = 64 << 10;

/// At most one VM that has not been requested yet.
#[derive(Default)]
pub(super) struct PrecreatedVm(Mutex<Option<JoinHandle<Result<VmFd, Error>>>>);

impl PrecreatedVm {
    fn lock(&self) -> MutexGuard<'_, Option<JoinHandle<Result<VmFd, Error>>>> {
        // The handle is replaced whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to create a VM, unless this has happened. With one processor, or if the
    /// thread cannot be spawned, [`PrecreatedVm::take`] creates the VM instead.
    pub(super) fn start(shared: &Arc<KvmShared>) {
        if processors() < 2 {
            return;
        }
        let mut precreated = shared.precreated.lock();
        if precreated.is_none() {
            let shared = Arc::clone(shared);
            let thread = Builder::new().name("kvm-ahead".to_owned());
            let spawned = thread
                .stack_size(STACK)
                .spawn(move || shared.kvm.create_vm());
            *precreated = spawned.ok();
        }
    }

    /// Returns the VM whose creation was started, or else a new one.
    pub(super) fn take(shared: &KvmShared) -> Result<VmFd, Error> {
        // A concurrent caller creates a VM of its own.
        let thread = shared.precreated.lock().take();
        match thread.map(JoinHandle::join) {
            Some(Ok(Ok(vm))) => Ok(vm),
            // The earlier failure may have been transient; create synchronously.
            Some(_) | None => shared.kvm.create_vm(),
        }
    }
}

/// Returns the number of processors that this thread may use; the maximum if there are too
/// many to count. (The standard library's count also reads limits of cgroups from files.)
fn processors() -> u32 {
    rustix::thread::sched_getaffinity(None).map_or(u32::MAX, |set| set.count())
}

impl fmt::Debug for PrecreatedVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ahead")
            .field(&self.lock().is_some())
            .finish()
    }
}
