//! Operations of a driver on a share, and their effect on the host.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};

use common::{directory, driver};
use rustix::io::Errno;
use sm_fs_server::testing::{FuseDriver, ROOT, opcode};
use sm_fs_server::{CacheMode, ChownPolicy, FsConfig, Server, Share, ShareOptions, ShareOwner};

fn err(errno: Errno) -> i32 {
    errno.raw_os_error()
}

#[test]
fn shares_are_entries_of_a_root_that_cannot_be_changed() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(b.path().join("x"), "x").unwrap();
    let share = |name, path| Share::new(name, directory(path), ShareOptions::default()).unwrap();
    let config = FsConfig::default()
        .share(share("a", a.path()))
        .share(share("b", b.path()));
    let mut driver = FuseDriver::started(Server::new(config).unwrap());

    let names: Vec<String> = driver
        .list(ROOT, 4096)
        .unwrap()
        .into_iter()
        .map(|e| e.0)
        .collect();
    assert_eq!(names, [".", "..", "a", "b"]);
    let b_root = driver.walk("b").unwrap();
    assert_eq!(b_root.ino, b.path().metadata().unwrap().ino());
    assert!(driver.walk("b/x").is_ok());
    assert_eq!(driver.walk("a/x"), Err(err(Errno::NOENT)));
    assert_eq!(driver.walk("c"), Err(err(Errno::NOENT)));
    assert_eq!(driver.mkdir(ROOT, "c", 0o755), Err(err(Errno::PERM)));
    assert_eq!(driver.unlink(ROOT, "a"), Err(err(Errno::PERM)));
    assert_eq!(driver.chmod(ROOT, 0o777), Err(err(Errno::PERM)));
    let a_root = driver.walk("a").unwrap().node;
    let across = driver.rename((b_root.node, "x"), (a_root, "x"), 0);
    assert_eq!(across, Err(err(Errno::XDEV)));
    let x = driver.walk("b/x").unwrap().node;
    assert_eq!(driver.link(x, a_root, "y"), Err(err(Errno::XDEV)));
}

#[test]
fn files_are_created_written_and_read() {
    let folder = tempfile::tempdir().unwrap();
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    let (file, handle) = driver.create(share, "f", 0o640).unwrap();
    assert_eq!(file.mode & 0o7777, 0o640 & !current_umask());
    let contents: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(
        driver.write(file.node, handle, 3, &contents, false),
        Ok(300_000)
    );
    let mut expected = vec![0; 3];
    expected.extend_from_slice(&contents);
    assert!(fs::read(folder.path().join("f")).unwrap() == expected);
    assert!(driver.read(file.node, handle, 3, 1 << 20).unwrap() == contents);
    assert_eq!(driver.read(file.node, handle, 300_003, 10).unwrap(), b"");

    // The host appends; so does the guest, whatever position it assumes.
    fs::write(folder.path().join("f"), "host").unwrap();
    assert_eq!(
        driver.write(file.node, handle, 300_003, b"guest", true),
        Ok(5)
    );
    assert_eq!(fs::read(folder.path().join("f")).unwrap(), b"hostguest");
    assert_eq!(driver.truncate(file.node, 2).unwrap().size, 2);

    // Handles belong to their node, and end.
    assert_eq!(driver.read(share, handle, 0, 1), Err(err(Errno::BADF)));
    driver.release(file.node, handle).unwrap();
    assert_eq!(driver.read(file.node, handle, 0, 1), Err(err(Errno::BADF)));
    let reading = driver.open(file.node, false).unwrap();
    let write = driver.write(file.node, reading, 0, b"x", false);
    assert_eq!(write, Err(err(Errno::BADF)));
}

fn current_umask() -> u32 {
    // Both calls at once: other tests create files meanwhile, with the mask of the process.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    u32::from_str_radix(mask.unwrap().trim(), 8).unwrap()
}

#[test]
fn an_open_file_remains_after_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    let (file, handle) = driver.create(share, "f", 0o600).unwrap();
    driver.write(file.node, handle, 0, b"text", false).unwrap();
    driver.unlink(share, "f").unwrap();
    let attr = driver.getattr(file.node).unwrap();
    assert_eq!((attr.size, attr.nlink), (4, 0));
    assert_eq!(driver.read(file.node, handle, 0, 9).unwrap(), b"text");
    assert_eq!(driver.chmod(file.node, 0o400).unwrap().mode & 0o777, 0o400);
    assert_eq!(driver.truncate(file.node, 1).unwrap().size, 1);
    driver.release(file.node, handle).unwrap();
    assert_eq!(driver.getattr(file.node), Err(err(Errno::STALE)));
}

#[test]
fn replaced_files_are_other_nodes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    fs::write(&path, "old").unwrap();
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    let old = driver.lookup(share, "f").unwrap();
    fs::write(folder.path().join("new"), "other").unwrap();
    fs::rename(folder.path().join("new"), &path).unwrap();
    assert_eq!(driver.getattr(old.node), Err(err(Errno::STALE)));
    assert_eq!(driver.open(old.node, false), Err(err(Errno::STALE)));
    let new = driver.lookup(share, "f").unwrap();
    assert_ne!(new.node, old.node);
    assert_eq!(driver.getattr(new.node).unwrap().size, 5);
}

#[test]
fn links_are_one_node_and_renames_keep_it() {
    let folder = tempfile::tempdir().unwrap();
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    let (file, _) = driver.create(share, "a", 0o644).unwrap();
    let link = driver.link(file.node, share, "b").unwrap();
    assert_eq!((link.node, link.nlink), (file.node, 2));
    let d = driver.mkdir(share, "d", 0o755).unwrap();
    let e = driver.mkdir(d.node, "e", 0o755).unwrap();
    driver.rename((share, "a"), (e.node, "c"), 0).unwrap();
    driver.rename((share, "d"), (share, "moved"), 0).unwrap();
    assert_eq!(driver.walk("s/moved/e/c").unwrap().node, file.node);
    assert_eq!(driver.getattr(e.node).unwrap().ino, e.ino);
    assert_eq!(driver.getattr(file.node).unwrap().nlink, 2);
    // RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT.
    driver.mkdir(share, "other", 0o755).unwrap();
    let (from, to) = ((share, "moved"), (share, "other"));
    assert_eq!(driver.rename(from, to, 1), Err(err(Errno::EXIST)));
    assert_eq!(driver.rename(from, to, 4), Err(err(Errno::INVAL)));
    driver.rename(from, to, 2).unwrap();
    assert_eq!(driver.walk("s/other/e/c").unwrap().node, file.node);
    assert_eq!(driver.getattr(e.node).unwrap().ino, e.ino);
}

#[test]
fn read_only_shares_refuse_every_change() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "text").unwrap();
    fs::create_dir(folder.path().join("d")).unwrap();
    let options = ShareOptions::default().read_only(true);
    let (mut driver, share) = driver(folder.path(), options);
    let f = driver.lookup(share, "f").unwrap().node;
    let refused = [
        driver.mkdir(share, "x", 0o755).map(drop),
        driver.mknod(share, "x", 0o100_644).map(drop),
        driver.symlink(share, "x", "f").map(drop),
        driver.link(f, share, "x").map(drop),
        driver.create(share, "x", 0o644).map(drop),
        driver.create(share, "f", 0o644).map(drop),
        driver.unlink(share, "f"),
        driver.rmdir(share, "d"),
        driver.rename((share, "f"), (share, "x"), 0),
        driver.open(f, true).map(drop),
        driver.chmod(f, 0o777).map(drop),
        driver.chown(f, 1, 1).map(drop),
        driver.truncate(f, 0).map(drop),
        driver
            .call(
                opcode::SETXATTR,
                f,
                &[&1u32.to_le_bytes(), &[0; 4], b"user.a\0x"],
            )
            .map(drop),
        driver
            .call(opcode::REMOVEXATTR, f, &[b"user.a\0"])
            .map(drop),
        driver
            .call(opcode::ACCESS, f, &[&2u32.to_le_bytes(), &[0; 4]])
            .map(drop),
    ];
    for (index, result) in refused.into_iter().enumerate() {
        assert_eq!(result, Err(err(Errno::ROFS)), "operation {index}");
    }
    let handle = driver.open(f, false).unwrap();
    assert_eq!(driver.read(f, handle, 0, 9).unwrap(), b"text");
    let fallocate = [
        &handle.to_le_bytes()[..],
        &[0; 8],
        &9u64.to_le_bytes(),
        &[0; 8],
    ];
    assert_eq!(
        driver.call(opcode::FALLOCATE, f, &fallocate),
        Err(err(Errno::BADF))
    );
}

#[test]
fn a_shared_file_is_all_that_there_is() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "text").unwrap();
    fs::write(folder.path().join("secret"), "text").unwrap();
    fs::create_dir(folder.path().join("d")).unwrap();
    let share = Share::file("s", directory(folder.path()), "f", ShareOptions::default());
    let config = FsConfig::default().share(share.unwrap());
    let mut driver = FuseDriver::started(Server::new(config).unwrap());
    let root = driver.walk("s").unwrap().node;
    let names: Vec<String> = driver
        .list(root, 4096)
        .unwrap()
        .into_iter()
        .map(|e| e.0)
        .collect();
    assert_eq!(names, [".", "..", "f"]);
    for hidden in ["secret", "d", "g"] {
        assert_eq!(
            driver.lookup(root, hidden),
            Err(err(Errno::NOENT)),
            "{hidden}"
        );
    }
    assert_eq!(
        driver.create(root, "g", 0o644).map(drop),
        Err(err(Errno::PERM))
    );
    assert_eq!(driver.unlink(root, "f"), Err(err(Errno::PERM)));
    assert_eq!(
        driver.rename((root, "f"), (root, "g"), 0),
        Err(err(Errno::PERM))
    );
    assert_eq!(driver.chmod(root, 0o777), Err(err(Errno::PERM)));
    let f = driver.lookup(root, "f").unwrap().node;
    let handle = driver.open(f, true).unwrap();
    driver.write(f, handle, 0, b"TE", false).unwrap();
    assert_eq!(fs::read(folder.path().join("f")).unwrap(), b"TExt");
    // A directory in its place is not shared.
    fs::remove_file(folder.path().join("f")).unwrap();
    fs::rename(folder.path().join("d"), folder.path().join("f")).unwrap();
    assert_eq!(driver.lookup(root, "f"), Err(err(Errno::NOENT)));
}

#[test]
fn links_are_data_and_other_types_are_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    symlink("/etc/passwd", folder.path().join("link")).unwrap();
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    let link = driver.lookup(share, "link").unwrap();
    assert_eq!(
        driver.call(opcode::READLINK, link.node, &[]).unwrap(),
        b"/etc/passwd"
    );
    assert_eq!(driver.open(link.node, false), Err(err(Errno::ACCESS)));
    assert_eq!(driver.lookup(link.node, "x"), Err(err(Errno::NOTDIR)));
    assert_eq!(driver.truncate(link.node, 0), Err(err(Errno::INVAL)));

    let fifo = driver.mknod(share, "fifo", 0o010_644).unwrap();
    let host = fs::symlink_metadata(folder.path().join("fifo")).unwrap();
    assert!(host.file_type().is_fifo());
    // Would wait for a reader.
    assert_eq!(driver.open(fifo.node, true), Err(err(Errno::ACCESS)));
    assert_eq!(driver.open(fifo.node, false), Err(err(Errno::ACCESS)));
    for (name, mode) in [
        ("char", 0o020_644),
        ("block", 0o060_644),
        ("socket", 0o140_644),
    ] {
        assert_eq!(
            driver.mknod(share, name, mode),
            Err(err(Errno::PERM)),
            "{name}"
        );
    }
    let socket = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
    let node = driver.lookup(share, "socket").unwrap().node;
    assert_eq!(driver.open(node, false), Err(err(Errno::ACCESS)));
    drop(socket);
}

#[test]
fn a_file_that_becomes_a_fifo_is_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    fs::write(&path, "").unwrap();
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    let f = driver.lookup(share, "f").unwrap().node;
    fs::remove_file(&path).unwrap();
    let fifo = rustix::fs::FileType::Fifo;
    let mode = rustix::fs::Mode::RWXU;
    rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, mode, 0).unwrap();
    for write in [false, true] {
        assert_eq!(driver.open(f, write), Err(err(Errno::STALE)));
    }
    // CREATE without O_EXCL finds it, too.
    assert_eq!(
        driver.create(share, "f", 0o644).map(drop),
        Err(err(Errno::ACCESS))
    );
}

#[test]
fn attributes_of_users_pass_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    let (file, _) = driver.create(share, "f", 0o644).unwrap();
    let set = |driver: &mut FuseDriver, name: &str, value: &str| {
        let size = u32::try_from(value.len()).unwrap().to_le_bytes();
        let name = format!("{name}\0{value}");
        driver
            .call(
                opcode::SETXATTR,
                file.node,
                &[&size, &[0; 4], name.as_bytes()],
            )
            .map(drop)
    };
    let get = |driver: &mut FuseDriver, name: &str| {
        let name = format!("{name}\0");
        driver.call(
            opcode::GETXATTR,
            file.node,
            &[&99u32.to_le_bytes(), &[0; 4], name.as_bytes()],
        )
    };
    set(&mut driver, "user.colour", "red").unwrap();
    assert_eq!(get(&mut driver, "user.colour").unwrap(), b"red");
    for hidden in [
        "user.containers.override_stat",
        "user.sm.overrides",
        "security.capability",
        "security.selinux",
        "trusted.overlay.opaque",
    ] {
        assert_eq!(
            set(&mut driver, hidden, "x"),
            Err(err(Errno::PERM)),
            "{hidden}"
        );
        assert_eq!(
            get(&mut driver, hidden),
            Err(err(Errno::NODATA)),
            "{hidden}"
        );
    }
    let acl = "system.posix_acl_access";
    assert_eq!(set(&mut driver, acl, "x"), Err(err(Errno::OPNOTSUPP)));
    assert_eq!(get(&mut driver, acl), Err(err(Errno::OPNOTSUPP)));
    let list = |driver: &mut FuseDriver, size: u32| {
        driver.call(
            opcode::LISTXATTR,
            file.node,
            &[&size.to_le_bytes(), &[0; 4]],
        )
    };
    assert_eq!(list(&mut driver, 99).unwrap(), b"user.colour\0");
    assert_eq!(list(&mut driver, 0).unwrap()[..4], 12u32.to_le_bytes());
    assert_eq!(list(&mut driver, 5), Err(err(Errno::RANGE)));
    driver
        .call(opcode::REMOVEXATTR, file.node, &[b"user.colour\0"])
        .unwrap();
    assert_eq!(get(&mut driver, "user.colour"), Err(err(Errno::NODATA)));
}

#[test]
fn owners_are_squashed_and_stored() {
    let folder = tempfile::tempdir().unwrap();
    let me = rustix::process::geteuid().as_raw();
    let options = ShareOptions::default().owner(ShareOwner::Squash {
        uid: 5000,
        gid: 5001,
    });
    let (mut first, share) = driver(folder.path(), options);
    first.ids = (5000, 5001);
    let (file, _) = first.create(share, "mine", 0o644).unwrap();
    assert_eq!((file.uid, file.gid), (5000, 5001));
    first.ids = (999, 998);
    let (file, handle) = first.create(share, "other", 0o444).unwrap();
    assert_eq!((file.uid, file.gid, file.mode & 0o777), (999, 998, 0o444));
    first.release(file.node, handle).unwrap();
    let d = first.mkdir(share, "d", 0o755).unwrap();
    assert_eq!((d.uid, d.gid), (999, 998));
    let mine = first.walk("s/mine").unwrap().node;
    let moved = first.chown(mine, 7, 8);
    assert_eq!(moved.map(|e| (e.uid, e.gid)), Ok((7, 8)));
    for name in ["mine", "other", "d"] {
        assert_eq!(
            folder.path().join(name).metadata().unwrap().uid(),
            me,
            "{name}"
        );
    }

    // A later server sees them; one without the attribute does not.
    let (mut later, share) = driver(folder.path(), options);
    let owner = |driver: &mut FuseDriver, share, name: &str| {
        driver.lookup(share, name).map(|e| (e.uid, e.gid))
    };
    assert_eq!(owner(&mut later, share, "other"), Ok((999, 998)));
    assert_eq!(owner(&mut later, share, "d"), Ok((999, 998)));
    assert_eq!(owner(&mut later, share, "mine"), Ok((7, 8)));
    let node = later.lookup(share, "mine").unwrap().node;
    later.chown(node, 5000, 5001).unwrap();
    let text = rustix::fs::getxattr(
        folder.path().join("mine"),
        "user.containers.override_stat",
        &mut [0u8; 64][..],
    );
    assert_eq!(text, Err(Errno::NODATA));
    let (mut ignoring, share) = driver(folder.path(), options.chown(ChownPolicy::Ignore));
    assert_eq!(owner(&mut ignoring, share, "other"), Ok((5000, 5001)));
    let node = ignoring.lookup(share, "other").unwrap().node;
    assert_eq!(ignoring.chown(node, 1, 1).map(|e| e.uid), Ok(5000));
    let (mut denying, share) = driver(folder.path(), options.chown(ChownPolicy::Deny));
    let node = denying.lookup(share, "other").unwrap().node;
    assert_eq!(denying.chown(node, 1, 1), Err(err(Errno::PERM)));
    assert_eq!(denying.chown(node, 5000, 5001).map(|e| e.uid), Ok(5000));
    let fixed = options.owner(ShareOwner::Fixed { uid: 1, gid: 2 });
    let (mut fixed, share) = driver(folder.path(), fixed.chown(ChownPolicy::Ignore));
    assert_eq!(owner(&mut fixed, share, "other"), Ok((1, 2)));
}

#[test]
fn chown_clears_bits_that_grant_the_owner() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    fs::write(&path, "").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
    let options = ShareOptions::default().owner(ShareOwner::Squash {
        uid: 5000,
        gid: 5000,
    });
    let (mut driver, share) = driver(folder.path(), options);
    let f = driver.lookup(share, "f").unwrap().node;
    driver.chown(f, 0, 0).unwrap();
    assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn listings_are_complete_for_any_size_of_reply() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..500 {
        let name = format!("{i:03}{}", "x".repeat(i % 200));
        fs::write(folder.path().join(name), "").unwrap();
    }
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    for size in [512, 4096, 20_000, 1 << 20] {
        let mut names: Vec<String> = driver
            .list(share, size)
            .unwrap()
            .into_iter()
            .map(|e| e.0)
            .collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 502, "with {size} bytes");
    }
}

#[test]
fn entries_beyond_the_limit_are_listed_but_not_known() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..50 {
        fs::write(folder.path().join(i.to_string()), "").unwrap();
    }
    let share = Share::new("s", directory(folder.path()), ShareOptions::default()).unwrap();
    let config = FsConfig::default()
        .share(share)
        .max_nodes(20)
        .max_handles(3);
    let mut driver = FuseDriver::started(Server::new(config).unwrap());
    let share = driver.walk("s").unwrap().node;
    let listed = driver.list(share, 4096).unwrap();
    assert_eq!(listed.len(), 52);
    let known: Vec<u64> = listed
        .iter()
        .map(|e| e.1)
        .filter(|node| *node != 0)
        .collect();
    // A quarter is left to entries that the guest uses.
    let mut known = known;
    assert_eq!(known.len(), 15);
    let mut unknown = listed.iter().filter(|e| e.1 == 0 && !e.0.starts_with('.'));
    for entry in unknown.by_ref().take(5) {
        let body = [entry.0.as_bytes(), b"\0"].concat();
        let reply = driver.call(opcode::LOOKUP, share, &[&body]).unwrap();
        let number = |at: usize| u64::from_le_bytes(reply[at..at + 8].try_into().unwrap());
        known.push(number(0));
        // Their names are not valid any longer than they are used, and their attributes are.
        assert_eq!((number(16), number(24)), (0, 1));
    }
    assert_eq!(driver.server.counts().nodes, 20);
    let unknown = unknown.next().unwrap();
    assert_eq!(driver.lookup(share, &unknown.0), Err(err(Errno::NFILE)));
    let create = driver.create(share, "new", 0o644).map(drop);
    assert_eq!(create, Err(err(Errno::NFILE)));
    assert!(!folder.path().join("new").exists());
    for node in known {
        driver.forget(node, 1);
    }
    assert_eq!(driver.server.counts().nodes, 0);
    let node = driver.lookup(share, &unknown.0).unwrap().node;
    for _ in 0..3 {
        driver.open(node, false).unwrap();
    }
    assert_eq!(driver.open(node, false), Err(err(Errno::NFILE)));
}

#[test]
fn directories_that_are_not_open_are_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let share = Share::new("s", directory(folder.path()), ShareOptions::default()).unwrap();
    let config = FsConfig::default().share(share).max_directories(16);
    let mut driver = FuseDriver::started(Server::new(config).unwrap());
    let share = driver.walk("s").unwrap().node;
    let mut nodes = Vec::new();
    for i in 0..100 {
        let d = driver.mkdir(share, &format!("d{i}"), 0o755).unwrap().node;
        let (file, handle) = driver.create(d, "f", 0o644).unwrap();
        driver.release(file.node, handle).unwrap();
        nodes.push((d, file.node));
    }
    assert!(driver.server.counts().directories <= 16);
    for (d, file) in &nodes {
        assert!(driver.lookup(*d, "f").is_ok());
        assert!(driver.open(*file, true).is_ok());
    }
    // Two of them trade places, so that names lead to other directories.
    let place = |i: usize| folder.path().join(format!("d{i}"));
    fs::rename(place(0), folder.path().join("t")).unwrap();
    fs::rename(place(1), place(0)).unwrap();
    fs::rename(folder.path().join("t"), place(1)).unwrap();
    assert_eq!(driver.lookup(nodes[0].0, "f"), Err(err(Errno::STALE)));
    // Looked up where it is now, it is the same node.
    assert_eq!(driver.lookup(share, "d1").unwrap().node, nodes[0].0);
    assert_eq!(driver.lookup(nodes[0].0, "f").unwrap().node, nodes[0].1);
}

#[test]
fn exclusive_shares_are_valid_for_a_day() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "").unwrap();
    let (mut auto, share) = driver(folder.path(), ShareOptions::default());
    assert_eq!(auto.lookup(share, "f").unwrap().valid, 1);
    assert_eq!(auto.lookup(share, "g"), Err(err(Errno::NOENT)));
    let options = ShareOptions::default().cache(CacheMode::Exclusive);
    let (mut exclusive, share) = driver(folder.path(), options);
    assert_eq!(exclusive.lookup(share, "f").unwrap().valid, 86_400);
    // An entry without a node: the absence of the name.
    let absent = exclusive.lookup(share, "g").unwrap();
    assert_eq!((absent.node, absent.valid), (0, 86_400));
}
