//! `sm pull` from storage and output of other tools: Podman's storage and service,
//! archives by skopeo and Podman.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use sm_image::{Compression, Config, Digest, LayoutBuilder, MemoryFile};

/// Returns true if the programs are installed; `cargo xtask test` installs them.
fn tools() -> bool {
    sm_test_needs::programs(&["skopeo", "podman"])
}

/// A user with an image in a layout.
struct Somebody {
    directory: tempfile::TempDir,
    /// Digests of the manifest and of the configuration.
    manifest: Digest,
    config: Digest,
}

impl Drop for Somebody {
    fn drop(&mut self) {
        // The storage driver bind-mounts its directory onto itself, and does not unmount
        // it.
        let mounted = self.path("storage/overlay");
        let _ = rustix::mount::unmount(&mounted, rustix::mount::UnmountFlags::DETACH);
    }
}

impl Somebody {
    fn new(compression: Compression) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("usr/bin")).unwrap();
        fs::write(tree.join("usr/bin/tool"), vec![7; 100_000]).unwrap();
        fs::hard_link(tree.join("usr/bin/tool"), tree.join("usr/bin/other")).unwrap();
        fs::write(tree.join("empty"), "").unwrap();
        std::os::unix::fs::symlink("usr/bin", tree.join("bin")).unwrap();
        let layout = directory.path().join("layout");
        let mut image = LayoutBuilder::new(&layout, compression).unwrap();
        image.directory_layer(&tree).unwrap();
        // A layer with a whiteout, and with a file behind a link.
        let file = |text: &str| MemoryFile::File(text.into());
        image
            .memory_layer(&[
                ("usr/bin/.wh.other", 0o644, file("")),
                ("bin/new", 0o755, file("new")),
            ])
            .unwrap();
        let manifest = image.finish("v1", Config::default()).unwrap();
        let json = fs::read(layout.join("blobs/sha256").join(manifest.hex())).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        Self {
            directory,
            manifest,
            config: Digest::parse(json["config"]["digest"].as_str().unwrap()).unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("HOME", self.path("home"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("DOCKER_HOST")
            .env_remove("DOCKER_CONTEXT")
            .env_remove("CONTAINERS_STORAGE_CONF");
        command
    }

    fn sm(&self, arguments: &[&str]) -> Command {
        self.command(env!("CARGO_BIN_EXE_sm"), arguments)
    }

    /// Copies the image with skopeo; returns true on success.
    fn copy(&self, destination: &str) -> bool {
        let layout = format!("oci:{}:v1", self.path("layout").display());
        let copied = self.command("skopeo", &["copy", "--quiet", &layout, destination]);
        let copied = { copied }.output().unwrap();
        if !copied.status.success() {
            eprintln!("{destination}: {}", String::from_utf8_lossy(&copied.stderr));
        }
        copied.status.success()
    }

    /// Pulls an image, and verifies it in the store.
    #[track_caller]
    fn pulled(&self, mut pull: Command) -> String {
        let id = id_of(&pull.output().unwrap());
        let verified = self.sm(&["image", "verify", &id]).output().unwrap();
        assert!(verified.status.success(), "{verified:?}");
        id
    }

    /// The same image from another source has the same layers: nothing is converted
    /// again, and its disk has the same contents.
    fn same_layers(&self, id: &str) {
        let inspect = |query: &str| {
            let output = self.sm(&["image", "inspect", query]).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{output:?}");
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            let layers = json[0]["layers"].as_array().unwrap().iter();
            let layers = layers.map(|layer| layer["diff_id"].to_string());
            layers.collect::<Vec<_>>()
        };
        let layout = format!("oci:{}:v1", self.path("layout").display());
        let by_layout = self.pulled(self.sm(&["pull", &layout]));
        assert_eq!(inspect(id), inspect(&by_layout));
    }
}

#[track_caller]
fn id_of(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[track_caller]
fn refused(mut command: Command, words: &[&str]) {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    let error = String::from_utf8_lossy(&output.stderr);
    for word in words {
        assert!(error.contains(word), "{word:?} is not in {error:?}");
    }
}

#[test]
fn images_of_podman_are_read_from_its_storage() {
    if !tools() {
        return;
    }
    for (driver, compression) in [
        ("vfs", Compression::Gzip(6)),
        ("vfs", Compression::None),
        ("overlay", Compression::Gzip(6)),
    ] {
        let somebody = Somebody::new(compression);
        let (root, run) = (somebody.path("storage"), somebody.path("storage-run"));
        let brackets = format!("[{driver}@{}+{}]", root.display(), run.display());
        let image = format!("containers-storage:{brackets}localhost/app:v1");
        if !somebody.copy(&image) {
            // Not every host allows all users to mount such file systems.
            assert_eq!(driver, "overlay");
            continue;
        }
        // Uncompressed layers in the storage are those of the manifest.
        let id = match compression {
            Compression::None => somebody.manifest,
            _ => somebody.config,
        };
        let id = id.to_string();
        assert_eq!(somebody.pulled(somebody.sm(&["pull", &image])), id);
        somebody.same_layers(&id);
        // By short name and by ID, in the storage of this user.
        let configuration = somebody.path("storage.conf");
        let text = format!("[storage]\ngraphroot = '{}'\n", root.display());
        fs::write(&configuration, text).unwrap();
        for name in ["app:v1", &somebody.config.hex()[..12]] {
            let mut pull = somebody.sm(&["pull", &format!("containers-storage:{name}")]);
            pull.env("CONTAINERS_STORAGE_CONF", &configuration);
            assert_eq!(somebody.pulled(pull), id, "{name}");
        }
        let other = format!("containers-storage:{brackets}localhost/other");
        refused(
            somebody.sm(&["pull", &other]),
            &["localhost/other", "there is none"],
        );
        damage(&somebody, &root.join(driver), &image);
    }
}

/// Changes a file of a layer, which is then refused.
fn damage(somebody: &Somebody, files: &Path, image: &str) {
    let mut found = false;
    let mut directories = vec![files.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                directories.push(entry.path());
            } else if entry.file_name() == "tool" {
                fs::write(entry.path(), vec![8; 100_000]).unwrap();
                found = true;
            }
        }
    }
    assert!(found, "a file to be changed");
    let mut pull = somebody.sm(&["pull", image]);
    pull.env("XDG_DATA_HOME", somebody.path("other-data"));
    // The error has its digest or its diff_id.
    refused(pull, &["contents have di"]);
}

/// Podman's service on a socket.
struct Service {
    process: Child,
    socket: PathBuf,
    options: Vec<String>,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Service {
    fn start(somebody: &Somebody) -> Self {
        let path = |name: &str| somebody.path(name).display().to_string();
        let options = [
            ("--root", path("storage")),
            ("--runroot", path("storage-run")),
            ("--tmpdir", path("podman")),
            ("--storage-driver", "vfs".to_owned()),
            ("--events-backend", "file".to_owned()),
        ];
        let options: Vec<String> = options
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value])
            .collect();
        for name in ["home", "run", "podman"] {
            fs::create_dir_all(somebody.path(name)).unwrap();
        }
        let socket = somebody.path("podman.sock");
        let mut command = somebody.command("podman", &[]);
        command
            .args(&options)
            .args(["system", "service", "--time=0"])
            .arg(format!("unix://{}", socket.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut service = Self {
            process: command.spawn().unwrap(),
            socket,
            options,
        };
        let begun = Instant::now();
        while UnixStream::connect(&service.socket).is_err() {
            assert!(service.process.try_wait().unwrap().is_none(), "it runs");
            assert!(begun.elapsed() < Duration::from_secs(120), "it listens");
            std::thread::sleep(Duration::from_millis(20));
        }
        service
    }

    fn host(&self) -> String {
        format!("unix://{}", self.socket.display())
    }
}

#[test]
fn images_of_an_engine_are_received_from_it() {
    if !tools() {
        return;
    }
    let somebody = Somebody::new(Compression::Gzip(6));
    let service = Service::start(&somebody);
    let brackets = format!(
        "[vfs@{}+{}]",
        somebody.path("storage").display(),
        somebody.path("storage-run").display()
    );
    assert!(somebody.copy(&format!("containers-storage:{brackets}localhost/app:v1")));
    let pull = |image: &str, host: &str| {
        let mut pull = somebody.sm(&["pull", image]);
        pull.env("DOCKER_HOST", host);
        pull
    };
    let image = "docker-daemon:localhost/app:v1";
    let id = somebody.pulled(pull(image, &service.host()));
    assert_eq!(id, somebody.config.to_string());
    somebody.same_layers(&id);
    let by_id = format!("docker-daemon:{}", somebody.config);
    assert_eq!(somebody.pulled(pull(&by_id, &service.host())), id);
    let missing = pull("docker-daemon:no/such", &service.host());
    refused(missing, &["docker-daemon:no/such:latest", "has none"]);

    // An image in the store is not transferred again, which this engine could not do.
    let (host, asked) = poor_engine(&somebody, somebody.config);
    assert_eq!(somebody.pulled(pull(image, &host)), id);
    // This engine has a newer image.
    let (other, _) = poor_engine(&somebody, Digest::of(b"newer"));
    refused(pull(image, &other), &["500", "poor"]);
    assert_eq!(
        asked.join().unwrap(),
        ["/_ping", "/v1.43/images/localhost/app:v1/json"]
    );

    let nobody = somebody.path("nobody.sock").display().to_string();
    refused(
        pull(image, &format!("unix://{nobody}")),
        &[&nobody, "no engine listens"],
    );
    refused(pull(image, "ssh://host"), &["unix://", "to an archive"]);
}

/// An engine that knows image IDs, and has no data. It serves two requests, and returns
/// them.
fn poor_engine(somebody: &Somebody, id: Digest) -> (String, std::thread::JoinHandle<Vec<String>>) {
    let path = somebody.path(&format!("{}.sock", &id.hex()[..8]));
    let listener = UnixListener::bind(&path).unwrap();
    let serving = std::thread::spawn(move || {
        let mut asked = Vec::new();
        let most = if id == Digest::of(b"newer") { 3 } else { 2 };
        while asked.len() < most {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut first, mut line) = (String::new(), String::new());
            reader.read_line(&mut first).unwrap();
            while reader.read_line(&mut line).unwrap() > 2 {
                line.clear();
            }
            let path = first.split(' ').nth(1).unwrap().to_owned();
            let (status, body) = match path.as_str() {
                "/_ping" => (200, String::new()),
                path if path.ends_with("/json") => (200, format!("{{\"Id\": \"{id}\"}}")),
                _ => (500, "{\"message\": \"too poor\"}".to_owned()),
            };
            let head = format!(
                "HTTP/1.1 {status} X\r\nApi-Version: 1.43\r\nConnection: close\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(head.as_bytes()).unwrap();
            asked.push(path);
        }
        asked
    });
    (format!("unix://{}", path.display()), serving)
}

#[test]
fn archives_are_read_compressed_from_a_pipe_and_with_several_images() {
    if !tools() {
        return;
    }
    let somebody = Somebody::new(Compression::Gzip(6));
    let (docker, oci) = (somebody.path("docker.tar"), somebody.path("oci.tar"));
    assert!(somebody.copy(&format!(
        "docker-archive:{}:r.example/app:v1",
        docker.display()
    )));
    assert!(somebody.copy(&format!("oci-archive:{}:v1", oci.display())));
    let (config, manifest) = (somebody.config.to_string(), somebody.manifest.to_string());
    let pulled = |image: &str| somebody.pulled(somebody.sm(&["pull", image]));
    for name in ["", ":r.example/app:v1", ":v1", ":@0"] {
        assert_eq!(
            pulled(&format!("docker-archive:{}{name}", docker.display())),
            config
        );
    }
    assert_eq!(
        pulled(&format!("oci-archive:{}:v1", oci.display())),
        manifest
    );
    let other = format!("docker-archive:{}:v2", docker.display());
    refused(
        somebody.sm(&["pull", &other]),
        &["no image \"v2\"", "r.example/app:v1"],
    );

    // An archive as written by "docker save | gzip", in a file and through a pipe.
    let bytes = fs::read(&docker).unwrap();
    let gzip = somebody.path("docker.tar.gz");
    let mut packing = Command::new("gzip")
        .arg("-c")
        .stdin(Stdio::piped())
        .stdout(File::create(&gzip).unwrap())
        .spawn()
        .unwrap();
    packing.stdin.take().unwrap().write_all(&bytes).unwrap();
    assert!(packing.wait().unwrap().success());
    assert_eq!(
        pulled(&format!("docker-archive:{}", gzip.display())),
        config
    );
    for (transport, file, id) in [
        ("docker", &docker, &config),
        ("docker", &gzip, &config),
        ("oci", &oci, &manifest),
    ] {
        let mut pull = somebody.sm(&["pull", &format!("{transport}-archive:-")]);
        let mut pulling = pull
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = pulling.stdin.take().unwrap();
        let bytes = fs::read(file).unwrap();
        stdin.write_all(&bytes).unwrap();
        drop(stdin);
        let mut printed = String::new();
        pulling
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut printed)
            .unwrap();
        assert!(pulling.wait().unwrap().success());
        assert_eq!(printed.trim(), id);
        // A file as standard input needs no copy.
        let mut pull = somebody.sm(&["pull", &format!("{transport}-archive:-")]);
        pull.stdin(File::open(file).unwrap());
        assert_eq!(&somebody.pulled(pull), id);
    }

    // Several images in one archive, by Podman.
    let service = Service::start(&somebody);
    let mut ids = Vec::new();
    for (name, text) in [("one", "1"), ("two", "2")] {
        let layout = somebody.path(name);
        let mut image = LayoutBuilder::new(&layout, Compression::Gzip(1)).unwrap();
        image
            .memory_layer(&[("file", 0o644, MemoryFile::File(text.into()))])
            .unwrap();
        image.finish("v1", Config::default()).unwrap();
        let source = format!("oci:{}:v1", layout.display());
        let destination = format!(
            "containers-storage:[vfs@{}+{}]localhost/{name}:v1",
            somebody.path("storage").display(),
            somebody.path("storage-run").display()
        );
        let mut copy = somebody.command("skopeo", &["copy", "--quiet", &source, &destination]);
        assert!(copy.status().unwrap().success());
        ids.push(pulled(&destination));
    }
    let several = somebody.path("several.tar").display().to_string();
    let mut save = somebody.command("podman", &[]);
    save.args(&service.options)
        .args(["save", "--quiet", "--multi-image-archive", "-o", &several])
        .args(["localhost/one:v1", "localhost/two:v1"]);
    assert!(save.status().unwrap().success());
    assert_eq!(
        pulled(&format!("docker-archive:{several}:localhost/one:v1")),
        ids[0]
    );
    assert_eq!(
        pulled(&format!("docker-archive:{several}:localhost/two:v1")),
        ids[1]
    );
    let all = format!("docker-archive:{several}");
    refused(
        somebody.sm(&["pull", &all]),
        &["2 images", "localhost/one:v1", "localhost/two:v1"],
    );
}

#[test]
fn archives_that_cannot_be_read_say_why() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("archive");
    let fails = |bytes: &[u8], words: &[&str]| {
        fs::write(&path, bytes).unwrap();
        let mut pull = Command::new(env!("CARGO_BIN_EXE_sm"));
        pull.args(["pull", &format!("docker-archive:{}", path.display())])
            .env("HOME", directory.path())
            .env("XDG_DATA_HOME", directory.path().join("data"));
        refused(pull, words);
    };
    let tar = |name: &str| {
        let mut header = vec![0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(b"00000000002\0");
        header[148..156].fill(b' ');
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let mut contents = b"{}".to_vec();
        contents.resize(512 * 3, 0);
        [header, contents].concat()
    };
    fails(b"\xfd7zXZ\0more", &["compressed by xz"]);
    fails(b"BZh9more", &["compressed by bzip2"]);
    fails(&tar("repositories"), &["before 1.10", "save it again"]);
    fails(&tar("something"), &["no manifest.json"]);
    fails(b"no archive", &["archive"]);
    fails(&tar("manifest.json"), &["manifest is not valid"]);
}
