//! The distribution's registry, filled by skopeo.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use sm_image::{Compression, Config, Digest, LayoutBuilder, MemoryFile};

/// `tester` with the password `secret`, as `htpasswd -B` writes it.
pub(crate) const HTPASSWD: &str =
    "tester:$2y$05$AnN9e0cFMXxC0RCdnfhP8OcEnAVraePaic14eNp94RuIlvvKqEXL6\n";
/// The same for Docker's configuration.
pub(crate) const AUTH: &str = "dGVzdGVyOnNlY3JldA==";

/// Whether the programs are there. `cargo xtask test` installs them, and then
/// they have to be.
pub(crate) fn tools() -> bool {
    let found = |program: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
    };
    let missing: Vec<_> = ["docker-registry", "skopeo", "openssl"]
        .into_iter()
        .filter(|program| !found(program))
        .collect();
    if !missing.is_empty() {
        assert!(
            std::env::var_os("SM_TEST_REGISTRY").is_none(),
            "missing: {missing:?}"
        );
        eprintln!("skipped: missing are {missing:?}");
    }
    missing.is_empty()
}

/// A registry, and the home of somebody who uses it.
pub(crate) struct Registry {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) address: String,
    pub(crate) process: Child,
    /// How skopeo talks to it.
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
        // Free a moment ago, and nobody asks for it by chance.
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

    /// One that anybody may use, without TLS.
    pub(crate) fn open() -> Self {
        Self::start(|_, _| (Vec::new(), vec!["--dest-tls-verify=false".to_owned()]))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Puts an image of two layers there, by skopeo.
    fn fill(&self) {
        let layout = self.path("layout");
        let mut image = LayoutBuilder::new(&layout, Compression::Gzip(6)).unwrap();
        for (number, name) in (0_u32..).zip(["one", "two"]) {
            // What does not compress.
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

    /// Runs `sm` as somebody whose home is in the registry's directory.
    pub(crate) fn sm(&self, arguments: &[&str]) -> Output {
        self.sm_with(arguments, &[])
    }

    /// [`Self::sm`] with variables of the environment.
    pub(crate) fn sm_with(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_sm"))
            .args(arguments)
            // What this host has been told about registries is none of the test's.
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

    /// The ID of the image in its layout.
    pub(crate) fn id(&self) -> String {
        self.pulled(&format!("oci:{}:v1", self.path("layout").display()))
    }

    /// What `sm pull` says about an image that it cannot have.
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
