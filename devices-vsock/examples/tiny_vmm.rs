//! The device in a VMM that is not this project's: KVM by `kvm-ioctls`, guest memory with a
//! dirty bitmap, and a guest of some forty bytes that starts the device and connects to the
//! host. Needs `/dev/kvm`, no kernel and no image.
//!
//! `cargo run -p sm-devices-vsock --example tiny_vmm`

use std::error::Error;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use sm_devices_vsock::{Vsock, VsockConfig};
use sm_event_loop::EventLoop;
use sm_virtio::mmio::{InterruptLine, MmioTransport};
use sm_virtio::queue::Span;
use sm_virtio::testing::DriverQueue;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
    GuestRegionMmap, MmapRegion,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MEMORY: usize = 1 << 20;
/// Guest physical addresses of the guest's code, its list of register writes, packets to
/// send, receive buffers, and queues.
const CODE: u64 = 0x1000;
const WRITES: u64 = 0x2000;
const PACKETS: u64 = 0x3000;
const BUFFERS: u64 = 0x4000;
const QUEUES: [u64; 3] = [0x8000, 0x9000, 0xa000];
const QUEUE_SIZE: u16 = 8;
/// The register window of the device.
const WINDOW: u64 = 0xd000_0000;
const WINDOW_LEN: u64 = 0x1000;

const GUEST_CID: u64 = 3;
const HOST_PORT: u32 = 5000;
const GREETING: &[u8] = b"hello from the guest";

fn main() -> Result<()> {
    println!("the host reads {:?}", String::from_utf8_lossy(&run()?));
    Ok(())
}

/// Runs the guest to its end and returns the bytes that it sent to the host.
fn run() -> Result<Vec<u8>> {
    // This VMM's memory: it marks its own writes, for a live migration, for example.
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), MEMORY)])?;
    let vm = Kvm::new()?.create_vm()?;
    map(&vm, &memory)?;

    // The device: host code keeps the muxer, the transport gets the device.
    let event_loop = EventLoop::spawn("devices")?;
    let config = VsockConfig::default().guest_cid(GUEST_CID);
    let (device, muxer) = Vsock::new(config)?;
    let seen_by_devices = without_bitmap(&memory)?;
    let line = Arc::new(NotConnected);
    let loop_handle = event_loop.handle();
    let transport = MmioTransport::new(0, device, seen_by_devices.clone(), line, loop_handle)?;

    // Connections of the guest to a port of the host arrive on a socket.
    let (accepted, connections) = channel();
    let listening = muxer.listen(
        HOST_PORT,
        Box::new(move |_| {
            let (ours, theirs) = UnixStream::pair().ok()?;
            accepted.send(ours).ok()?;
            Some(OwnedFd::from(theirs).into())
        }),
    );

    let used = load_guest(&memory, &seen_by_devices)?;
    let mut vcpu = boot(&vm)?;
    run_vcpu(&mut vcpu, &transport)?;
    let answers: u16 = memory.read_obj(GuestAddress(used))?;
    if answers == 0 {
        return Err("the device did not answer".into());
    }

    let mut stream = connections.recv_timeout(Duration::from_secs(60))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut greeting = vec![0; GREETING.len()];
    stream.read_exact(&mut greeting)?;
    drop(listening);
    Ok(greeting)
}

/// Maps the memory into the guest.
fn map(vm: &VmFd, memory: &GuestMemoryMmap<AtomicBitmap>) -> Result<()> {
    let host = memory.get_host_address(GuestAddress(0))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: host as u64,
    };
    #[expect(unsafe_code, reason = "the guest writes the memory")]
    // SAFETY: `memory` outlives the VM and its vCPU, which `run` drops first.
    unsafe {
        vm.set_user_memory_region(region)?;
    }
    Ok(())
}

/// Returns the same memory for the devices: without a bitmap. The VMM's own bitmap does not
/// mark a device's writes, so the VMM has to treat receive buffers and rings as dirty.
fn without_bitmap(memory: &GuestMemoryMmap<AtomicBitmap>) -> Result<GuestMemoryMmap> {
    let mut regions = Vec::new();
    for region in memory.iter() {
        let host = memory.get_host_address(region.start_addr())?;
        let len = usize::try_from(region.len())?;
        #[expect(unsafe_code, reason = "a second view of a mapping")]
        // SAFETY: the range belongs to `region`, which lives as long as `memory`; `run`
        // drops the devices and their view of it first.
        let view = unsafe { MmapRegion::build_raw(host, len, region.prot(), region.flags()) }?;
        regions.push(GuestRegionMmap::new(view, region.start_addr()).ok_or("too large")?);
    }
    Ok(GuestMemoryMmap::from_regions(regions)?)
}

/// The guest polls, so it needs no interrupt. Other VMMs write an irqfd here.
struct NotConnected;

impl InterruptLine for NotConnected {
    fn pulse(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Loads the guest into its memory: code, rings, and two packets to send. Returns the
/// address of the used index of its receive queue.
fn load_guest(memory: &GuestMemoryMmap<AtomicBitmap>, rings: &GuestMemoryMmap) -> Result<u64> {
    let mut queues = QUEUES.map(|at| DriverQueue::new(rings.clone(), at, QUEUE_SIZE));
    let span = |address, len| Span {
        address: GuestAddress(address),
        len,
    };
    for index in 0..4 {
        queues[0]
            .offer(&[], &[span(BUFFERS + index * 0x400, 0x400)])
            .ok_or("no room")?;
    }
    let mut at = PACKETS;
    for packet in [packet(1, b""), packet(5, GREETING)] {
        memory.write_slice(&packet, GuestAddress(at))?;
        let len = u32::try_from(packet.len())?;
        queues[1].offer(&[span(at, len)], &[]).ok_or("no room")?;
        at += 0x100;
    }

    let mut writes = Vec::new();
    let mut write = |register: u64, value: u32| writes.extend([WINDOW + register, value.into()]);
    // ACKNOWLEDGE and DRIVER; VERSION_1 is the guest's only feature; FEATURES_OK.
    for (register, value) in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)] {
        write(register, value);
    }
    for (index, queue) in (0..).zip(&queues) {
        write(0x30, index);
        write(0x38, QUEUE_SIZE.into());
        for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(queue.addresses()) {
            write(register, u32::try_from(address)?);
        }
        write(0x44, 1);
    }
    // DRIVER_OK, and a notification of the transmit queue.
    write(0x70, 15);
    write(0x50, 1);
    for (index, value) in (0..).zip(writes.into_iter().chain([0])) {
        memory.write_obj(u32::try_from(value)?, GuestAddress(WRITES + index * 4))?;
    }

    let [_, _, used_ring] = queues[0].addresses();
    let used = used_ring + 2;
    let [a, b, c, d] = u32::try_from(used)?.to_le_bytes();
    // 32-bit code: each pair of the list is an address and a value to store there; then it
    // waits until a packet arrives, at most 2^28 iterations.
    let code = [
        &[0xbe, 0x00, 0x20, 0x00, 0x00][..], //   mov esi, WRITES
        &[0xad, 0x85, 0xc0, 0x74, 0x07],     // 1: lodsd; test eax, eax; jz 2f
        &[0x89, 0xc7, 0xad, 0x89, 0x07],     //   mov edi, eax; lodsd; mov [edi], eax
        &[0xeb, 0xf4],                       //   jmp 1b
        &[0xb9, 0x00, 0x00, 0x00, 0x10],     // 2: mov ecx, 1 << 28
        &[0x66, 0x83, 0x3d, a, b, c, d, 0],  // 3: cmp word [used], 0
        &[0x75, 0x05, 0xf3, 0x90],           //   jne 4f; pause
        &[0x49, 0x75, 0xf1],                 //   dec ecx; jnz 3b
        &[0xf4],                             // 4: hlt
    ]
    .concat();
    memory.write_slice(&code, GuestAddress(CODE))?;
    Ok(used)
}

/// Returns a packet of the guest (virtio 1.3 section 5.10.6): operation 1 is a request for
/// a connection, 5 is data.
fn packet(operation: u16, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
    [
        &GUEST_CID.to_le_bytes()[..],
        &2_u64.to_le_bytes(),    // context identifier of the host
        &1024_u32.to_le_bytes(), // port of the guest
        &HOST_PORT.to_le_bytes(),
        &len.to_le_bytes(),
        &1_u16.to_le_bytes(), // a stream
        &operation.to_le_bytes(),
        &0_u32.to_le_bytes(),     // flags
        &65536_u32.to_le_bytes(), // room that the guest has
        &0_u32.to_le_bytes(),     // bytes that it has taken
        data,
    ]
    .concat()
}

/// Creates a vCPU at the guest's code, in protected mode without paging.
fn boot(vm: &VmFd) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(0)?;
    let mut special = vcpu.get_sregs()?;
    for segment in [
        &mut special.cs,
        &mut special.ds,
        &mut special.es,
        &mut special.ss,
    ] {
        (segment.base, segment.limit, segment.selector) = (0, u32::MAX, 0x10);
        (segment.type_, segment.present, segment.s) = (3, 1, 1);
        (segment.db, segment.g) = (1, 1);
    }
    (special.cs.selector, special.cs.type_) = (0x08, 11);
    special.cr0 |= 1;
    vcpu.set_sregs(&special)?;
    let mut registers = vcpu.get_regs()?;
    (registers.rip, registers.rflags) = (CODE, 2);
    vcpu.set_regs(&registers)?;
    Ok(vcpu)
}

/// Runs until the guest halts. The device is the only resource outside of its memory.
fn run_vcpu(vcpu: &mut VcpuFd, transport: &MmioTransport) -> Result<()> {
    let offset = |address: u64| address.checked_sub(WINDOW).filter(|at| *at < WINDOW_LEN);
    loop {
        match vcpu.run()? {
            VcpuExit::MmioRead(address, data) => match offset(address) {
                Some(offset) => transport.read(offset, data),
                None => data.fill(0xff),
            },
            VcpuExit::MmioWrite(address, data) => {
                if let Some(offset) = offset(address) {
                    transport.write(offset, data);
                }
            }
            VcpuExit::Hlt => return Ok(()),
            other => return Err(format!("the guest stopped: {other:?}").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn data_of_the_guest_arrive() {
        let kvm = kvm_ioctls::Kvm::new();
        let missing = kvm.is_err().then_some("it needs /dev/kvm");
        if !sm_test_needs::met("kvm", missing) {
            return;
        }
        assert_eq!(super::run().unwrap(), super::GREETING);
    }
}
