//! Tests of pushing images to a registry.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::super::push::{Pushed, Pusher};
use super::server::{Answer, Heard, Request, registry, status};
use crate::digest::Digest;
use crate::store::Store;
use crate::{DockerReference, Error, PullOptions};

/// Contents of the fake registry after a push.
#[derive(Default)]
struct Brought {
    blobs: BTreeMap<String, Vec<u8>>,
    uploads: BTreeMap<String, Vec<u8>>,
    manifest: Option<(String, Vec<u8>)>,
}

impl Brought {
    /// Answers a push request like a correct registry.
    fn take(&mut self, request: &Request) -> Answer {
        let path = request.path.split('?').next().unwrap();
        let query = request.path.split_once('?').map_or("", |(_, query)| query);
        let accepted =
            |location: String| Answer::Say(202, vec![("Location", location)], Vec::new());
        match request.method.as_str() {
            "HEAD" => {
                let name = path.rsplit('/').next().unwrap();
                status(if self.blobs.contains_key(name) {
                    200
                } else {
                    404
                })
            }
            "POST" if query.contains("from=shared%2Fbase") => status(201),
            "POST" => {
                let number = self.uploads.len();
                accepted(format!("/v2/team/app/blobs/uploads/{number}?state=0"))
            }
            "PATCH" => {
                assert_eq!(query, "state=0");
                self.uploads.insert(path.to_owned(), request.body.clone());
                accepted(format!("{path}?state=1"))
            }
            "PUT" if path.contains("/blobs/") => {
                let digest = query
                    .strip_prefix("state=1&digest=")
                    .unwrap()
                    .replace("%3A", ":");
                let bytes = self.uploads[path].clone();
                if Digest::of(&bytes).to_string() != digest {
                    return status(400);
                }
                self.blobs.insert(digest, bytes);
                status(201)
            }
            "PUT" => {
                assert!(path.ends_with("/manifests/v1"), "{path}");
                let kind = request.headers["content-type"].clone();
                let digest = Digest::of(&request.body).to_string();
                self.manifest = Some((kind, request.body.clone()));
                Answer::Say(201, vec![("Docker-Content-Digest", digest)], Vec::new())
            }
            _ => status(if path == "/v2/" { 200 } else { 404 }),
        }
    }
}

fn pusher<T>(address: &str, others: &[&str], act: impl FnOnce(&Pusher<'_>) -> T) -> T {
    let heard = Heard::default();
    heard.with(|session| {
        let name = format!("{address}/team/app:v1");
        let reference = DockerReference::parse(&name).unwrap();
        act(&Pusher::open(&reference, others, session.cancel, session.message).unwrap())
    })
}

fn push(pusher: &Pusher<'_>, bytes: &'static [u8]) -> Result<Pushed, Error> {
    let open = || -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(bytes)) };
    let mut last = 0;
    let size = bytes.len() as u64;
    let pushed = pusher.blob(Digest::of(bytes), size, &open, &mut |sent| last = sent);
    if let Ok(Pushed::Sent) = pushed {
        assert_eq!(last, size);
    }
    pushed
}

#[test]
fn a_push_that_fails_does_not_cancel_its_caller() {
    let brought = Arc::new(Mutex::new(Brought::default()));
    let refuses = Arc::new(AtomicBool::new(true));
    let (taking, refusing) = (Arc::clone(&brought), Arc::clone(&refuses));
    let fixture = registry(move |request, content| match request.method.as_str() {
        "GET" => content.honest(request),
        "POST" if refusing.load(Ordering::Relaxed) => status(400),
        _ => taking.lock().unwrap().take(request),
    });
    fixture.pull().unwrap();
    let store = Store::open(&fixture.directory.path().join("store")).unwrap();
    let pulled = store.list().unwrap().remove(0).reference;
    let name = format!("{}/team/app:v1", fixture.address);
    let name = DockerReference::parse(&name).unwrap();
    store.tag(&pulled, &name).unwrap();
    let options = PullOptions::default();
    let failed = store.push(&name, &options);
    assert!(
        failed.is_err() && !matches!(failed, Err(Error::Cancelled)),
        "{failed:?}"
    );
    assert!(!options.cancel.is_cancelled());
    refuses.store(false, Ordering::Relaxed);
    store.push(&name, &options).unwrap();
    assert!(brought.lock().unwrap().manifest.is_some());
}

#[test]
fn blobs_are_sent_once_and_then_named() {
    let brought = Arc::new(Mutex::new(Brought::default()));
    let taking = Arc::clone(&brought);
    let fixture = registry(move |request, _| taking.lock().unwrap().take(request));
    let manifest = b"{\"exact\":  true}";
    pusher(&fixture.address, &[], |pusher| {
        assert_eq!(push(pusher, b"one").unwrap(), Pushed::Sent);
        assert_eq!(push(pusher, b"").unwrap(), Pushed::Sent);
        assert_eq!(push(pusher, b"one").unwrap(), Pushed::Existed);
        let digest = pusher.manifest("application/x", manifest).unwrap();
        assert_eq!(digest, Digest::of(manifest));
    });
    let brought = brought.lock().unwrap();
    assert_eq!(brought.blobs[&Digest::of(b"one").to_string()], b"one");
    let expected = ("application/x".to_owned(), manifest.to_vec());
    assert_eq!(brought.manifest, Some(expected));
}

#[test]
fn blobs_of_another_repository_are_mounted() {
    let brought = Arc::new(Mutex::new(Brought::default()));
    let fixture = registry(move |request, _| brought.lock().unwrap().take(request));
    let others = ["team/app", "other/image", "shared/base"];
    let pushed = pusher(&fixture.address, &others, |pusher| push(pusher, b"base"));
    assert_eq!(pushed.unwrap(), Pushed::Mounted);
    let asked = fixture.requests();
    let mounts: Vec<_> = asked.iter().filter(|r| r.path.contains("mount=")).collect();
    assert_eq!(
        mounts.len(),
        2,
        "nothing is mounted from itself: {mounts:?}"
    );
    assert!(!asked.iter().any(|r| r.method == "PATCH"));
}

#[test]
fn a_broken_upload_restarts() {
    let brought = Arc::new(Mutex::new(Brought::default()));
    let mut broken = 0;
    let fixture = registry(move |request, _| {
        if request.method == "PATCH" && broken < 2 {
            broken += 1;
            return match broken {
                1 => Answer::HangUp,
                _ => Answer::Say(503, vec![("Retry-After", "0".to_owned())], Vec::new()),
            };
        }
        brought.lock().unwrap().take(request)
    });
    let pushed = pusher(&fixture.address, &[], |pusher| push(pusher, b"layer"));
    assert_eq!(pushed.unwrap(), Pushed::Sent);
}

#[test]
fn permission_to_push_is_requested() {
    let brought = Arc::new(Mutex::new(Brought::default()));
    let fixture = registry(move |request, content| {
        if request.path.starts_with("/token") {
            for scope in ["team%2Fapp%3Apull%2Cpush", "other%2Fimage%3Apull"] {
                assert!(request.path.contains(scope), "{request:?}");
            }
            return super::server::ok(b"{\"token\": \"t\"}");
        }
        if !request.headers.contains_key("authorization") {
            let challenge = format!("Bearer realm=\"http://{}/token\"", content.address);
            return Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new());
        }
        brought.lock().unwrap().take(request)
    });
    let pushed = pusher(&fixture.address, &["other/image"], |pusher| {
        push(pusher, b"x")
    });
    assert_eq!(pushed.unwrap(), Pushed::Sent);
}

#[test]
fn uploads_to_other_hosts_carry_no_credentials() {
    let brought = Arc::new(Mutex::new(Brought::default()));
    let elsewhere = registry(move |request, _| {
        assert!(
            !request.headers.contains_key("authorization"),
            "{request:?}"
        );
        brought.lock().unwrap().take(request)
    });
    let other = elsewhere.address.replace("127.0.0.1", "localhost");
    let fixture = registry(move |request, content| {
        if request.path.starts_with("/token") {
            return super::server::ok(b"{\"token\": \"secret\"}");
        }
        if !request.headers.contains_key("authorization") {
            let challenge = format!("Bearer realm=\"http://{}/token\"", content.address);
            return Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new());
        }
        if request.method == "POST" {
            let location = format!("http://{other}/v2/team/app/blobs/uploads/0?state=0");
            return Answer::Say(202, vec![("Location", location)], Vec::new());
        }
        status(if request.method == "HEAD" { 404 } else { 500 })
    });
    let pushed = pusher(&fixture.address, &[], |pusher| push(pusher, b"x"));
    assert_eq!(pushed.unwrap(), Pushed::Sent);
}

#[test]
fn refusals_and_wrong_digests_are_reported() {
    let refusing = registry(|request, _| match request.method.as_str() {
        "HEAD" => status(404),
        _ => Answer::Say(
            403,
            Vec::new(),
            br#"{"errors": [{"message": "quota exceeded"}]}"#.to_vec(),
        ),
    });
    let error = pusher(&refusing.address, &[], |pusher| push(pusher, b"x")).unwrap_err();
    assert!(error.to_string().contains("quota exceeded"), "{error}");

    let lying = registry(|_, _| {
        let other = Digest::of(b"something else").to_string();
        Answer::Say(201, vec![("Docker-Content-Digest", other)], Vec::new())
    });
    let error = pusher(&lying.address, &[], |pusher| pusher.manifest("x/y", b"{}")).unwrap_err();
    assert!(error.to_string().contains("it reports digest"), "{error}");

    let mute = registry(|request, _| match request.method.as_str() {
        "HEAD" => status(404),
        _ => status(202),
    });
    let error = pusher(&mute.address, &[], |pusher| push(pusher, b"x")).unwrap_err();
    assert!(
        error.to_string().contains("where an upload continues"),
        "{error}"
    );

    // A file that has become shorter.
    let brought = Arc::new(Mutex::new(Brought::default()));
    let fixture = registry(move |request, _| brought.lock().unwrap().take(request));
    let open = || -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(&b"short"[..])) };
    let failed = pusher(&fixture.address, &[], |pusher| {
        pusher.blob(Digest::of(b"longer than that"), 16, &open, &mut |_| {})
    });
    assert!(failed.is_err());

    let name = format!("{}/team/app@{}", fixture.address, Digest::of(b""));
    let reference = DockerReference::parse(&name).unwrap();
    let heard = Heard::default();
    let opened = heard
        .with(|session| Pusher::open(&reference, &[], session.cancel, session.message).map(drop));
    assert!(opened.unwrap_err().to_string().contains("needs a tag"));
}
