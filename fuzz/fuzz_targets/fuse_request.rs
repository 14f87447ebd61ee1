//! Arbitrary requests to a server of a directory: none of them reaches outside.
#![no_main]

use std::fs;

use libfuzzer_sys::fuzz_target;
use sm_fs_server::testing::{FuseDriver, request};
use sm_fs_server::{FsConfig, Server, Share, ShareOptions};

/// Requests of one input.
const MAX_REQUESTS: u64 = 200;

fuzz_target!(|data: &[u8]| {
    let outer = tempfile::tempdir().expect("a temporary directory");
    let share = outer.path().join("share");
    fs::create_dir_all(share.join("d")).expect("a directory");
    fs::write(share.join("f"), "contents").expect("a file");
    std::os::unix::fs::symlink("..", share.join("l")).expect("a link");
    let directory = fs::File::open(&share).expect("the directory");
    let options = ShareOptions::default();
    let shared = Share::new("s", directory.into(), options).expect("a directory");
    let config = FsConfig::default().share(shared).max_nodes(8).max_handles(8);
    let mut driver = FuseDriver::started(Server::new(config).expect("a server"));
    for name in ["s", "s/f", "s/d", "s/l"] {
        driver.walk(name).expect("an entry");
    }
    // Each request: operation, node, space for the reply, length of the body, body.
    let mut rest = data;
    for unique in 0..MAX_REQUESTS {
        let [operation, node, space, len, bytes @ ..] = rest else {
            break;
        };
        let (body, after) = bytes.split_at(usize::from(*len).min(bytes.len()));
        let bytes = request((*operation).into(), unique, (*node).into(), &[body]);
        if let Some(reply) = driver.raw(&bytes, usize::from(*space) * 20) {
            assert!(reply.is_empty() || reply.len() >= 16);
        }
        rest = after;
    }
    let counts = driver.server.counts();
    assert!(counts.nodes <= 8 && counts.handles <= 8);
    let names: Vec<_> = fs::read_dir(outer.path()).expect("it").collect();
    assert_eq!(names.len(), 1);
});
