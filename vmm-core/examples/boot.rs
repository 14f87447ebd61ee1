//! Boots a kernel with the host's hypervisor, prints its console and says how
//! it ended: `boot KERNEL INITRAMFS CMDLINE [MEMORY_MIB [VCPUS]]`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::time::Instant;

use sm_hypervisor::Hypervisor;
use sm_hypervisor::kvm::Kvm;
use sm_vmm_core::event_loop::EventLoop;
use sm_vmm_core::loader::InitramfsPart;
use sm_vmm_core::machine::{Machine, MachineConfig};
use sm_vmm_core::memory::MemoryConfig;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, kernel, initramfs, cmdline, rest @ ..] = args.as_slice() else {
        return Err("usage: boot KERNEL INITRAMFS CMDLINE [MEMORY_MIB [VCPUS]]".into());
    };
    let mib: u64 = rest.first().map_or(Ok(256), |mib| mib.parse())?;
    let vcpus: u32 = rest.get(1).map_or(Ok(1), |vcpus| vcpus.parse())?;

    let started = Instant::now();
    let mut console = tempfile::tempfile()?;
    let host = Kvm::open()?;
    let event_loop = EventLoop::spawn("devices")?;
    let mut machine = Machine::boot(
        &host,
        MachineConfig {
            memory: MemoryConfig::new(mib << 20),
            vcpus,
            kernel: File::open(kernel)?,
            initramfs: vec![InitramfsPart::File(initramfs.into())],
            cmdline: cmdline.clone(),
            generation_id: [0xff; 16],
            console: console.try_clone()?,
            devices: Vec::new(),
        },
        &event_loop.handle(),
    )?;
    machine.resume()?;
    let running = started.elapsed();
    let reason = machine.exit_latch().wait();
    let ended = started.elapsed();

    let mut text = String::new();
    console.seek(SeekFrom::Start(0))?;
    console.read_to_string(&mut text)?;
    println!("{text}");
    println!("{reason:?}; {mib} MiB, {vcpus} vCPUs");
    println!("started after {running:?}, ended after {ended:?}");
    println!("{:?}", machine.phases());
    Ok(())
}
