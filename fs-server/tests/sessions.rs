//! Sessions: their start and end, and going on in another server.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::fs;

use common::{directory, driver};
use rustix::io::Errno;
use sm_fs_server::testing::{FuseDriver, ROOT, opcode};
use sm_fs_server::{FsConfig, Server, Share, ShareOptions};

fn err(errno: Errno) -> i32 {
    errno.raw_os_error()
}

#[test]
fn sessions_start_and_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = FuseDriver::new(common::server(folder.path(), ShareOptions::default()));
    assert_eq!(driver.lookup(ROOT, "s"), Err(err(Errno::IO)));
    let old = [7u32, 30, 0, 0].map(u32::to_le_bytes).concat();
    assert_eq!(
        driver.call(opcode::INIT, 0, &[&old]),
        Err(err(Errno::PROTO))
    );
    let newer = [8u32, 1, 0, 0].map(u32::to_le_bytes).concat();
    let reply = driver.call(opcode::INIT, 0, &[&newer]).unwrap();
    assert_eq!(reply[..4], 7u32.to_le_bytes());
    assert!(!driver.server.is_mounted());
    let body = sm_fs_server::testing::init_body();
    driver.call(opcode::INIT, 0, &[&body]).unwrap();
    assert!(driver.server.is_mounted());
    let share = driver.walk("s").unwrap().node;
    let (file, _) = driver.create(share, "f", 0o644).unwrap();
    driver.call(opcode::DESTROY, 0, &[]).unwrap();
    assert_eq!(driver.server.counts(), sm_fs_server::FsCounts::default());
    driver.call(opcode::INIT, 0, &[&body]).unwrap();
    assert_eq!(driver.getattr(file.node), Err(err(Errno::STALE)));
}

#[test]
fn a_session_goes_on_in_another_server() {
    let folder = tempfile::tempdir().unwrap();
    let (mut first, share) = driver(folder.path(), ShareOptions::default());
    let d = first.mkdir(share, "d", 0o755).unwrap();
    let (file, handle) = first.create(d.node, "f", 0o644).unwrap();
    first.write(file.node, handle, 0, b"text", false).unwrap();
    let (gone, gone_handle) = first.create(share, "gone", 0o644).unwrap();
    let (unnamed, unnamed_handle) = first.create(share, "unnamed", 0o644).unwrap();
    assert_eq!(first.server.unnamed_files(), 0);
    first.unlink(share, "unnamed").unwrap();
    assert_eq!(first.server.unnamed_files(), 1);
    let reading = first.open(file.node, false).unwrap();
    let state = first.server.save().unwrap();
    drop(first);
    fs::remove_file(folder.path().join("gone")).unwrap();

    let server = common::server(folder.path(), ShareOptions::default());
    let mut second = FuseDriver::new(server);
    second.server.restore(&state).unwrap();
    assert_eq!(second.server.save().unwrap(), state);
    // Handles and nodes keep their numbers.
    assert_eq!(second.read(file.node, handle, 0, 9).unwrap(), b"text");
    second.write(file.node, handle, 4, b"more", false).unwrap();
    let write = second.write(file.node, reading, 0, b"x", false);
    assert_eq!(write, Err(err(Errno::BADF)));
    assert_eq!(second.getattr(d.node).unwrap().ino, d.ino);
    assert_eq!(second.lookup(share, "d").unwrap().node, d.node);
    // What is gone is an error for that file only.
    assert_eq!(second.getattr(gone.node), Err(err(Errno::STALE)));
    let read = second.read(gone.node, gone_handle, 0, 9);
    assert_eq!(read, Err(err(Errno::IO)));
    let read = second.read(unnamed.node, unnamed_handle, 0, 9);
    assert_eq!(read, Err(err(Errno::IO)));
    second.release(unnamed.node, unnamed_handle).unwrap();
    let (new, new_handle) = second.create(share, "new", 0o644).unwrap();
    assert!(![d.node, file.node, gone.node].contains(&new.node));
    assert!(![handle, gone_handle, unnamed_handle].contains(&new_handle));
}

#[test]
fn a_session_is_restored_only_over_its_own_shares() {
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let server = |names: &[(&str, usize)], read_only| {
        let mut config = FsConfig::default();
        for (name, index) in names {
            let options = ShareOptions::default().read_only(read_only);
            let directory = directory(folders[*index].path());
            config = config.share(Share::new(name, directory, options).unwrap());
        }
        Server::new(config).unwrap()
    };
    let mut first = FuseDriver::started(server(&[("a", 0), ("b", 1)], false));
    let a = first.walk("a").unwrap().node;
    let (file, handle) = first.create(a, "f", 0o644).unwrap();
    first.walk("b").unwrap();
    let state = first.server.save().unwrap();

    for names in [
        &[("a", 0)][..],
        &[("a", 0), ("c", 1)],
        &[("a", 0), ("b", 1), ("c", 1)],
    ] {
        let mut other = server(names, false);
        assert!(other.restore(&state).is_err(), "{names:?}");
        assert!(!other.is_mounted());
    }
    // In any order; rights are those of the new server, and no others.
    let mut second = FuseDriver::new(server(&[("b", 1), ("a", 0)], true));
    second.server.restore(&state).unwrap();
    assert_eq!(second.walk("a").unwrap().node, a);
    assert_eq!(second.getattr(file.node).unwrap().ino, file.ino);
    assert_eq!(
        second.write(file.node, handle, 0, b"x", false),
        Err(err(Errno::IO))
    );
    // Another directory: the file is not there.
    let mut third = FuseDriver::new(server(&[("a", 1), ("b", 0)], false));
    third.server.restore(&state).unwrap();
    assert_eq!(third.getattr(file.node), Err(err(Errno::STALE)));
}
