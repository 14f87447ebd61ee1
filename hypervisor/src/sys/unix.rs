//! Targets of doorbells: file descriptors.

use std::os::fd::BorrowedFd;
#[cfg(any(feature = "testing", test))]
use std::{io, os::fd::OwnedFd};

/// Target of a doorbell: an eventfd on Linux, elsewhere a descriptor that becomes readable
/// when eight bytes are written to it.
pub type Wake<'a> = BorrowedFd<'a>;

/// A duplicate of a [`Wake`] that the fake backend signals.
#[cfg(any(feature = "testing", test))]
#[derive(Debug)]
pub(crate) struct Waker(OwnedFd);

#[cfg(any(feature = "testing", test))]
impl Waker {
    /// Duplicates `wake`. `None` means that the fake signals nothing on this host.
    pub(crate) fn of(wake: Wake<'_>) -> io::Result<Option<Self>> {
        Ok(Some(Self(wake.try_clone_to_owned()?)))
    }

    pub(crate) fn signal(&self) {
        // A full eventfd counter is still a signal.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use crate::fake::{FakeEvent, FakeHypervisor, Step};
    use crate::{
        Bus, Doorbell, Exit, Hypervisor as _, Vcpu as _, VcpuSeed as _, VirtualMachine as _,
        VmParameters,
    };

    /// A bus that receives no access.
    struct NoBus;

    impl Bus for NoBus {
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
        fn pio_read(&self, _: u16, _: &mut [u8]) {}
        fn pio_write(&self, _: u16, _: &[u8]) {}
    }

    #[test]
    fn doorbells_take_the_writes_they_match() {
        let write = |value: u32| Step::MmioWrite(0x50, value.to_le_bytes().to_vec());
        let end = Step::Exit(Exit::Halt);
        let fake = FakeHypervisor::new(vec![vec![write(1), write(2), end]]);
        let vm = fake.create_vm(&VmParameters { vcpus: 1 }).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let doorbell = Doorbell {
            address: 0x50,
            width: Some(4),
            value: Some(2),
        };
        assert!(vm.add_doorbell(doorbell, writer.as_fd()).unwrap());
        let mut vcpu = vm.create_vcpu(0).unwrap().bind(None).unwrap();
        vcpu.run(&NoBus).unwrap();
        let events = fake.take_events();
        assert_eq!(
            events,
            [FakeEvent::Bound(0, None), FakeEvent::Rung(doorbell)]
        );
        let mut count = [0; 8];
        rustix::io::read(&reader, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
    }
}
