//! The transport on `/dev/fuse`: a server that is mounted on the host itself, for tests and
//! measurements without a VM. It needs root.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{MAX_REQUEST, Served, Server, SliceBuffers, own_umask};

/// A mounted server. Dropping it unmounts it.
#[derive(Debug)]
pub struct DevFuse {
    target: PathBuf,
    thread: Option<JoinHandle<Server>>,
}

impl DevFuse {
    /// Mounts `server` on the directory `target`, and serves it on a thread of its own.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn mount(server: Server, target: impl AsRef<Path>) -> io::Result<Self> {
        let target = target.as_ref().to_owned();
        let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        // The kernel compares owners and modes, as in a guest.
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={}",
            device.as_raw_fd(),
            1 << 20
        );
        let options = std::ffi::CString::new(options)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("sm", &target, "fuse.sm", flags, Some(options.as_c_str()))?;
        let thread = std::thread::Builder::new()
            .name("dev-fuse".to_owned())
            .spawn(move || serve(server, &device));
        match thread {
            Ok(thread) => Ok(Self {
                target,
                thread: Some(thread),
            }),
            Err(error) => {
                let _ = unmount(&target, UnmountFlags::DETACH);
                Err(error)
            }
        }
    }

    /// Unmounts the server and returns it.
    ///
    /// # Errors
    /// The operating system's error, such as `EBUSY` for open files.
    pub fn unmount(mut self) -> io::Result<Server> {
        unmount(&self.target, UnmountFlags::empty())?;
        let thread = self.thread.take();
        let server = thread.and_then(|thread| thread.join().ok());
        server.ok_or_else(|| io::Error::other("the thread of /dev/fuse panicked"))
    }
}

impl Drop for DevFuse {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = unmount(&self.target, UnmountFlags::DETACH);
            // Files that are still open keep the file system, and its thread, alive.
            drop(thread);
        }
    }
}

/// Serves requests until the file system is unmounted.
fn serve(mut server: Server, device: &OwnedFd) -> Server {
    // Without it, modes are reduced by the mask of the process.
    let _ = own_umask();
    let mut request = vec![0; MAX_REQUEST];
    let mut reply = vec![0; MAX_REQUEST];
    loop {
        let len = match rustix::io::read(device, &mut request) {
            Ok(len) => len,
            // Interrupted requests, and ones that were cancelled before they were read.
            Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
            // ENODEV: unmounted.
            Err(_) => break,
        };
        let mut buffers = SliceBuffers::new(&request[..len], &mut reply);
        let len = match server.serve(&mut buffers) {
            Served::Reply(len) => len,
            Served::NoReply => continue,
            Served::Job(job) => job.run(&mut buffers),
        };
        // An error means that the request was cancelled meanwhile.
        let _ = rustix::io::write(device, &reply[..len]);
    }
    server
}
