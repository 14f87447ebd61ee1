//! Tests of demands in answers: those of the registry are met, those of hosts it
//! redirects to are not.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::push::Pusher;
use super::server::{Answer, Fixture, Heard, Request, ok, registry, status};
use crate::DockerReference;
use crate::digest::Digest;

/// Starts a registry that requires a token and redirects requests for blobs to `other`.
pub(super) fn redirecting(other: &Fixture) -> Fixture {
    let other = other.address.replace("127.0.0.1", "localhost");
    registry(move |request, content| {
        if request.path.starts_with("/token") {
            return ok(b"{\"token\": \"secret\"}");
        }
        if !request.headers.contains_key("authorization") {
            let challenge = format!("Bearer realm=\"http://{}/token\"", content.address);
            return Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new());
        }
        if request.path.contains("/blobs/") {
            let location = format!("http://{other}{}", request.path);
            return Answer::Say(307, vec![("Location", location)], Vec::new());
        }
        content.honest(request)
    })
}

#[test]
fn a_challenge_after_a_redirect_is_ignored() {
    for code in [401, 403] {
        let thief = registry(move |request, content| {
            if request.path.starts_with("/token") {
                return ok(b"{\"token\": \"mine\"}");
            }
            let challenge = format!("Bearer realm=\"http://{}/token\"", content.address);
            let headers = vec![("WWW-Authenticate", challenge)];
            let body = br#"{"errors": [{"message": "log in at evil.example"}]}"#;
            Answer::Say(code, headers, body.to_vec())
        });
        let own = redirecting(&thief);
        let error = own.pull().unwrap_err().to_string();
        assert!(
            error.contains("localhost, to which it redirects"),
            "{error}"
        );
        assert!(!error.contains("evil"), "{error}");
        assert!(!error.contains("login"), "{error}");
        let asked: Vec<Request> = thief.requests();
        assert_eq!(asked.len(), 1, "{asked:?}");
        assert!(asked[0].path.contains("/blobs/"), "{asked:?}");
        assert!(!asked[0].headers.contains_key("authorization"), "{asked:?}");
    }
}

/// An address of the registry that another host chose gets no credentials, and what it
/// demands is not met: the registry may serve content of other users there.
#[test]
fn credentials_do_not_come_back_with_a_redirect_through_another_host() {
    let address = Arc::new(std::sync::Mutex::new(String::new()));
    let back = Arc::clone(&address);
    let elsewhere = registry(move |_, _| {
        let location = format!(
            "http://{}/v2/chosen/by-the-other-host",
            back.lock().unwrap()
        );
        Answer::Say(307, vec![("Location", location)], Vec::new())
    });
    let other = elsewhere.address.replace("127.0.0.1", "localhost");
    let own = registry(move |request, content| {
        if request.path.starts_with("/token") {
            return ok(b"{\"token\": \"secret\"}");
        }
        if !request.headers.contains_key("authorization") {
            let challenge = format!("Bearer realm=\"http://{}/token\"", content.address);
            return Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new());
        }
        if request.path.contains("/blobs/") {
            let location = format!("http://{other}{}", request.path);
            return Answer::Say(307, vec![("Location", location)], Vec::new());
        }
        content.honest(request)
    });
    (*address.lock().unwrap()).clone_from(&own.address);
    let error = own.pull().unwrap_err().to_string();
    assert!(error.contains("to which it redirects"), "{error}");
    assert!(!elsewhere.requests().is_empty());
    let requests = own.requests();
    let chosen = requests.iter().filter(|r| r.path.contains("/chosen/"));
    let chosen: Vec<_> = chosen.collect();
    assert!(!chosen.is_empty(), "{requests:?}");
    for request in chosen {
        assert!(
            !request.headers.contains_key("authorization"),
            "{request:?}"
        );
    }
    // The challenge at that address asks for no other token.
    let tokens = requests.iter().filter(|r| r.path.starts_with("/token"));
    assert_eq!(tokens.count(), 1, "{requests:?}");
}

#[test]
fn a_pause_is_accepted_only_from_the_registry() {
    // The requested pause would exceed the maximum.
    let mut troubles = 1;
    let elsewhere = registry(move |request, content| {
        if troubles > 0 {
            troubles -= 1;
            return Answer::Say(
                503,
                vec![("Retry-After", "100000".to_owned())],
                br#"{"errors": [{"message": "from elsewhere"}]}"#.to_vec(),
            );
        }
        content.honest(request)
    });
    redirecting(&elsewhere).pull().unwrap();

    let broken = registry(|_, _| {
        let body = br#"{"errors": [{"message": "from elsewhere"}]}"#;
        Answer::Say(410, Vec::new(), body.to_vec())
    });
    let error = redirecting(&broken).pull().unwrap_err().to_string();
    assert!(
        error.contains("localhost, to which it redirects"),
        "{error}"
    );
    assert!(!error.contains("from elsewhere"), "{error}");
}

#[test]
fn tokens_come_from_the_server_that_the_registry_names() {
    let thief = registry(|_, _| ok(b"{\"token\": \"theirs\"}"));
    let other = thief.address.replace("127.0.0.1", "localhost");
    let own = registry(move |request, content| {
        if request.path.starts_with("/token") {
            let location = format!("http://{other}{}", request.path);
            return Answer::Say(307, vec![("Location", location)], Vec::new());
        }
        let challenge = format!("Bearer realm=\"http://{}/token\"", content.address);
        Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new())
    });
    own.fails(&["token server redirects to localhost"]);
    assert!(
        !own.requests()
            .iter()
            .any(|request| request.headers.contains_key("authorization"))
    );
}

/// Starts a registry whose uploads continue at `other`.
pub(super) fn uploads_continue_at(other: &Fixture) -> Fixture {
    let location = other.address.replace("127.0.0.1", "localhost");
    registry(move |request, content| {
        if request.path.starts_with("/token") {
            return ok(b"{\"token\": \"secret\"}");
        }
        if !request.headers.contains_key("authorization") {
            let challenge = format!("Bearer realm=\"http://{}/token\"", content.address);
            return Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new());
        }
        match request.method.as_str() {
            "POST" => {
                let location = format!("http://{location}/upload");
                Answer::Say(202, vec![("Location", location)], Vec::new())
            }
            "HEAD" => status(404),
            _ => status(if request.path == "/v2/" { 200 } else { 500 }),
        }
    })
}

/// Pushes a blob, which fails with the returned error.
pub(super) fn push(own: &Fixture) -> String {
    let heard = Heard::default();
    let error = heard.with(|session| {
        let name = format!("{}/team/app:v1", own.address);
        let reference = DockerReference::parse(&name).unwrap();
        let pusher = Pusher::open(&reference, &[], session.cancel, session.message).unwrap();
        let open = || -> std::io::Result<Box<dyn std::io::Read + Send>> { Ok(Box::new(&b"x"[..])) };
        pusher.blob(Digest::of(b"x"), 1, &open, &mut |_| {})
    });
    error.unwrap_err().to_string()
}

#[test]
fn an_upload_at_another_host_gets_no_credentials() {
    let thief = registry(|request, content| {
        if request.path.starts_with("/token") {
            return ok(b"{\"token\": \"mine\"}");
        }
        let challenge = format!("Bearer realm=\"http://{}/token\"", content.address);
        Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new())
    });
    let error = push(&uploads_continue_at(&thief));
    assert!(
        error.contains("localhost, to which it redirects"),
        "{error}"
    );
    assert_eq!(thief.requests().len(), 1, "{:?}", thief.requests());
}

#[test]
fn an_upload_at_another_host_cannot_redirect_to_the_registry() {
    // The address is one of the registry, which the upload's host knows from the first
    // request, chosen by that host.
    let registry_address = Arc::new(std::sync::Mutex::new(String::new()));
    let named = Arc::clone(&registry_address);
    let clever = registry(move |_, _| {
        let address = named.lock().unwrap();
        assert!(!address.is_empty());
        let location = format!("http://{address}/v2/other/manifests/latest");
        Answer::Say(202, vec![("Location", location)], Vec::new())
    });
    let own = uploads_continue_at(&clever);
    (*registry_address.lock().unwrap()).clone_from(&own.address);
    let error = push(&own);
    assert!(error.contains("at another host"), "{error}");
    assert_eq!(clever.requests().len(), 1, "{:?}", clever.requests());
    let requests = own.requests();
    assert!(requests.iter().any(|request| request.method == "POST"));
    assert!(
        !requests
            .iter()
            .any(|r| r.method == "PUT" || r.method == "PATCH"),
        "{requests:?}"
    );
}

/// Starts a server that sends `answer` on each connection. Returns its address and the
/// number of plain HTTP connections.
fn port(answer: Option<&'static [u8]>) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut greeting = [0; 4096];
            let length = stream.read(&mut greeting).unwrap_or(0);
            // HTTP without TLS starts with the method.
            if greeting.starts_with(b"GET ") {
                counted.fetch_add(1, Ordering::Relaxed);
            }
            assert!(length > 0);
            if let Some(answer) = answer {
                let _ = stream.write_all(answer);
            }
            // Without an answer the connection is closed.
        }
    });
    (address, count)
}

fn ask(address: &str) -> String {
    let heard = Heard::default();
    heard.with(|session| {
        let location = crate::source::repository::Repository {
            registry: address.to_owned(),
            host: address.to_owned(),
            name: "team/app".to_owned(),
            insecure: true,
        };
        let client = super::Client::new(location, session, 1, Vec::new());
        let asked =
            client.with_retries(|| client.send_request(ureq::http::Method::GET, "tags/list", &[]));
        asked.map_or_else(|error| error.to_string(), |_| "answered".to_owned())
    })
}

#[test]
fn plain_http_is_used_only_without_tls_support() {
    // The answer of Go's server to a TLS greeting.
    let refused = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let (plain, count) = port(Some(refused));
    ask(&plain);
    assert!(count.load(Ordering::Relaxed) > 0);
    // A TLS alert (handshake_failure), and a closed connection.
    for answer in [Some(&b"\x15\x03\x03\x00\x02\x02\x28"[..]), None] {
        let (address, count) = port(answer);
        let said = ask(&address);
        assert!(said.contains(&address), "{said}");
        assert_eq!(count.load(Ordering::Relaxed), 0, "{answer:?}: {said}");
    }
}
