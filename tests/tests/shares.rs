//! Directories and files of the host in a guest.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use sm_e2e::{Home, image, until};

fn run(home: &Home, mounts: &[&str], script: &str) -> sm_e2e::Done {
    let image = image("busybox");
    let mut arguments = vec!["run", "--rm", "-m", "128m"];
    for mount in mounts {
        arguments.extend(["-v", mount]);
    }
    arguments.extend([&image, "sh", "-c", script]);
    home.sm(&arguments)
}

#[test]
fn a_directory_is_shared_both_ways() {
    let home = Home::shared();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    fs::write(path.join("script"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(path.join("script"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(path.join("d")).unwrap();
    symlink("/etc/passwd", path.join("link")).unwrap();
    let mount = format!("{}:/shared", path.display());
    let script = "cd /shared && ./script && readlink link && ls | tr '\\n' ' ' &&
        mkdir -p d/new && echo text > d/new/file && chmod 600 d/new/file && ln d/new/file d/hard &&
        mv d/new d/moved && rm script && dd if=/dev/zero of=large bs=1M count=20 2>/dev/null &&
        grep -c ' /shared virtiofs .*nosuid,nodev' /proc/mounts";
    let out = run(home, &[&mount], script).exits(0).out();
    assert_eq!(out, "ran\n/etc/passwd\nd link script 1\n");
    let file = path.join("d/moved/file").metadata().unwrap();
    assert_eq!(
        (file.mode() & 0o777, file.nlink(), file.uid()),
        (0o600, 2, 0)
    );
    assert_eq!(fs::read(path.join("d/hard")).unwrap(), b"text\n");
    assert_eq!(path.join("large").metadata().unwrap().len(), 20 << 20);
    assert!(!path.join("script").exists());
}

#[test]
fn read_only_directories_and_files_stay_as_they_are() {
    let home = Home::shared();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    fs::write(path.join("f"), "one\n").unwrap();
    fs::write(path.join("secret"), "two\n").unwrap();
    let mounts = [
        format!("{}:/ro:ro", path.display()),
        format!("{}/f:/etc/conf/f", path.display()),
        format!("{}/f:/ro/below:ro", path.display()),
    ];
    let mounts: Vec<&str> = mounts.iter().map(String::as_str).collect();
    let script = "cat /etc/conf/f; ls /etc/conf; echo more >> /etc/conf/f;
        for change in 'touch /ro/x' 'rm /ro/f' 'sh -c \"echo x > /ro/f\"' 'mkdir /ro/d' 'chmod 7 /ro/f'; do
            eval $change 2>/dev/null && echo $change succeeded; done; cat /ro/f";
    // The third needs a file in a read-only directory, which is not there.
    let refused = run(home, &mounts, script).exits(125).err();
    assert!(refused.contains("/ro/below"), "{refused}");
    let out = run(home, &mounts[..2], script).exits(0).out();
    assert_eq!(out, "one\nf\none\nmore\n");
    assert_eq!(fs::read(path.join("f")).unwrap(), b"one\nmore\n");
}

#[test]
fn the_guest_sees_changes_of_the_host() {
    let home = Home::shared();
    let folder = tempfile::tempdir().unwrap();
    let mount = format!("{}:/shared", folder.path().display());
    let image = image("busybox");
    let vm = home.detached(&["-m", "128m", "-v", &mount, &image, "sleep", "10000"]);
    for text in ["one", "two"] {
        fs::write(folder.path().join("new"), text).unwrap();
        fs::rename(folder.path().join("new"), folder.path().join("f")).unwrap();
        until("the guest sees it", || {
            vm.exec(&["cat", "/shared/f"]).out() == text
        });
    }
    let refused = home
        .sm(&["snapshot", "create", &vm.name, "shares"])
        .exits(1)
        .err();
    assert!(
        refused.contains("files of the host are mounted"),
        "{refused}"
    );
    // It goes on.
    vm.exec(&["touch", "/shared/after"]).exits(0);
    assert!(folder.path().join("after").exists());
}

#[test]
fn unusable_sources_are_refused() {
    let home = Home::shared();
    let folder = tempfile::tempdir().unwrap();
    let data = home.data();
    for (source, why) in [
        (folder.path().join("missing"), "No such file"),
        ("/dev/null".into(), "neither a directory nor a regular file"),
        (data.join("sm"), "are stored there"),
    ] {
        let mount = format!("{}:/x", source.display());
        let error = run(home, &[&mount], "true").exits(125).err();
        assert!(error.contains(why), "{error}");
    }
}
