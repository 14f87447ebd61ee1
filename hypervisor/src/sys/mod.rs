//! Choices by operating system: this host's backend, and the type of doorbell targets.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub use self::unix::Wake;
#[cfg(all(unix, any(feature = "testing", test)))]
pub(crate) use self::unix::Waker;
#[cfg(windows)]
pub use self::windows::Wake;
#[cfg(all(windows, any(feature = "testing", test)))]
pub(crate) use self::windows::Waker;

/// The backend of this host; on a host that has none, [`NoBackend`](crate::NoBackend),
/// which cannot be opened.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub type Native = crate::kvm::Kvm;
/// The backend of this host: none exists yet.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub type Native = crate::NoBackend<crate::X86_64>;
