//! Kicks: any thread can make a vCPU leave the guest.
//!
//! Kicks are sticky and never lost: a kick first sets a flag, then the `immediate_exit`
//! byte in the page shared with KVM, then signals the thread. If the vCPU is in the guest,
//! the signal ends KVM_RUN; if it is about to enter, KVM sees the byte; if it is outside,
//! it sees the flag. The vCPU clears the byte *before* it reads the flag.

#![expect(
    unsafe_code,
    reason = "another thread writes a byte that KVM reads, and signals a thread"
)]

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use crate::Kicker;

/// The real-time signal (counted from `SIGRTMIN`) that ends KVM_RUN.
const KICK_SIGNAL: i32 = 0;

/// Destination of kicks while the vCPU is bound.
struct Target {
    thread: libc::pthread_t,
    /// `kvm_run.immediate_exit`.
    immediate_exit: *const AtomicU8,
}

// SAFETY: the pointer is only used under the mutex, while the mapping it points
// into is alive; what it points to is atomic.
unsafe impl Send for Target {}

/// State shared by a vCPU and its kickers.
pub(super) struct KickState {
    kicked: AtomicBool,
    target: Mutex<Option<Target>>,
}

impl KickState {
    pub(super) fn new() -> Self {
        Self {
            kicked: AtomicBool::new(false),
            target: Mutex::new(None),
        }
    }

    /// Makes the calling thread the target of kicks.
    ///
    /// # Safety
    /// `immediate_exit` must stay valid until [`KickState::unbind`], which the
    /// calling thread must call before it ends.
    pub(super) unsafe fn bind(&self, immediate_exit: *const AtomicU8) {
        prepare_signal();
        *self.target() = Some(Target {
            // SAFETY: has no preconditions.
            thread: unsafe { libc::pthread_self() },
            immediate_exit,
        });
    }

    /// Ends the binding: kicks only set the flag from now on.
    pub(super) fn unbind(&self) {
        *self.target() = None;
    }

    /// Takes a pending kick.
    pub(super) fn take(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    fn target(&self) -> MutexGuard<'_, Option<Target>> {
        // No code panics with the lock held, and the value is always consistent.
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for KickState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KickState")
            .field("kicked", &self.kicked)
            .finish_non_exhaustive()
    }
}

impl Kicker for KickState {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        let target = self.target();
        if let Some(target) = &*target {
            // SAFETY: a target is only registered while the vCPU's mapping lives;
            // it is unregistered, under this lock, before that ends.
            unsafe { &*target.immediate_exit }.store(1, Ordering::SeqCst);
            // SAFETY: for the same reason the thread is alive: the vCPU never leaves it.
            // The handler does nothing.
            unsafe {
                libc::pthread_kill(target.thread, libc::SIGRTMIN() + KICK_SIGNAL);
            }
        }
    }
}

extern "C" fn ignore(_: libc::c_int) {}

/// Makes the kick signal interrupt the calling thread's system calls without other effect.
/// The handler is installed once for the process; the mask is the thread's own, inherited
/// from its parent thread.
fn prepare_signal() {
    static ONCE: Once = Once::new();
    let signal = libc::SIGRTMIN() + KICK_SIGNAL;
    ONCE.call_once(|| {
        // SAFETY: zero is a valid value of every field; no SA_RESTART, so that
        // KVM_RUN returns.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = ignore as *const () as usize;
        // SAFETY: the handler is async-signal-safe: it is empty.
        unsafe {
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    });
    // SAFETY: an empty set is a valid one to start from, and the calls only
    // touch it and the calling thread's mask.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
}
