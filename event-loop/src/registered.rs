//! Descriptors that a loop waits for.
//!
//! A descriptor must leave the loop before it is closed: the kernel keeps a registration
//! as long as the open file exists, while the number may already name another file.
//! [`Registered`] owns its descriptor, so that there is no other order.

#![expect(
    unsafe_code,
    reason = "a descriptor is moved out of a value that has a destructor"
)]

use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::registry::{Descriptor, Reclaimer, Registry, RegistryFd};
use crate::{Interest, Registration};

/// A descriptor that a loop waits for, with its owner, to which it dereferences.
///
/// `Registry::remove` gives the owner back. One that is dropped goes to the loop, which
/// removes the registration and then drops the owner; the handler may be called with its
/// token until then.
#[must_use = "the loop does not wait for it any more when this is dropped"]
pub struct Registered<F: Descriptor> {
    fd: ManuallyDrop<F>,
    registration: Registration,
    /// `None` only while it is taken apart.
    reclaimer: Option<Arc<Reclaimer>>,
}

impl<F: Descriptor> Registered<F> {
    /// Gives the owner out, without its registration.
    fn into_inner(self) -> F {
        let mut this = ManuallyDrop::new(self);
        this.reclaimer = None;
        // SAFETY: `this` is neither dropped nor used again, and has no other part that
        // would have to be dropped.
        unsafe { ManuallyDrop::take(&mut this.fd) }
    }
}

impl<F: Descriptor> Drop for Registered<F> {
    fn drop(&mut self) {
        // SAFETY: the value is being dropped, so that nobody can use the owner again.
        let fd = unsafe { ManuallyDrop::take(&mut self.fd) };
        if let Some(reclaimer) = &self.reclaimer {
            reclaimer.reclaim(self.registration, fd);
        }
    }
}

impl<F: Descriptor> Deref for Registered<F> {
    type Target = F;

    fn deref(&self) -> &F {
        &self.fd
    }
}

impl<F: Descriptor> AsFd for Registered<F> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<F: Descriptor + std::fmt::Debug> std::fmt::Debug for Registered<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Registered").field(&**self).finish()
    }
}

impl<F: Descriptor> Read for Registered<F>
where
    for<'a> &'a F: Read,
{
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&**self).read(buffer)
    }
}

impl<F: Descriptor> Write for Registered<F>
where
    for<'a> &'a F: Write,
{
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&**self).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&**self).flush()
    }
}

impl dyn Registry + '_ {
    /// Registers a descriptor; the handler is called with `token`.
    ///
    /// # Errors
    /// A descriptor that cannot be waited for or is registered already, or no memory.
    /// The owner is then dropped.
    pub fn add<F: Descriptor>(
        &mut self,
        fd: F,
        token: u64,
        interest: Interest,
    ) -> io::Result<Registered<F>> {
        let registration = self.register(RegistryFd(fd.as_fd()), token, interest)?;
        Ok(Registered {
            fd: ManuallyDrop::new(fd),
            registration,
            reclaimer: Some(self.reclaimer()),
        })
    }

    /// Replaces the interest in a descriptor that was registered with this loop. A
    /// condition that holds is reported once more, also if it is edge-triggered.
    ///
    /// # Errors
    /// No memory.
    pub fn modify<F: Descriptor>(
        &mut self,
        fd: &Registered<F>,
        interest: Interest,
    ) -> io::Result<()> {
        self.reregister(fd.registration, RegistryFd(fd.as_fd()), interest)
    }

    /// Removes a descriptor from the loop that it was registered with, and gives it
    /// back. Events that were fetched for it before are dropped.
    pub fn remove<F: Descriptor>(&mut self, fd: Registered<F>) -> F {
        self.deregister(fd.registration, RegistryFd(fd.as_fd()));
        fd.into_inner()
    }
}
