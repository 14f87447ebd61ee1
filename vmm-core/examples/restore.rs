//! Boots a kernel, saves the machine when a line of its console contains a marker, and
//! continues it in clones, each with its own generation ID: `restore KERNEL INITRAMFS
//! CMDLINE MEMORY_MIB VCPUS MARKER CLONES`.

use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use sm_event_loop::{EventLoop, EventLoopHandle};
use sm_hypervisor::{Hypervisor, Native};
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::layout::{SLOT_RNG, SLOT_ROOT_DISK};
use sm_vmm_core::loader::InitramfsPart;
use sm_vmm_core::machine::{Machine, MachineConfig};
use sm_vmm_core::memory::{FileExtent, MachineMemory, MemoryConfig, PAGE_SIZE};
use sm_vmm_core::state::MachineState;
use sm_vmm_core::virtio::blk::{Access, Block};
use sm_vmm_core::virtio::disk::{Disk, FileSegment};
use sm_vmm_core::virtio::rng::Rng;
use vm_memory::{Bytes, GuestAddress};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, kernel, initramfs, cmdline, mib, vcpus, marker, clones] = args.as_slice() else {
        return Err("usage: restore KERNEL INITRAMFS CMDLINE MIB VCPUS MARKER CLONES".into());
    };
    let memory = MemoryConfig::new(mib.parse::<u64>()? << 20);
    let host = Native::open()?;
    let event_loop = EventLoop::spawn("devices")?;
    let (mut lines, console) = console()?;
    let mut machine = Machine::boot(
        &host,
        MachineConfig {
            memory,
            vcpus: vcpus.parse()?,
            kernel: File::open(kernel)?,
            initramfs: vec![InitramfsPart::File(initramfs.into())],
            cmdline: cmdline.clone(),
            generation_id: [0xff; 16],
            console,
            devices: devices()?,
        },
        &event_loop.handle(),
    )?;
    machine.resume()?;
    for line in lines.by_ref() {
        let line = line?;
        println!("original: {line}");
        if line.contains(marker.as_str()) {
            break;
        }
    }
    let started = Instant::now();
    machine.pause()?;
    let paused = started.elapsed();
    let state = machine.save_state()?;
    println!(
        "paused after {paused:?}, saved after {:?}",
        started.elapsed()
    );
    let (file, extents) = dump(machine.memory())?;
    println!(
        "dumped after {:?}, {} extents",
        started.elapsed(),
        extents.len()
    );
    drop(machine);
    drop(lines);

    let sections = state.encode()?;
    let bytes: usize = sections.iter().map(|section| section.payload.len()).sum();
    println!("state of {bytes} bytes in {} sections", sections.len());
    for clone in 0..clones.parse::<u8>()? {
        let parts = sections.iter();
        let state = MachineState::decode(parts.map(|s| (&*s.name, s.version, &*s.payload)))?;
        let extents: Vec<_> = extents
            .iter()
            .map(|&(offset, len)| FileExtent {
                offset,
                len,
                file: file.clone(),
                file_offset: offset,
            })
            .collect();
        continue_machine(&host, &event_loop.handle(), state, &memory, &extents, clone)?;
    }
    Ok(())
}

fn continue_machine(
    host: &Native,
    event_loop: &EventLoopHandle,
    state: MachineState,
    config: &MemoryConfig,
    extents: &[FileExtent],
    clone: u8,
) -> Result<()> {
    let started = Instant::now();
    let memory = MachineMemory::from_files(config, extents)?;
    let mapped = started.elapsed();
    let (mut lines, console) = console()?;
    let mut machine =
        Machine::restore(host, state.clone(), memory, devices()?, console, event_loop)?;
    machine.set_generation_id([clone; 16])?;
    machine.resume()?;
    let resumed = started.elapsed();
    if clone % 2 == 1 {
        // Every second clone is reset once after its first line.
        println!("clone {clone}: {}", lines.next().ok_or("no console")??);
        let reset = Instant::now();
        machine.pause()?;
        machine.reset_to(&state, None)?;
        machine.resume()?;
        println!("clone {clone}: reset in place in {:?}", reset.elapsed());
    }
    let printer = std::thread::spawn(move || {
        for line in lines.map_while(std::io::Result::ok) {
            println!("clone {clone} at {:?}: {line}", started.elapsed());
        }
    });
    let reason = machine.exit_latch().wait();
    println!(
        "clone {clone}: {reason:?}; memory mapped after {mapped:?}, resumed after {resumed:?}, {:?}",
        machine.phases()
    );
    drop(machine);
    printer.join().map_err(|_| "the printer panicked")?;
    Ok(())
}

/// Returns a disk with contents, and an entropy device.
fn devices() -> Result<Vec<DeviceConfig>> {
    let mut file = tempfile::tempfile()?;
    for block in 0..4096u32 {
        file.write_all(&[block.to_le_bytes()[0]; 4096])?;
    }
    let disk = Disk::composite(vec![FileSegment {
        file,
        offset: 0,
        len: 4096 * 4096,
    }])?;
    Ok(vec![
        DeviceConfig::new(SLOT_RNG, Arc::new(Mutex::new(Rng::new()))),
        DeviceConfig::new(
            SLOT_ROOT_DISK,
            Arc::new(Mutex::new(Block::new(disk, Access::ReadOnly, "root"))),
        ),
    ])
}

/// Creates a console whose lines the caller can wait for.
fn console() -> Result<(std::io::Lines<BufReader<PipeReader>>, File)> {
    let (reader, writer) = std::io::pipe()?;
    let writer = File::from(OwnedFd::from(writer));
    Ok((BufReader::new(reader).lines(), writer))
}

/// Offset and length of a non-zero part of memory.
type Piece = (u64, u64);

/// Writes all non-zero pages to a sparse file; returns them as ranges.
fn dump(memory: &MachineMemory) -> Result<(Arc<File>, Vec<Piece>)> {
    let mut file = tempfile::tempfile()?;
    file.set_len(memory.bytes())?;
    let mut extents: Vec<Piece> = Vec::new();
    let mut page = vec![0; usize::try_from(PAGE_SIZE)?];
    for region in &memory.regions {
        for at in (0..region.len).step_by(usize::try_from(PAGE_SIZE)?) {
            memory
                .guest
                .read_slice(&mut page, GuestAddress(region.guest_address + at))?;
            if page.iter().all(|&byte| byte == 0) {
                continue;
            }
            let offset = region.offset + at;
            file.seek(SeekFrom::Start(offset))?;
            file.write_all(&page)?;
            match extents.last_mut() {
                Some((start, len)) if *start + *len == offset => *len += PAGE_SIZE,
                _ => extents.push((offset, PAGE_SIZE)),
            }
        }
    }
    Ok((Arc::new(file), extents))
}
