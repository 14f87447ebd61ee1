//! Entry points for fuzz targets: all code that parses untrusted bytes.

mod layers;
#[cfg(test)]
mod tar_reference;

pub use self::layers::{disk, layer, layer_index, pax, tar};
#[cfg(feature = "containers-storage")]
use std::{fs::File, io, os::fd::OwnedFd};

use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::documents::{Parts, diff_ids, parse, resolve};
use crate::{DockerReference, Platform, Reference};

/// Parses `data` as a manifest or index and, after a zero byte, the configuration that
/// belongs to it.
pub fn documents(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let manifest = parts.next().unwrap_or_default();
    let config = parse::<ImageConfig>(parts.next().unwrap_or(manifest), "configuration");
    // Every requested document has these bytes.
    let resolved = resolve(manifest.to_vec(), None, None, &|_| Ok(manifest.to_vec()));
    if let Ok(config) = &config {
        let _ = Platform::of(config).to_string().parse::<Platform>();
    }
    if let (Ok(resolved), Ok(config)) = (resolved, config) {
        let parts = Parts::of(&resolved.manifest);
        let _ = parts.and_then(|parts| diff_ids(&config, parts.layers.len()));
    }
}

/// Parses `data` as a name.
///
/// # Panics
/// A valid name is parsed differently after it was formatted.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let _ = Reference::parse(text);
    let _ = Digest::parse(text);
    let _ = text.parse::<Platform>();
    if let Ok(reference) = DockerReference::parse(text) {
        let written = reference.to_string();
        assert_eq!(DockerReference::parse(&written), Ok(reference), "{written}");
    }
}

/// Parses `data` as each of the headers in answers of registries.
#[cfg(feature = "registry")]
pub fn headers(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        crate::source::headers(text);
    }
}

/// Parses `data` as a `registries.conf`, whose first line is a comment with the name to
/// look up.
#[cfg(feature = "registry")]
pub fn registries(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let first = text.lines().next().unwrap_or_default();
    crate::source::fuzz_registries(text, first.trim_start_matches('#').trim());
}

/// Reads a layer's stream from tar-split data, compressed by gzip, and the directory of its
/// files.
///
/// # Errors
/// The data or the files are refused.
#[cfg(feature = "containers-storage")]
pub fn tar_split(entries: File, layer: OwnedFd) -> io::Result<u64> {
    io::copy(
        &mut crate::source::tar_split(entries, layer),
        &mut io::sink(),
    )
}

/// Replays the seeds and corpora of the fuzzers without a fuzzer.
#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Read as _;
    use std::path::Path;

    use flate2::read::MultiGzDecoder;

    use super::*;

    /// Passes the seeds and the corpus called `name` to `target`.
    fn replay(name: &str, target: impl Fn(&[u8])) {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        let seeds = fuzz.join("seeds").join(name);
        let mut taken = 0;
        if seeds.exists() {
            for seed in fs::read_dir(seeds).unwrap() {
                target(&fs::read(seed.unwrap().path()).unwrap());
                taken += 1;
            }
        }
        let corpus = fuzz.join("corpus").join(format!("{name}.tar.gz"));
        if corpus.exists() {
            let corpus = MultiGzDecoder::new(File::open(corpus).unwrap());
            for entry in tar::Archive::new(corpus).entries().unwrap() {
                let mut data = Vec::new();
                entry.unwrap().read_to_end(&mut data).unwrap();
                target(&data);
                taken += 1;
            }
        }
        assert!(taken > 0, "there is nothing for {name}");
    }

    #[test]
    fn archives() {
        replay("tar", super::tar);
        replay("pax", pax);
    }

    #[cfg(feature = "containers-storage")]
    #[test]
    fn tar_split_data() {
        use flate2::{Compression, write::GzEncoder};
        use std::io::{Seek as _, Write as _};

        let layer = tempfile::tempdir().unwrap();
        fs::write(layer.path().join("file"), [1; 600]).unwrap();
        let read = std::cell::Cell::new(0);
        replay("tar_split", |data| {
            let file = tempfile::tempfile().unwrap();
            let mut encoder = GzEncoder::new(file, Compression::none());
            encoder.write_all(data).unwrap();
            let mut entries = encoder.finish().unwrap();
            entries.rewind().unwrap();
            let layer = File::open(layer.path()).unwrap().into();
            if let Ok(len) = super::tar_split(entries, layer) {
                read.set(read.get() + len);
            }
        });
        // The seed "file" is a whole layer; the others lack a file here, or are damaged.
        assert_eq!(read.get(), 640);
    }

    #[test]
    fn layers() {
        replay("layer", layer);
        replay("layer_index", layer_index);
    }

    #[test]
    fn disks() {
        replay("erofs", |data| drop(disk(data)));
    }

    #[test]
    fn documents_and_references() {
        replay("documents", documents);
        replay("reference", reference);
    }

    #[test]
    #[cfg(feature = "registry")]
    fn headers_and_registries() {
        replay("headers", headers);
        replay("registries", registries);
    }
}
