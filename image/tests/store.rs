//! Tests of the content store: sharing, removal, several processes, and kills.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;

use sm_image::{LayerStep, Progress, PullOptions, Reference, Report, Store, Users};
use support::{file, image, tar};

fn reference(layout: &Path) -> Reference {
    Reference::parse(&format!("oci:{}", layout.display())).unwrap()
}

/// Returns options with a progress callback.
fn reporting<'a>(report: Report<'a>) -> PullOptions<'a> {
    PullOptions::new().report(report)
}

fn count(store: &Path, part: &str) -> usize {
    fs::read_dir(store.join(part)).unwrap().count()
}

#[test]
fn layers_are_stored_once_and_go_with_their_last_image() {
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name);
    let shared = tar(&[file("shared", vec![1; 10_000])]);
    image(&at("one"), &[shared.clone(), tar(&[file("a", b"a")])]);
    image(&at("two"), &[shared, tar(&[file("b", b"b")])]);
    let root = at("store");
    let store = Store::open(&root).unwrap();
    let one = store
        .open_image(&reference(&at("one")), &PullOptions::default())
        .unwrap();
    let reported = Mutex::new(Vec::new());
    let two = store
        .open_image(
            &reference(&at("two")),
            &reporting(&|progress| {
                if let Progress::Layer {
                    number, of, step, ..
                } = progress
                {
                    reported.lock().unwrap().push((number, of, step));
                }
            }),
        )
        .unwrap();
    let reported = reported.into_inner().unwrap();
    assert!(
        reported.contains(&(1, 2, LayerStep::Present)),
        "{reported:?}"
    );
    assert!(reported.contains(&(2, 2, LayerStep::Done)), "{reported:?}");
    assert_eq!(count(&root, "layers"), 3);
    assert_eq!(one.segments[1], two.segments[1]);
    assert_eq!(store.list().unwrap().len(), 2);

    // The second time, nothing is converted.
    store
        .open_image(
            &reference(&at("one")),
            &reporting(&|_| panic!("no work is done")),
        )
        .unwrap();

    let (one_id, two_id) = (one.digest.to_string(), two.digest.to_string());
    drop(one);
    store.remove(&one_id[..20], &|| Ok(Users::new())).unwrap();
    assert_eq!((count(&root, "layers"), count(&root, "disks")), (2, 1));
    assert!(store.remove(&one_id, &|| Ok(Users::new())).is_err());

    // The image is in use: its name is removed, and the disk stays until it is no longer
    // used.
    store.remove(&two_id, &|| Ok(Users::new())).unwrap();
    assert!(store.list().unwrap().is_empty());
    assert_eq!((count(&root, "layers"), count(&root, "disks")), (2, 1));
    assert!(two.segments.iter().all(|segment| segment.path.exists()));
    drop(two);
    let again = store
        .open_image(&reference(&at("one")), &PullOptions::default())
        .unwrap();
    drop(again);
    store.remove(&one_id, &|| Ok(Users::new())).unwrap();
    assert_eq!((count(&root, "layers"), count(&root, "disks")), (0, 0));
}

#[test]
fn corrupt_objects_are_created_again() {
    let work = tempfile::tempdir().unwrap();
    let layout = work.path().join("layout");
    image(&layout, &[tar(&[file("x", vec![1; 10_000])])]);
    let store = Store::open(&work.path().join("store")).unwrap();
    let image = store
        .open_image(&reference(&layout), &PullOptions::default())
        .unwrap();
    let blob = image.segments[1].clone();
    let before = fs::read(&blob.path).unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(&blob.path)
        .unwrap()
        .set_len(5)
        .unwrap();
    store
        .open_image(&reference(&layout), &PullOptions::default())
        .unwrap();
    assert!(fs::read(&blob.path).unwrap() == before);
}

#[test]
fn concurrent_pulls_create_one_image() {
    let work = tempfile::tempdir().unwrap();
    let layout = work.path().join("layout");
    let layers: Vec<_> = (0..3u8)
        .map(|n| tar(&[file(format!("{n}"), vec![n; 500_000])]))
        .collect();
    image(&layout, &layers);
    let root = work.path().join("store");
    let barrier = Barrier::new(6);
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let store = Store::open(&root).unwrap();
                barrier.wait();
                let image = store
                    .open_image(&reference(&layout), &PullOptions::default())
                    .unwrap();
                for segment in &image.segments {
                    assert_eq!(
                        segment.open().unwrap().metadata().unwrap().len(),
                        segment.len
                    );
                }
            });
        }
    });
    assert_eq!(Store::open(&root).unwrap().list().unwrap().len(), 1);
    assert_eq!((count(&root, "layers"), count(&root, "disks")), (3, 1));
    assert_eq!(count(&root, "tmp"), 0);
}

/// Kills a converting process at many points. The next process finds no partial objects
/// in the store, and completes the conversion.
#[test]
fn a_kill_leaves_nothing_half_made() {
    const VARIABLE: &str = "SM_IMAGE_TEST_KILL";
    if let Some(work) = std::env::var_os(VARIABLE) {
        // The process to be killed kills itself from its progress callback.
        let work = Path::new(&work);
        let store = Store::open(&work.join("store")).unwrap();
        let steps = std::env::var("SM_IMAGE_TEST_STEPS").unwrap();
        let left = AtomicU32::new(steps.parse().unwrap());
        store
            .open_image(
                &reference(&work.join("layout")),
                &reporting(&|_| {
                    if left.fetch_sub(1, Ordering::Relaxed) == 0 {
                        let own = rustix::process::getpid();
                        rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
                    }
                }),
            )
            .unwrap();
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let layers: Vec<_> = (0..4u8)
        .map(|n| tar(&[file(format!("{n}"), vec![n; 1_000_000])]))
        .collect();
    image(&work.path().join("layout"), &layers);
    let root = work.path().join("store");
    let mut killed = 0;
    for steps in 0..12 {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_kill_leaves_nothing_half_made"])
            .env(VARIABLE, work.path())
            .env("SM_IMAGE_TEST_STEPS", steps.to_string())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        if status.success() {
            break;
        }
        killed += 1;
        assert!(Store::open(&root).unwrap().list().unwrap().is_empty());
        assert_eq!(count(&root, "disks"), 0);
    }
    assert!(killed >= 4, "each of the layers had its turn: {killed}");
    let store = Store::open(&root).unwrap();
    let image = store
        .open_image(
            &reference(&work.path().join("layout")),
            &PullOptions::default(),
        )
        .unwrap();
    assert_eq!(image.segments.len(), 5);
    assert_eq!(count(&root, "tmp"), 0);
}
