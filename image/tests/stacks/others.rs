//! Disks of this crate, and umoci.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags};
use sm_image::{
    Compression, Config, Error, LayoutBuilder, PullOptions, Reference, Store, StoredImage,
};

use crate::compare::{Refusal, Stack};
use crate::programs::{output, while_none_starts};
use crate::tree::{self, Tree};

/// Size of the block device in bytes.
const DISK: u64 = 64 << 20;

/// A block device on which one disk after another is mounted. Starting `mount` would take
/// longer than the comparison.
pub(crate) struct Disk {
    device: PathBuf,
    mount: PathBuf,
}

impl Disk {
    pub(crate) fn new(directory: &Path) -> Self {
        let path = directory.join("disk");
        File::create(&path).unwrap().set_len(DISK).unwrap();
        let mount = directory.join("mnt");
        fs::create_dir(&mount).unwrap();
        let losetup = ["--find", "--show"];
        let device = output(Command::new("losetup").args(losetup).arg(&path)).unwrap();
        Self {
            device: device.trim().into(),
            mount,
        }
    }

    /// Returns the tree of an image's disk. A disk that cannot be read is kept for
    /// examination, and read once more: if it is sound by `fsck.erofs` and can be read
    /// then, the host is at fault (seen once in 20,000 stacks, as EUCLEAN).
    fn tree(&self, image: &StoredImage) -> Tree {
        let read = || catch_unwind(AssertUnwindSafe(|| self.read_once(image)));
        read().unwrap_or_else(|_| {
            let (mut file, path) = tempfile::NamedTempFile::new().unwrap().keep().unwrap();
            for segment in &image.segments {
                io::copy(&mut segment.open().unwrap(), &mut file).unwrap();
            }
            eprintln!("a disk could not be read: {}", path.display());
            output(Command::new("fsck.erofs").arg(&path)).unwrap();
            read().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    fn read_once(&self, image: &StoredImage) -> Tree {
        // Nothing, unless a panic has left it.
        let _ = rustix::mount::unmount(&self.mount, UnmountFlags::DETACH);
        let mut device = OpenOptions::new().write(true).open(&self.device).unwrap();
        for segment in &image.segments {
            io::copy(&mut segment.open().unwrap(), &mut device).unwrap();
        }
        // A file system reads past the page cache of the device.
        device.flush().unwrap();
        device.sync_all().unwrap();
        drop(device);
        // A process that is being started would briefly hold files on the mount open.
        while_none_starts(|| {
            rustix::mount::mount(&self.device, &self.mount, "erofs", MountFlags::RDONLY, None)
                .unwrap();
            let tree = tree::read(&self.mount);
            rustix::mount::unmount(&self.mount, UnmountFlags::empty()).unwrap();
            tree
        })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = output(Command::new("losetup").arg("--detach").arg(&self.device));
    }
}

/// A refusal by this crate, with the entry.
#[derive(Clone, Debug)]
pub(crate) struct OurRefusal {
    pub(crate) refusal: Refusal,
    pub(crate) entry: String,
}

impl OurRefusal {
    /// Returns true for links that lead to themselves.
    pub(crate) fn by_links(&self) -> bool {
        self.refusal.text.contains("too many symbolic links")
    }

    fn new(stack: &Stack, error: Error) -> Self {
        let text = error.to_string();
        let Error::Entry { layer, entry, .. } = error else {
            panic!("no entry is named: {text}");
        };
        let number = stack
            .tars
            .iter()
            .position(|tar| sm_image::Digest::of(tar).to_string() == layer)
            .unwrap_or_else(|| panic!("not a layer of the stack: {text}"));
        let refusal = Refusal {
            layer: number,
            text,
        };
        Self { refusal, entry }
    }
}

/// A store, and the layout of the current stack.
pub(crate) struct Bench {
    pub(crate) work: PathBuf,
    layout: PathBuf,
    store: Store,
}

impl Bench {
    pub(crate) fn new(work: &Path) -> Self {
        Self {
            work: work.to_owned(),
            layout: work.join("layout"),
            store: Store::open(&work.join("store")).unwrap(),
        }
    }

    /// Makes this stack the current one.
    pub(crate) fn write(&self, stack: &Stack) {
        let mut builder = LayoutBuilder::new(&self.layout, Compression::None).unwrap();
        for layer in &stack.tars {
            builder.layer(layer.as_slice()).unwrap();
        }
        builder.finish("latest", Config::default()).unwrap();
    }

    fn open(&self, stack: &Stack) -> Result<StoredImage, OurRefusal> {
        let text = format!("oci:{}:latest", self.layout.display());
        let reference = Reference::parse(&text).unwrap();
        self.store
            .open_image(&reference, &PullOptions::default())
            .map_err(|error| OurRefusal::new(stack, error))
    }

    /// Checks that the stack can be converted to a disk.
    pub(crate) fn accepted(&self, stack: &Stack) -> Result<(), OurRefusal> {
        self.open(stack).map(drop)
    }

    /// Returns the tree that a guest sees.
    pub(crate) fn ours(&self, stack: &Stack, disk: &Disk) -> Result<Tree, OurRefusal> {
        self.open(stack).map(|image| disk.tree(&image))
    }

    pub(crate) fn umoci(&self) -> Result<Tree, String> {
        let root = self.work.join("umoci");
        let image = format!("{}:latest", self.layout.display());
        let unpack = ["raw", "unpack", "--image", &image];
        let unpacked = output(Command::new("umoci").args(unpack).arg(&root));
        let tree = unpacked.map(|_| tree::read(&root));
        // Umoci refuses some images before it creates anything.
        if root.exists() {
            fs::remove_dir_all(root).unwrap();
        }
        tree
    }
}
