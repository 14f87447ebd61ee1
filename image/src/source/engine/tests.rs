//! Tests with an engine in this process.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::*;
use crate::builder::{Compression, LayoutBuilder, MemoryFile};
use crate::cancel::Cancel;

/// Returns the engine's answer for a path: status and body.
type Answer = Box<dyn FnMut(&str) -> (u16, Vec<u8>) + Send>;

/// Serves connections sequentially and returns the requested paths.
fn serve<S: io::Read + io::Write + Send + 'static>(
    mut accept: impl FnMut() -> S + Send + 'static,
    mut answer: Answer,
) -> Arc<Mutex<Vec<String>>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    std::thread::spawn(move || {
        loop {
            let mut stream = BufReader::new(accept());
            let (mut first, mut line) = (String::new(), String::new());
            stream.read_line(&mut first).unwrap();
            while stream.read_line(&mut line).unwrap() > 2 {
                line.clear();
            }
            let path = first.split(' ').nth(1).unwrap().to_owned();
            log.lock().unwrap().push(path.clone());
            let (status, body) = answer(&path);
            let head = format!(
                "HTTP/1.1 {status} X\r\nApi-Version: 1.43\r\nContent-Length: {}\r\n\
                 Connection: close\r\n\r\n",
                body.len()
            );
            let stream = stream.get_mut();
            // Some tests close the connection early.
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&body);
        }
    });
    seen
}

fn on_socket(directory: &Path, answer: Answer) -> (Host, Arc<Mutex<Vec<String>>>) {
    let path = directory.join("engine.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let seen = serve(move || listener.accept().unwrap().0, answer);
    (Host::Unix(path), seen)
}

/// Creates an image as newer engines save it (a layout and Docker's list) or as older
/// ones do (the list only). Returns it with the digests of the image and of its
/// configuration.
fn saved(directory: &Path, with_layout: bool) -> (Vec<u8>, Digest, Digest) {
    let layout = directory.join("layout");
    let mut image = LayoutBuilder::new(&layout, Compression::None).unwrap();
    let file = MemoryFile::File(vec![7; 100_000]);
    image.memory_layer(&[("file", 0o644, file)]).unwrap();
    let digest = image.finish("v1", crate::Config::default()).unwrap();
    let blob = |digest: &str| format!("blobs/sha256/{}", digest.strip_prefix("sha256:").unwrap());
    let manifest = std::fs::read(layout.join(blob(&digest.to_string()))).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let named = |value: &serde_json::Value| value["digest"].as_str().unwrap().to_owned();
    let config = named(&manifest["config"]);
    let list = format!(
        r#"[{{"Config": "{}", "RepoTags": ["app:latest"], "Layers": ["{}"]}}]"#,
        blob(&config),
        blob(&named(&manifest["layers"][0]))
    );
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_dir_all("blobs", layout.join("blobs")).unwrap();
    let mut files = vec![("manifest.json", list.into_bytes())];
    if with_layout {
        for name in ["index.json", "oci-layout"] {
            files.push((name, std::fs::read(layout.join(name)).unwrap()));
        }
    }
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes.as_slice())
            .unwrap();
    }
    (
        tar.into_inner().unwrap(),
        digest,
        Digest::parse(&config).unwrap(),
    )
}

fn opened<T>(
    host: Host,
    scratch: &Path,
    act: impl FnOnce(&Engine<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    let cancel = Cancel::new();
    let session = Session {
        scratch,
        cancel: &cancel,
        message: &|_| {},
    };
    act(&Engine::at(host, "app:latest", session)?)
}

#[test]
fn an_image_is_received_once_and_read_as_an_archive() {
    for with_layout in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let (tar, digest, config) = saved(directory.path(), with_layout);
        let id = if with_layout { digest } else { config };
        let answer = move |path: &str| match path {
            "/_ping" => (200, Vec::new()),
            "/v1.43/images/app:latest/json" => (200, format!(r#"{{"Id": "{id}"}}"#).into()),
            "/v1.43/images/app:latest/get" => (200, tar.clone()),
            other => panic!("{other}"),
        };
        let (host, seen) = on_socket(directory.path(), Box::new(answer));
        let scratch = tempfile::tempdir().unwrap();
        opened(host, scratch.path(), |engine| {
            assert_eq!(engine.identity()?, Some(id));
            let image = engine.image(None)?;
            assert_eq!((image.digest, image.named), (id, id));
            assert_eq!(image.manifest.is_some(), with_layout);
            for _ in 0..2 {
                let mut layer = Vec::new();
                engine
                    .layer(&image.layers[0])?
                    .read_to_end(&mut layer)
                    .unwrap();
                assert_eq!(Digest::of(&layer), image.layers[0].diff_id);
            }
            Ok(())
        })
        .unwrap();
        let gets = seen
            .lock()
            .unwrap()
            .iter()
            .filter(|path| path.ends_with("/get"))
            .count();
        assert_eq!(gets, 1);
        assert_eq!(
            scratch.path().read_dir().unwrap().count(),
            0,
            "nothing is left"
        );
    }
}

#[test]
fn an_engine_can_be_on_another_host() {
    let directory = tempfile::tempdir().unwrap();
    let (tar, _, config) = saved(directory.path(), false);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = move |path: &str| match path {
        "/_ping" => (200, Vec::new()),
        _ => (200, tar.clone()),
    };
    serve(move || listener.accept().unwrap().0, Box::new(answer));
    let image = opened(Host::Tcp(address, None), directory.path(), |engine| {
        engine.image(None)
    });
    assert_eq!(image.unwrap().digest, config);
}

#[test]
fn failures_are_reported() {
    let directory = tempfile::tempdir().unwrap();
    let fails = |host: Host, words: &[&str]| {
        let error = opened(host, directory.path(), |engine| engine.image(None));
        let error = error.unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    };
    let nowhere = directory.path().join("nowhere.sock");
    fails(
        Host::Unix(nowhere),
        &["nowhere.sock", "no engine listens there"],
    );
    fails(
        Host::Tcp("127.0.0.1:1".to_owned(), None),
        &["no engine listens there"],
    );
    // A socket without a listener.
    let left = directory.path().join("left.sock");
    drop(UnixListener::bind(&left).unwrap());
    fails(Host::Unix(left), &["no engine listens there"]);

    let answers: [(&[u8], u16, &[&str]); 4] = [
        (
            b"",
            404,
            &["unknown image", "docker-daemon:app:latest", "has none"],
        ),
        (
            b"{\"message\": \"disk\\u001b is full\"}",
            500,
            &["500", "disk  is full"],
        ),
        (b"not a tar", 200, &["docker-daemon:app:latest"]),
        (&[0; 2048], 200, &["not an archive of images"]),
    ];
    for (body, status, words) in answers {
        let directory = tempfile::tempdir().unwrap();
        let body = body.to_vec();
        let answer = move |path: &str| match path {
            "/_ping" => (200, Vec::new()),
            _ => (status, body.clone()),
        };
        let (host, _) = on_socket(directory.path(), Box::new(answer));
        fails(host, words);
    }
}

#[test]
fn cancelling_ends_a_transfer() {
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("engine.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let cancel = Cancel::new();
    let session = Session {
        scratch: directory.path(),
        cancel: &cancel,
        message: &|_| {},
    };
    std::thread::scope(|scope| {
        let opening = scope.spawn(|| Engine::at(Host::Unix(path.clone()), "x", session).map(drop));
        // The engine sends nothing until the client disconnects.
        let (stream, _) = listener.accept().unwrap();
        BufReader::new(&stream)
            .read_line(&mut String::new())
            .unwrap();
        cancel.cancel();
        assert!(opening.join().unwrap().is_err());
    });
}
