//! Directories and files of the host in a guest.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use sm_e2e::{Home, Mount, image, lab, lanes, unique, until};

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
}

/// Writes to a file that it holds open, and has a removed one open.
const WRITES: &str = "exec 9>>/shared/log 8>/shared/removed; rm /shared/removed;
    while true; do hostname >&9; sleep 1; done 2>/dev/null";

/// Removes a snapshot when the test ends.
struct Taken<'a>(&'a Home, String);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.sm(&["snapshot", "rm", &self.1]);
    }
}

fn lines(log: &Path) -> usize {
    fs::read_to_string(log).unwrap_or_default().lines().count()
}

#[test]
fn clones_get_the_directories_that_they_are_given() {
    let home = Home::shared();
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let log = folder.path().join("log");
    for file in 0..500 {
        fs::write(folder.path().join(format!("file-{file}")), "").unwrap();
    }
    fs::write(other.path().join("elsewhere"), "").unwrap();
    let path = folder.path().display();
    let shared = format!("{path}:/shared");
    let below = format!("{path}:/ro:ro");
    let conf = format!("{path}/file-0:/etc/conf");
    let image = image("busybox");
    let mut arguments = vec!["-m", "128m"];
    arguments.extend(["-v", &shared, "-v", &below, "-v", &conf]);
    arguments.extend([&image, "sh", "-c", WRITES]);
    let vm = home.detached(&arguments);
    until("it writes", || lines(&log) > 1);
    vm.exec(&["find", "/shared", "-size", "+0"]).exits(0);
    let snapshot = Taken(home, unique("shares"));
    let name = &snapshot.1;
    let taken = home.sm(&["snapshot", "create", &vm.name, name]).exits(0);
    assert!(
        taken.err().contains("file of the host that was removed"),
        "{taken:?}"
    );
    // Inodes of which only names were cached are not in it.
    let state = home
        .data()
        .join("sm/snapshots")
        .join(name)
        .join("state.bin");
    let bytes = fs::read(state).unwrap();
    assert!(!bytes.windows(8).any(|window| window == b"file-321"));
    let inspected = home.sm(&["snapshot", "inspect", name]).exits(0).json();
    assert_eq!(inspected["shares"][1]["target"], "/ro");

    // Its paths are no rights.
    let run = ["run", "-d", "--rm", "--from", name];
    let refused = home.sm(&run).exits(125).err();
    let hint = format!("-v {path}:/shared");
    assert!(
        refused.contains("\"/shared\"") && refused.contains(&hint),
        "{refused}"
    );
    let more = ["-v", &shared, "-v", &below, "-v", &conf, "-v", "/tmp:/more"];
    let refused = home.sm(&[&run[..], &more].concat()).exits(125).err();
    assert!(refused.contains("\"/more\""), "{refused}");
    let directory = format!("{path}:/etc/conf");
    let wrong = ["-v", &shared, "-v", &below, "-v", &directory];
    let refused = home.sm(&[&run[..], &wrong].concat()).exits(125).err();
    assert!(refused.contains("a file named \"file-0\""), "{refused}");

    // The same, in another order: open files stay open.
    let given = ["-v", &conf, "-v", &below, "-v", &shared];
    let clone = home.clone_with(name, "clone", &given);
    let host = clone.exec(&["hostname"]).exits(0).out();
    until("the clone writes", || {
        fs::read_to_string(&log).unwrap().contains(host.trim())
    });
    let script =
        "cat /etc/conf && ls /ro | wc -l && ! touch /ro/x 2>/dev/null && touch /shared/new";
    let entries = folder.path().read_dir().unwrap().count();
    let out = clone.exec(&["sh", "-c", script]).exits(0).out();
    assert_eq!(out.trim(), entries.to_string());
    assert!(folder.path().join("new").exists());
    // After a reset as well, in which the workload continues from the snapshot again.
    home.sm(&["reset", &clone.name]).exits(0);
    let before = lines(&log);
    until("the clone writes after its reset", || lines(&log) > before);
    clone
        .exec(&["sh", "-c", "cat /etc/conf && touch /shared/reset"])
        .exits(0);
    assert!(folder.path().join("reset").exists());
    drop(clone);

    // Another directory.
    let elsewhere = format!("{}:/shared", other.path().display());
    let given = ["-v", &elsewhere, "-v", &below, "-v", &conf];
    let clone = home.clone_with(name, "clone", &given);
    until("it sees that", || {
        clone.exec(&["ls", "/shared"]).out() == "elsewhere\n"
    });
    clone.exec(&["touch", "/shared/here"]).exits(0);
    assert!(other.path().join("here").exists());
    drop(clone);

    // Several clones that write are wanted only if that is said.
    let fork = [
        "fork",
        &vm.name,
        "-n",
        "2",
        "--rm",
        "--name",
        name,
        "--share-binds",
    ];
    let refused = home.sm(&fork[..7]).exits(1).err();
    assert!(refused.contains("--share-binds"), "{refused}");
    home.sm(&fork).exits(0);
    for number in 1..=2 {
        let clone = format!("{name}-{number}");
        home.sm(&["exec", &clone, "touch", &format!("/shared/{number}")])
            .exits(0);
        assert!(folder.path().join(number.to_string()).exists());
        home.sm(&["rm", "-f", &clone]).exits(0);
    }
    let before = lines(&log);
    until("the original goes on", || lines(&log) > before);
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

#[test]
fn a_watcher_sees_edits_of_the_host() {
    let home = Home::shared();
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("src");
    fs::create_dir(&source).unwrap();
    let edit = |text: &str| {
        // As editors do.
        fs::write(source.join(".app.js"), text).unwrap();
        fs::rename(source.join(".app.js"), source.join("app.js")).unwrap();
    };
    edit("first");
    let mount = format!("{}:/code:ro,watch", folder.path().display());
    let program = lanes();
    let root = format!("rootfs:{}", program.path().display());
    let run = [
        "-m",
        "128m",
        "-v",
        &mount,
        &root,
        "/lanes",
        "watch",
        "/code/src",
    ];
    let vm = home.detached(&run);
    vm.until_it_says("watching");
    fs::write(source.join("app.js"), "second").unwrap();
    vm.until_it_says("app.js: second");
    edit("third edit");
    vm.until_it_says("app.js: third edit");
    fs::write(source.join("new.js"), "more").unwrap();
    vm.until_it_says("new.js: more");
    fs::remove_file(source.join("new.js")).unwrap();
    vm.until_it_says("entries: 1");
    // A clone watches, too.
    let snapshot = Taken(home, unique("watcher"));
    home.sm(&["snapshot", "create", &vm.name, &snapshot.1])
        .exits(0);
    let clone = home.clone_with(&snapshot.1, "clone", &["-v", &mount]);
    edit("fourth");
    clone.until_it_says("app.js: fourth");
    vm.until_it_says("app.js: fourth");
}

#[test]
fn owners_are_shown_and_changed_as_asked() {
    let home = Home::shared();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("files");
    // Owners are stored in attributes, which a tmpfs may not have.
    let _disk = lab().then(|| Mount::ext4(1, &path));
    fs::create_dir_all(&path).unwrap();
    for (name, owner) in [("mine", None), ("other", Some(7))] {
        fs::write(path.join(name), name).unwrap();
        std::os::unix::fs::chown(path.join(name), owner, owner).unwrap();
    }
    let run = |options: &str, script: &str| {
        let mount = format!("{}:/d:{options}", path.display());
        run(home, &[&mount], script)
    };
    let me = path.join("mine").metadata().unwrap().uid();
    let owners = "cd /d; stat -c %u:%g mine other";
    for (options, seen) in [
        ("owner=keep", format!("{me}:{me}\n7:7\n")),
        ("owner=33:44", "33:44\n33:44\n".to_owned()),
        ("owner=squash", "0:0\n7:7\n".to_owned()),
    ] {
        assert_eq!(run(options, owners).exits(0).out(), seen, "{options}");
    }
    // A change is refused, has no effect, or is stored beside the owner on the host.
    let change = "cd /d; chown 5:6 mine 2>&1 | grep -o 'not permitted'; stat -c %u:%g mine";
    for (options, seen) in [
        ("owner=squash,chown=deny", "not permitted\n0:0\n"),
        ("owner=squash,chown=ignore", "0:0\n"),
        ("owner=squash,chown=xattr", "5:6\n"),
    ] {
        if options.ends_with("xattr") && !lab() {
            return;
        }
        assert_eq!(run(options, change).exits(0).out(), seen, "{options}");
        assert_eq!(path.join("mine").metadata().unwrap().uid(), me, "{options}");
    }
    // The next VM finds it.
    let said = run("owner=squash", owners).exits(0).out();
    assert_eq!(said, "5:6\n7:7\n");
    // Options that are none are refused before anything starts.
    for options in ["owner=me", "chown=maybe"] {
        let said = run(options, "true").exits(125).err();
        let value = options.split('=').nth(1).unwrap();
        assert!(said.contains(value), "{options}: {said}");
    }
}

/// Descriptors of a process, and its anonymous memory in bytes beside that of its guest.
fn costs(pid: u64) -> (usize, u64) {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut of_guest, mut bytes) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next().unwrap_or_default() {
            "Anonymous:" if !of_guest => {
                let kib: u64 = words.next().unwrap_or_default().parse().unwrap();
                bytes += kib << 10;
            }
            first if first.contains('-') => of_guest = line.ends_with("/memory.bin"),
            _ => {}
        }
    }
    (fds, bytes)
}

#[test]
fn full_a_million_files_are_found_without_a_descriptor_for_each() {
    const DIRECTORIES: usize = 10_000;
    const EACH: usize = 100;
    let home = Home::shared();
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    // By default, a tmpfs has inodes for half of the pages of memory.
    let options = ["-t", "tmpfs", "-o", "nr_inodes=0", "tmpfs"];
    let _tmpfs = lab().then(|| Mount::new(&options, &tree));
    for directory in 0..DIRECTORIES {
        let path = tree.join(format!("{}/{directory}", directory % 50));
        fs::create_dir_all(&path).unwrap();
        for file in 0..EACH {
            fs::File::create(path.join(file.to_string())).unwrap();
        }
    }
    let mount = format!("{}:/t:ro", tree.display());
    let image = image("busybox");
    // The first one makes the snapshot, of which the memory of the next one is a mapping.
    run(home, &[], "true").exits(0);
    let vm = home.detached(&["-m", "128m", "-v", &mount, &image, "sleep", "100000"]);
    let inspected = home.sm(&["inspect", &vm.name]).exits(0).json();
    let pid = inspected[0]["state"]["pid"].as_u64().unwrap();
    let before = costs(pid);
    let most = std::sync::Mutex::new(before);
    let found = std::thread::scope(|scope| {
        let find = scope.spawn(|| {
            vm.exec(&["sh", "-c", "find /t -type f -size 0 | wc -l"])
                .exits(0)
                .out()
        });
        while !find.is_finished() {
            let now = costs(pid);
            let mut most = most.lock().unwrap();
            *most = (most.0.max(now.0), most.1.max(now.1));
            drop(most);
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
        find.join().unwrap()
    });
    let (fds, bytes) = *most.lock().unwrap();
    println!("before {before:?}, at most {fds} descriptors and {bytes} bytes");
    assert_eq!(found.trim(), (DIRECTORIES * EACH).to_string());
    assert!(fds < 2000, "{fds} descriptors");
    assert!(bytes < 40 << 20, "{bytes} bytes, {before:?} before");
}
