//! Entrances for fuzz targets: everything that takes bytes from strangers.

use oci_spec::image::ImageConfiguration;

use crate::digest::Digest;
use crate::documents::{Parts, diff_ids, parse, resolve};
use crate::erofs::{self, LayerData};
use crate::index::IndexReader;
use crate::layer::{self, Expected, LayerFiles};
use crate::limits::Limits;
use crate::pipeline::Decoders;
use crate::skeleton::Assembler;
use crate::source::Registries;
use crate::tree::Tree;
use crate::{DockerReference, Platform, Reference, source};

/// Small enough that reaching them is found.
const LIMITS: Limits = Limits {
    layer_bytes: 1 << 20,
    entries: 4096,
    index_bytes: 1 << 20,
    names_bytes: 256 << 10,
    ratio: 100,
    ratio_floor: 64 << 10,
};

/// Takes `data` for a layer, plain or compressed, and makes a disk of it.
///
/// # Panics
/// When there are no temporary files to be had.
#[expect(clippy::expect_used, reason = "a fuzzer without files is of no use")]
pub fn layer(data: &[u8]) {
    let file = || tempfile::tempfile().expect("a temporary file");
    let (blob, small, index, skeleton) = (file(), file(), file(), file());
    let digest = Digest::of(data);
    let expected = Expected {
        digest,
        size: u64::try_from(data.len()).ok(),
        diff_id: None,
    };
    let files = LayerFiles {
        blob: &blob,
        small: &small,
        index: &index,
        skeleton: &skeleton,
    };
    let decoders = Decoders::default();
    let Ok(converted) = layer::convert(data, &expected, LIMITS, &decoders, files, &mut |_| {})
    else {
        return;
    };
    // What was taken apart can be put together again.
    let rewound = |mut file: &std::fs::File| {
        std::io::Seek::rewind(&mut file).expect("a file that can be read again");
        file.try_clone().expect("a descriptor")
    };
    let assembled = Assembler::new(rewound(&skeleton), &blob, &small).expect("a skeleton");
    let again = layer::index_again(assembled, &file()).expect("the same stream");
    assert_eq!(again, converted);
    let mut index = IndexReader::open(rewound(&index))
        .expect("a file that can be read")
        .expect("an index that is whole");
    let mut tree = Tree::new(LIMITS);
    if tree.apply(0, &mut index).is_ok() {
        let data = LayerData {
            blob_len: converted.totals.blob_len,
            small: &small,
        };
        let _ = erofs::build(&tree, &[data], digest, &file());
    }
}

/// Takes `data` for a manifest or index and, after a zero byte, the configuration
/// that belongs to it.
pub fn documents(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let manifest = parts.next().unwrap_or_default();
    let config = parse::<ImageConfiguration>(parts.next().unwrap_or(manifest), "configuration");
    // Whatever is asked for, there are only these bytes.
    let resolved = resolve(manifest.to_vec(), None, None, &|_| Ok(manifest.to_vec()));
    if let Ok(config) = &config {
        let _ = Platform::of(config).to_string().parse::<Platform>();
    }
    if let (Ok(resolved), Ok(config)) = (resolved, config) {
        let parts = Parts::of(&resolved.manifest);
        let _ = parts.and_then(|parts| diff_ids(&config, parts.layers.len()));
    }
}

/// Takes `data` for a name.
///
/// # Panics
/// When a name that is understood is understood differently after having been
/// written.
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

/// Takes `data` for each of the headers that registries answer with.
pub fn headers(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        source::headers(text);
    }
}

/// Takes `data` for a `registries.conf`, whose first line is a comment with the
/// name to look up.
pub fn registries(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let first = text.lines().next().unwrap_or_default();
    Registries::fuzz(text, first.trim_start_matches('#').trim());
}
