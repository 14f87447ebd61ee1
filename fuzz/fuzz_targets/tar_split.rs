//! Arbitrary tar-split data of a layer with a file, links and a FIFO: a stream or an error,
//! and never a byte of a file outside of the layer.
#![no_main]

use std::fs::{self, File};
use std::io::{Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::sync::LazyLock;

use flate2::{Compression, write::GzEncoder};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// The layer is the directory "layer". A file beside it is larger than all inputs.
static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| {
    let directory = tempfile::tempdir().expect("a directory");
    let layer = directory.path().join("layer");
    fs::create_dir_all(layer.join("d")).expect("a directory");
    fs::write(layer.join("file"), [b'f'; 600]).expect("a file");
    fs::write(layer.join("d/file"), b"").expect("a file");
    fs::write(directory.path().join("outside"), vec![b'o'; OUTSIDE]).expect("a file");
    for (target, name) in [("file", "l"), ("../outside", "o"), ("d", "dl"), ("/", "r")] {
        symlink(target, layer.join(name)).expect("a link");
    }
    let fifo = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mkfifoat(rustix::fs::CWD, layer.join("fifo"), fifo).expect("a FIFO");
    directory
});
const OUTSIDE: usize = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let mut encoder = GzEncoder::new(tempfile::tempfile().expect("a file"), Compression::none());
    encoder.write_all(data).expect("a temporary file");
    let mut entries = encoder.finish().expect("a temporary file");
    entries.rewind().expect("a temporary file");
    let layer: OwnedFd = File::open(DIRECTORY.path().join("layer"))
        .expect("it exists")
        .into();
    if let Ok(len) = sm_image::fuzzing::tar_split(entries, layer) {
        // An entry that names the file has 600 bytes of it, and is longer than "file".
        let most = u64::try_from(data.len()).expect("it fits") * 150;
        assert!(len <= most, "{len} bytes of {}", data.len());
    }
});
