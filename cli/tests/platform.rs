//! `--platform`: selection among several images, and images that cannot run on this host.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sm_image::{Compression, Config, Digest, LayoutBuilder, MemoryFile, Platform};

struct Somebody {
    directory: tempfile::TempDir,
    /// Digests of the images for this host and for another one.
    ours: Digest,
    theirs: Digest,
}

/// An architecture that no host of this program has.
const FOREIGN: &str = "linux/s390x";

impl Somebody {
    /// Creates a layout of one image for two platforms, and one for a foreign platform.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let layout = directory.path().join("layout");
        let host = Platform::host().to_string();
        let ours = image(&layout, &host);
        let theirs = image(&layout, FOREIGN);
        let index = format!(
            r#"{{"schemaVersion": 2, "manifests": [{}, {}, {}]}}"#,
            entry(&layout, theirs, FOREIGN),
            entry(&layout, ours, &host),
            entry(&layout, theirs, "unknown/unknown"),
        );
        let digest = Digest::of(index.as_bytes());
        fs::write(blob(&layout, digest), &index).unwrap();
        let top = format!(
            r#"{{"schemaVersion": 2, "manifests": [
                {{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": "{digest}",
                  "size": {}, "annotations": {{"org.opencontainers.image.ref.name": "both"}}}},
                {{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "{theirs}",
                  "size": {}, "annotations": {{"org.opencontainers.image.ref.name": "foreign"}}}}
            ]}}"#,
            index.len(),
            fs::metadata(blob(&layout, theirs)).unwrap().len(),
        );
        fs::write(layout.join("index.json"), top).unwrap();
        Self {
            directory,
            ours,
            theirs,
        }
    }

    fn sm(&self, arguments: &[&str]) -> Output {
        let home = self.directory.path();
        Command::new(env!("CARGO_BIN_EXE_sm"))
            .args(arguments)
            .env("HOME", home)
            .env("XDG_DATA_HOME", home.join("data"))
            .env("XDG_RUNTIME_DIR", home.join("run"))
            .output()
            .unwrap()
    }

    fn reference(&self, tag: &str) -> String {
        format!(
            "oci:{}:{tag}",
            self.directory.path().join("layout").display()
        )
    }

    #[track_caller]
    fn pulled(&self, arguments: &[&str]) -> String {
        let output = self.sm(&[&["pull", "--quiet"], arguments].concat());
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    #[track_caller]
    fn refused(&self, arguments: &[&str], words: &[&str]) {
        let output = self.sm(arguments);
        assert!(!output.status.success(), "{output:?}");
        let error = String::from_utf8_lossy(&output.stderr);
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }
}

fn blob(layout: &Path, digest: Digest) -> PathBuf {
    layout.join("blobs/sha256").join(digest.hex())
}

fn image(layout: &Path, platform: &str) -> Digest {
    let mut image = LayoutBuilder::new(layout, Compression::Gzip(1))
        .unwrap()
        .platform(platform.parse().unwrap());
    let file = MemoryFile::File(platform.as_bytes().to_vec());
    image.memory_layer(&[("platform", 0o644, file)]).unwrap();
    image.finish(platform, Config::default()).unwrap()
}

fn entry(layout: &Path, digest: Digest, platform: &str) -> String {
    let (os, architecture) = platform.split_once('/').unwrap();
    format!(
        r#"{{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "{digest}",
        "size": {}, "platform": {{"os": "{os}", "architecture": "{architecture}"}}}}"#,
        fs::metadata(blob(layout, digest)).unwrap().len()
    )
}

#[test]
fn the_hosts_platform_is_taken_unless_another_is_asked_for() {
    let somebody = Somebody::new();
    let both = somebody.reference("both");
    assert_eq!(somebody.pulled(&[&both]), somebody.ours.to_string());
    let theirs = somebody.pulled(&["--platform", FOREIGN, &both]);
    assert_eq!(theirs, somebody.theirs.to_string());
    let host = Platform::host().to_string();
    somebody.refused(
        &["pull", "--platform", "linux/mips64le", &both],
        &["no image for linux/mips64le", &host, FOREIGN],
    );
    somebody.refused(
        &["pull", "--platform", "linux", &both],
        &["is not a platform"],
    );
    // A single image is taken, unless it is known to be for another platform than
    // requested.
    let foreign = somebody.reference("foreign");
    assert_eq!(somebody.pulled(&[&foreign]), somebody.theirs.to_string());
    somebody.refused(
        &["pull", "--platform", &host, &foreign],
        &["no image for", &host, FOREIGN],
    );
}

#[test]
fn one_name_may_be_of_an_image_for_each_platform() {
    let somebody = Somebody::new();
    let layout = somebody.directory.path().join("layout");
    let host = Platform::host().to_string();
    let name = r#""annotations": {"org.opencontainers.image.ref.name": "app"}, "platform""#;
    let entries = [(somebody.theirs, FOREIGN), (somebody.ours, &host)]
        .map(|(digest, platform)| entry(&layout, digest, platform).replace("\"platform\"", name));
    let write = |entries: &str| {
        let index = format!("{{\"schemaVersion\": 2, \"manifests\": [{entries}]}}");
        fs::write(layout.join("index.json"), index).unwrap();
    };
    write(&entries.join(", "));
    let app = somebody.reference("app");
    assert_eq!(somebody.pulled(&[&app]), somebody.ours.to_string());
    let theirs = somebody.pulled(&["--platform", FOREIGN, &app]);
    assert_eq!(theirs, somebody.theirs.to_string());
    // With two names, the choice is ambiguous.
    write(&entries.join(", ").replacen("\"app\"", "\"other\"", 1));
    let both = format!("oci:{}", layout.display());
    somebody.refused(&["pull", &both], &["2 images", "other, app"]);
}

#[test]
fn an_image_for_another_platform_does_not_run() {
    let somebody = Somebody::new();
    let both = somebody.reference("both");
    let host = Platform::host().to_string();
    somebody.refused(
        &["run", "--platform", FOREIGN, &both, "true"],
        &["is for linux/s390x", &host],
    );
    somebody.refused(
        &["run", &somebody.reference("foreign"), "true"],
        &["is for linux/s390x", &host],
    );
}
