//! Boots a kernel with the host's hypervisor, prints its console and the reason of its end:
//! `boot KERNEL INITRAMFS CMDLINE [MEMORY_MIB [VCPUS [DISK [DATA]]]]`. DISK appears
//! read-only as vda, DATA writable as vdb.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use sm_event_loop::EventLoop;
use sm_hypervisor::{Hypervisor, Native};
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::layout::{SLOT_DATA_DISK, SLOT_RNG, SLOT_ROOT_DISK};
use sm_vmm_core::loader::InitramfsPart;
use sm_vmm_core::machine::{Machine, MachineConfig};
use sm_vmm_core::memory::MemoryConfig;
use sm_vmm_core::virtio::blk::{Access, Block};
use sm_vmm_core::virtio::disk::{Disk, FileSegment, SECTOR};
use sm_vmm_core::virtio::rng::Rng;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, kernel, initramfs, cmdline, rest @ ..] = args.as_slice() else {
        return Err(
            "usage: boot KERNEL INITRAMFS CMDLINE [MEMORY_MIB [VCPUS [DISK [DATA]]]]".into(),
        );
    };
    let mib: u64 = rest.first().map_or(Ok(256), |mib| mib.parse())?;
    let vcpus: u32 = rest.get(1).map_or(Ok(1), |vcpus| vcpus.parse())?;

    let disk = match rest.get(2) {
        Some(path) => {
            let file = File::open(path)?;
            let len = file.metadata()?.len().next_multiple_of(SECTOR);
            Disk::composite(vec![FileSegment {
                file,
                offset: 0,
                len,
            }])?
        }
        None => Disk::empty(),
    };
    let data = match rest.get(3) {
        Some(path) => Disk::raw(File::options().read(true).write(true).open(path)?, false)?,
        None => Disk::empty(),
    };

    let started = Instant::now();
    let (output, console) = std::io::pipe()?;
    let printer = std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            println!("{line}");
        }
    });
    let host = Native::open()?;
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
            console: File::from(OwnedFd::from(console)),
            devices: vec![
                DeviceConfig::new(SLOT_RNG, Arc::new(Mutex::new(Rng::new()))),
                DeviceConfig::new(
                    SLOT_ROOT_DISK,
                    Arc::new(Mutex::new(Block::new(disk, Access::ReadOnly, "root"))),
                ),
                DeviceConfig::new(
                    SLOT_DATA_DISK,
                    Arc::new(Mutex::new(Block::new(data, Access::ReadWrite, "data"))),
                ),
            ],
        },
        &event_loop.handle(),
    )?;
    machine.resume()?;
    let running = started.elapsed();
    let reason = machine.exit_latch().wait();
    let ended = started.elapsed();

    let phases = machine.phases();
    drop(machine);
    printer.join().map_err(|_| "the printer panicked")?;
    println!("{reason:?}; {mib} MiB, {vcpus} vCPUs");
    println!("started after {running:?}, ended after {ended:?}");
    println!("{phases:?}");
    Ok(())
}
