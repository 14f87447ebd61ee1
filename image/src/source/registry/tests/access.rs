//! Tests of tokens, passwords and redirections.

use super::super::http::{Http, HttpError, HttpRequest};
use super::super::proxy::Proxies;
use super::server::{Answer, Heard, ok, registry};
use crate::cancel::Cancel;

#[test]
fn a_token_is_requested_and_renewed() {
    let mut valid = 0;
    let fixture = registry(move |request, content| {
        if request.path.starts_with("/token?") {
            assert!(
                request
                    .path
                    .contains("scope=repository%3Ateam%2Fapp%3Apull"),
                "{request:?}"
            );
            assert!(request.path.contains("service=here"));
            valid += 1;
            return ok(format!("{{\"token\": \"t{valid}\"}}").as_bytes());
        }
        // The first token expires before the layer is requested.
        let is_layer = request.path.contains("/blobs/") && valid == 1;
        let given = request.headers.get("authorization").cloned();
        if is_layer || given != Some(format!("Bearer t{valid}")) {
            let challenge = format!(
                "Bearer realm=\"http://{}/token\",service=\"here\",scope=\"repository:team/app:pull\"",
                content.address
            );
            return Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new());
        }
        content.honest(request)
    });
    fixture.pull().unwrap();
    let tokens = fixture.requests();
    let tokens = tokens.iter().filter(|r| r.path.starts_with("/token"));
    assert_eq!(tokens.count(), 2);
}

#[test]
fn the_error_for_a_private_image_names_the_login() {
    let fixture = registry(|_, _| {
        let challenge = "Basic realm=\"private\"".to_owned();
        Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new())
    });
    fixture.fails(&["refuses", "docker login 127.0.0.1:"]);
    let fixture = registry(|_, _| {
        let challenge = "Negotiate".to_owned();
        Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new())
    });
    fixture.fails(&["unsupported authentication"]);
}

#[test]
fn a_redirect_is_followed_without_the_token() {
    let elsewhere = registry(|request, content| {
        assert!(
            !request.headers.contains_key("authorization"),
            "{request:?}"
        );
        content.honest(request)
    });
    let other = elsewhere
        .reference
        .trim_start_matches("docker://")
        .to_owned();
    let other = other
        .split('/')
        .next()
        .unwrap()
        .replace("127.0.0.1", "localhost");
    let fixture = registry(move |request, content| {
        if request.path.starts_with("/token") {
            return ok(b"{\"access_token\": \"secret\"}");
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
    fixture.pull().unwrap();
    let blobs = elsewhere.requests();
    let blobs = blobs.iter().filter(|r| r.path.contains("/blobs/"));
    assert_eq!(blobs.count(), 2);
    // A redirection loop is an error.
    let endless = registry(|request, content| {
        let location = format!("http://{}{}x", content.address, request.path);
        Answer::Say(307, vec![("Location", location)], Vec::new())
    });
    endless.fails(&["registry"]);
}

#[test]
fn a_token_that_expires_during_a_pull_is_renewed() {
    let mut valid = 1;
    let fixture = registry(move |request, content| {
        if request.path.starts_with("/token") {
            return ok(format!("{{\"token\": \"t{valid}\"}}").as_bytes());
        }
        if request.headers.get("authorization") != Some(&format!("Bearer t{valid}")) {
            let challenge = format!("Bearer realm=\"http://{}/token\"", content.address);
            return Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new());
        }
        match content.honest(request) {
            Answer::Say(200, headers, body) if body.len() > 100_000 && valid == 1 => {
                valid = 2;
                Answer::Cut(200, headers, body, 70_000)
            }
            other => other,
        }
    });
    fixture.pull().unwrap();
    let seen = fixture.requests();
    let last = seen.last().unwrap();
    assert_eq!(last.headers.get("authorization").unwrap(), "Bearer t2");
    assert_eq!(last.headers.get("range").unwrap(), "bytes=70000-");
}

#[test]
fn one_of_many_readers_gets_the_token() {
    let fixture = registry(|request, content| {
        if request.path.starts_with("/token") {
            return ok(b"{\"token\": \"t\"}");
        }
        if !request.headers.contains_key("authorization") {
            let challenge = format!("Bearer realm=\"http://{}/token\"", content.address);
            return Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new());
        }
        content.honest(request)
    });
    let heard = Heard::default();
    heard.with(|session| {
        let location = fixture.repository();
        let scope = "repository:team/app:pull".to_owned();
        let client = super::Client::new(location, session, 5, vec![scope]);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    client
                        .send_request(ureq::http::Method::GET, "tags/list", &[])
                        .ok()
                });
            }
        });
    });
    let tokens = fixture.requests();
    let tokens = tokens.iter().filter(|r| r.path.starts_with("/token"));
    assert_eq!(tokens.count(), 1);
}

#[test]
fn the_registrys_error_message_is_reported() {
    let fixture = registry(|_, _| {
        let body = br#"{"errors": [{"code": "DENIED", "message": "not for\nyou \u001b[31m"}]}"#;
        Answer::Say(403, Vec::new(), body.to_vec())
    });
    fixture.fails(&["refuses access", "not for you  [31m"]);
}

/// Starts a server that speaks TLS and answers one request, and creates a client that
/// trusts it.
pub(super) fn with_tls(answer: &'static str) -> (String, Http) {
    use std::io::{Read as _, Write as _};

    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der());
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key.unwrap())
        .unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("localhost:{}", listener.local_addr().unwrap().port());
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let session = rustls::ServerConnection::new(std::sync::Arc::new(config)).unwrap();
        let mut stream = rustls::StreamOwned::new(session, stream);
        let mut request = [0; 4096];
        // The client may close the connection early.
        let _ = stream.read(&mut request);
        let _ = stream.write_all(answer.as_bytes());
        let _ = stream.flush();
    });
    let root = ureq::tls::Certificate::from_der(&certificate).to_owned();
    let tls = ureq::tls::TlsConfig::builder()
        .root_certs(ureq::tls::RootCerts::new_with_certs(&[root]))
        .build();
    let http = Http::with(tls, Proxies::default(), false, &Cancel::new());
    (address, http)
}

pub(super) fn ask(address: &str) -> HttpRequest<'static> {
    HttpRequest {
        method: ureq::http::Method::GET,
        uri: format!("https://{address}/").parse().unwrap(),
        headers: Vec::new(),
        authorization: None,
    }
}

#[test]
fn redirects_from_tls_to_plain_http_are_refused() {
    let answer = "HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:1/x\r\nContent-Length: 0\r\n\r\n";
    let (address, http) = with_tls(answer);
    match http.send_request(&ask(&address)) {
        Err(HttpError::ForbiddenRedirect(text)) => {
            assert!(text.to_string().contains("without TLS"), "{text}");
        }
        Err(HttpError::Http(error)) => panic!("{error}"),
        Ok(response) => panic!("{response:?}"),
    }
    let (address, http) = with_tls("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert!(http.send_request(&ask(&address)).is_ok());
}

#[test]
fn credentials_are_not_sent_without_tls() {
    // The registry uses TLS; the token server that it names does not.
    let answer = "HTTP/1.1 401 No\r\nContent-Length: 0\r\n\
                  WWW-Authenticate: Bearer realm=\"http://127.0.0.1:1/token\"\r\n\r\n";
    let (address, http) = with_tls(answer);
    let asked = ask(&address);
    let Ok(answer) = http.send_request(&asked) else {
        panic!("no answer");
    };
    let authorizer = super::auth::Authorizer::new("r", "a", vec!["repository:a:pull".to_owned()]);
    match authorizer.renew(&http, &asked.uri, None, answer.response.headers()) {
        Err(super::Failure::Final(reason)) => {
            assert!(reason.to_string().contains("without TLS"), "{reason}");
        }
        _ => panic!("it was asked"),
    }
}
