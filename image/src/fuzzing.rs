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
use crate::tree::Tree;
use crate::{DockerReference, Reference, source};

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
