//! Commands that need no guest, with their output: `sm kernel`, `sm doctor`, `sm
//! completions`, and errors.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use sm_image::{Compression, Config, LayoutBuilder, MemoryFile};

/// A user with an empty home.
struct User {
    directory: tempfile::TempDir,
}

struct Done {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Done {
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.out, self.err);
        self
    }

    #[track_caller]
    fn says(&self, words: &[&str]) {
        for word in words {
            assert!(self.err.contains(word), "no {word:?} in: {}", self.err);
        }
    }
}

impl User {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        common::sm(self.directory.path(), arguments)
    }

    fn run(&self, command: &mut Command) -> Done {
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes).into_owned();
            text.replace(self.directory.path().to_str().unwrap(), "~")
        };
        Done {
            code: output.status.code(),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }

    fn sm(&self, arguments: &[&str]) -> Done {
        self.run(&mut self.command(arguments))
    }

    /// Creates a file with the header of a kernel, and returns its path.
    fn kernel(&self, name: &str) -> String {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut bytes = vec![0; 1024];
        bytes[..4].copy_from_slice(b"\x7fELF");
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Creates an image, and returns its reference.
    fn image(&self) -> String {
        let layout = self.path("layout");
        let mut image = LayoutBuilder::new(&layout, Compression::None).unwrap();
        let file = MemoryFile::File(b"hello".to_vec());
        image.memory_layer(&[("hello", 0o644, file)]).unwrap();
        image.finish("v1", Config::default()).unwrap();
        format!("oci:{}:v1", layout.display())
    }
}

#[test]
fn kernels_are_listed_and_chosen() {
    let user = User::new();
    let built = user.kernel("cache/sm/kernels/6.12.1-abc/vmlinux");
    // The host's own kernels are listed last.
    let listed = |words: &[&str]| {
        let done = user.sm(&[&["kernel", "list"], words].concat()).exits(0);
        let ours = |line: &&str| !line.contains("/boot/vmlinuz-") && !line.starts_with("vmlinuz-");
        let lines: Vec<_> = done.out.lines().filter(ours).map(str::to_owned).collect();
        lines
    };
    let row = "*   6.12.1-abc   ~/cache/sm/kernels/6.12.1-abc/vmlinux";
    let squeezed = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let table = |words: &[&str]| {
        let lines = listed(words);
        lines.iter().map(|line| squeezed(line)).collect::<Vec<_>>()
    };
    assert_eq!(table(&[]), ["NAME PATH", &squeezed(row)]);
    assert_eq!(listed(&["-q"]), ["6.12.1-abc"]);

    // A kernel from another directory is listed while it is selected.
    let other = user.kernel("elsewhere/vmlinux");
    let done = user.sm(&["kernel", "use", &other]).exits(0);
    assert_eq!(done.out, "~/elsewhere/vmlinux\n");
    let chosen = "* ~/elsewhere/vmlinux ~/elsewhere/vmlinux";
    let unchosen = squeezed(row).replace("* ", "");
    assert_eq!(table(&[]), ["NAME PATH", chosen, &unchosen]);
    let json: Value = serde_json::from_str(&user.sm(&["kernel", "list", "--json"]).out).unwrap();
    assert_eq!(json[0]["current"], true);
    assert_eq!(json[1]["name"], "6.12.1-abc");
    assert_eq!(json[1]["current"], false);

    user.sm(&["kernel", "use", "6.12.1-abc"]).exits(0);
    assert_eq!(table(&[]), ["NAME PATH", &squeezed(row)]);
    // The environment variable takes precedence.
    let mut asked = user.command(&["kernel", "list", "-q"]);
    let done = user.run(asked.env("SM_KERNEL", &other));
    assert!(
        done.out.starts_with("~/elsewhere/vmlinux\n"),
        "{}",
        done.out
    );

    for (name, why) in [
        ("nowhere", "No such file"),
        ("/etc/passwd", "neither an ELF"),
    ] {
        let done = user.sm(&["kernel", "use", name]).exits(1);
        done.says(&["cannot use kernel", name, why]);
    }
    fs::remove_file(built).unwrap();
    user.sm(&["run", "--rm", &user.image()]).exits(125).says(&[
        "cannot use kernel",
        "kernels/current",
        "No such file",
    ]);
}

#[test]
fn a_kernel_is_built_in_the_source_tree_only() {
    let done = User::new().sm(&["kernel", "build"]).exits(1);
    done.says(&["source tree", "cargo xtask kernel", "sm kernel use /boot/"]);
}

/// Cargo obeys configuration, and rustup the choice of a toolchain, in the directories above
/// the one that it is run in; in `/tmp` both may be another user's.
#[test]
fn nothing_above_the_source_tree_decides_how_a_kernel_is_built() {
    let user = User::new();
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("sm");
    fs::create_dir_all(tree.join("xtask")).unwrap();
    fs::create_dir(tree.join("vmm-core")).unwrap();
    fs::write(tree.join("xtask/Cargo.toml"), b"").unwrap();
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let cargo = bin.join("cargo");
    fs::write(&cargo, "#!/bin/sh\npwd\necho \"$@\"\nexit 3\n").unwrap();
    fs::set_permissions(&cargo, Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());

    let mut build = user.command(&["kernel", "build"]);
    let done = user.run(build.current_dir(tree.join("xtask")).env("PATH", path));
    let manifest = tree.join("Cargo.toml");
    let arguments = format!(
        "run --quiet --manifest-path {} --package xtask -- kernel",
        manifest.display()
    );
    assert_eq!(done.out, format!("/\n{arguments}\n"));
    assert_eq!(done.code, Some(1));
}

#[test]
fn doctor_finds_what_is_missing() {
    let user = User::new();
    let report = |command: &mut Command| -> (Done, Value) {
        let table = user.run(command);
        let json = user.run(command.arg("--json"));
        assert_eq!(json.code, table.code);
        (table, serde_json::from_str(&json.out).unwrap())
    };
    let check = |json: &Value, name: &str| {
        let checks = json["checks"].as_array().unwrap();
        checks.iter().find(|c| c["name"] == name).unwrap().clone()
    };
    let mut doctor = user.command(&["doctor"]);
    let (table, json) = report(
        doctor
            .env("SM_KERNEL", "/nowhere")
            .env("SM_AGENT", "/nowhere"),
    );
    assert_eq!(table.code, Some(1));
    assert_eq!(json["works"], false);
    for name in ["guest kernel", "guest agent"] {
        assert_eq!(check(&json, name)["ok"], false);
        let line = table.out.lines().find(|line| line.contains(name)).unwrap();
        assert!(
            line.starts_with("FAIL") && line.contains("/nowhere"),
            "{line}"
        );
    }
    let last = table.out.lines().last().unwrap();
    assert_eq!(
        last,
        "This host cannot run VMs until the failed checks pass"
    );

    let kernel = user.kernel("vmlinux");
    let mut doctor = user.command(&["doctor"]);
    let (table, json) = report(doctor.env("SM_KERNEL", &kernel).env("SM_AGENT", &kernel));
    for name in ["guest kernel", "guest agent", "data and sockets", "memory"] {
        assert_eq!(check(&json, name)["ok"], true, "{json}");
        assert!(
            table.out.contains(&format!("ok    {name}: ")),
            "{}",
            table.out
        );
    }
    let works = check(&json, "hypervisor")["ok"] == true;
    assert_eq!(json["works"], works);
    assert_eq!(table.code, Some(i32::from(!works)));
}

/// On a host with an unusable hypervisor, `sm run` and `sm doctor` report the same. On
/// any other host, the start fails because the kernel file is not a kernel.
#[test]
fn an_unusable_hypervisor_is_reported() {
    let user = User::new();
    let (kernel, image) = (user.kernel("vmlinux"), user.image());
    let json = user.sm(&["doctor", "--json"]).out;
    let json: Value = serde_json::from_str(&json).unwrap();
    let checks = json["checks"].as_array().unwrap();
    let hypervisor = checks.iter().find(|c| c["name"] == "hypervisor").unwrap();
    let mut run = user.command(&["run", "--rm", &image, "true"]);
    let done = user.run(run.env("SM_KERNEL", &kernel).env("SM_AGENT", &kernel));
    let done = done.exits(125);
    if hypervisor["ok"] == true {
        eprintln!("this host's hypervisor runs Linux, so only that is checked");
        done.says(&["cannot load the guest kernel"]);
        return;
    }
    let detail = hypervisor["detail"].as_str().unwrap();
    let action = [
        "Use a host with",
        "load the kvm",
        "add this user",
        "cannot be used",
    ];
    assert!(
        action.iter().any(|words| detail.contains(words)),
        "{detail}"
    );
    done.says(&[detail]);
}

#[test]
fn completions_name_every_subcommand() {
    let user = User::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = user.sm(&["completions", shell]).exits(0).out;
        for word in [
            "run",
            "exec",
            "snapshot",
            "prove-distinct",
            "kernel",
            "stop-signal",
        ] {
            assert!(script.contains(word), "{shell} has no {word}");
        }
    }
    let script = user.path("completions");
    fs::write(&script, user.sm(&["completions", "bash"]).out).unwrap();
    let parsed = Command::new("bash").arg("-n").arg(script).output().unwrap();
    assert!(parsed.status.success(), "{parsed:?}");
    user.sm(&["completions", "tcsh"])
        .exits(125)
        .says(&["tcsh", "bash"]);
}

#[test]
fn listings_of_nothing_have_a_header() {
    let user = User::new();
    let header = "VM ID   IMAGE   COMMAND   CREATED   STATUS   PORTS   NAME\n";
    for words in [&["ps"][..], &["ps", "-a"]] {
        assert_eq!(user.sm(words).exits(0).out, header);
    }
    assert_eq!(user.sm(&["ps", "--json"]).exits(0).out, "[]\n");
    assert_eq!(user.sm(&["ps", "-q"]).exits(0).out, "");
}

#[test]
fn mounts_that_make_no_sense_are_refused() {
    let user = User::new();
    for (flag, words) in [
        (["-v", "/host:/guest:fast"], "no option of this mount"),
        (["--volume", "./data:/"], "absolute path"),
        (["--mount", "type=bind,target=/x"], "no source"),
        (["--mount", "type=npipe,target=/x"], "no type of a mount"),
    ] {
        let line = [&["run", "--rm"], &flag[..], &["busybox"]].concat();
        user.sm(&line).exits(125).says(&[words]);
    }
}

#[test]
fn wrong_words_are_named() {
    let user = User::new();
    // The statuses are those of Docker: tests/vms/statuses.rs has the table.
    for (line, words) in [
        (
            &["run", "--frobnicate", "x"][..],
            &["--frobnicate", "--help"][..],
        ),
        (&["frobnicate"], &["frobnicate", "--help"]),
        (&["run"], &["IMAGE", "--help"]),
        (&["exec", "vm"], &["COMMAND", "--help"]),
        (
            &["logs", "--since", "yesterday", "vm"],
            &["yesterday", "1h30m"],
        ),
        (&["run", "-p", "http", "x"], &["http"]),
        (
            &["run", "--add-host", "db", "oci:x"],
            &["\"db\" is not a host", "NAME:ADDRESS"],
        ),
        (&["run", "--network", "host", "x"], &["--allow-net host"]),
        (&["run", "--network", "back", "x"], &["not there yet"]),
        (&["run", "--allow-net", "tcp:", "x"], &["tcp:"]),
        (
            &["run", "--mac-address", "ff:ff:ff:ff:ff:ff", "x"],
            &["one station"],
        ),
        (&["kill", "-s", "NOSIG", "vm"], &["NOSIG"]),
        (&["stop", "nobody"], &["no such VM: \"nobody\""]),
    ] {
        let status = match line[0] {
            _ if line.contains(&"--frobnicate") || line.contains(&"yesterday") => 125,
            "run" if line.len() > 1 => 125,
            _ => 1,
        };
        user.sm(line).exits(status).says(words);
    }
    let version = format!("sm {}\n", env!("CARGO_PKG_VERSION"));
    for line in ["version", "--version"] {
        assert_eq!(user.sm(&[line]).exits(0).out, version);
    }
}
