//! The device on a loop that the test drives: no threads, and the test controls the time.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sm_devices_vsock::testing::{Packet, REQUEST, RESPONSE, RST, RW};
use sm_devices_vsock::{ConnectError, ConnectOptions, MuxerHandle, Vsock, VsockConfig};
use sm_event_loop::testing::ManualLoop;
use sm_event_loop::{EventHandler, HandlerId, Readiness, Registry};
use sm_virtio::queue::Span;
use sm_virtio::testing::DriverQueue;
use sm_virtio::{Activation, GuestMemory, Interrupt, VirtioDevice};
use vm_memory::{Bytes as _, GuestAddress};

const QUEUES: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;
const BUFFER: u32 = 4096;
const PORT: u32 = 1024;

/// No interrupt is needed here.
struct Silent;

impl Interrupt for Silent {
    fn used_buffers(&self) {}
    fn config_changed(&self) {}
    fn needs_reset(&self, reason: &str) {
        panic!("{reason}");
    }
}

/// The transport's part on the loop. It drops events while the device is quiesced.
struct Transport {
    device: Arc<Mutex<Vsock>>,
    quiesced: Arc<AtomicBool>,
}

impl EventHandler for Transport {
    fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
        self.device.lock().unwrap().attached(registry);
        Ok(())
    }

    fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        if !self.quiesced.load(Ordering::SeqCst) {
            let mut device = self.device.lock().unwrap();
            device.host_ready(token, readiness, registry);
        }
    }
}

struct Guest {
    event_loop: ManualLoop,
    handler: HandlerId,
    device: Arc<Mutex<Vsock>>,
    quiesced: Arc<AtomicBool>,
    muxer: MuxerHandle,
    memory: GuestMemory,
    rx: DriverQueue,
    tx: DriverQueue,
    buffers: HashMap<u16, u64>,
}

impl Guest {
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let (device, muxer) = Vsock::new(VsockConfig::default()).unwrap();
        let mut event_loop = ManualLoop::new();
        let quiesced = Arc::new(AtomicBool::new(false));
        let transport = Arc::new(Mutex::new(Transport {
            device: device.clone(),
            quiesced: quiesced.clone(),
        }));
        let handler = event_loop.add_handler(transport).unwrap();
        let [mut rx, tx, event] = [0, 1, 2].map(|index| {
            let mut queue = DriverQueue::new(memory.clone(), QUEUES * (index + 1), 16);
            queue.clear();
            queue
        });
        let mut buffers = HashMap::new();
        for index in 0..8 {
            let address = BUFFERS + index * u64::from(BUFFER);
            buffers.insert(offer(&mut rx, address), address);
        }
        let queues = [&rx, &tx, &event].map(|queue| queue.device_side(false));
        let activation = Activation {
            memory: memory.clone(),
            features: 0,
            queues: queues.to_vec(),
            interrupt: Arc::new(Silent),
        };
        device.lock().unwrap().activate(activation).unwrap();
        let mut guest = Self {
            event_loop,
            handler,
            device,
            quiesced,
            muxer,
            memory,
            rx,
            tx,
            buffers,
        };
        guest.with_device(|device, registry| device.started(registry));
        guest
    }

    fn with_device(&mut self, task: impl FnOnce(&mut Vsock, &mut dyn Registry)) {
        let device = self.device.clone();
        self.event_loop
            .with(self.handler, |registry| {
                task(&mut device.lock().unwrap(), registry);
            })
            .unwrap();
        self.event_loop.settle();
    }

    fn advance(&mut self, by: Duration) {
        self.event_loop.advance(by);
        self.event_loop.settle();
    }

    /// Requests a connection to the guest. Also returns a receiver of the result.
    fn connect(&mut self) -> (UnixStream, Receiver<Result<u32, ConnectError>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (ended, end) = channel();
        let options =
            ConnectOptions::default().on_result(move |result| ended.send(result).unwrap());
        self.muxer.connect(PORT, theirs.into(), options);
        self.event_loop.settle();
        (ours, end)
    }

    fn send(&mut self, packet: &Packet) {
        let address = BUFFERS + 64 * u64::from(BUFFER);
        let len = u32::try_from(packet.payload.len()).unwrap();
        let mut bytes = packet.header(len).to_vec();
        bytes.extend(&packet.payload);
        self.memory
            .write_slice(&bytes, GuestAddress(address))
            .unwrap();
        let span = Span {
            address: GuestAddress(address),
            len: u32::try_from(bytes.len()).unwrap(),
        };
        self.tx.offer(&[span], &[]).unwrap();
        self.with_device(|device, registry| device.queue_notified(1, registry));
        self.tx.take_used().unwrap();
    }

    fn receive(&mut self) -> Option<Packet> {
        let (head, len) = self.rx.take_used()?;
        let address = self.buffers.remove(&head).unwrap();
        let mut bytes = vec![0; len as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        self.buffers.insert(offer(&mut self.rx, address), address);
        self.with_device(|device, registry| device.queue_notified(0, registry));
        Some(Packet::decode(&bytes))
    }
}

fn offer(rx: &mut DriverQueue, address: u64) -> u16 {
    let span = Span {
        address: GuestAddress(address),
        len: BUFFER,
    };
    rx.offer(&[], &[span]).unwrap()
}

#[test]
fn data_flow_in_both_directions() {
    let mut guest = Guest::new();
    let (mut host, end) = guest.connect();
    let request = guest.receive().unwrap();
    assert_eq!(request.op, REQUEST);
    guest.send(&request.reply(RESPONSE));
    assert!(end.try_recv().unwrap().is_ok());
    host.write_all(b"to the guest").unwrap();
    guest.event_loop.settle();
    let data = guest.receive().unwrap();
    assert_eq!((data.op, &data.payload[..]), (RW, &b"to the guest"[..]));
    let mut answer = request.reply(RW);
    answer.payload = b"to the host".to_vec();
    guest.send(&answer);
    let mut bytes = [0; 11];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the host");
    // It has no deadline.
    assert_eq!(guest.event_loop.until_timer(), None);
}

#[test]
fn a_request_waits_exactly_until_its_deadline() {
    let timeout = VsockConfig::default().answer_timeout;
    let mut guest = Guest::new();
    let (_host, end) = guest.connect();
    assert_eq!(guest.receive().unwrap().op, REQUEST);
    guest.advance(timeout - Duration::from_nanos(1));
    assert!(end.try_recv().is_err());
    guest.advance(Duration::from_nanos(1));
    assert_eq!(end.try_recv().unwrap(), Err(ConnectError::TimedOut));
    assert_eq!(guest.receive().unwrap().op, RST);
    assert_eq!(guest.event_loop.until_timer(), None);
}

#[test]
fn the_time_of_a_pause_does_not_count() {
    let timeout = VsockConfig::default().answer_timeout;
    let half = timeout / 2;
    let mut guest = Guest::new();
    let (_host, end) = guest.connect();
    guest.advance(half);
    guest.with_device(|device, registry| device.quiesce(registry));
    guest.quiesced.store(true, Ordering::SeqCst);
    // The event of its timer is lost.
    guest.advance(timeout * 10);
    guest.quiesced.store(false, Ordering::SeqCst);
    guest.with_device(|device, registry| device.started(registry));
    assert!(end.try_recv().is_err());
    guest.advance(half - Duration::from_nanos(1));
    assert!(end.try_recv().is_err());
    guest.advance(Duration::from_nanos(1));
    assert_eq!(end.try_recv().unwrap(), Err(ConnectError::TimedOut));
}
