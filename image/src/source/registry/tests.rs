//! Against a registry in this process that does as each test likes.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::*;
use crate::builder::{Compression, LayoutBuilder, MemoryFile};
use crate::reference::Reference;
use crate::store::Store;

/// A request: its path with query, and its headers in lower case.
#[derive(Clone, Debug)]
struct Request {
    path: String,
    headers: BTreeMap<String, String>,
}

/// What the registry does with a request.
enum Answer {
    Say(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// Says that there are so many bytes, sends fewer, and hangs up.
    Cut(u16, Vec<(&'static str, String)>, Vec<u8>, usize),
    HangUp,
}

fn ok(bytes: &[u8]) -> Answer {
    Answer::Say(200, Vec::new(), bytes.to_vec())
}

fn status(status: u16) -> Answer {
    Answer::Say(status, Vec::new(), Vec::new())
}

type Behaviour = dyn FnMut(&Request, &Content) -> Answer + Send;

/// An image, by the names of its parts.
struct Content {
    manifest: Vec<u8>,
    blobs: BTreeMap<String, Vec<u8>>,
    address: String,
}

impl Content {
    /// What an honest registry says.
    fn honest(&self, request: &Request) -> Answer {
        let path = &request.path;
        let name = path.rsplit('/').next().unwrap_or_default();
        let found = match path {
            path if path.contains("/manifests/") => Some(&self.manifest),
            path if path.contains("/blobs/") => self.blobs.get(name),
            _ => None,
        };
        let Some(bytes) = found else {
            return status(if path == "/v2/" { 200 } else { 404 });
        };
        let range = request.headers.get("range");
        let from = range
            .and_then(|range| {
                range
                    .strip_prefix("bytes=")?
                    .strip_suffix('-')?
                    .parse()
                    .ok()
            })
            .unwrap_or(0);
        if from == 0 {
            return ok(bytes);
        }
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        let headers = vec![("Content-Range", range)];
        Answer::Say(206, headers, bytes[from..].to_vec())
    }
}

struct Fixture {
    reference: String,
    seen: Arc<Mutex<Vec<Request>>>,
    directory: tempfile::TempDir,
}

/// Starts a registry with one image.
fn registry(mut behaviour: impl FnMut(&Request, &Content) -> Answer + Send + 'static) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let layout = directory.path().join("layout");
    // What does not compress.
    let noise: Vec<u8> = (0..10_000_u32)
        .flat_map(|n| *Digest::of(&n.to_le_bytes()).bytes())
        .collect();
    let mut image = LayoutBuilder::new(&layout, Compression::Gzip(1)).unwrap();
    image
        .memory_layer(&[("file", 0o644, MemoryFile::File(noise))])
        .unwrap();
    let digest = image.finish("latest", crate::Config::default()).unwrap();
    let mut blobs = BTreeMap::new();
    for entry in std::fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        blobs.insert(format!("sha256:{name}"), std::fs::read(&path).unwrap());
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let content = Content {
        manifest: blobs[&digest.to_string()].clone(),
        blobs,
        address: address.clone(),
    };
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            serve(&stream.unwrap(), &log, &mut behaviour, &content);
        }
    });
    Fixture {
        reference: format!("docker://{address}/team/app"),
        seen,
        directory,
    }
}

fn serve(
    stream: &TcpStream,
    log: &Mutex<Vec<Request>>,
    behaviour: &mut Behaviour,
    content: &Content,
) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    // TLS is not spoken here: a client hello is no line.
    if reader.read_line(&mut line).is_err() || !line.starts_with(['G', 'P']) {
        let _ = stream.shutdown(Shutdown::Both);
        return;
    }
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    loop {
        line.clear();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    let request = Request { path, headers };
    log.lock().unwrap().push(request.clone());
    let (status, headers, body, sent) = match behaviour(&request, content) {
        Answer::Say(status, headers, body) => {
            let len = body.len();
            (status, headers, body, len)
        }
        Answer::Cut(status, headers, body, sent) => (status, headers, body, sent),
        Answer::HangUp => {
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    };
    let mut head = format!(
        "HTTP/1.1 {status} Because\r\nConnection: close\r\nContent-Length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let mut stream = stream;
    // A client that has heard enough is no matter.
    let _ = stream.write_all(format!("{head}\r\n").as_bytes());
    let _ = stream.write_all(&body[..sent]);
}

impl Fixture {
    fn pull(&self) -> Result<u64, Error> {
        let store = Store::open(&self.directory.path().join("store"))?;
        let reference = Reference::parse(&self.reference)?;
        let image = store.open_image(&reference, &crate::PullOptions::default())?;
        Ok(image.segments.iter().map(|segment| segment.len).sum())
    }

    fn requests(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// Nothing of a failed pull is listed or in the way.
    fn fails(&self, words: &[&str]) {
        let error = self.pull().unwrap_err();
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        for word in words {
            assert!(text.contains(word), "{word:?} is not in {text:?}");
        }
        let store = Store::open(&self.directory.path().join("store")).unwrap();
        assert!(store.list().unwrap().is_empty());
    }
}

#[test]
fn an_image_is_pulled_once_and_then_at_hand() {
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
    // A pull asks, and finds that it has everything.
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
fn a_broken_connection_is_taken_up_where_it_broke() {
    let mut cuts = 0;
    let fixture = registry(move |request, content| {
        let honest = content.honest(request);
        let is_layer = request.path.contains("/blobs/");
        match honest {
            Answer::Say(status, headers, body) if is_layer && body.len() > 100_000 && cuts < 3 => {
                cuts += 1;
                Answer::Cut(status, headers, body, 70_000)
            }
            other => other,
        }
    });
    fixture.pull().unwrap();
    let ranges: Vec<_> = fixture
        .requests()
        .iter()
        .filter_map(|request| request.headers.get("range").cloned())
        .collect();
    assert_eq!(ranges.first().map(String::as_str), Some("bytes=70000-"));
    assert_eq!(ranges.len(), 3, "{ranges:?}");
}

#[test]
fn a_registry_without_ranges_is_read_again() {
    let mut cut = false;
    let fixture = registry(move |request, content| {
        let mut plain = request.clone();
        plain.headers.remove("range");
        match content.honest(&plain) {
            Answer::Say(status, headers, body) if body.len() > 100_000 && !cut => {
                cut = true;
                Answer::Cut(status, headers, body, 50_000)
            }
            other => other,
        }
    });
    fixture.pull().unwrap();
}

#[test]
fn a_connection_that_always_breaks_is_given_up() {
    let fixture = registry(|request, content| match content.honest(request) {
        Answer::Say(status, headers, body) if body.len() > 100_000 => {
            Answer::Cut(status, headers, body, 10)
        }
        other => other,
    });
    fixture.fails(&["layer"]);
    assert!(fixture.requests().len() < 20);
}

#[test]
fn trouble_that_passes_is_waited_for() {
    let mut troubles = vec![
        status(503),
        Answer::Say(429, vec![("Retry-After", "0".to_owned())], Vec::new()),
        Answer::HangUp,
    ];
    let fixture = registry(move |request, content| {
        if request.path.contains("/manifests/")
            && let Some(trouble) = troubles.pop()
        {
            return trouble;
        }
        content.honest(request)
    });
    fixture.pull().unwrap();
}

#[test]
fn trouble_that_stays_is_told() {
    let fixture = registry(|request, _| match request.path.as_str() {
        "/v2/" => status(200),
        _ => Answer::Say(500, vec![("Retry-After", "0".to_owned())], Vec::new()),
    });
    fixture.fails(&["127.0.0.1", "500", "5 times"]);
}

#[test]
fn what_is_not_there_is_unknown() {
    let fixture = registry(|_, _| status(404));
    fixture.fails(&["unknown image", "team/app:latest", "has none"]);
}

#[test]
fn wrong_contents_are_refused() {
    let fixture = registry(|request, content| match content.honest(request) {
        Answer::Say(status, headers, mut body) if body.len() > 100_000 => {
            let middle = body.len() / 2;
            body[middle] ^= 1;
            Answer::Say(status, headers, body)
        }
        other => other,
    });
    fixture.fails(&["blob sha256:", "contents have digest"]);

    let mut fixture = registry(|request, content| content.honest(request));
    let digest = Digest::of(b"another manifest");
    fixture.reference = format!("{}@{digest}", fixture.reference);
    fixture.fails(&[&digest.to_string()]);
}

#[test]
fn lengths_that_lie_are_found_out() {
    // Longer than the manifest says.
    let fixture = registry(|request, content| match content.honest(request) {
        Answer::Say(status, headers, mut body) if body.len() > 100_000 => {
            body.extend(vec![0; 4 << 20]);
            Answer::Say(status, headers, body)
        }
        other => other,
    });
    fixture.fails(&["blob sha256:", "more than"]);
    // A manifest without end.
    let fixture = registry(
        |request, content| match request.path.contains("/manifests/") {
            true => ok(&vec![b' '; 9 << 20]),
            false => content.honest(request),
        },
    );
    fixture.fails(&["larger than 8 MiB"]);
    let fixture = registry(
        |request, content| match request.path.contains("/manifests/") {
            true => ok(b"{\"schemaVersion\": 2, \"manifests\": ["),
            false => content.honest(request),
        },
    );
    fixture.fails(&["manifest"]);
}

#[test]
fn a_token_is_got_and_got_again() {
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
        // The first token expires before the layer is asked for.
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
fn an_image_that_is_not_ours_says_how_to_log_in() {
    let fixture = registry(|_, _| {
        let challenge = "Basic realm=\"private\"".to_owned();
        Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new())
    });
    fixture.fails(&["refuses", "docker login 127.0.0.1:"]);
    let fixture = registry(|_, _| {
        let challenge = "Negotiate".to_owned();
        Answer::Say(401, vec![("WWW-Authenticate", challenge)], Vec::new())
    });
    fixture.fails(&["does not know"]);
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
    // Round and round is given up.
    let endless = registry(|request, content| {
        let location = format!("http://{}{}x", content.address, request.path);
        Answer::Say(307, vec![("Location", location)], Vec::new())
    });
    endless.fails(&["registry"]);
}

#[test]
fn an_index_leads_to_the_manifest_of_this_platform() {
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
