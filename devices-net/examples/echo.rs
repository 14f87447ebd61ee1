//! Sends a frame through the rings of the device to a backend that returns it.
//! `cargo run -p sm-devices-net --example echo`
//!
//! The driver side comes from the feature `testing` of `sm-virtio`; in a VMM it is the
//! guest's kernel.

use std::collections::VecDeque;
use std::error::Error;
use std::sync::{Arc, Mutex};

use sm_devices_net::{HEADER_LEN, Net, NetBackend, NetConfig, NetFrame, NetHeader, ReceiveRing};
use sm_event_loop::{EventLoop, Readiness, Registry};
use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;
use sm_virtio::queue::Span;
use sm_virtio::testing::Driver;
use vm_memory::GuestAddress;

/// Frames that are held back until the guest has receive buffers.
const BACKLOG: usize = 64;

/// Returns every frame to its sender.
#[derive(Default)]
struct Echo {
    frames: VecDeque<(NetHeader, Vec<u8>)>,
}

impl NetBackend for Echo {
    fn started(&mut self, _features: u64, _registry: &mut dyn Registry) {}

    fn transmit(&mut self, frame: &NetFrame<'_>, _registry: &mut dyn Registry) {
        let mut bytes = vec![0; frame.bytes.len() as usize];
        if self.frames.len() < BACKLOG && frame.bytes.copy_out(frame.memory, &mut bytes) {
            self.frames.push_back((frame.header, bytes));
        }
    }

    fn receive(&mut self, ring: &mut ReceiveRing<'_>, _registry: &mut dyn Registry) {
        while let Some((header, bytes)) = self.frames.front() {
            let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            match ring.reserve(len) {
                Ok(buffers) => {
                    if !buffers.copy(header, bytes) {
                        return;
                    }
                }
                Err(sm_devices_net::ReserveError::TooLong) => {}
                Err(_) => return,
            }
            self.frames.pop_front();
        }
    }

    fn host_ready(&mut self, _token: u64, _ready: Readiness, _registry: &mut dyn Registry) {}

    fn quiesce(&mut self, _registry: &mut dyn Registry) {}

    fn reset(&mut self, _registry: Option<&mut dyn Registry>) {
        self.frames.clear();
    }

    fn save(&self) -> Result<Vec<u8>, String> {
        Ok(Vec::new())
    }

    fn check(&self, _bytes: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn restore(&mut self, _bytes: &[u8]) -> Result<(), String> {
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let echoed = through_rings(b"a frame")?;
    println!("received {:?}", String::from_utf8_lossy(&echoed));
    Ok(())
}

/// Transmits a frame, and returns the frame that arrives.
fn through_rings(frame: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    let event_loop = EventLoop::spawn("devices")?;
    let config = NetConfig::new([2, 0, 0, 0, 0, 1]);
    let device = Net::with_backend(config, Box::new(Echo::default()));
    let driver = Driver::new(Arc::new(Mutex::new(device)), &memory, event_loop.handle());
    let mut queues = driver.start(0x1_0000, &[256, 256]);
    let [rx, tx] = &mut queues[..] else {
        return Err("a network device has two queues".into());
    };

    let buffer = Span {
        address: GuestAddress(0x9_0000),
        len: 2048,
    };
    rx.offer(&[], &[buffer]).ok_or("the queue is full")?;
    driver.notify(0);

    let bytes = [&[0; HEADER_LEN as usize], frame].concat();
    let span = Span {
        address: GuestAddress(0x8_0000),
        len: u32::try_from(bytes.len())?,
    };
    if !Window::new(&[span], 0, u32::MAX).copy_in(&memory, &bytes) {
        return Err("the frame does not fit".into());
    }
    tx.offer(&[span], &[]).ok_or("the queue is full")?;
    driver.notify(1);

    let (_, len) = driver.wait_used(rx);
    let mut received = vec![0; usize::try_from(len)?];
    if !Window::new(&[buffer], 0, len).copy_out(&memory, &mut received) {
        return Err("the frame is longer than its buffer".into());
    }
    Ok(received.split_off(HEADER_LEN as usize))
}

#[cfg(test)]
mod tests {
    use super::through_rings;

    #[test]
    fn a_frame_returns() {
        assert_eq!(through_rings(b"hello").unwrap(), b"hello");
    }
}
