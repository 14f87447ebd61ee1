//! Files of VMs, running or not: copying, comparing, exporting, and images of the changes.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use sm_e2e::{Home, Vm, image, unique, until};

/// Starts a VM that waits.
fn waiting(home: &Home) -> Vm<'_> {
    home.detached(&["-m", "192m", &image("busybox"), "sleep", "100000"])
}

fn at(vm: &Vm<'_>, path: &str) -> String {
    format!("{}:{path}", vm.name)
}

#[test]
fn files_are_copied_by_dockers_rules() {
    let home = Home::shared();
    let vm = waiting(home);
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir_all(path("tree/sub")).unwrap();
    let large: Vec<u8> = (0..2_000_000u32).flat_map(u32::to_le_bytes).collect();
    fs::write(path("tree/large"), &large).unwrap();
    fs::write(path("tree/sub/run"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(path("tree/sub/run"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("large", path("tree/link")).unwrap();
    let cp = |arguments: &[&str]| home.sm(&[&["cp", "-q"], arguments].concat());

    // A directory into an existing one, to a new one, and its contents.
    cp(&[&path("tree"), &at(&vm, "/tmp")]).exits(0);
    cp(&[&path("tree"), &at(&vm, "/new")]).exits(0);
    vm.exec(&["mkdir", "/here"]).exits(0);
    cp(&[&path("tree/."), &at(&vm, "/here")]).exits(0);
    for copy in ["/tmp/tree", "/new", "/here"] {
        let said = vm.exec(&[
            "sh",
            "-c",
            &format!("cd {copy}; readlink link; sub/run; stat -c %u:%g large"),
        ]);
        assert_eq!(said.exits(0).out(), "large\nran\n0:0\n", "{copy}");
    }
    cp(&[&at(&vm, "/here"), &path("back")]).exits(0);
    assert!(fs::read(path("back/large")).unwrap() == large);
    assert_eq!(
        fs::read_link(path("back/link")).unwrap().to_str(),
        Some("large")
    );
    assert_eq!(
        fs::metadata(path("back/sub/run")).unwrap().mode() & 0o777,
        0o755
    );
    cp(&["-L", &at(&vm, "/here/link"), &path("followed")]).exits(0);
    assert!(fs::symlink_metadata(path("followed")).unwrap().is_file());

    // Files: new, over another one, into a directory; links of the VM are its own.
    vm.exec(&[
        "sh",
        "-c",
        "echo old >/old; ln -s /old /to-old; ln -s /etc /l",
    ])
    .exits(0);
    fs::write(path("f"), "new").unwrap();
    cp(&[&path("f"), &at(&vm, "/to-old")]).exits(0);
    cp(&[&path("f"), &at(&vm, "/l/")]).exits(0);
    let said = vm.exec(&["sh", "-c", "cat /old /etc/f; readlink /to-old"]);
    assert_eq!(said.exits(0).out(), "newnew/old\n");
    assert!(!std::path::Path::new("/etc/f").exists());

    // Archives on standard streams.
    let archive = home.sm(&["cp", &at(&vm, "/here/sub"), "-"]).exits(0).stdout;
    vm.exec(&["mkdir", "/piped"]).exits(0);
    home.sm_with_input(&["cp", "-", &at(&vm, "/piped")], &archive)
        .exits(0);
    assert_eq!(vm.exec(&["/piped/sub/run"]).exits(0).out(), "ran\n");

    // Refusals name the reason and change nothing.
    for (arguments, words) in [
        ([at(&vm, "/none"), path("x")], "No such file"),
        ([path("none"), at(&vm, "/x")], "cannot read"),
        ([path("tree"), at(&vm, "/old")], "cannot copy a directory"),
        ([path("f"), at(&vm, "/none/")], "does not exist"),
        ([path("f"), at(&vm, "/none/x")], "No such file"),
        ([path("f"), path("g")], "VM:PATH"),
        ([at(&vm, "/old"), path("tree/large/")], "not a directory"),
    ] {
        let [from, to] = &arguments;
        let said = cp(&[from, to]).exits(1).err();
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    // The size is printed unless -q is given.
    let said = home.sm(&["cp", &path("f"), &at(&vm, "/f")]).exits(0).err();
    assert!(said.contains("Successfully copied"), "{said}");
}

/// Returns the state of a VM, and the number of its events.
fn life(home: &Home, vm: &str) -> (String, usize) {
    let format = "{{.State.Status}} {{.State.ExitCode}}";
    let state = home.sm(&["inspect", "-f", format, vm]).exits(0).out();
    let filter = format!("vm={vm}");
    let events = home.sm(&[
        "events", "--since", "24h", "--until", "0s", "--filter", &filter,
    ]);
    (state, events.exits(0).out().lines().count())
}

#[test]
fn files_of_a_stopped_vm_are_those_of_its_disk() {
    let home = Home::shared();
    let busybox = image("busybox");
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let cp = |from: &str, to: &str| home.sm(&["cp", "-q", from, to]);
    let volume = unique("kept");
    fs::create_dir(path("shared")).unwrap();
    let vm = home.detached(&[
        "-m",
        "192m",
        "-v",
        &format!("{volume}:/kept"),
        "-v",
        &format!("{}:/shared", path("shared")),
        &busybox,
        "sh",
        "-c",
        "echo started >>/starts; trap 'exit 7' TERM; while :; do sleep 1; done",
    ]);
    vm.exec(&["sh", "-c", "echo one >/one; echo v >/kept/v; rm /etc/group"])
        .exits(0);
    home.sm(&["stop", &vm.name]).exits(0);
    let before = life(home, &vm.name);

    // From it, also of its volumes.
    cp(&at(&vm, "/one"), &path("one")).exits(0);
    cp(&at(&vm, "/kept/v"), &path("v")).exits(0);
    assert_eq!(fs::read_to_string(path("one")).unwrap(), "one\n");
    assert_eq!(fs::read_to_string(path("v")).unwrap(), "v\n");
    let diff = home.sm(&["diff", &vm.name]).exits(0).out();
    for line in ["A /one", "A /starts", "C /etc", "D /etc/group"] {
        assert!(diff.lines().any(|found| found == line), "{line}: {diff}");
    }
    let exported = home.sm(&["export", &vm.name]).exits(0).stdout;
    assert!(exported.windows(4).any(|bytes| bytes == b"one\n"));
    let name = format!("{}:1", unique("stopped").to_lowercase());
    home.sm(&["commit", "-c", "CMD cat /one", &vm.name, &name])
        .exits(0);
    let ran = home.sm(&["run", "--rm", "-m", "192m", &name]).exits(0);
    assert_eq!(ran.out(), "one\n");

    // To it, with owners, and to what it mounts.
    fs::write(path("two"), "two\n").unwrap();
    cp(&path("two"), &at(&vm, "/two")).exits(0);
    cp(&path("two"), &at(&vm, "/kept/two")).exits(0);
    cp(&path("two"), &at(&vm, "/shared/two")).exits(0);
    assert_eq!(fs::read_to_string(path("shared/two")).unwrap(), "two\n");
    let said = cp(&path("two"), &at(&vm, "/none/")).exits(1).err();
    assert!(said.contains("does not exist"), "{said}");
    assert_eq!(life(home, &vm.name), before, "nothing else has changed");

    // A client that is killed in the middle leaves the disk to the next one.
    let mut endless = home
        .command(&["cp", "-", &at(&vm, "/tmp")])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut endless.stdin.take().unwrap(), &exported[..1 << 20]).unwrap();
    endless.kill().unwrap();
    endless.wait().unwrap();

    // The workload finds all of it; it was not started before.
    home.sm(&["start", &vm.name]).exits(0);
    let said = vm.exec(&["cat", "/one", "/two", "/kept/two", "/shared/two", "/starts"]);
    assert_eq!(
        said.exits(0).out(),
        "one\ntwo\ntwo\ntwo\nstarted\nstarted\n"
    );
    home.sm(&["stop", &vm.name]).exits(0);

    // The reader of an archive that wants no more ends the command, without a word.
    let (reader, writer) = std::io::pipe().unwrap();
    let mut export = home.command(&["export", &vm.name]);
    let export = export.stdout(writer).spawn().unwrap();
    drop(reader);
    let ended = export.wait_with_output().unwrap();
    assert_eq!(
        (ended.status.code(), ended.stderr.len()),
        (Some(141), 0),
        "{ended:?}"
    );
}

#[test]
fn files_of_a_vm_that_was_never_started_are_found_by_its_first_run() {
    let home = Home::shared();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("greeting");
    fs::write(&file, "hello\n").unwrap();
    let busybox = image("busybox");
    let name = unique("created");
    home.sm(&[
        "create",
        "--rm",
        "--name",
        &name,
        "-m",
        "192m",
        &busybox,
        "cat",
        "/greeting",
    ])
    .exits(0);
    home.sm(&["cp", file.to_str().unwrap(), &format!("{name}:/greeting")])
        .exits(0);
    assert_eq!(home.sm(&["diff", &name]).exits(0).out(), "A /greeting\n");
    assert!(life(home, &name).0.starts_with("created"));
    assert_eq!(home.sm(&["start", "-a", &name]).exits(0).out(), "hello\n");

    // Without a disk there is nothing to copy to.
    let name = unique("created");
    home.sm(&[
        "create", "--name", &name, "-m", "192m", "--root", "tmpfs", &busybox, "true",
    ])
    .exits(0);
    let said = home.sm(&["cp", file.to_str().unwrap(), &format!("{name}:/x")]);
    let said = said.exits(1).err();
    assert!(
        said.contains("guest memory") && said.contains("sm start"),
        "{said}"
    );
    home.sm(&["rm", &name]).exits(0);
}

#[test]
fn a_committed_vm_is_an_image_like_it() {
    let home = Home::shared();
    let busybox = image("busybox");
    let vm = home.detached(&["-m", "192m", "-e", "MINE=1", &busybox, "sleep", "100000"]);
    assert_eq!(home.sm(&["diff", &vm.name]).exits(0).out(), "");
    let script = "mkdir -p /srv/deep; echo text >/srv/deep/f; ln /srv/deep/f /srv/deep/g; \
                  chown 7:8 /srv/deep/f; rm /etc/group; mv /etc/init.d /srv/renamed 2>/dev/null; \
                  echo own >>/etc/hosts; true";
    vm.exec(&["sh", "-c", script]).exits(0);
    let diff = home.sm(&["diff", &vm.name]).exits(0).out();
    for line in [
        "C /etc",
        "D /etc/group",
        "A /srv/deep",
        "A /srv/deep/f",
        "A /srv/deep/g",
    ] {
        assert!(diff.lines().any(|found| found == line), "{line}: {diff}");
    }
    assert!(
        !diff.contains("hosts") && !diff.contains("machine-id"),
        "{diff}"
    );
    let json = home.sm(&["diff", "--json", &vm.name]).exits(0).json();
    assert_eq!(json.as_array().unwrap().len(), diff.lines().count());

    let name = format!("{}:1", unique("committed").to_lowercase());
    let id = home.sm(&[
        "commit",
        "-a",
        "Ada",
        "-m",
        "mine",
        "-c",
        "ENV MORE=2",
        "-c",
        "CMD cat /srv/deep/f",
        &vm.name,
        &name,
    ]);
    let id = id.exits(0).out();
    assert!(id.starts_with("sha256:"), "{id}");
    // The processes of the VM go on.
    vm.exec(&["true"]).exits(0);
    let run = |arguments: &[&str]| {
        home.sm(&[&["run", "--rm", "-m", "192m"], arguments].concat())
            .exits(0)
            .out()
    };
    assert_eq!(run(&[&name]), "text\n");
    let script = "stat -c %u:%g:%h /srv/deep/f; test -e /etc/group || echo gone; echo $MINE$MORE";
    assert_eq!(run(&[&name, "sh", "-c", script]), "7:8:2\ngone\n12\n");

    // A copy through an archive is equal.
    let directory = tempfile::tempdir().unwrap();
    let archive = directory.path().join("a.tar");
    let archive = archive.to_str().unwrap();
    home.sm(&["save", "-o", archive, &name]).exits(0);
    let config =
        |name: &str| home.sm(&["image", "inspect", name]).exits(0).json()[0]["config"].clone();
    let before = config(&name);
    home.sm(&["rmi", &name]).exits(0);
    home.sm(&["load", "-i", archive]).exits(0);
    assert_eq!(config(&name), before);
    assert_eq!(run(&[&name]), "text\n");
    home.sm(&["image", "verify", &name]).exits(0);
    home.sm(&["rmi", &name]).exits(0);

    // The whole root as an archive.
    let tar = home.sm(&["export", &vm.name]).exits(0).stdout;
    let exported = format!("{}:1", unique("exported").to_lowercase());
    home.sm_with_input(&["import", "-", &exported], &tar)
        .exits(0);
    assert_eq!(run(&[&exported, "cat", "/srv/deep/g"]), "text\n");
    home.sm(&["rmi", &exported]).exits(0);
}

/// A registry on this host, which ends with the value.
struct Registry {
    process: std::process::Child,
    address: String,
    _directory: tempfile::TempDir,
}

impl Registry {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        // The port was just free, and no other program is expected to take it.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let configuration = directory.path().join("registry.yml");
        let storage = directory.path().join("storage");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: \"{address}\"}}\n\
             storage: {{filesystem: {{rootdirectory: {storage:?}}}}}\n"
        );
        fs::write(&configuration, text).unwrap();
        let process = std::process::Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        until("the registry listens", || {
            std::net::TcpStream::connect(&address).is_ok()
        });
        Self {
            process,
            address,
            _directory: directory,
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_committed_image_is_the_same_after_a_push_and_a_pull() {
    if !sm_test_needs::programs(&["docker-registry"]) {
        return;
    }
    let registry = Registry::start();
    let home = Home::shared();
    let vm = waiting(home);
    vm.exec(&[
        "sh",
        "-c",
        "mkdir /new; echo text >/new/f; chown 7:8 /new/f; rm /etc/group",
    ])
    .exits(0);
    let name = format!("{}/made/here:1", registry.address);
    home.sm(&["commit", "-c", "CMD cat /new/f", &vm.name, &name])
        .exits(0);
    let described = |home: &Home| {
        let inspected = home.sm(&["image", "inspect", &name]).exits(0).json();
        let (config, digest) = (&inspected[0]["config"], &inspected[0]["config_digest"]);
        assert!(config.is_object() && digest.is_string(), "{inspected}");
        (config.clone(), digest.clone())
    };
    let check = "stat -c %u:%g /new/f; ls /etc/group 2>/dev/null; cat /new/f";
    let run = |home: &Home| {
        let command = home
            .sm(&["run", "--rm", "-m", "192m", &name])
            .exits(0)
            .out();
        let files = home.sm(&["run", "--rm", "-m", "192m", &name, "sh", "-c", check]);
        (command, files.out())
    };
    let before = (described(home), run(home));
    assert_eq!(before.1, ("text\n".to_owned(), "7:8\ntext\n".to_owned()));
    home.sm(&["push", &name]).exits(0);
    // Another user, who has nothing of it.
    let other = Home::new();
    other.sm(&["pull", "-q", &name]).exits(0);
    assert_eq!((described(&other), run(&other)), before);
}
