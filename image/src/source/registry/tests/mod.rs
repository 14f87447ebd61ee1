//! Tests with registries in this process.

mod access;
mod faults;
mod full;
mod kinds;
mod mirrors;
mod origins;
mod push;
mod refresh;
mod server;

use self::server::{ok, registry, status};
use super::*;
use crate::reference::Reference;
use crate::store::Store;

#[test]
fn an_image_is_pulled_once_and_then_found_in_the_store() {
    let fixture = registry(|request, content| content.honest(request));
    assert!(fixture.pull().unwrap() > 300_000);
    let asked = fixture.requests().len();
    fixture.pull().unwrap();
    assert_eq!(fixture.requests().len(), asked, "nothing is asked again");
    let store = Store::open(&fixture.directory.path().join("store")).unwrap();
    let named = store.list().unwrap();
    assert!(
        named[0].reference.ends_with("/team/app:latest"),
        "{named:?}"
    );
    // A pull requests the manifest, and finds that the store is complete.
    let reference = Reference::parse(&fixture.reference).unwrap();
    store
        .pull(&reference, &crate::PullOptions::default())
        .unwrap();
    let again: Vec<_> = fixture.requests().split_off(asked);
    assert!(again.iter().any(|r| r.path.contains("/manifests/latest")));
    let layers = again.iter().filter(|r| r.path.contains("/blobs/")).count();
    assert_eq!(layers, 1, "the configuration only: {again:?}");
}

#[test]
fn missing_images_are_unknown() {
    let fixture = registry(|_, _| status(404));
    fixture.fails(&["unknown image", "team/app:latest", "has none"]);
}

#[test]
fn an_index_is_resolved_to_the_manifest_of_this_platform() {
    let fixture = registry(|request, content| {
        let digest = Digest::of(&content.manifest);
        if request.path.ends_with("/manifests/latest") {
            let manifest = |architecture: &str, digest: Digest| {
                format!(
                    "{{\"mediaType\": \"application/vnd.oci.image.manifest.v1+json\", \
                     \"size\": {}, \"digest\": \"{digest}\", \"platform\": \
                     {{\"os\": \"linux\", \"architecture\": \"{architecture}\"}}}}",
                    content.manifest.len()
                )
            };
            let ours = if cfg!(target_arch = "x86_64") {
                "amd64"
            } else {
                "arm64"
            };
            let index = format!(
                "{{\"schemaVersion\": 2, \"manifests\": [{}, {}]}}",
                manifest("s390x", Digest::of(b"no")),
                manifest(ours, digest)
            );
            return ok(index.as_bytes());
        }
        if request.path.contains("/manifests/") {
            assert!(request.path.ends_with(&digest.to_string()), "{request:?}");
        }
        content.honest(request)
    });
    fixture.pull().unwrap();
}
