//! Tests of managing images: names, verification, removal, and export.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

#[path = "support/archives.rs"]
mod archives;
mod support;

use std::fs;
use std::process::Command;

use sm_image::{
    Config, Digest, DockerReference, Error, PruneOptions, PullOptions, Reference, Users,
};
use support::home::{Home, layers};
use support::{file, tar};

fn name(text: &str) -> DockerReference {
    DockerReference::parse(text).unwrap()
}

#[test]
fn names_are_found_in_every_notation() {
    let home = Home::new();
    let (reference, digest) = home.image("layout", &layers());
    let store = &home.store;
    store.tag(&reference, &name("app")).unwrap();
    store.tag("app", &name("host.example:5000/app:v2")).unwrap();
    let id = digest.to_string();
    for query in [
        &*reference,
        "app",
        "app:latest",
        "docker.io/library/app",
        "host.example:5000/app:v2",
        &id,
        &id[..20],
        &digest.hex()[..12],
    ] {
        assert_eq!(store.find(query).unwrap().digest, digest, "{query}");
    }
    assert!(matches!(store.find("ap"), Err(Error::Unknown { .. })));
    let details = store.inspect("app").unwrap();
    assert_eq!((details.names.len(), details.layers.len()), (3, 2));
    // One name is removed and the image stays; the last name removes the image.
    store.remove("app", &|| Ok(Users::new())).unwrap();
    assert!(store.find("app").is_err());
    let removed = store.remove(&digest.hex()[..12], &|| Ok(Users::new()));
    assert_eq!(removed.unwrap().images.len(), 2);
    assert_eq!((home.count("disks"), home.count("blobs")), (0, 0));
}

#[test]
fn the_least_recently_used_images_are_removed_first() {
    let home = Home::new();
    let big = |n: u8| [tar(&[file("x", vec![n; 3 << 20])])];
    // Images of a registry can be pulled again; images of a layout are not removed by
    // size.
    let (first, _) = home.image("first", &big(1));
    let (second, digest) = home.image("second", &big(2));
    let usage = home.store.usage().unwrap();
    assert_eq!(usage.images.len(), 2);
    assert!(usage.total > 6 << 20, "{usage:?}");
    assert_eq!(usage.images[0].shared, 0);
    let tight = PruneOptions::new().max_bytes(1 << 20);
    assert!(home.prune(tight).images.is_empty());
    assert_eq!(home.count("disks"), 2);

    // An image that is in use, or that the caller needs, stays even with `all`.
    let parsed = Reference::parse(&first).unwrap();
    let in_use = home.store.open_image(&parsed, &PullOptions::default());
    let all = PruneOptions::new().all(true);
    let kept = home
        .store
        .prune(all, &|| Ok(Users::from([(digest, vec!["s".to_owned()])])))
        .unwrap();
    assert!(kept.images.is_empty(), "{kept:?}");
    drop(in_use);
    let pruned = home.prune(all);
    assert_eq!(pruned.images, [first, second]);
    assert!(pruned.bytes > 6 << 20);
    assert_eq!((home.count("disks"), home.count("layers")), (0, 0));
}

fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed by this test: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the manifest of an image as skopeo reads it.
fn manifest(reference: &str) -> Vec<u8> {
    tool("skopeo", &["inspect", "--raw", reference]).into_bytes()
}

#[test]
fn an_archive_has_the_image_byte_for_byte() {
    if !sm_test_needs::programs(&["skopeo"]) {
        return;
    }
    let home = Home::new();
    let (reference, digest) = home.image("layout", &layers());
    home.store.tag(&reference, &name("app:v1")).unwrap();
    home.store.tag(&reference, &name("h.example/b")).unwrap();
    let (other, _) = home.image("other", &layers()[1..]);
    let path = home.save(&["app:v1", "h.example/b", &other], "saved.tar");
    let path = path.display();
    let raw = manifest(&format!("oci-archive:{path}:v1"));
    assert_eq!(Digest::of(&raw), digest);
    // The archive is also a Docker archive with all tags and the same layers.
    let tags = tool("skopeo", &["list-tags", &format!("docker-archive:{path}")]);
    assert!(
        tags.contains("app:v1") && tags.contains("h.example/b"),
        "{tags}"
    );
    let copied = home.path("copied");
    let target = format!("oci:{}:x", copied.display());
    let source = format!("docker-archive:{path}:docker.io/library/app:v1");
    tool("skopeo", &["copy", "--quiet", &source, &target]);
    let again = Home::new();
    again.open(&target);
    let diff_ids = |home: &Home, query: &str| -> Vec<Digest> {
        let details = home.store.inspect(query).unwrap();
        details.layers.iter().map(|layer| layer.diff_id).collect()
    };
    assert_eq!(diff_ids(&again, &target), diff_ids(&home, "app:v1"));
    // This crate can read the archive as well.
    let opened = again.open(&format!("oci-archive:{path}:v1"));
    assert_eq!(opened, digest);
}

#[test]
fn all_images_of_an_archive_are_loaded() {
    if !sm_test_needs::programs(&["skopeo"]) {
        return;
    }
    let home = Home::new();
    let (reference, digest) = home.image("layout", &layers());
    home.store.tag(&reference, &name("app:v1")).unwrap();
    home.store.tag(&reference, &name("h.example/b")).unwrap();
    let (other, second) = home.image("other", &layers()[1..]);
    let path = home.save(&["app:v1", "h.example/b", &other], "saved.tar");
    let bytes = fs::read(&path).unwrap();
    let again = Home::new();
    let options = PullOptions::default();
    let load = |bytes: &[u8]| again.store.load(bytes, "an archive", &options);
    let loaded = load(&zstd::encode_all(bytes.as_slice(), 1).unwrap()).unwrap();
    let ids: Vec<_> = loaded.iter().map(|image| image.digest).collect();
    assert_eq!(ids, [digest, digest, second]);
    for (query, id) in [("app:v1", digest), ("h.example/b", digest)] {
        assert_eq!(again.store.find(query).unwrap().digest, id);
    }
    // The archive is removed, and the image can still be saved byte for byte.
    let saved = again.save(&["app:v1"], "again.tar");
    let raw = manifest(&format!("oci-archive:{}:v1", saved.display()));
    assert_eq!(Digest::of(&raw), digest);
    // A Docker archive written by skopeo.
    let docker = home.path("docker.tar");
    let target = format!("docker-archive:{}:name/in-it:v9", docker.display());
    tool("skopeo", &["copy", "--quiet", &reference, &target]);
    let loaded = again.store.load_file(&docker, &options).unwrap();
    assert_eq!(loaded[0].names, ["name/in-it:v9"]);
    let verified = again.store.verify("name/in-it:v9", None).unwrap();
    assert!(verified.problems.is_empty(), "{verified:?}");
    for wrong in [&b"nothing"[..], &bytes[..bytes.len() / 2]] {
        let error = load(wrong).unwrap_err().to_string();
        assert!(error.contains("an archive"), "{error}");
    }
}

#[test]
fn an_image_without_its_source_is_reconstructed() {
    let home = Home::new();
    let [lower, mut upper] = layers();
    // Some tools write nothing after the last file's contents.
    upper.truncate(512 + 5000);
    let (reference, digest) = home.image("layout", &[lower.clone(), upper.clone()]);
    let verified = home.store.verify(&reference, None).unwrap();
    assert!(verified.problems.is_empty(), "{verified:?}");
    fs::remove_dir_all(home.path("layout")).unwrap();
    let query = digest.to_string();
    let path = home.save(&[&query], "saved.tar");
    let unpacked = home.path("unpacked");
    fs::create_dir(&unpacked).unwrap();
    let (path, into) = (path.to_str().unwrap(), unpacked.to_str().unwrap());
    tool("tar", &["-xf", path, "-C", into]);
    for layer in [lower, upper] {
        let blob = unpacked.join("blobs/sha256").join(Digest::of(&layer).hex());
        assert!(fs::read(blob).unwrap() == layer);
    }
    let saved = home.open(&format!("oci-archive:{path}"));
    assert_ne!(saved, digest);
    assert!(home.store.find(&reference).is_ok());
}

#[test]
fn a_tar_stream_becomes_an_image() {
    let home = Home::new();
    let [stream, _] = layers();
    let mut config = Config::default();
    config.cmd = Some(vec!["/d/small".to_owned()]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gzip, &stream).unwrap();
    let gzip = gzip.finish().unwrap();
    let options = PullOptions::default();
    let import = |stream: &[u8], name: Option<&DockerReference>| {
        home.store
            .import(stream, name, config.clone(), "from a test", &options)
    };
    let image = import(&gzip, Some(&name("imported"))).unwrap();
    assert_eq!(image.config.config.as_ref(), Some(&config));
    // Importing the plain stream without a name produces the same image.
    let digest = image.digest;
    drop(image);
    assert_eq!(import(&stream, None).unwrap().digest, digest);
    assert_eq!(home.store.inspect("imported").unwrap().names.len(), 2);
    let verified = home.store.verify("imported", None).unwrap();
    assert!(verified.problems.is_empty(), "{verified:?}");
    let error = import(b"no archive at all", None).unwrap_err().to_string();
    assert!(
        error.contains("not a tar archive") || error.contains("truncated"),
        "{error}"
    );
    assert_eq!(home.count("tmp"), 0);
}
