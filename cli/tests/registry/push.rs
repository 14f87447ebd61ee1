//! `sm push` of images that were pulled, and of images from other sources.

use std::fs;
use std::process::Command;

use crate::support::{Registry, tools};

/// Returns the digest of `name` in the registry, computed by skopeo.
fn digest(registry: &Registry, name: &str) -> String {
    let inspected = Command::new("skopeo")
        .args(["inspect", "--raw"])
        .args(
            registry
                .skopeo
                .iter()
                .map(|option| option.replace("--dest-", "--")),
        )
        .arg(format!("docker://{}/{name}", registry.address))
        .output()
        .unwrap();
    assert!(inspected.status.success(), "{inspected:?}");
    sm_image::Digest::of(&inspected.stdout).to_string()
}

#[test]
fn pulled_images_are_pushed_byte_for_byte() {
    if !tools() {
        return;
    }
    let registry = Registry::open();
    let ok = |arguments: &[&str]| {
        let output = registry.sm(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let image = registry.image();
    let original = digest(&registry, "team/app:v1");
    assert_eq!(ok(&["pull", "--quiet", &image]), original);

    // A push to another repository, which mounts existing blobs.
    let second = format!("{}/other/copy:v2", registry.address);
    ok(&["tag", &image, &second]);
    let output = registry.sm(&["push", &second]);
    assert!(output.status.success(), "{output:?}");
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(told.matches("Already exists").count(), 2, "{told}");
    assert_eq!(digest(&registry, "other/copy:v2"), original);

    // A push to another registry, with the compressed layers, and without.
    let other = Registry::open();
    let third = format!("{}/third:v3", other.address);
    ok(&["tag", &image, &third]);
    assert_eq!(ok(&["push", "--quiet", &third]), original);
    assert_eq!(digest(&other, "third:v3"), original);
    ok(&["image", "prune", "--compressed"]);
    let fourth = format!("{}/fourth/is:new", other.address);
    ok(&["tag", &image, &fourth]);
    assert_eq!(ok(&["push", "--quiet", &fourth]), original);

    // Blobs are not downloaded again if the registry has them.
    ok(&["image", "prune", "--compressed"]);
    let used = || ok(&["image", "du", "--json"]);
    ok(&["push", &second]);
    assert!(used().contains("\"compressed\": 0"), "{}", used());
}

#[test]
fn an_image_without_a_manifest_is_pushed_with_a_new_one() {
    if !tools() {
        return;
    }
    let registry = Registry::open();
    let root = registry.path("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), "contents\n".repeat(10_000)).unwrap();
    let tar = registry.path("root.tar");
    let made = Command::new("tar")
        .arg("-C")
        .arg(&root)
        .arg("-cf")
        .arg(&tar)
        .arg(".")
        .status();
    assert!(made.unwrap().success());
    let name = format!("{}/imported:latest", registry.address);
    let ok = |arguments: &[&str]| {
        let output = registry.sm(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    ok(&[
        "import",
        "--change",
        "CMD cat /file",
        tar.to_str().unwrap(),
        &name,
    ]);
    let pushed = ok(&["push", "--quiet", &name]);
    assert_eq!(digest(&registry, "imported:latest"), pushed);
    // Other tools can read it, and so can sm, with the same contents.
    let copied = registry.path("copied");
    let output = Command::new("skopeo")
        .args(["copy", "--quiet", "--src-tls-verify=false"])
        .arg(format!("docker://{name}"))
        .arg(format!("oci:{}:x", copied.display()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let layers = |query: &str| {
        let details = ok(&["image", "inspect", query]);
        let details: serde_json::Value = serde_json::from_str(&details).unwrap();
        details[0]["layers"][0]["diff_id"].clone()
    };
    let before = layers(&name);
    ok(&["pull", "--quiet", &name]);
    assert_eq!(layers(&name), before);
}
