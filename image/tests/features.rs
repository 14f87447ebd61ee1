//! Tests of the crate's features: a source whose feature is disabled is refused by name,
//! and OCI layouts need none.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

#[cfg(feature = "archive")]
use sm_image::ErrorKind;
use sm_image::{
    Compression, Config, Error, LayoutBuilder, MemoryFile, PullOptions, Reference, Store,
};

/// A reference to a source that does not exist, the feature that it needs, and whether
/// that is enabled.
const SOURCES: [(&str, &str, bool); 5] = [
    (
        "oci-archive:/nowhere/x.tar",
        "archive",
        cfg!(feature = "archive"),
    ),
    (
        "docker-archive:/nowhere/x.tar",
        "archive",
        cfg!(feature = "archive"),
    ),
    (
        "docker-daemon:app:latest",
        "engine",
        cfg!(feature = "engine"),
    ),
    (
        "containers-storage:[/nowhere]app",
        "containers-storage",
        cfg!(feature = "containers-storage"),
    ),
    (
        "localhost:1/app:latest",
        "registry",
        cfg!(feature = "registry"),
    ),
];

#[test]
fn disabled_sources_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("store")).unwrap();
    for (text, needed, enabled) in SOURCES {
        let parsed = Reference::parse(text).unwrap();
        assert_eq!(parsed.feature(), Some(needed), "{text}");
        if enabled {
            continue;
        }
        match store.pull(&parsed, &PullOptions::default()).unwrap_err() {
            Error::Disabled { reference, feature } => {
                assert_eq!((reference.as_str(), feature), (text, needed));
            }
            other => panic!("{text}: {other}"),
        }
    }
}

#[test]
fn layouts_and_streams_need_no_feature() {
    let directory = tempfile::tempdir().unwrap();
    let layout = directory.path().join("layout");
    let mut image = LayoutBuilder::new(&layout, Compression::Zstd(1)).unwrap();
    let file = MemoryFile::File(vec![1; 10_000]);
    image.memory_layer(&[("file", 0o644, file)]).unwrap();
    let digest = image.finish("v1", Config::default()).unwrap();
    let reference = Reference::parse(&format!("oci:{}:v1", layout.display())).unwrap();
    assert_eq!(reference.feature(), None);

    let store = Store::open(&directory.path().join("store")).unwrap();
    let options = PullOptions::default();
    let opened = store.open_image(&reference, &options).unwrap();
    assert_eq!(opened.digest, digest);
    let tar = [0; 1024];
    let imported = store.import(&tar[..], None, Config::default(), "empty", &options);
    assert_eq!(store.list().unwrap().len(), 2);
    assert!(imported.unwrap().segments[0].open().is_ok());
}

/// Callers tell a file that is absent from one that cannot be used.
#[cfg(feature = "archive")]
#[test]
fn archives_that_cannot_be_used_have_kinds() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::write(at("text"), b"no archive").unwrap();
    let mut packed = zstd::encode_all(&[7; 100_000][..], 1).unwrap();
    packed.truncate(packed.len() / 2);
    std::fs::write(at("cut"), packed).unwrap();
    std::fs::create_dir(at("directory")).unwrap();
    let store = Store::open(&at("store")).unwrap();
    let kind = |name: &str| {
        let text = format!("oci-archive:{}", at(name).display());
        let reference = Reference::parse(&text).unwrap();
        let pulled = store.pull(&reference, &PullOptions::default());
        pulled.unwrap_err().kind()
    };
    assert_eq!(kind("absent"), ErrorKind::NotFound);
    for name in ["text", "cut"] {
        assert_eq!(kind(name), ErrorKind::Damaged, "{name}");
    }
    assert_eq!(kind("directory"), ErrorKind::Io);
}
