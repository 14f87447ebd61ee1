//! The distribution's registry, filled by skopeo.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use sm_image::{Compression, Config, Digest, LayoutBuilder, MemoryFile};

/// The entry of `tester` with the password `secret`, as written by `htpasswd -B`.
pub(crate) const HTPASSWD: &str =
    "tester:$2y$05$AnN9e0cFMXxC0RCdnfhP8OcEnAVraePaic14eNp94RuIlvvKqEXL6\n";
/// The same credentials for Docker's configuration.
pub(crate) const AUTH: &str = "dGVzdGVyOnNlY3JldA==";

/// Returns true if the programs are installed; `cargo xtask test` installs them.
pub(crate) fn tools() -> bool {
    sm_test_needs::programs(&["docker-registry", "skopeo", "openssl"])
}

/// A registry, and the home of a user of it.
pub(crate) struct Registry {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) address: String,
    pub(crate) process: Child,
    /// Options of skopeo for this registry.
    pub(crate) skopeo: Vec<String>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Registry {
    pub(crate) fn start(
        settings: impl FnOnce(&Path, &str) -> (Vec<(&'static str, String)>, Vec<String>),
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // The port was just free, and no other program is expected to take it.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let (settings, skopeo) = settings(directory.path(), &address);
        let configuration = directory.path().join("registry.yml");
        fs::write(
            &configuration,
            format!(
                "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: \"{address}\"}}\n\
                 storage: {{filesystem: {{rootdirectory: \"{}\"}}}}\n",
                directory.path().join("storage").display()
            ),
        )
        .unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .envs(settings)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while TcpStream::connect(&address).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it listens");
            std::thread::sleep(Duration::from_millis(20));
        }
        let registry = Self {
            directory,
            address,
            process,
            skopeo,
        };
        registry.fill();
        registry
    }

    /// Starts a registry without authentication and TLS.
    pub(crate) fn open() -> Self {
        Self::start(|_, _| (Vec::new(), vec!["--dest-tls-verify=false".to_owned()]))
    }

    /// Ends the registry. Its directory, and the user's home there, stay.
    pub(crate) fn stop(&self) {
        let pid = self.process.id().to_string();
        let killed = Command::new("kill").args(["-9", &pid]).status();
        assert!(killed.unwrap().success());
        while TcpStream::connect(&self.address).is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Copies an image of two layers to the registry, with skopeo.
    fn fill(&self) {
        let layout = self.path("layout");
        let mut image = LayoutBuilder::new(&layout, Compression::Gzip(6)).unwrap();
        for (number, name) in (0_u32..).zip(["one", "two"]) {
            // Random data, which does not compress.
            let bytes: Vec<u8> = (0..5_000_u32)
                .flat_map(|n| {
                    *Digest::of(&[number.to_le_bytes(), n.to_le_bytes()].concat()).bytes()
                })
                .collect();
            image
                .memory_layer(&[(name, 0o644, MemoryFile::File(bytes))])
                .unwrap();
        }
        image.finish("v1", Config::default()).unwrap();
        let copied = Command::new("skopeo")
            .args(["copy", "--quiet"])
            .args(&self.skopeo)
            .arg(format!("oci:{}:v1", layout.display()))
            .arg(format!("docker://{}/team/app:v1", self.address))
            .output()
            .unwrap();
        assert!(copied.status.success(), "{copied:?}");
    }

    pub(crate) fn image(&self) -> String {
        format!("{}/team/app:v1", self.address)
    }

    /// Runs `sm` as a user whose home is in the registry's directory.
    pub(crate) fn sm(&self, arguments: &[&str]) -> Output {
        self.sm_with(arguments, &[])
    }

    /// Runs `sm`, which must succeed, and returns its output.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.sm(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Like [`Self::sm`], with environment variables.
    pub(crate) fn sm_with(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_sm"))
            .args(arguments)
            // The test must not use this host's configuration of registries.
            .env("CONTAINERS_REGISTRIES_CONF", self.path("registries.conf"))
            .env_remove("XDG_CONFIG_HOME")
            .env("HOME", self.path("home"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env_remove("DOCKER_CONFIG")
            .env_remove("REGISTRY_AUTH_FILE")
            .envs(variables.iter().copied())
            .output()
            .unwrap()
    }

    /// Pulls the image and returns its ID.
    #[track_caller]
    pub(crate) fn pulled(&self, reference: &str) -> String {
        let output = self.sm(&["pull", reference]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Returns the ID of the image in its layout.
    pub(crate) fn id(&self) -> String {
        self.pulled(&format!("oci:{}:v1", self.path("layout").display()))
    }

    /// Checks the error of `sm pull` for an unavailable image.
    #[track_caller]
    pub(crate) fn refused(&self, words: &[&str]) {
        refused(&self.sm(&["pull", &self.image()]), words);
    }
}

#[track_caller]
pub(crate) fn refused(output: &Output, words: &[&str]) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = String::from_utf8_lossy(&output.stderr);
    for word in words {
        assert!(error.contains(word), "{word:?} is not in {error:?}");
    }
}

#[track_caller]
pub(crate) fn id_of(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
