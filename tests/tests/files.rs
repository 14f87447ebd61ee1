//! Files of running VMs: copying, comparing, exporting, and images of the changes.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use sm_e2e::{Home, Vm, image, unique};

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

    home.sm(&["stop", "-t", "1", &vm.name]).exits(0);
    let said = cp(&[&path("f"), &at(&vm, "/x")]).exits(1).err();
    assert!(said.contains("is not running"), "{said}");
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
