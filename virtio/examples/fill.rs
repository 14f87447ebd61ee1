//! The device side of a queue: fills a driver's buffers from a socket, by vectored reads
//! directly into guest memory. `cargo run -p sm-virtio --example fill [TEXT]`
//!
//! The driver side comes from the feature `testing`; in a VMM it is the guest.

use std::error::Error;
use std::io::Write as _;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;

use sm_virtio::GuestMemory;
use sm_virtio::iov;
use sm_virtio::queue::{DescriptorChain, Queue, Span};
use sm_virtio::testing::DriverQueue;
use vm_memory::{Bytes as _, GuestAddress};

fn main() -> Result<(), Box<dyn Error>> {
    let text = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "hello".to_owned());
    println!(
        "{}",
        String::from_utf8_lossy(&through_queue(text.as_bytes())?)
    );
    Ok(())
}

/// Sends bytes to a guest and returns those that fit into the two buffers that it offers.
fn through_queue(text: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    let mut driver = DriverQueue::new(memory.clone(), 0x1_0000, 8);
    let buffers = [0x2000, 0x3000].map(|at| Span {
        address: GuestAddress(at),
        len: 16,
    });
    let head = driver.offer(&[], &buffers).ok_or("the queue has no room")?;

    let mut queue = driver.device_side(false);
    let (mut sender, socket) = UnixStream::pair()?;
    sender.write_all(text)?;
    fill(&memory, &mut queue, socket.as_fd())?;

    let (used, mut len) = driver.take_used().ok_or("the device used no buffer")?;
    assert_eq!(used, head);
    let mut bytes = Vec::new();
    for buffer in buffers {
        let mut part = vec![0; usize::try_from(len.min(buffer.len))?];
        memory.read_slice(&mut part, buffer.address)?;
        len -= len.min(buffer.len);
        bytes.append(&mut part);
    }
    Ok(bytes)
}

/// Serves all chains that the driver has offered.
fn fill(
    memory: &GuestMemory,
    queue: &mut Queue,
    socket: BorrowedFd<'_>,
) -> Result<(), Box<dyn Error>> {
    let mut chain = DescriptorChain::new();
    // Every index and address is checked: an error means that the driver corrupted the
    // ring.
    while queue.pop(memory, &mut chain)? {
        let read = iov::receive(memory, &chain.writable, socket)?;
        queue.push_used(memory, chain.head(), u32::try_from(read.len)?)?;
    }
    if queue.publish(memory)? {
        println!("the driver wants an interrupt");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::through_queue;

    #[test]
    fn bytes_arrive_in_both_buffers() {
        let long = b"sixteen bytes...and twice as much, and more";
        assert_eq!(through_queue(long).unwrap(), long[..32]);
        assert_eq!(through_queue(b"short").unwrap(), b"short");
    }
}
