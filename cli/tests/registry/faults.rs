//! `sm pull` through a faulty proxy: it succeeds, or reports the cause, and never stores
//! wrong data.

use std::process::Output;

use crate::faulty::{Fault, Faulty};
use crate::support::{Registry, id_of, refused, tools};

/// Pseudo-random numbers with a fixed seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

impl Registry {
    /// Pulls through a proxy into an empty store.
    fn pull_through(&self, proxy: &Faulty, store: &str) -> Output {
        let home = self.path(store).display().to_string();
        let image = format!("{}/team/app:v1", proxy.address);
        self.sm_with(&["pull", &image], &[("XDG_DATA_HOME", &home)])
    }

    /// Verifies the stored image.
    fn verify(&self, store: &str, id: &str) {
        let home = self.path(store).display().to_string();
        let output = self.sm_with(&["image", "verify", id], &[("XDG_DATA_HOME", &home)]);
        assert!(output.status.success(), "{output:?}");
    }
}

fn is_blob(line: &str) -> bool {
    line.contains("/blobs/")
}

#[test]
fn transient_faults_are_survived() {
    if !tools() {
        return;
    }
    let registry = Registry::open();
    let id = registry.id();
    let mut numbers = Numbers(7);
    for round in 0..12 {
        // Up to two of the first answers to each request are faulty.
        let mut damaged = std::collections::BTreeMap::new();
        let (place, kind) = (numbers.below(170_000), numbers.below(7));
        let proxy = Faulty::start(&registry.address, move |line| {
            let count = damaged.entry(line.to_owned()).or_insert(0);
            *count += 1;
            if *count > 2 || line.contains(" /v2/ ") {
                return Fault::None;
            }
            match kind {
                0 => Fault::HangUp,
                1 => Fault::Status(503, Some("0")),
                2 => Fault::Status(429, Some("0")),
                3 => Fault::Slow,
                4 if is_blob(line) => Fault::Longer(place),
                5 if is_blob(line) => Fault::Shorter(place),
                _ => Fault::Cut(place),
            }
        });
        let store = format!("store-{round}");
        let pulled = id_of(&registry.pull_through(&proxy, &store));
        assert_eq!(pulled, id, "round {round}, fault {kind} at {place}");
        registry.verify(&store, &id);
    }
}

#[test]
fn permanent_faults_are_reported_and_nothing_is_stored() {
    if !tools() {
        return;
    }
    let registry = Registry::open();
    let always = |fault: Fault, only: fn(&str) -> bool| {
        Faulty::start(&registry.address, move |line| match only(line) {
            true => fault.clone(),
            false => Fault::None,
        })
    };
    let is_manifest = |line: &str| line.contains("/manifests/");
    for (number, (fault, only, words)) in [
        (Fault::Alter(100_000), is_blob as fn(&str) -> bool, "digest"),
        (Fault::Cut(0), is_blob, "the connection broke"),
        (Fault::Longer(10), is_blob, "announces"),
        (Fault::Status(500, Some("0")), is_blob, "500"),
        (Fault::Status(403, None), is_blob, "refuses access"),
        (Fault::Status(404, None), is_blob, "does not have blob"),
        (Fault::Status(429, Some("7200")), is_manifest, "7200 s"),
        (
            Fault::Cut(60),
            is_manifest,
            "the transfer of a manifest was interrupted",
        ),
        (Fault::Alter(3), is_manifest, "manifest"),
        (
            Fault::Elsewhere("127.0.0.1:1".to_owned()),
            is_blob,
            "cannot talk to it",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let proxy = always(fault, only);
        let store = format!("store-{number}");
        refused(&registry.pull_through(&proxy, &store), &[words]);
        let home = registry.path(&store).display().to_string();
        let listed = registry.sm_with(&["images", "-q"], &[("XDG_DATA_HOME", &home)]);
        assert!(listed.stdout.is_empty(), "{listed:?}");
    }
}

#[test]
fn another_host_gets_the_requests_and_no_credentials() {
    use std::fs;

    use crate::support::{AUTH, HTPASSWD};

    if !tools() {
        return;
    }
    // The registry without a password is the target of redirected blobs.
    let elsewhere = Registry::open();
    let there = Faulty::start(&elsewhere.address, |_| Fault::None);
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
    let other = there.address.replace("127.0.0.1", "localhost");
    let proxy = Faulty::start(&registry.address, move |line| match is_blob(line) {
        true => Fault::Elsewhere(other.clone()),
        false => Fault::None,
    });
    let docker = registry.path("home/.docker");
    fs::create_dir_all(&docker).unwrap();
    let json = format!(
        "{{\"auths\": {{\"{}\": {{\"auth\": \"{AUTH}\"}}}}}}",
        proxy.address
    );
    fs::write(docker.join("config.json"), json).unwrap();
    assert_eq!(
        id_of(&registry.pull_through(&proxy, "store")),
        registry.id()
    );
    let has_credentials = |request: &Vec<String>| {
        request
            .iter()
            .any(|line| line.to_ascii_lowercase().starts_with("authorization:"))
    };
    assert!(proxy.requests().iter().any(has_credentials));
    let blobs = there.requests();
    assert_eq!(blobs.len(), 3, "{blobs:?}");
    assert!(!blobs.iter().any(has_credentials), "{blobs:?}");
}
