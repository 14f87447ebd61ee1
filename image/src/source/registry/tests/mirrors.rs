//! Tests of mirrors, which replace a registry and each other.

use super::server::{Answer, Heard, registry, status};

#[test]
fn a_mirror_replaces_the_registry() {
    let mirror = registry(|request, content| content.honest(request));
    let own = registry(|_, _| status(500));
    let heard = Heard::default();
    let bytes = heard.with(|session| own.read_through(&[&mirror], session));
    assert!(bytes.unwrap().len() > 300_000);
    assert!(own.requests().is_empty());
    assert!(heard.said().is_empty());
}

#[test]
fn unusable_mirrors_are_skipped() {
    let missing = registry(|_, _| status(404));
    let refusing = registry(|_, _| status(403));
    let own = registry(|request, content| content.honest(request));
    let gone = {
        let mut gone = registry(|_, _| status(404));
        // No server listens on this port.
        gone.address = "127.0.0.1:1".to_owned();
        gone
    };
    let heard = Heard::default();
    heard
        .with(|session| own.read_through(&[&missing, &refusing, &gone], session))
        .unwrap();
    let said = heard.said();
    assert_eq!(said.len(), 3, "{said:?}");
    assert!(said.iter().all(|text| text.contains("mirror")), "{said:?}");
    assert!(said[1].contains("refuses access"), "{said:?}");
}

#[test]
fn the_registrys_own_error_is_reported() {
    let mirror = registry(|_, _| status(500));
    let own = registry(|_, _| status(404));
    let heard = Heard::default();
    let error = heard
        .with(|session| own.read_through(&[&mirror], session))
        .unwrap_err()
        .to_string();
    assert!(error.contains("unknown image"), "{error}");
}

#[test]
fn a_layer_is_resumed_at_another_location() {
    // The mirror has the image, but never more than a part of the layer.
    let mirror = registry(|request, content| match content.honest(request) {
        Answer::Say(200, headers, body) if body.len() > 100_000 => {
            Answer::Cut(200, headers, body, 70_000)
        }
        Answer::Say(206, ..) => status(404),
        other => other,
    });
    let own = registry(|request, content| content.honest(request));
    let heard = Heard::default();
    heard
        .with(|session| own.read_through(&[&mirror], session))
        .unwrap();
    let asked = own.requests();
    let ranges: Vec<_> = asked
        .iter()
        .filter_map(|r| r.headers.get("range"))
        .collect();
    assert_eq!(ranges, ["bytes=70000-"]);
    assert!(heard.said()[0].contains("continuing at another location"));
}
