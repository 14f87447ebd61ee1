//! Images: conversion of a layer, and writing the metadata image of many files.
//!
//! Both go through the store as in `sm`, including writes and syncs.

#![allow(clippy::unwrap_used, reason = "benches")]

use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sm_image::{
    Compression, Config, LayoutBuilder, MemoryFile, PullOptions, Reference, Store, Users,
};

/// Bytes of the converted layer: large enough for a steady state.
const LAYER: usize = 64 << 20;
/// Number of files in the metadata image.
const FILES: usize = 50_000;

/// Returns bytes with the compression ratio of programs.
fn contents(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut bytes = Vec::with_capacity(len + 64);
    while bytes.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let random = state.to_be_bytes();
        let repeat = usize::from(random[0] & 15);
        bytes.extend_from_slice(&random[1..4]);
        if bytes.len() > 4096 {
            let from = bytes.len() - 4096 + usize::from(random[4]) * 8;
            bytes.extend_from_within(from..from + repeat);
        }
    }
    bytes.truncate(len);
    bytes
}

fn reference(layout: &Path, tag: &str) -> Reference {
    Reference::parse(&format!("oci:{}:{tag}", layout.display())).unwrap()
}

fn layer(criterion: &mut Criterion) {
    let work = tempfile::tempdir().unwrap();
    let layout = work.path().join("layout");
    let files = [("program", 0o755, MemoryFile::File(contents(LAYER)))];
    let mut group = criterion.benchmark_group("layer");
    group
        .throughput(Throughput::Bytes(LAYER as u64))
        .sample_size(10);
    for (name, compression) in [
        ("plain", Compression::None),
        ("gzip", Compression::Gzip(6)),
        ("zstd", Compression::Zstd(3)),
    ] {
        let mut image = LayoutBuilder::new(&layout, compression).unwrap();
        image.memory_layer(&files).unwrap();
        let digest = image.finish(name, Config::default()).unwrap().to_string();
        let store = Store::open(&work.path().join(name)).unwrap();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let image = store
                    .open_image(&reference(&layout, name), &PullOptions::default())
                    .unwrap();
                drop(black_box(image));
                store.remove(&digest, &|| Ok(Users::new())).unwrap();
            });
        });
    }
    group.finish();
}

/// Two images share a layer; the disk of the second one is created repeatedly.
fn metadata(criterion: &mut Criterion) {
    let work = tempfile::tempdir().unwrap();
    let layout = work.path().join("layout");
    let names: Vec<String> = (0..FILES)
        .map(|n| format!("directory-{}/{}/file-{n}", n / 5000, n / 50))
        .collect();
    let files: Vec<_> = names
        .iter()
        .map(|name| (name.as_str(), 0o644, MemoryFile::File(Vec::new())))
        .collect();
    let mut digest = String::new();
    for tag in ["kept", "made"] {
        let mut image = LayoutBuilder::new(&layout, Compression::None).unwrap();
        image.memory_layer(&files).unwrap();
        let mut config = Config::default();
        config.user = Some(tag.to_owned());
        digest = image.finish(tag, config).unwrap().to_string();
    }
    let store = Store::open(&work.path().join("store")).unwrap();
    store
        .open_image(&reference(&layout, "kept"), &PullOptions::default())
        .unwrap();
    let mut group = criterion.benchmark_group("metadata");
    group
        .throughput(Throughput::Elements(FILES as u64))
        .sample_size(10);
    group.bench_function("50,000 files", |bencher| {
        bencher.iter(|| {
            let image = store
                .open_image(&reference(&layout, "made"), &PullOptions::default())
                .unwrap();
            drop(black_box(image));
            store.remove(&digest, &|| Ok(Users::new())).unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, layer, metadata);
criterion_main!(benches);
