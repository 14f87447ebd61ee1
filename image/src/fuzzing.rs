//! Entrances for fuzz targets: everything that takes bytes from strangers.

use oci_spec::image::ImageConfiguration;

use crate::digest::Digest;
use crate::documents::{Parts, diff_ids, parse, resolve};
use crate::layer::{self, Expected};
use crate::limits::Limits;
use crate::tree::Tree;
use crate::{DockerReference, Reference, erofs, source};

/// Small enough that reaching them is found.
const LIMITS: Limits = Limits {
    layer_bytes: 1 << 20,
    entries: 4096,
    ratio: 100,
    ratio_floor: 64 << 10,
};

/// Takes `data` for a layer, plain or compressed, and makes a disk of it.
///
/// # Panics
/// When there are no temporary files to be had.
#[expect(clippy::expect_used, reason = "a fuzzer without files is of no use")]
pub fn layer(data: &[u8]) {
    let blob = tempfile::tempfile().expect("a temporary file");
    let digest = Digest::of(data);
    let expected = Expected {
        digest,
        size: u64::try_from(data.len()).ok(),
        // That of a plain layer; a compressed one fails when it is complete.
        diff_id: digest,
    };
    let Ok(index) = layer::convert(data, &expected, LIMITS, &blob, &mut |_| {}) else {
        return;
    };
    let mut tree = Tree::new();
    if tree.apply(0, &index).is_ok() {
        let _ = erofs::build(&tree, &[index.blob_len]);
    }
}

/// Takes `data` for each kind of document, name and header.
pub fn documents(data: &[u8]) {
    let config = parse::<ImageConfiguration>(data, "configuration");
    // Whatever is asked for, there are only these bytes.
    let resolved = resolve(data.to_vec(), None, None, &|_| Ok(data.to_vec()));
    if let (Ok(resolved), Ok(config)) = (resolved, config) {
        let parts = Parts::of(&resolved.manifest);
        let _ = parts.and_then(|parts| diff_ids(&config, parts.layers.len()));
    }
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let _ = Reference::parse(text);
    let _ = DockerReference::parse(text);
    let _ = Digest::parse(text);
    source::challenge(text);
}
