//! A registry that trusts the tokens of another server only.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::support::{AUTH, Registry, refused, tools};

const ISSUER: &str = "token server";
const SERVICE: &str = "test registry";

/// A server that grants all requested scopes, to `tester` only.
struct Tokens {
    asked: Arc<Mutex<Vec<String>>>,
    realm: String,
}

impl Tokens {
    /// Starts the server with a new key in `directory`.
    fn start(directory: &Path) -> Self {
        let line = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=tokens \
                    -keyout tokens.key -out tokens.crt";
        let made = Command::new("openssl")
            .args(line.split_whitespace())
            .current_dir(directory)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let realm = format!("http://{}/token", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        let directory = directory.to_owned();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (mut line, mut known) = (String::new(), false);
                let mut first = String::new();
                reader.read_line(&mut first).unwrap();
                while reader.read_line(&mut line).unwrap() > 2 {
                    known |= line.trim().ends_with(&format!("Basic {AUTH}"));
                    line.clear();
                }
                log.lock().unwrap().push(first.clone());
                let (status, body) = match known {
                    true => (
                        200,
                        format!("{{\"token\": \"{}\"}}", token(&directory, &first)),
                    ),
                    false => (401, String::new()),
                };
                let head = format!(
                    "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all(format!("{head}{body}").as_bytes());
            }
        });
        Self { asked, realm }
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let mut word = [0; 4];
        word[1..=group.len()].copy_from_slice(group);
        let word = u32::from_be_bytes(word);
        for digit in 0..=group.len() {
            let value = word >> (18 - 6 * digit) & 63;
            text.push(char::from(DIGITS[value as usize]));
        }
    }
    text
}

/// Returns a token (RFC 7519) for the scopes of a request, in the form that the registry
/// accepts.
fn token(directory: &Path, request: &str) -> String {
    let query = request.split(['?', ' ']).nth(2).unwrap_or_default();
    let access: Vec<String> = query
        .split('&')
        .filter_map(|pair| pair.strip_prefix("scope="))
        .filter_map(|scope| {
            let scope = scope
                .replace("%3A", ":")
                .replace("%2F", "/")
                .replace("%2C", ",");
            let mut parts = scope.splitn(3, ':').map(str::to_owned);
            let (kind, name, actions) = (parts.next()?, parts.next()?, parts.next()?);
            let actions: Vec<_> = actions.split(',').map(|a| format!("\"{a}\"")).collect();
            let actions = actions.join(",");
            Some(format!(
                r#"{{"type": "{kind}", "name": "{name}", "actions": [{actions}]}}"#
            ))
        })
        .collect();
    let pem = fs::read_to_string(directory.join("tokens.crt")).unwrap();
    let certificate: String = pem
        .lines()
        .filter(|line| !line.starts_with("---"))
        .collect();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let header = format!(r#"{{"typ": "JWT", "alg": "RS256", "x5c": ["{certificate}"]}}"#);
    let claims = format!(
        r#"{{"iss": "{ISSUER}", "sub": "tester", "aud": "{SERVICE}", "exp": {}, "nbf": {},
        "iat": {now}, "jti": "1", "access": [{}]}}"#,
        now + 300,
        now - 10,
        access.join(", ")
    );
    let signed = format!(
        "{}.{}",
        base64(header.as_bytes()),
        base64(claims.as_bytes())
    );
    let mut signing = Command::new("openssl")
        .args(["dgst", "-sha256", "-sign", "tokens.key"])
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    signing
        .stdin
        .take()
        .unwrap()
        .write_all(signed.as_bytes())
        .unwrap();
    let signature = signing.wait_with_output().unwrap().stdout;
    format!("{signed}.{}", base64(&signature))
}

#[test]
fn tokens_are_requested_with_credentials() {
    if !tools() {
        return;
    }
    let mut server = None;
    let registry = Registry::start(|directory, _| {
        let tokens = Tokens::start(directory);
        let bundle = directory.join("tokens.crt").display().to_string();
        let settings = vec![
            ("REGISTRY_AUTH", "token".to_owned()),
            ("REGISTRY_AUTH_TOKEN_REALM", tokens.realm.clone()),
            ("REGISTRY_AUTH_TOKEN_SERVICE", SERVICE.to_owned()),
            ("REGISTRY_AUTH_TOKEN_ISSUER", ISSUER.to_owned()),
            ("REGISTRY_AUTH_TOKEN_ROOTCERTBUNDLE", bundle),
        ];
        server = Some(tokens);
        let skopeo = ["--dest-tls-verify=false", "--dest-creds", "tester:secret"];
        (settings, skopeo.map(str::to_owned).to_vec())
    });
    let tokens = server.unwrap();
    refused(
        &registry.sm(&["pull", &registry.image()]),
        &["token server", "401", "docker login"],
    );
    let docker = registry.path("home/.docker");
    fs::create_dir_all(&docker).unwrap();
    let json = format!(
        "{{\"auths\": {{\"{}\": {{\"auth\": \"{AUTH}\"}}}}}}",
        registry.address
    );
    fs::write(docker.join("config.json"), json).unwrap();
    tokens.asked.lock().unwrap().clear();
    assert_eq!(registry.pulled(&registry.image()), registry.id());
    let asked = tokens.asked.lock().unwrap();
    assert_eq!(asked.len(), 1, "one token does for all layers: {asked:?}");
    assert!(asked[0].contains("service=test%20registry"), "{asked:?}");
    assert!(
        asked[0].contains("scope=repository%3Ateam%2Fapp%3Apull"),
        "{asked:?}"
    );
}
