//! A disk of layers as a file of this host, by FUSE: the host's own file systems can be mounted
//! on it by a loop device, and their writes and flushes are those of a guest.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::{Arc, File, GuestMemory, LayeredDisk, Mutex, memory, read};

const LONGEST: usize = 128 << 10;
const HEADER: usize = 40;

/// A mounted disk. Dropping it ends its thread.
pub(super) struct FuseFile {
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl FuseFile {
    /// Makes `disk` the content of the file `path`. It is locked during each request, and may
    /// be replaced by the same disk with other layers, also by `before` a request.
    pub(super) fn mount(
        disk: Arc<Mutex<Arc<LayeredDisk>>>,
        path: &Path,
        before: impl FnMut(&mut Arc<LayeredDisk>) + Send + 'static,
    ) -> Self {
        File::create(path).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&device);
        let data = format!("fd={fd},rootmode=100000,user_id=0,group_id=0");
        let data = std::ffi::CString::new(data).unwrap();
        mount("disk", path, "fuse", MountFlags::empty(), &*data).unwrap();
        // The thread owns the device: if it panics, requests fail instead of waiting.
        let thread = std::thread::spawn(move || serve(device, &disk, before));
        Self {
            path: path.to_owned(),
            thread: Some(thread),
        }
    }
}

impl Drop for FuseFile {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::DETACH);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

/// A file system on a loop device.
pub(super) struct LoopMount {
    pub(super) path: PathBuf,
}

impl LoopMount {
    pub(super) fn new(image: &Path, path: &Path, options: &str) -> Self {
        std::fs::create_dir_all(path).unwrap();
        let options = format!("loop,{options}");
        let mut command = Command::new("mount");
        command.args(["-t", "ext4", "-o", &options]);
        run(command.arg(image).arg(path));
        Self {
            path: path.to_owned(),
        }
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = unmount(&self.path, UnmountFlags::DETACH);
        } else {
            unmount(&self.path, UnmountFlags::empty()).unwrap();
        }
    }
}

/// Runs a program that has to succeed.
pub(super) fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {text}{error}");
}

/// Reads fields of a request in order.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&mut self) -> u32 {
        let (value, rest) = self.0.split_first_chunk().unwrap();
        self.0 = rest;
        u32::from_ne_bytes(*value)
    }

    fn u64(&mut self) -> u64 {
        let (value, rest) = self.0.split_first_chunk().unwrap();
        self.0 = rest;
        u64::from_ne_bytes(*value)
    }
}

/// Answers requests until the file is unmounted.
fn serve(
    mut device: File,
    disk: &Mutex<Arc<LayeredDisk>>,
    mut before: impl FnMut(&mut Arc<LayeredDisk>),
) {
    let memory = memory();
    let mut request = vec![0; LONGEST + 4096];
    loop {
        let len = match device.read(&mut request) {
            Ok(len) => len,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
            // The request was cancelled before it was read.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(error) => panic!("{error}"),
        };
        let mut header = Fields(&request[4..HEADER]);
        let (opcode, unique) = (header.u32(), header.u64());
        let mut disk = disk.lock().unwrap();
        before(&mut disk);
        let Some(result) = answer(&disk, &memory, opcode, &request[HEADER..len]) else {
            continue;
        };
        drop(disk);
        let (error, body) = match result {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = u32::try_from(16 + body.len())
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        reply.extend(error.to_ne_bytes());
        reply.extend(unique.to_ne_bytes());
        reply.extend(body);
        match device.write_all(&reply) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => panic!("{error}"),
            _ => {}
        }
    }
}

fn u32s(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

/// Executes a request (`fuse.h` of Linux); returns its reply, if it has one.
fn answer(
    disk: &LayeredDisk,
    memory: &GuestMemory,
    opcode: u32,
    body: &[u8],
) -> Option<Result<Vec<u8>, i32>> {
    let mut fields = Fields(body);
    Some(match opcode {
        // FORGET, INTERRUPT, BATCH_FORGET.
        2 | 36 | 42 => return None,
        // GETATTR, SETATTR: a regular file of one owner.
        3 | 4 => {
            let mut reply = u32s(&[60, 0, 0, 0]);
            for value in [1, disk.capacity(), 0, 0, 0, 0] {
                reply.extend(value.to_ne_bytes());
            }
            reply.extend(u32s(&[0, 0, 0, 0o100_600, 1, 0, 0, 0, 4096, 0]));
            Ok(reply)
        }
        // OPEN.
        14 => Ok(vec![0; 16]),
        // READ.
        15 => {
            fields.u64();
            let (offset, len) = (fields.u64(), fields.u32());
            let len = u64::from(len).min(disk.capacity().saturating_sub(offset));
            Ok(read(disk, memory, offset, len as usize))
        }
        // WRITE.
        16 => {
            fields.u64();
            let (offset, len) = (fields.u64(), fields.u32());
            disk.store(&body[HEADER..HEADER + len as usize], offset)
                .unwrap();
            Ok(u32s(&[len, 0]))
        }
        // STATFS.
        17 => Ok(vec![0; 80]),
        // FSYNC.
        20 => {
            disk.flush().unwrap();
            Ok(Vec::new())
        }
        // RELEASE, FLUSH, DESTROY.
        18 | 25 | 38 => Ok(Vec::new()),
        // INIT: version 7.31, with writes of up to `LONGEST`.
        26 => {
            let mut reply = u32s(&[7, 31, 0, 1 << 5 | 1 << 22, 0, LONGEST as u32, 1, 32]);
            reply.resize(64, 0);
            Ok(reply)
        }
        // FALLOCATE: PUNCH_HOLE or ZERO_RANGE.
        43 => {
            fields.u64();
            let (offset, len, mode) = (fields.u64(), fields.u64(), fields.u32());
            match mode {
                3 => disk.discard(offset, len).unwrap(),
                0x10 | 0x11 => disk.write_zeroes(offset, len, false).unwrap(),
                _ => return Some(Err(libc::EOPNOTSUPP)),
            }
            Ok(Vec::new())
        }
        _ => Err(libc::ENOSYS),
    })
}
