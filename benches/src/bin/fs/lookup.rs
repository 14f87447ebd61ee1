//! LOOKUP and FORGET without a kernel in between: the server, beside the smallest server
//! that holds a descriptor per inode. CPU time of this thread.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, openat, statx};
use rustix::time::{ClockId, clock_gettime};
use sm_fs_server::testing::{FuseDriver, opcode, request};
use sm_fs_server::{FsConfig, Served, Server, Share, ShareOptions, SliceBuffers};

/// Files that are known at the same time: as many as a usual limit of descriptors permits.
const FILES: usize = 900;
/// Position of the name in a LOOKUP.
const NAME_AT: usize = 40;
/// Lengths of the replies.
const REPLY: usize = 144;

/// Nanoseconds for LOOKUP and FORGET of a file, in each round.
pub(crate) struct Times {
    pub(crate) server: Vec<f64>,
    pub(crate) descriptors: Vec<f64>,
}

fn cpu() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let nanoseconds = time.tv_sec as f64 * 1e9 + time.tv_nsec as f64;
    nanoseconds / FILES as f64
}

/// A server as others work: it opens each inode, and knows it by its descriptor.
struct Descriptors {
    directory: OwnedFd,
    /// Descriptor, references and identity, by number.
    nodes: HashMap<u64, (OwnedFd, u64, (u64, u64))>,
    numbers: HashMap<(u64, u64), u64>,
    next: u64,
}

impl Descriptors {
    fn lookup(&mut self, request: &[u8], reply: &mut [u8]) -> Result<()> {
        let name = request.get(NAME_AT..).context("a request without a name")?;
        let name = CStr::from_bytes_until_nul(name)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.directory, name, flags, Mode::empty())?;
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat = statx(&file, c"", AtFlags::EMPTY_PATH, mask)?;
        let device = u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor);
        let identity = (device, stat.stx_ino);
        let id = match self.numbers.get(&identity) {
            Some(id) => *id,
            None => {
                let id = self.next;
                self.next += 1;
                self.numbers.insert(identity, id);
                self.nodes.insert(id, (file, 0, identity));
                id
            }
        };
        if let Some((_, references, _)) = self.nodes.get_mut(&id) {
            *references += 1;
        }
        let times = [stat.stx_atime, stat.stx_mtime, stat.stx_ctime];
        let seconds = times.map(|time| time.tv_sec.cast_unsigned());
        let rest = times.map(|time| u64::from(time.tv_nsec));
        // The fields of a reply in their order; two of 32 bits in one number.
        let mut words = [0; REPLY / 8];
        let numbers = [REPLY as u64, 1, id, 0, 1, 1, 0];
        let file = [stat.stx_ino, stat.stx_size, stat.stx_blocks];
        let modes = [
            rest[0] | rest[1] << 32,
            rest[2] | u64::from(stat.stx_mode) << 32,
            u64::from(stat.stx_nlink) | u64::from(stat.stx_uid) << 32,
            u64::from(stat.stx_gid),
            u64::from(stat.stx_blksize),
        ];
        let all = numbers.into_iter().chain(file).chain(seconds).chain(modes);
        words.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        for (to, word) in reply.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        Ok(())
    }

    fn forget(&mut self, id: u64) {
        let Some((_, references, identity)) = self.nodes.get_mut(&id) else {
            return;
        };
        *references -= 1;
        if *references == 0 {
            self.numbers.remove(identity);
            self.nodes.remove(&id);
        }
    }
}

fn serve(server: &mut Server, request: &[u8], space: &mut [u8]) -> usize {
    let mut buffers = SliceBuffers::new(request, space);
    match server.serve(&mut buffers) {
        Served::Reply(len) => len,
        Served::NoReply => 0,
        Served::Job(job) => job.run(&mut buffers),
    }
}

/// Returns the number of the node in a reply to LOOKUP.
fn number(reply: &[u8]) -> [u8; 8] {
    let bytes = reply.get(16..24).and_then(|bytes| bytes.try_into().ok());
    bytes.unwrap_or_default()
}

/// Measures in `folder`, which is empty.
pub(crate) fn measure(folder: &Path, rounds: usize) -> Result<Times> {
    let name = |index: usize| format!("file-{index:05}");
    for index in 0..FILES {
        fs::write(folder.join(name(index)), "")?;
    }
    let share = Share::new("s", File::open(folder)?.into(), ShareOptions::default())?;
    let server = Server::new(FsConfig::default().share(share))?;
    let mut driver = FuseDriver::started(server);
    let Ok(directory) = driver.walk("s") else {
        bail!("the server does not find its share");
    };
    let mut server = driver.server;
    let mut other = Descriptors {
        directory: File::open(folder)?.into(),
        nodes: HashMap::new(),
        numbers: HashMap::new(),
        next: 2,
    };
    let requests: Vec<Vec<u8>> = (0..FILES)
        .map(|index| {
            let name = name(index) + "\0";
            request(opcode::LOOKUP, 1, directory.node, &[name.as_bytes()])
        })
        .collect();
    let mut forget = request(opcode::FORGET, 1, 0, &[&1u64.to_le_bytes()]);
    let mut space = [0; 4096];
    let mut times = Times {
        server: Vec::new(),
        descriptors: Vec::new(),
    };
    let mut found = Vec::with_capacity(FILES);
    for _ in 0..rounds {
        let begun = cpu();
        for request in &requests {
            if serve(&mut server, request, &mut space) != REPLY {
                bail!("the server does not find a file");
            }
            found.push(number(&space));
        }
        for id in found.drain(..) {
            forget[16..24].copy_from_slice(&id);
            serve(&mut server, &forget, &mut space);
        }
        times.server.push(cpu() - begun);
        let begun = cpu();
        for request in &requests {
            other.lookup(request, &mut space)?;
            found.push(number(&space));
        }
        for id in found.drain(..) {
            other.forget(u64::from_le_bytes(id));
        }
        times.descriptors.push(cpu() - begun);
    }
    for index in 0..FILES {
        fs::remove_file(folder.join(name(index)))?;
    }
    Ok(times)
}
