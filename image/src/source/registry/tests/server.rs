//! A registry in this process whose behaviour each test determines.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::super::super::registries::Locations;
use super::super::super::repository::Repository;
use super::super::{Registry, Source as _};
use crate::builder::{Compression, LayoutBuilder, MemoryFile};
use crate::cancel::Cancel;
use crate::digest::Digest;
use crate::reference::Reference;
use crate::source::Session;
use crate::store::Store;
use crate::{DockerReference, Error};

/// A request: its path with query, and its headers in lower case.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) headers: BTreeMap<String, String>,
    pub(super) body: Vec<u8>,
}

/// Answer of the registry to a request.
pub(super) enum Answer {
    Say(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// Announces the full length, sends fewer bytes, and closes the connection.
    Cut(u16, Vec<(&'static str, String)>, Vec<u8>, usize),
    HangUp,
    /// Sends nothing until the client has disconnected.
    Silence,
}

pub(super) fn ok(bytes: &[u8]) -> Answer {
    Answer::Say(200, Vec::new(), bytes.to_vec())
}

pub(super) fn status(status: u16) -> Answer {
    Answer::Say(status, Vec::new(), Vec::new())
}

type Behaviour = Mutex<dyn FnMut(&Request, &Content) -> Answer + Send>;

/// The parts of an image, by their names.
pub(super) struct Content {
    pub(super) manifest: Vec<u8>,
    pub(super) blobs: BTreeMap<String, Vec<u8>>,
    pub(super) address: String,
}

impl Content {
    /// Returns the answer of a correct registry.
    pub(super) fn honest(&self, request: &Request) -> Answer {
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

pub(super) struct Fixture {
    pub(super) reference: String,
    pub(super) address: String,
    seen: Arc<Mutex<Vec<Request>>>,
    pub(super) directory: tempfile::TempDir,
}

/// Starts a registry with one image.
pub(super) fn registry(
    behaviour: impl FnMut(&Request, &Content) -> Answer + Send + 'static,
) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let layout = directory.path().join("layout");
    // Incompressible data.
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
    let behaviour: Arc<Behaviour> = Arc::new(Mutex::new(behaviour));
    let content = Arc::new(content);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            let (log, content) = (Arc::clone(&log), Arc::clone(&content));
            let behaviour = Arc::clone(&behaviour);
            std::thread::spawn(move || serve(&stream, &log, &behaviour, &content));
        }
    });
    Fixture {
        reference: format!("docker://{address}/team/app"),
        address,
        seen,
        directory,
    }
}

fn serve(stream: &TcpStream, log: &Mutex<Vec<Request>>, behaviour: &Behaviour, content: &Content) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    // The server does not support TLS. A client hello is not an HTTP request and is
    // answered like real servers do.
    if reader.read_line(&mut line).is_err() || !line.starts_with(['G', 'H', 'P']) {
        let _ = (&mut &*stream).write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
        let _ = stream.shutdown(Shutdown::Both);
        return;
    }
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap_or_default());
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
    // Some tests close the connection early.
    let body = match headers.get("transfer-encoding") {
        Some(coding) if coding == "chunked" => chunked(&mut reader),
        _ => {
            let length = headers.get("content-length");
            let length: u64 = length.map_or(0, |length| length.parse().unwrap());
            let mut body = Vec::new();
            let _ = reader.take(length).read_to_end(&mut body);
            body
        }
    };
    let request = Request {
        method,
        path,
        headers,
        body,
    };
    log.lock().unwrap().push(request.clone());
    let answer = (behaviour.lock().unwrap())(&request, content);
    let (status, headers, body, sent) = match answer {
        Answer::Silence => {
            let _ = (&mut &*stream).read(&mut [0]);
            return;
        }
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
    if headers.iter().any(|(name, _)| *name == "Content-Length") {
        head = format!("HTTP/1.1 {status} Because\r\nConnection: close\r\n");
    }
    for (name, value) in headers.iter().filter(|(_, value)| !value.is_empty()) {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let mut stream = stream;
    // The client may have closed the connection.
    let _ = stream.write_all(format!("{head}\r\n").as_bytes());
    if request.method != "HEAD" {
        let _ = stream.write_all(&body[..sent]);
    }
}

/// Reads a body in chunks (RFC 9112 section 7.1), up to the end of the connection at most.
fn chunked(reader: &mut impl std::io::BufRead) -> Vec<u8> {
    let mut body = Vec::new();
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return body;
        }
        let size = u64::from_str_radix(line.trim(), 16).unwrap();
        let _ = reader.by_ref().take(size).read_to_end(&mut body);
        // The line end after each chunk, and after the empty last one.
        let _ = reader.read_line(&mut line);
        if size == 0 {
            return body;
        }
    }
}

/// Records the notices of a session.
#[derive(Default)]
pub(super) struct Heard {
    pub(super) cancel: Cancel,
    said: Mutex<Vec<String>>,
}

impl Heard {
    pub(super) fn with<T>(&self, act: impl FnOnce(Session<'_>) -> T) -> T {
        act(Session {
            scratch: std::path::Path::new("/nowhere"),
            cancel: &self.cancel,
            message: &|text| self.said.lock().unwrap().push(text.to_owned()),
        })
    }

    pub(super) fn said(&self) -> Vec<String> {
        self.said.lock().unwrap().clone()
    }
}

impl Fixture {
    pub(super) fn pull(&self) -> Result<u64, Error> {
        let store = Store::open(&self.directory.path().join("store"))?;
        let reference = Reference::parse(&self.reference)?;
        let image = store.open_image(&reference, &crate::PullOptions::default())?;
        Ok(image.segments.iter().map(|segment| segment.len).sum())
    }

    /// Returns the location of the repository.
    pub(super) fn repository(&self) -> Repository {
        Repository {
            registry: self.address.clone(),
            host: self.address.clone(),
            name: "team/app".to_owned(),
            insecure: false,
        }
    }

    /// Reads all layers through mirrors in front of this registry.
    pub(super) fn read_through(
        &self,
        mirrors: &[&Self],
        session: Session<'_>,
    ) -> Result<Vec<u8>, Error> {
        let locations = Locations {
            mirrors: mirrors.iter().map(|mirror| mirror.repository()).collect(),
            own: self.repository(),
        };
        let name = self.reference.strip_prefix("docker://").unwrap();
        let registry = Registry::at(locations, &DockerReference::parse(name).unwrap(), session);
        let mut bytes = Vec::new();
        for layer in registry.image(None)?.layers {
            let mut one = Vec::new();
            let read = registry.layer(&layer)?.read_to_end(&mut one);
            read.map_err(|error| Error::document("layer", error))?;
            assert_eq!(Digest::of(&one), layer.digest);
            bytes.extend(one);
        }
        Ok(bytes)
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// Asserts that a pull fails with these words and leaves nothing behind.
    #[track_caller]
    pub(super) fn fails(&self, words: &[&str]) {
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
