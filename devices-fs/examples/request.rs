//! Looks up a file of a shared directory through the rings of the device.
//! `cargo run -p sm-devices-fs --example request [DIRECTORY NAME]`
//!
//! The driver side comes from the feature `testing` of other crates; in a VMM it is the
//! guest's kernel.

use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};

use sm_devices_fs::{Fs, FsConfig, Share, ShareOptions};
use sm_event_loop::EventLoop;
use sm_fs_server::testing::{ROOT, init_body, opcode, request};
use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;
use sm_virtio::queue::Span;
use sm_virtio::testing::{Driver, DriverQueue};
use vm_memory::GuestAddress;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap_or_else(|| "/etc".to_owned());
    let name = arguments.next().unwrap_or_else(|| "hostname".to_owned());
    let size = size_through_rings(Path::new(&directory), &name)?;
    println!("{directory}/{name} has {size} bytes");
    Ok(())
}

/// Returns the length of a file in bytes, as a guest sees it.
fn size_through_rings(directory: &Path, name: &str) -> Result<u64, Box<dyn Error>> {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    let event_loop = EventLoop::spawn("devices")?;
    let share = Share::new(
        "share",
        File::open(directory)?.into(),
        ShareOptions::default(),
    )?;
    let device = Arc::new(Mutex::new(Fs::new(FsConfig::default().share(share))?));
    let driver = Driver::new(device, &memory, event_loop.handle());
    let mut queues = driver.start(0x1_0000, &[128, 1024]);
    let queue = queues.last_mut().ok_or("the device has no queues")?;

    let mut call = |opcode, node, body: &[&[u8]]| -> Result<Vec<u8>, Box<dyn Error>> {
        let request = request(opcode, 1, node, body);
        exchange(&memory, &driver, queue, &request)
    };
    call(opcode::INIT, 0, &[&init_body()])?;
    let share = number(&call(opcode::LOOKUP, ROOT, &[b"share\0"])?, 0)?;
    let file = call(opcode::LOOKUP, share, &[name.as_bytes(), b"\0"])?;
    // The attributes begin with number and size of the inode.
    number(&file, 48)
}

/// Sends a request; returns the body of its reply.
fn exchange(
    memory: &GuestMemory,
    driver: &Driver,
    queue: &mut DriverQueue,
    request: &[u8],
) -> Result<Vec<u8>, Box<dyn Error>> {
    let span = |address, len: usize| -> Result<Span, Box<dyn Error>> {
        Ok(Span {
            address: GuestAddress(address),
            len: u32::try_from(len)?,
        })
    };
    let readable = [span(0x8_0000, request.len())?];
    let writable = [span(0x9_0000, 4096)?];
    if !Window::new(&readable, 0, u32::MAX).copy_in(memory, request) {
        return Err("the request does not fit".into());
    }
    queue
        .offer(&readable, &writable)
        .ok_or("the queue is full")?;
    driver.notify(1);
    let (_, len) = driver.wait_used(queue);
    let mut reply = vec![0; usize::try_from(len)?];
    if !Window::new(&writable, 0, len).copy_out(memory, &mut reply) {
        return Err("the reply is longer than its buffer".into());
    }
    match reply.get(4..8) {
        Some([0, 0, 0, 0]) => Ok(reply.split_off(16)),
        other => Err(format!("the request failed: {other:?}").into()),
    }
}

fn number(bytes: &[u8], at: usize) -> Result<u64, Box<dyn Error>> {
    let bytes = bytes.get(at..at + 8).ok_or("the reply is too short")?;
    Ok(u64::from_le_bytes(bytes.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::size_through_rings;

    #[test]
    fn a_file_has_its_size_in_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("f"), "contents").unwrap();
        assert_eq!(size_through_rings(folder.path(), "f").unwrap(), 8);
        assert!(size_through_rings(folder.path(), "g").is_err());
    }
}
