//! A TAP whose packets are those of a guest: a kernel on its other side has a network by the
//! engine, with the offloads of a virtio-net driver.

use std::fs::File;
use std::io::{self, IoSlice, Read as _, Write as _};
use std::os::fd::AsRawFd as _;

use sm_devices_net::engine::{GuestLink, LinkFull, LinkOffloads, NetEngine};
use sm_devices_net::{HEADER_LEN, MAX_FRAME, NetHeader};
use sm_event_loop::{EventHandler, Interest, Readiness, Registered, Registry};

// Linux: include/uapi/linux/if_tun.h.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const IFF_TAP: u16 = 2;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
/// Checksums, and segments of both families.
const OFFLOADS: libc::c_ulong = 1 | 2 | 4;
/// Frames of one turn.
const BUDGET: usize = 64;
/// Token of the TAP; those of the engine have a bit of their own.
const TAP: u64 = 0;
const HEADER: usize = HEADER_LEN as usize;

/// `struct ifreq`.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Creates a TAP in the network namespace of the calling thread. With `offloads`, the kernel
/// passes on segments that are larger than packets, and without checksums.
pub(crate) fn create(name: &str, offloads: bool) -> io::Result<File> {
    let mut request = Request {
        name: [0; 16],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    for (to, from) in request.name.iter_mut().zip(name.bytes().take(15)) {
        *to = from;
    }
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let fd = tap.as_raw_fd();
    let header: libc::c_int = 12;
    // SAFETY: the first call reads one `struct ifreq`, the second one integer, and the others
    // take numbers.
    let results = unsafe {
        [
            libc::ioctl(fd, TUNSETIFF, &raw const request),
            libc::ioctl(fd, TUNSETVNETHDRSZ, &raw const header),
            libc::ioctl(fd, TUNSETOFFLOAD, if offloads { OFFLOADS } else { 0 }),
            libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK),
        ]
    };
    match results.iter().any(|result| *result < 0) {
        true => Err(io::Error::last_os_error()),
        false => Ok(tap),
    }
}

/// Loses frames, as a bad link does.
#[derive(Default)]
pub(crate) struct Loss {
    /// One of this number of frames is lost; zero for none.
    pub(crate) one_of: u64,
    state: u64,
}

impl Loss {
    fn loses(&mut self) -> bool {
        if self.one_of == 0 {
            return false;
        }
        // A linear congruential generator (Knuth).
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.state >> 33).is_multiple_of(self.one_of)
    }
}

/// The way to the kernel.
struct TapLink<'a> {
    tap: &'a File,
    offloads: LinkOffloads,
    loss: &'a mut Loss,
}

impl GuestLink for TapLink<'_> {
    fn offloads(&self) -> LinkOffloads {
        self.offloads
    }

    fn transmit(&mut self, header: &NetHeader, frame: &[IoSlice<'_>]) -> Result<(), LinkFull> {
        if self.loss.loses() {
            return Ok(());
        }
        let header = header.encode(1);
        let mut parts = [IoSlice::new(&[]); 32];
        let count = frame.len().min(parts.len() - 1);
        parts[1..=count].copy_from_slice(&frame[..count]);
        parts[0] = IoSlice::new(&header);
        match { self.tap }.write_vectored(&parts[..=count]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(LinkFull),
            // A frame that the kernel refuses is lost, as on any network.
            _ => Ok(()),
        }
    }
}

/// An engine between a TAP and the network of the event loop's thread.
pub(crate) struct TapGateway {
    pub(crate) engine: NetEngine,
    new: Option<File>,
    tap: Option<Registered<File>>,
    offloads: LinkOffloads,
    buffer: Vec<u8>,
    pub(crate) loss: Loss,
    pub(crate) lost_from_guest: Loss,
}

impl TapGateway {
    pub(crate) fn new(engine: NetEngine, tap: File, offloads: bool) -> Self {
        Self {
            engine,
            new: Some(tap),
            tap: None,
            offloads: match offloads {
                true => LinkOffloads::ALL,
                false => LinkOffloads::NONE,
            },
            buffer: vec![0; HEADER + MAX_FRAME as usize],
            loss: Loss::default(),
            lost_from_guest: Loss::default(),
        }
    }
}

impl EventHandler for TapGateway {
    fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
        if let Some(tap) = self.new.take() {
            self.tap = Some(registry.add(tap, TAP, Interest::READ)?);
            self.engine.started(registry);
        }
        Ok(())
    }

    fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        let Self { engine, buffer, .. } = self;
        let Some(tap) = &self.tap else { return };
        if token == TAP {
            for _ in 0..BUDGET {
                match { &**tap }.read(buffer) {
                    Ok(_) if self.lost_from_guest.loses() => {}
                    Ok(len) if len > HEADER => {
                        engine.guest_frame(&&buffer[HEADER..len], registry);
                    }
                    _ => break,
                }
            }
        } else {
            engine.host_ready(token, readiness, registry);
        }
        let mut link = TapLink {
            tap,
            offloads: self.offloads,
            loss: &mut self.loss,
        };
        engine.serve(&mut link, registry);
    }
}
