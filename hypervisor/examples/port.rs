//! A guest of a few bytes on the host's hypervisor, which prints to a port and is stopped:
//! the whole use of the hypervisor interface by a VMM. `cargo run -p sm-hypervisor
//! --example port`
//!
//! It needs `/dev/kvm`, but not one that can run Linux.

use std::error::Error;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use sm_hypervisor::state::x86_64::{BootRegisters, Segment};
use sm_hypervisor::{
    Bus, Exit, Hypervisor, Kicker, MemoryRegion, Native, Vcpu as _, VcpuSeed as _,
    VirtualMachine as _, VmParameters, X86_64,
};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

const MEMORY: usize = 0x1_0000;
const CODE: u64 = 0x1000;
/// 32-bit code that writes the text behind it to port 0x3f8, byte by byte, and then a byte
/// to port 0x80.
const GUEST: &[u8] = b"\xbe\x20\x10\x00\x00\x66\xba\xf8\x03\xac\x84\xc0\x74\x03\xee\xeb\xf8\
    \xe6\x80\xf4\xeb\xfd\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90hello from a guest\n\0";

fn main() -> Result<(), Box<dyn Error>> {
    let host = Native::open()?;
    println!("{:?}", host.capabilities());
    print!("{}", String::from_utf8_lossy(&run(&host)?));
    Ok(())
}

/// Runs the guest and returns the text that it printed, on any hypervisor for x86-64.
fn run(host: &impl Hypervisor<Arch = X86_64>) -> Result<Vec<u8>, Box<dyn Error>> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])?;
    memory.write_slice(GUEST, GuestAddress(CODE))?;
    let vm = host.create_vm(&VmParameters { vcpus: 1 })?;
    let region = MemoryRegion {
        guest_address: 0,
        host_address: NonNull::new(memory.get_host_address(GuestAddress(0))?).ok_or("null")?,
        len: MEMORY as u64,
    };
    #[expect(unsafe_code, reason = "the guest writes the memory")]
    // SAFETY: `memory` is dropped after the VM and its vCPU, and no reference to it exists.
    unsafe {
        vm.map_memory(region)?;
    }

    let seed = vm.create_vcpu(0)?;
    let port = Port {
        printed: Mutex::default(),
        kicker: seed.kicker(),
    };
    // From here on the vCPU belongs to this thread.
    let mut vcpu = seed.bind(Some(&registers()))?;
    match vcpu.run(&port)? {
        Exit::Cancelled => Ok(port
            .printed
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)),
        other => Err(format!("the guest stopped: {other:?}").into()),
    }
}

/// Protected mode without paging, with flat segments.
fn registers() -> BootRegisters {
    let code = Segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x08,
        attributes: 0xc09b,
        unusable: false,
    };
    BootRegisters {
        rip: CODE,
        rflags: 2,
        cs: code,
        ds: Segment {
            selector: 0x10,
            attributes: 0xc093,
            ..code
        },
        tr: Segment {
            limit: 0x67,
            selector: 0,
            attributes: 0x008b,
            ..code
        },
        // PE (protection) and ET, NE (x87).
        cr0: 0x31,
        ..BootRegisters::default()
    }
}

/// The only device.
struct Port {
    printed: Mutex<Vec<u8>>,
    kicker: Arc<dyn Kicker>,
}

impl Bus for Port {
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, _address: u64, _data: &[u8]) {}

    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        match port {
            0x3f8 => {
                let mut printed = self.printed.lock().unwrap_or_else(PoisonError::into_inner);
                printed.extend_from_slice(data);
            }
            // The guest has finished: make `run` return.
            0x80 => self.kicker.kick(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_guest_prints() {
        if let Some(host) = sm_hypervisor::testing::native() {
            assert_eq!(super::run(&host).unwrap(), b"hello from a guest\n");
        }
    }
}
