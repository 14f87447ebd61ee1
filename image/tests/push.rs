//! Tests of [`sm_image::Pusher`] with the distribution's registry, read by skopeo: images
//! are pushed byte for byte.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sm_image::{
    Cancel, Compression, Config, Digest, DockerReference, LayoutBuilder, MemoryFile, Pushed, Pusher,
};

/// Returns true if the programs are installed; `cargo xtask test` installs them.
fn tools() -> bool {
    sm_test_needs::programs(&["docker-registry", "skopeo"])
}

struct Registry {
    address: String,
    process: Child,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Registry {
    fn start(directory: &Path) -> Self {
        // The port was free a moment ago; a conflict is unlikely.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let configuration = directory.join("registry.yml");
        let storage = directory.join("storage");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: \"{address}\"}}\n\
             storage: {{filesystem: {{rootdirectory: \"{}\"}}}}\n",
            storage.display()
        );
        fs::write(&configuration, text).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let registry = Self { address, process };
        let begun = Instant::now();
        while TcpStream::connect(&registry.address).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it listens");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    /// Returns an image's description by skopeo.
    fn inspect(&self, image: &str, raw: bool) -> Vec<u8> {
        let output = Command::new("skopeo")
            .args(["inspect", "--tls-verify=false"])
            .args(raw.then_some("--raw"))
            .arg(format!("docker://{}/{image}", self.address))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    }
}

/// Pushes a manifest of a layout and its blobs, and returns the results.
fn push(layout: &Path, manifest: Digest, name: &str, others: &[&str]) -> Vec<Pushed> {
    let blob = |digest: &str| {
        let digits = digest.strip_prefix("sha256:").unwrap();
        layout.join("blobs/sha256").join(digits)
    };
    let bytes = fs::read(blob(&manifest.to_string())).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    let layers = json["layers"].as_array().unwrap();
    let cancel = Cancel::new();
    let reference = DockerReference::parse(name).unwrap();
    let pusher = Pusher::open(&reference, others, &cancel, &|_| {}).unwrap();
    // All blobs are pushed concurrently.
    let pushed = std::thread::scope(|scope| {
        let sending: Vec<_> = layers
            .iter()
            .chain([&json["config"]])
            .map(|named| {
                let (pusher, blob) = (&pusher, &blob);
                scope.spawn(move || {
                    let digest = named["digest"].as_str().unwrap();
                    let path = blob(digest);
                    let open =
                        || -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(File::open(&path)?)) };
                    let (size, digest) = (named["size"].as_u64(), Digest::parse(digest));
                    let mut sent = 0;
                    let pushed = pusher
                        .blob(digest.unwrap(), size.unwrap(), &open, &mut |now| sent = now)
                        .unwrap();
                    assert_eq!(
                        sent,
                        if pushed == Pushed::Sent {
                            size.unwrap()
                        } else {
                            0
                        }
                    );
                    pushed
                })
            })
            .collect();
        let pushed = sending.into_iter().map(|sending| sending.join().unwrap());
        pushed.collect()
    });
    let media_type = json["mediaType"].as_str().unwrap();
    assert_eq!(pusher.manifest(media_type, &bytes).unwrap(), manifest);
    pushed
}

#[test]
fn images_are_pushed_byte_for_byte() {
    if !tools() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path());
    let layout = directory.path().join("layout");
    let mut image = LayoutBuilder::new(&layout, Compression::Gzip(6)).unwrap();
    for name in ["one", "two", "three"] {
        // One layer needs several reads.
        let file = MemoryFile::File(name.repeat(1_000_000).into_bytes());
        image.memory_layer(&[(name, 0o644, file)]).unwrap();
    }
    let digest = image.finish("v1", Config::default()).unwrap();

    let name = format!("{}/team/app:v1", registry.address);
    assert_eq!(push(&layout, digest, &name, &[]), [Pushed::Sent; 4]);
    let raw = registry.inspect("team/app:v1", true);
    assert_eq!(Digest::of(&raw), digest);
    let seen: serde_json::Value =
        serde_json::from_slice(&registry.inspect("team/app:v1", false)).unwrap();
    assert_eq!(seen["Digest"], digest.to_string());
    assert_eq!(seen["Layers"].as_array().unwrap().len(), 3);

    // No blob is uploaded twice, neither to the same repository nor to another one.
    assert_eq!(push(&layout, digest, &name, &[]), [Pushed::Existed; 4]);
    let other = format!("{}/else/where:v2", registry.address);
    assert_eq!(
        push(&layout, digest, &other, &["team/app"]),
        [Pushed::Mounted; 4]
    );
    assert_eq!(Digest::of(&registry.inspect("else/where:v2", true)), digest);

    // The image can be pulled again byte for byte, with all blobs.
    let copied = Command::new("skopeo")
        .args(["copy", "--quiet", "--src-tls-verify=false"])
        .arg(format!("docker://{other}"))
        .arg(format!(
            "oci:{}:v1",
            directory.path().join("back").display()
        ))
        .output()
        .unwrap();
    assert!(copied.status.success(), "{copied:?}");
}
