//! `sm push` of images that were pulled, and of images from other sources.

use std::fs;
use std::process::Command;

use serde_json::Value;
use sm_image::{Commit, Config, Digest, DockerReference, PullOptions, Store};

use crate::support::{Registry, tools};

/// Returns the manifest of `name` in the registry, read by skopeo.
fn raw(registry: &Registry, name: &str) -> Vec<u8> {
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
    inspected.stdout
}

fn digest(registry: &Registry, name: &str) -> String {
    Digest::of(&raw(registry, name)).to_string()
}

#[test]
fn pulled_images_are_pushed_byte_for_byte() {
    if !tools() {
        return;
    }
    let registry = Registry::open();
    let ok = |arguments: &[&str]| registry.ok(arguments);
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
    let ok = |arguments: &[&str]| registry.ok(arguments);
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

/// Returns the digests of the layers of `name` in the registry.
fn layers(registry: &Registry, name: &str) -> Vec<Value> {
    let manifest: Value = serde_json::from_slice(&raw(registry, name)).unwrap();
    let layers = manifest["layers"].as_array().unwrap().iter();
    layers.map(|layer| layer["digest"].clone()).collect()
}

#[test]
fn committed_images_keep_the_layers_of_their_base() {
    if !tools() {
        return;
    }
    let registry = Registry::open();
    let ok = |arguments: &[&str]| registry.ok(arguments);
    let base = ok(&["pull", "--quiet", &registry.image()]);
    let of_base = layers(&registry, "team/app:v1");

    let root = registry.path("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("new"), "new").unwrap();
    fs::write(root.join(".wh.one"), "").unwrap();
    let tar = registry.path("root.tar");
    let mut made = Command::new("tar");
    made.arg("-C").arg(&root).arg("-cf").arg(&tar);
    assert!(made.args(["new", ".wh.one"]).status().unwrap().success());
    let store = Store::open(&registry.path("data/sm/images")).unwrap();
    let same = format!("{}/mine/app:v2", registry.address);
    let name = DockerReference::parse(&same).unwrap();
    let commit = Commit {
        name: Some(&name),
        created: "2026-01-02T03:04:05Z".to_owned(),
        author: None,
        created_by: "sh".to_owned(),
        comment: None,
        change: &mut |config: &mut Config| config.user = Some("app".to_owned()),
    };
    let stream = fs::File::open(&tar).unwrap();
    let base = Digest::parse(&base).unwrap();
    store
        .commit(base, stream, commit, &PullOptions::new())
        .unwrap();
    let details = |registry: &Registry, query: &str| -> Value {
        let output = registry.sm(&["image", "inspect", query]);
        assert!(output.status.success(), "{output:?}");
        let all: Value = serde_json::from_slice(&output.stdout).unwrap();
        let layers = all[0]["layers"].as_array().unwrap().iter();
        let diff_ids: Vec<_> = layers.map(|layer| layer["diff_id"].clone()).collect();
        serde_json::json!([all[0]["config_digest"], diff_ids])
    };
    let committed = details(&registry, &same);

    // The layers are mounted, and not read.
    ok(&["image", "prune", "--compressed"]);
    let output = registry.sm(&["push", &same]);
    assert!(output.status.success(), "{output:?}");
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(told.matches("Already exists").count(), 2, "{told}");
    let pushed = layers(&registry, "mine/app:v2");
    assert_eq!((&pushed[..2], pushed.len()), (&of_base[..], 3));

    // Another registry gets them from the first one.
    let other = Registry::open();
    let elsewhere = format!("{}/app:v2", other.address);
    ok(&["tag", &same, &elsewhere]);
    ok(&["push", "--quiet", &elsewhere]);
    assert_eq!(layers(&other, "app:v2"), pushed);
    other.pulled(&elsewhere);
    assert_eq!(details(&other, &elsewhere), committed);

    // Without it, they are created again: other digests, the same content.
    ok(&["image", "prune", "--compressed"]);
    let third = Registry::open();
    let last = format!("{}/app:v2", third.address);
    ok(&["tag", &same, &last]);
    registry.stop();
    ok(&["push", "--quiet", &last]);
    third.pulled(&last);
    assert_eq!(details(&third, &last), committed);
}
