//! Tests of refresh tokens (identity tokens): they are posted to the token server that the
//! registry names, and to no other host.
//!
//! Each test runs itself again with a file of credentials of its own.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::super::auth::Authorizer;
use super::super::failure::Failure;
use super::access::{ask, with_tls};
use super::origins::{push, redirecting, uploads_continue_at};
use super::server::{Answer, Fixture, Request, ok, registry};

const OWN: &str = "REGISTRY_AUTH_FILE";
const RUNS: &str = "SM_TEST_OWN_CREDENTIALS";
const REFRESH: &str = "the-refresh-token";
/// The refresh token in Docker's configuration.
const IDENTITY: &str = "\"identitytoken\": \"the-refresh-token\"";
/// "me:secret" in Docker's configuration.
const PASSWORD: &str = "\"auth\": \"bWU6c2VjcmV0\"";

/// The file of the credentials that this process uses.
struct Login(PathBuf);

impl Login {
    /// Runs the test again in a child process, which gets the file.
    fn own(name: &str) -> Option<Self> {
        if std::env::var_os(RUNS).is_some() {
            return std::env::var_os(OWN).map(|path| Self(path.into()));
        }
        let directory = tempfile::tempdir().unwrap();
        let test = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg(format!("source::registry::tests::refresh::{name}"))
            .env(OWN, directory.path().join("auth.json"))
            .env(RUNS, "1")
            .output()
            .unwrap();
        assert!(test.status.success(), "{test:?}");
        assert!(String::from_utf8_lossy(&test.stdout).contains("1 passed"));
        None
    }

    /// Stores the credentials for a registry.
    fn at(&self, registry: &str, entry: &str) {
        let json = format!("{{\"auths\": {{\"{registry}\": {{{entry}}}}}}}");
        std::fs::write(&self.0, json).unwrap();
    }
}

/// Starts a registry that requires a token of the server at `realm`.
fn trusting(realm: String) -> Fixture {
    registry(move |request, content| {
        if request.headers.get("authorization") == Some(&"Bearer granted".to_owned()) {
            return content.honest(request);
        }
        let challenge = format!("Bearer realm=\"{realm}\",service=\"here\"");
        Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new())
    })
}

/// Starts a server that grants all tokens and demands another one for everything else.
fn greedy() -> Fixture {
    registry(|request, content| {
        if request.path.starts_with("/token") {
            return ok(b"{\"token\": \"mine\"}");
        }
        let challenge = format!("Bearer realm=\"http://{}/token\"", content.address);
        Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new())
    })
}

/// Returns the address of a server on this host by another name.
fn other_name(server: &Fixture) -> String {
    server.address.replace("127.0.0.1", "localhost")
}

fn has_secret(request: &Request) -> bool {
    let all = format!("{request:?}{}", String::from_utf8_lossy(&request.body));
    all.contains(REFRESH) || request.headers.contains_key("authorization")
}

/// The registry chooses its token server freely: Docker's is on another host as well.
#[test]
fn the_server_that_the_registry_names_gets_it_and_the_registry_does_not() {
    let name = "the_server_that_the_registry_names_gets_it_and_the_registry_does_not";
    let Some(login) = Login::own(name) else {
        return;
    };
    let tokens = registry(|_, _| ok(b"{\"access_token\": \"granted\"}"));
    let own = trusting(format!("http://{}/token", other_name(&tokens)));
    login.at(&own.address, IDENTITY);
    own.pull().unwrap();
    let asked = tokens.requests();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!((&*asked[0].method, &*asked[0].path), ("POST", "/token"));
    assert!(!asked[0].headers.contains_key("authorization"));
    let form = String::from_utf8(asked[0].body.clone()).unwrap();
    for field in [
        "grant_type=refresh_token",
        "refresh_token=the-refresh-token",
        "service=here",
        "scope=repository%3Ateam%2Fapp%3Apull",
    ] {
        assert!(form.split('&').any(|found| found == field), "{form}");
    }
    for request in own.requests() {
        let shown = format!("{request:?}{}", String::from_utf8_lossy(&request.body));
        assert!(!shown.contains(REFRESH), "{shown}");
    }
}

#[test]
fn a_token_server_cannot_redirect_it_to_another_host() {
    let Some(login) = Login::own("a_token_server_cannot_redirect_it_to_another_host") else {
        return;
    };
    let thief = registry(|_, _| ok(b"{\"token\": \"granted\"}"));
    let location = format!("http://{}/token", other_name(&thief));
    let status = Arc::new(AtomicU16::new(0));
    let answered = Arc::clone(&status);
    let tokens = registry(move |_, _| {
        let headers = vec![("Location", location.clone())];
        Answer::Say(answered.load(Ordering::Relaxed), headers, Vec::new())
    });
    let own = trusting(format!("http://{}/token", tokens.address));
    // A redirection of the form is an error and is not followed.
    login.at(&own.address, IDENTITY);
    for redirection in [301, 302, 303, 307, 308] {
        status.store(redirection, Ordering::Relaxed);
        own.fails(&[&format!("its token server answers {redirection}")]);
    }
    let asked = tokens.requests();
    assert_eq!(asked.len(), 5, "{asked:?}");
    assert!(asked.iter().all(|r| r.method == "POST" && has_secret(r)));
    assert!(thief.requests().is_empty(), "{:?}", thief.requests());
    // A redirection of a request with a password is followed without the password, and the
    // token that it leads to is not used.
    login.at(&own.address, PASSWORD);
    own.fails(&["its token server redirects to localhost"]);
    let asked = tokens.requests();
    let last = asked.last().unwrap();
    assert!(last.method == "GET" && has_secret(last), "{last:?}");
    let stolen = thief.requests();
    assert!(stolen.len() == 1 && !has_secret(&stolen[0]), "{stolen:?}");
    let own = own.requests();
    assert!(!own.iter().any(has_secret), "{own:?}");
}

#[test]
fn a_host_that_the_registry_redirects_to_cannot_ask_for_it() {
    let name = "a_host_that_the_registry_redirects_to_cannot_ask_for_it";
    let Some(login) = Login::own(name) else {
        return;
    };
    let thief = greedy();
    let pulled = redirecting(&thief);
    login.at(&pulled.address, IDENTITY);
    let error = pulled.pull().unwrap_err().to_string();
    let elsewhere = "localhost, to which it redirects, answers 401";
    assert!(error.contains(elsewhere), "{error}");
    let pushed = uploads_continue_at(&thief);
    login.at(&pushed.address, IDENTITY);
    let error = push(&pushed);
    assert!(error.contains(elsewhere), "{error}");
    // The registries' own servers got it, so there was something to steal.
    for own in [pulled, pushed] {
        let tokens = own.requests();
        let mut tokens = tokens.iter().filter(|r| r.path.starts_with("/token"));
        assert!(tokens.any(has_secret));
    }
    let asked = thief.requests();
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(!asked.iter().any(|r| r.path.starts_with("/token")));
    assert!(!asked.iter().any(has_secret), "{asked:?}");
}

#[test]
fn it_is_not_sent_without_tls() {
    let Some(login) = Login::own("it_is_not_sent_without_tls") else {
        return;
    };
    let tokens = registry(|_, _| ok(b"{\"token\": \"granted\"}"));
    let realm = format!("http://{}/token", tokens.address);
    login.at("r", IDENTITY);
    // The registry uses TLS; the token server that it names does not.
    let (address, http) = with_tls("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    let base = ask(&address).uri;
    let mut headers = ureq::http::HeaderMap::new();
    let challenge = format!("Bearer realm=\"{realm}\"").parse().unwrap();
    headers.insert("www-authenticate", challenge);
    let authorizer = Authorizer::new("r", "a", vec!["repository:a:pull".to_owned()]);
    match authorizer.renew(&http, &base, None, &headers) {
        Err(Failure::Final(reason)) => {
            assert!(reason.to_string().contains("without TLS"), "{reason}");
        }
        _ => panic!("it was sent"),
    }
    assert!(tokens.requests().is_empty(), "{:?}", tokens.requests());
    // The same server gets it from a registry without TLS.
    let base = format!("http://{}/", tokens.address).parse().unwrap();
    assert!(authorizer.renew(&http, &base, None, &headers).is_ok());
    assert!(tokens.requests().iter().all(has_secret));
}
