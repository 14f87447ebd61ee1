//! A VM that is made before it is needed.
//!
//! `KVM_CREATE_VM` can wait long: in Linux 6.1 for a kernel thread of the VM's to begin
//! (`kvm_vm_create_worker_thread`), 10 to 26 ms in the lab. A program that starts for
//! one VM has other work in the meantime.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use kvm_ioctls::{Error, VmFd};

use super::Shared;

/// The thread calls into the kernel, no more.
const STACK: usize = 64 << 10;

/// At most one VM that nobody has asked for yet.
#[derive(Default)]
pub(super) struct Ahead(Mutex<Option<JoinHandle<Result<VmFd, Error>>>>);

impl Ahead {
    fn lock(&self) -> MutexGuard<'_, Option<JoinHandle<Result<VmFd, Error>>>> {
        // The handle is replaced whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to make one, unless that has been done. Where no thread can be had, or
    /// none would run beside the caller's, the VM is made when it is asked for.
    pub(super) fn begin(shared: &Arc<Shared>) {
        if processors() < 2 {
            return;
        }
        let mut ahead = shared.ahead.lock();
        if ahead.is_none() {
            let shared = Arc::clone(shared);
            let thread = Builder::new().name("kvm-ahead".to_owned());
            let made = thread
                .stack_size(STACK)
                .spawn(move || shared.kvm.create_vm());
            *ahead = made.ok();
        }
    }

    /// The VM that was begun, or else a new one.
    pub(super) fn take(shared: &Shared) -> Result<VmFd, Error> {
        // Whoever comes meanwhile makes its own.
        let begun = shared.ahead.lock().take();
        match begun.map(JoinHandle::join) {
            Some(Ok(Ok(vm))) => Ok(vm),
            // What stood in the way then need not now.
            Some(_) | None => shared.kvm.create_vm(),
        }
    }
}

/// How many processors this thread may use; many where they are too many to count. (The
/// standard library's count takes limits of cgroups from files, too.)
fn processors() -> u32 {
    rustix::thread::sched_getaffinity(None).map_or(u32::MAX, |set| set.count())
}

impl fmt::Debug for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ahead")
            .field(&self.lock().is_some())
            .finish()
    }
}
