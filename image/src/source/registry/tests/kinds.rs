//! Tests that callers can match the cause of a failed pull.

use std::net::TcpListener;

use super::server::{Answer, Fixture};
use super::*;

type Headers = Vec<(&'static str, String)>;

#[track_caller]
fn kind(fixture: &Fixture) -> ErrorKind {
    fixture.pull().unwrap_err().kind()
}

#[test]
fn answers_of_a_registry_have_kinds() {
    let answering = |code| registry(move |_, _| status(code));
    assert_eq!(kind(&answering(403)), ErrorKind::Unauthorized);
    assert_eq!(kind(&answering(404)), ErrorKind::NotFound);
    assert_eq!(kind(&answering(418)), ErrorKind::Service);
    let login = registry(|_, _| {
        let challenge = "Basic realm=\"private\"".to_owned();
        Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new())
    });
    assert_eq!(kind(&login), ErrorKind::Unauthorized);
    let invalid = registry(|_, _| ok(b"[]"));
    assert_eq!(kind(&invalid), ErrorKind::Damaged);
    let old = registry(|_, _| ok(b"{\"schemaVersion\": 1, \"fsLayers\": []}"));
    assert_eq!(kind(&old), ErrorKind::Unsupported);
}

#[test]
fn an_address_where_nothing_listens_is_unreachable() {
    let mut fixture = registry(|_, _| status(404));
    // The port is free again when the listener is dropped.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    fixture.reference = format!("docker://{}/app", listener.local_addr().unwrap());
    drop(listener);
    assert_eq!(kind(&fixture), ErrorKind::Unreachable);
}

#[test]
fn the_kind_of_a_download_survives_the_conversion_of_its_layer() {
    let on_layers = |change: fn(u16, Headers, Vec<u8>) -> Answer| {
        registry(move |request, content| match content.honest(request) {
            Answer::Say(code, headers, body) if body.len() > 100_000 => change(code, headers, body),
            other => other,
        })
    };
    let broken = on_layers(|code, headers, body| Answer::Cut(code, headers, body, 10));
    assert_eq!(kind(&broken), ErrorKind::Unreachable);
    let refused = on_layers(|_, _, _| status(403));
    assert_eq!(kind(&refused), ErrorKind::Unauthorized);
    let changed = on_layers(|code, headers, mut body| {
        let middle = body.len() / 2;
        body[middle] ^= 1;
        Answer::Say(code, headers, body)
    });
    assert_eq!(kind(&changed), ErrorKind::Damaged);
}
