//! `sm pull` from the distribution's registry, filled by skopeo: open, with a password,
//! with tokens, with TLS, through proxies, through mirrors, and through a faulty proxy.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

mod configured;
mod faults;
mod faulty;
mod push;
mod support;
mod tls;
mod tokens;

use std::fs;
use std::process::Command;

use support::{AUTH, HTPASSWD, Registry, tools};

#[test]
fn an_image_is_the_same_as_in_its_layout() {
    if !tools() {
        return;
    }
    let registry = Registry::open();
    let id = registry.pulled(&registry.image());
    let layout = format!("oci:{}:v1", registry.path("layout").display());
    assert_eq!(registry.pulled(&layout), id, "skopeo copies it as it is");
    let by_digest = format!("{}/team/app@{id}", registry.address);
    assert_eq!(registry.pulled(&by_digest), id);
    let listed = registry.sm(&["images", "--json"]);
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let names: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|i| i["reference"].as_str().unwrap())
        .collect();
    assert!(names.contains(&&*registry.image()), "{names:?}");
    // Docker's other manifest format, and a tag that is moved.
    let old = Command::new("skopeo")
        .args(["copy", "--quiet", "--format", "v2s2"])
        .args(&registry.skopeo)
        .arg(format!("oci:{}:v1", registry.path("layout").display()))
        .arg(format!("docker://{}", registry.image()))
        .output()
        .unwrap();
    assert!(old.status.success(), "{old:?}");
    assert_ne!(registry.pulled(&registry.image()), id);
    let removed = registry.sm(&["rmi", &registry.image()]);
    assert!(removed.status.success(), "{removed:?}");
}

#[test]
fn a_missing_image_and_a_missing_registry_are_named() {
    if !tools() {
        return;
    }
    let registry = Registry::open();
    let output = registry.sm(&["pull", &format!("{}/no/such", registry.address)]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        error.contains("no/such:latest") && error.contains("has none"),
        "{error}"
    );
    let never = registry.sm(&["run", "--pull", "never", &registry.image(), "true"]);
    let error = String::from_utf8_lossy(&never.stderr);
    assert!(error.contains("sm pull"), "{error}");
    let mut registry = registry;
    registry.process.kill().unwrap();
    registry.process.wait().unwrap();
    registry.refused(&["cannot"]);
}

#[test]
fn a_password_is_asked_for_and_taken_from_where_docker_has_it() {
    if !tools() {
        return;
    }
    let registry = Registry::start(|directory, _| {
        let file = directory.join("htpasswd");
        fs::write(&file, HTPASSWD).unwrap();
        let settings = vec![
            ("REGISTRY_AUTH", "htpasswd".to_owned()),
            ("REGISTRY_AUTH_HTPASSWD_REALM", "test".to_owned()),
            ("REGISTRY_AUTH_HTPASSWD_PATH", file.display().to_string()),
        ];
        let skopeo = ["--dest-tls-verify=false", "--dest-creds", "tester:secret"];
        (settings, skopeo.map(str::to_owned).to_vec())
    });
    registry.refused(&["refuses", "docker login"]);
    let login = |auth: &str| {
        let docker = registry.path("home/.docker");
        fs::create_dir_all(&docker).unwrap();
        let json = format!(
            "{{\"auths\": {{\"{}\": {{\"auth\": \"{auth}\"}}}}}}",
            registry.address
        );
        fs::write(docker.join("config.json"), json).unwrap();
    };
    login("dGVzdGVyOndyb25n");
    registry.refused(&["refuses", "credentials"]);
    login(AUTH);
    registry.pulled(&registry.image());
}
