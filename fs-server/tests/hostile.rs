//! A guest's kernel that ignores the protocol.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::fs;

use common::{descriptors, driver};
use proptest::prelude::*;
use rustix::io::Errno;
use sm_fs_server::ShareOptions;
use sm_fs_server::testing::{ROOT, opcode, request};

fn err(errno: Errno) -> i32 {
    errno.raw_os_error()
}

/// Numbers from a fixed seed, so that a failure is repeated.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(99);
        (self.0 >> 33) % limit
    }
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let outer = tempfile::tempdir().unwrap();
    fs::write(outer.path().join("secret"), "").unwrap();
    fs::create_dir(outer.path().join("share")).unwrap();
    let (mut driver, share) = driver(&outer.path().join("share"), ShareOptions::default());
    let d = driver.mkdir(share, "d", 0o755).unwrap().node;
    for node in [ROOT, share, d] {
        for name in [
            "",
            ".",
            "..",
            "../secret",
            "/etc/passwd",
            "d/..",
            "d/../../secret",
        ] {
            let refused = Err(err(Errno::INVAL));
            assert_eq!(driver.lookup(node, name), refused, "{name}");
            assert_eq!(driver.mkdir(node, name, 0o755), refused, "{name}");
            assert_eq!(
                driver.create(node, name, 0o644).map(drop),
                Err(22),
                "{name}"
            );
            assert_eq!(driver.unlink(node, name), Err(22), "{name}");
            assert_eq!(
                driver.rename((node, "d"), (share, name), 0),
                Err(22),
                "{name}"
            );
            assert_eq!(
                driver.rename((node, name), (share, "e"), 0),
                Err(22),
                "{name}"
            );
            assert_eq!(driver.link(d, node, name).map(drop), Err(22), "{name}");
            assert_eq!(driver.symlink(node, name, "x").map(drop), Err(22), "{name}");
        }
    }
    let long = "x".repeat(256);
    assert_eq!(driver.lookup(share, &long), Err(err(Errno::NAMETOOLONG)));
    // Bytes after the name, and none after its start.
    let body: [&[&[u8]]; 4] = [&[b"a\0b"], &[b"a"], &[], &[b"\0"]];
    for body in body {
        assert_eq!(
            driver.call(opcode::LOOKUP, share, body),
            Err(22),
            "{body:?}"
        );
    }
    assert!(outer.path().join("secret").exists());
}

/// Every operation with bodies of every length, on nodes of every kind, with any space for
/// the reply.
#[test]
fn every_operation_survives_any_body() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), vec![7; 10_000]).unwrap();
    std::os::unix::fs::symlink("f", folder.path().join("l")).unwrap();
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    let f = driver.lookup(share, "f").unwrap().node;
    let l = driver.lookup(share, "l").unwrap().node;
    let handle = driver.open(f, true).unwrap();
    let mut numbers = Numbers(5);
    let before = descriptors();
    for round in 0..60_000u64 {
        let operation = match numbers.below(60) {
            // A session that ends here would make the rest pointless.
            26 | 38 => continue,
            59 => u32::MAX,
            operation => u32::try_from(operation).unwrap(),
        };
        let node = match numbers.below(8) {
            0 => ROOT,
            1 | 2 => share,
            3 | 4 => f,
            5 => l,
            6 => numbers.below(10),
            _ => u64::MAX - numbers.below(3),
        };
        let len = match numbers.below(4) {
            0 => numbers.below(9),
            1 => numbers.below(200),
            _ => [8, 16, 24, 32, 40, 48, 56, 88][usize::try_from(numbers.below(8)).unwrap()],
        };
        let mut body: Vec<u8> = (0..len)
            .map(|_| match numbers.below(6) {
                0 => u8::try_from(numbers.below(256)).unwrap(),
                1 => 0xff,
                2 => b'f',
                _ => 0,
            })
            .collect();
        if numbers.below(2) == 0 && body.len() >= 8 {
            body[..8].copy_from_slice(&handle.to_le_bytes());
        }
        let bytes = request(operation, round, node, &[&body]);
        let cut = match numbers.below(20) {
            0 => usize::try_from(numbers.below(60)).unwrap().min(bytes.len()),
            _ => bytes.len(),
        };
        let space = match numbers.below(5) {
            0 => usize::try_from(numbers.below(40)).unwrap(),
            1 => 200,
            _ => 70_000,
        };
        if let Some(reply) = driver.raw(&bytes[..cut], space) {
            assert!(
                reply.is_empty() || reply.len() >= 16,
                "operation {operation}"
            );
        }
    }
    let left = driver.server.counts();
    assert!(left.handles <= 4096 && left.nodes < 60_000, "{left:?}");
    // Other tests of this program have a few.
    assert!(descriptors() <= before + left.handles + left.directories + 100);
    // It still works.
    assert!(driver.walk("s").is_ok());
    driver.server.reset();
    assert!(descriptors() <= before + 100);
}

#[test]
fn lengths_in_headers_are_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    let (file, handle) = driver.create(share, "f", 0o644).unwrap();
    let mut write = vec![0; 40];
    write[..8].copy_from_slice(&handle.to_le_bytes());
    // More contents than there are.
    write[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(
        driver.call(opcode::WRITE, file.node, &[&write, b"text"]),
        Err(22)
    );
    // A read of 4 GiB fills the space that there is.
    driver
        .write(file.node, handle, 0, &[1; 5000], false)
        .unwrap();
    let bytes = request(opcode::READ, 9, file.node, &[&write]);
    assert_eq!(driver.raw(&bytes, 100).unwrap().len(), 100);
    assert_eq!(driver.raw(&bytes, 1 << 16).unwrap().len(), 5016);
    let mut wrong = request(opcode::GETATTR, 9, share, &[&[0; 16]]);
    wrong[0] += 1;
    let reply = driver.raw(&wrong, 200).unwrap();
    assert_eq!(reply[4..8], (-22i32).to_le_bytes());
    assert_eq!(driver.raw(&wrong[..39], 200), None);
    assert_eq!(driver.raw(&[], 200), None);
    // A list of forgotten nodes that is longer than its request.
    let batch = request(
        opcode::BATCH_FORGET,
        9,
        0,
        &[&u32::MAX.to_le_bytes(), &[0; 4]],
    );
    assert_eq!(driver.raw(&batch, 200), None);
}

#[test]
fn forgetting_more_than_was_found_is_harmless() {
    let folder = tempfile::tempdir().unwrap();
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    let d = driver.mkdir(share, "d", 0o755).unwrap().node;
    let (file, handle) = driver.create(d, "f", 0o644).unwrap();
    for _ in 0..1000 {
        for node in [ROOT, share, d, file.node, 0, 77, u64::MAX] {
            driver.forget(node, u64::MAX);
        }
    }
    assert_eq!(driver.server.counts().nodes, 0);
    // The handle outlives its node, and is closed by its number.
    assert_eq!(driver.read(file.node, handle, 0, 1), Ok(Vec::new()));
    assert_eq!(driver.getattr(file.node), Err(err(Errno::STALE)));
    driver.release(file.node, handle).unwrap();
    assert!(driver.lookup(share, "d").is_ok());
    let mut all = 2u32.to_le_bytes().to_vec();
    all.extend([0; 4]);
    for node in [share, u64::MAX] {
        all.extend(node.to_le_bytes());
        all.extend(u64::MAX.to_le_bytes());
    }
    driver.call(opcode::BATCH_FORGET, 0, &[&all]).unwrap();
    assert!(driver.walk("s/d").is_ok());
}

#[test]
fn renames_in_circles_end() {
    let folder = tempfile::tempdir().unwrap();
    let (mut driver, share) = driver(folder.path(), ShareOptions::default());
    let mut nodes = vec![share];
    for i in 0..8 {
        let parent = nodes[i / 2];
        nodes.push(driver.mkdir(parent, &format!("d{i}"), 0o755).unwrap().node);
    }
    let mut numbers = Numbers(3);
    let pick = |numbers: &mut Numbers| usize::try_from(numbers.below(9)).unwrap();
    let mut moved = 0;
    for _ in 0..20_000 {
        let name = format!("d{}", numbers.below(8));
        let (from, to) = (nodes[pick(&mut numbers)], nodes[pick(&mut numbers)]);
        moved += usize::from(driver.rename((from, &name), (to, &name), 0).is_ok());
        // The host moves directories as well, unseen.
        if numbers.below(10) == 0 {
            let names: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
            let at = usize::try_from(numbers.below(names.len() as u64)).unwrap();
            let from = names[at].as_ref().unwrap().path();
            let to = names[at / 2].as_ref().unwrap().path();
            let _ = fs::rename(&from, to.join(from.file_name().unwrap()));
        }
        let _ = driver.lookup(to, &name);
        let _ = driver.getattr(nodes[pick(&mut numbers)]);
    }
    assert!(moved > 50, "{moved}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any bytes at all, with a header that says their length or not.
    #[test]
    fn any_bytes_are_a_request_or_not(
        mut bytes in prop::collection::vec(any::<u8>(), 0..300),
        fitting in any::<bool>(),
        operation in 0u8..55,
        space in 0usize..300,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (mut driver, _) = driver(folder.path(), ShareOptions::default());
        if fitting && bytes.len() >= 40 {
            let len = u32::try_from(bytes.len()).unwrap();
            bytes[..4].copy_from_slice(&len.to_le_bytes());
            bytes[4..8].copy_from_slice(&u32::from(operation).to_le_bytes());
            bytes[16..24].copy_from_slice(&(1 + u64::from(operation) % 2).to_le_bytes());
        }
        if let Some(reply) = driver.raw(&bytes, space) {
            prop_assert!(reply.len() <= space);
        }
    }
}
