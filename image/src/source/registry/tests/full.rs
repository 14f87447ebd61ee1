//! Tests of a disk that becomes full while a layer is stored and converted.

use std::fs::{self, File};
use std::io::Write as _;
use std::process::Command;

use super::server::{ok, registry};
use crate::store::Store;
use crate::{ErrorKind, Reference};

const OWN: &str = "SM_TEST_OWN_DISK";

/// Runs the test again in a child process, with a small tmpfs for temporary directories.
/// Returns true in the child.
fn on_small_disk(name: &str, size: &str) -> bool {
    if std::env::var_os(OWN).is_some() {
        return true;
    }
    let at = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    // Other users than root can mount in a user namespace.
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let test = command
        .args(["--mount", "sh", "-c"])
        .arg(format!(
            "mount -t tmpfs -o size={size} none \"$TMPDIR\" && exec \"$0\" \"$@\""
        ))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture"])
        .arg(format!("source::registry::tests::full::{name}"))
        .env("TMPDIR", at.path())
        .env(OWN, "1")
        .output()
        .unwrap();
    assert!(test.status.success(), "{test:?}");
    assert!(String::from_utf8_lossy(&test.stdout).contains("1 passed"));
    false
}

/// The sizes in a manifest are checked before any layer is requested.
#[test]
fn a_layer_with_an_excessive_size_is_not_requested() {
    if !on_small_disk("a_layer_with_an_excessive_size_is_not_requested", "4m") {
        return;
    }
    // A size beyond the free space, one beyond the limit of layers, and the maximum of
    // the number type.
    for (claimed, words) in [
        (100 << 20, "the image's layers have 104857600 bytes"),
        (1 << 50, "it has more than"),
        (i64::MAX, "it has more than"),
    ] {
        let fixture = registry(move |request, content| {
            if !request.path.contains("/manifests/") {
                return content.honest(request);
            }
            let mut manifest: serde_json::Value =
                serde_json::from_slice(&content.manifest).unwrap();
            manifest["layers"][0]["size"] = claimed.into();
            ok(manifest.to_string().as_bytes())
        });
        fixture.fails(&[words]);
        let layer: Vec<_> = fixture
            .requests()
            .into_iter()
            .filter(|request| request.path.contains("/blobs/"))
            .collect();
        assert_eq!(layer.len(), 1, "the configuration only: {layer:?}");
    }
}

#[test]
fn a_pull_reports_a_full_disk() {
    if !on_small_disk("a_pull_reports_a_full_disk", "4m") {
        return;
    }
    let fixture = registry(|request, content| content.honest(request));
    let ballast = fixture.directory.path().join("ballast");
    Store::open(&fixture.directory.path().join("store")).unwrap();
    let mut causes = [0, 0];
    for room in (0..).step_by(5) {
        let mut file = File::create(&ballast).unwrap();
        while file.write(&[1; 4096]).is_ok_and(|count| count > 0) {}
        let len = file.metadata().unwrap().len();
        file.set_len(len - room * 4096).unwrap();
        let Err(error) = fixture.pull() else {
            break;
        };
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
        // The error comes from the check of the manifest's sizes, or from a failed write.
        let cause = match error {
            crate::Error::Space { .. } => 0,
            _ => 1,
        };
        causes[cause] += 1;
        fixture.fails(&[["has room for", "No space left"][cause]]);
        let tmp = fixture.directory.path().join("store/tmp");
        assert_eq!(fs::read_dir(tmp).unwrap().count(), 0);
    }
    assert!(causes[0] > 10 && causes[1] > 10, "{causes:?}");
    fs::remove_file(&ballast).unwrap();
    fixture.pull().unwrap();
    let store = Store::open(&fixture.directory.path().join("store")).unwrap();
    let name = Reference::parse(&fixture.reference).unwrap().to_string();
    let verified = store.verify(&name, None).unwrap();
    assert!(verified.problems.is_empty(), "{verified:?}");
}
