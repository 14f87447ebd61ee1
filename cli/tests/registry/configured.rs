//! Effects of `registries.conf` on registries.

use std::fs;

use crate::support::{Registry, id_of, refused, tools};

impl Registry {
    fn configure(&self, text: &str) {
        fs::write(self.path("registries.conf"), text).unwrap();
    }
}

#[test]
fn registries_are_moved_mirrored_and_blocked() {
    if !tools() {
        return;
    }
    let registry = Registry::open();
    let (id, address) = (registry.id(), registry.address.clone());
    registry.configure(&format!(
        "[[registry]]\nprefix = 'r.test/old'\nlocation = '{address}/team'\n"
    ));
    assert_eq!(registry.pulled("r.test/old/app:v1"), id);

    // The first mirror does not exist, the second does not have the image.
    registry.configure(&format!(
        "[[registry]]\nlocation = 'r.test'\n\
         mirror = [{{location = '127.0.0.1:1'}}, {{location = '{address}/other'}}, {{location = '{address}'}}]\n"
    ));
    assert_eq!(registry.pulled("r.test/team/app:v1"), id);
    let names = registry.sm(&["images", "--json"]);
    let names = String::from_utf8_lossy(&names.stdout).into_owned();
    assert!(
        names.contains("r.test/team/app:v1"),
        "named as asked for: {names}"
    );

    // A mirror for digests only; the registry itself does not exist.
    registry.configure(&format!(
        "[[registry]]\nlocation = '127.0.0.1:1'\nprefix = 'r.test'\nmirror-by-digest-only = true\n\
         mirror = [{{location = '{address}'}}]\n"
    ));
    assert_eq!(registry.pulled(&format!("r.test/team/app@{id}")), id);
    let output = registry.sm(&["pull", "r.test/team/app:v1"]);
    refused(&output, &["127.0.0.1:1", "cannot"]);

    registry.configure(&format!(
        "[[registry]]\nlocation = '{address}'\nblocked = true\n"
    ));
    registry.refused(&["blocked", "registries.conf"]);
    registry.configure("[[registry");
    registry.refused(&["registries.conf"]);
}

#[test]
fn short_names_are_dockers_unless_they_are_aliases() {
    if !tools() {
        return;
    }
    let registry = Registry::open();
    registry.configure(&format!(
        "[aliases]\n'app' = '{}/team/app'\n",
        registry.address
    ));
    let id = registry.id();
    assert_eq!(registry.pulled("app:v1"), id);
    let names = registry.sm(&["images", "--json"]);
    let names = String::from_utf8_lossy(&names.stdout).into_owned();
    assert!(names.contains(&registry.image()), "{names}");
    // The store has the image under the short name as well.
    let output = registry.sm(&["run", "--pull", "never", "app:v1", "true"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!error.contains("not in the store"), "{error}");
    // A name with Docker's registry is no short name.
    let docker =
        "[[registry]]\nlocation = 'docker.io'\nblocked = true\n[aliases]\n'app' = 'x.test/y'\n";
    registry.configure(docker);
    refused(
        &registry.sm(&["pull", "docker.io/library/app"]),
        &["blocked"],
    );
}

#[test]
fn of_several_platforms_one_is_pulled() {
    if !tools() {
        return;
    }
    use sm_image::{Compression, Config, LayoutBuilder, MemoryFile, Platform};

    let registry = Registry::open();
    let layout = registry.path("platforms");
    let mut digests = Vec::new();
    for platform in ["linux/s390x", &Platform::host().to_string(), "linux/arm/v5"] {
        let image = LayoutBuilder::new(&layout, Compression::Gzip(1)).unwrap();
        let mut image = image.platform(platform.parse().unwrap());
        let file = MemoryFile::File(platform.as_bytes().to_vec());
        image.memory_layer(&[("platform", 0o644, file)]).unwrap();
        digests.push((
            platform.to_owned(),
            image.finish(platform, Config::default()).unwrap(),
        ));
    }
    // One index of all images, which skopeo copies completely.
    let entries: Vec<String> = digests
        .iter()
        .map(|(platform, digest)| {
            let mut parts = platform.split('/');
            let (os, architecture) = (parts.next().unwrap(), parts.next().unwrap());
            let variant = parts.next().unwrap_or_default();
            let size = fs::metadata(layout.join("blobs/sha256").join(digest.hex())).unwrap().len();
            format!(
                r#"{{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "{digest}",
                "size": {size}, "platform": {{"os": "{os}", "architecture": "{architecture}",
                "variant": "{variant}"}}}}"#
            )
        })
        .collect();
    let index = format!(
        r#"{{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{}]}}"#,
        entries.join(", ")
    );
    let digest = sm_image::Digest::of(index.as_bytes());
    fs::write(layout.join("blobs/sha256").join(digest.hex()), &index).unwrap();
    let top = format!(
        r#"{{"schemaVersion": 2, "manifests": [{{"digest": "{digest}", "size": {},
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "annotations": {{"org.opencontainers.image.ref.name": "all"}}}}]}}"#,
        index.len()
    );
    fs::write(layout.join("index.json"), top).unwrap();
    let copied = std::process::Command::new("skopeo")
        .args(["copy", "--quiet", "--all"])
        .args(&registry.skopeo)
        .arg(format!("oci:{}:all", layout.display()))
        .arg(format!("docker://{}/team/all:v1", registry.address))
        .output()
        .unwrap();
    assert!(copied.status.success(), "{copied:?}");

    let name = format!("{}/team/all:v1", registry.address);
    let id = |number: usize| digests[number].1.to_string();
    assert_eq!(registry.pulled(&name), id(1));
    let pull = |platform: &str| registry.sm(&["pull", "--platform", platform, &name]);
    assert_eq!(id_of(&pull("linux/s390x")), id(0));
    assert_eq!(id_of(&pull("linux/arm/v7")), id(2));
    refused(
        &pull("linux/riscv64"),
        &["linux/riscv64", "linux/s390x", "linux/arm/v5"],
    );
    // The digest of the index selects the same image.
    let by_digest = format!("{}/team/all@{digest}", registry.address);
    assert_eq!(registry.pulled(&by_digest), id(1));
}
