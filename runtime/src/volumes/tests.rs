use std::fs::{self, File};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use sm_control::config::{SettingsSourceV1, VmConfig};

use super::*;
use crate::record::{Draft, Record, Records};
use crate::{ErrorKind, Force, RunOptions};

struct Fixture {
    dir: tempfile::TempDir,
    volumes: Volumes,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let sm = Sm::builder().below(dir.path()).build().unwrap();
    let volumes = sm.volumes();
    Fixture { dir, volumes }
}

fn small() -> VolumeOptions {
    VolumeOptions::new().size(16 << 20)
}

/// Creates a VM, which does not run, with these mounts.
pub(super) fn vm_with(sm: &Sm, name: &str, mounts: &[Mount]) -> Record {
    let options = mounts
        .iter()
        .cloned()
        .fold(RunOptions::new(), RunOptions::mount);
    let draft = Draft {
        name: Some(name.to_owned()),
        start: Some(options.settings(SettingsSourceV1::Image { cold: false })),
        idle: true,
    };
    let records = Records::open(sm.home()).unwrap();
    let created = records.create(&draft, |id, name| Ok(VmConfig::new(id, name)));
    created.unwrap().0
}

fn names(volumes: &Volumes) -> Vec<String> {
    let (volumes, errors) = volumes.list().unwrap();
    assert!(errors.is_empty(), "{errors:?}");
    volumes.iter().map(|v| v.name().to_owned()).collect()
}

#[test]
fn volumes_are_created_once_listed_and_removed() {
    let Fixture { volumes, .. } = fixture();
    assert!(names(&volumes).is_empty());
    let options = small().label("tier", "db");
    let made = volumes.create(Some("data"), &options).unwrap();
    assert_eq!(made.size_bytes(), Some(16 << 20));
    assert_eq!(made.labels()["tier"], "db");
    assert!(!made.is_anonymous());
    // The same name is the same volume, whatever its options.
    let again = volumes
        .create(Some("data"), &small().size(1 << 30))
        .unwrap();
    assert_eq!(again, made);
    let anonymous = volumes.create(None, &small()).unwrap();
    assert!(anonymous.is_anonymous());
    assert_eq!(anonymous.name().len(), 64);
    assert_eq!(names(&volumes).len(), 2);
    volumes.remove(anonymous.name()).unwrap();
    volumes.remove("data").unwrap();
    assert!(names(&volumes).is_empty());
    assert!(!made.path().exists());
    let error = volumes.remove("data").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.to_string(), "no such volume: \"data\"");
}

#[test]
fn bad_names_and_sizes_are_refused() {
    let Fixture { volumes, .. } = fixture();
    for name in ["", "..", "a/b", ".tmp-x", "-a", &"x".repeat(65)] {
        let error = volumes.create(Some(name), &small()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{name}");
        assert!(volumes.get(name).is_err() && volumes.remove(name).is_err());
    }
    for size in [0, 1 << 20, u64::MAX - 4096] {
        let error = volumes.create(Some("a"), &small().size(size)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{size}");
    }
    assert!(names(&volumes).is_empty());
}

#[test]
fn a_volume_in_use_is_not_removed_or_copied() {
    let Fixture { volumes, .. } = fixture();
    let made = volumes.create(Some("data"), &small()).unwrap();
    let path = made.path().join("lock");
    let lock = File::options().read(true).write(true).open(&path).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    fs::write(&path, "web\n").unwrap();
    for error in [
        volumes.remove("data").unwrap_err(),
        volumes.copy("data", "copy").unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Busy);
        let text = error.to_string();
        assert_eq!(text, "volume \"data\" is in use by VM \"web\"");
    }
    // Readers keep it as well.
    flock(&lock, FlockOperation::NonBlockingLockShared).unwrap();
    fs::write(&path, "").unwrap();
    let error = volumes.remove("data").unwrap_err().to_string();
    assert_eq!(error, "volume \"data\" is in use");
    flock(&lock, FlockOperation::Unlock).unwrap();
    volumes.remove("data").unwrap();
}

#[test]
fn a_copy_has_the_content_and_a_life_of_its_own() {
    use sm_vmm::disks::DiskDirectory;

    let Fixture { volumes, dir } = fixture();
    volumes.create(Some("data"), &small()).unwrap();
    let disk =
        |name: &str| DiskDirectory::at(dir.path().join("data/volumes").join(name).join("disk"));
    let opened = disk("data").open().unwrap();
    opened.store(b"content", 1 << 20).unwrap();
    opened.flush().unwrap();
    drop(opened);
    let copy = volumes.copy("data", "copy").unwrap();
    assert_eq!(copy.size_bytes(), Some(16 << 20));
    let error = volumes.copy("data", "copy").unwrap_err();
    assert_eq!(error.to_string(), "a volume named \"copy\" exists already");
    volumes.remove("data").unwrap();
    assert_eq!(disk("copy").layers().unwrap().len(), 3);
    disk("copy").open().unwrap();
    let error = volumes.copy("missing", "other").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn a_damaged_volume_affects_no_other() {
    let Fixture { volumes, .. } = fixture();
    let bad = volumes.create(Some("bad"), &small()).unwrap();
    volumes.create(Some("good"), &small()).unwrap();
    fs::write(bad.path().join("volume.json"), "{}").unwrap();
    let (listed, errors) = volumes.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert!(
        errors[0]
            .to_string()
            .starts_with("volume \"bad\" is damaged")
    );
    volumes.remove("bad").unwrap();
    assert_eq!(names(&volumes), ["good"]);
}

#[test]
fn a_volume_of_a_vm_that_does_not_run_stays() {
    let Fixture { volumes, .. } = fixture();
    let sm = volumes.sm.clone();
    volumes.create(Some("data"), &small()).unwrap();
    volumes.create(Some("free"), &small()).unwrap();
    vm_with(&sm, "web", &[Mount::volume("data", "/data")]);
    let error = volumes.remove("data").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let text = error.to_string();
    assert_eq!(text, "volume \"data\" is in use by VM \"web\"");
    let pruned = volumes.prune(|_| true).unwrap();
    assert_eq!(pruned.names, ["free"]);
    let usage = volumes.disk_usage().unwrap();
    assert_eq!((usage.total, usage.active), (1, 1));
    sm.vm("web")
        .unwrap()
        .remove_with_volumes(Force::No)
        .unwrap();
    // A name that somebody gave outlives the VM.
    assert_eq!(names(&volumes), ["data"]);
    volumes.remove("data").unwrap();
}

#[test]
fn anonymous_volumes_go_with_their_vm_on_request() {
    let Fixture { volumes, .. } = fixture();
    let sm = volumes.sm.clone();
    let declared = ["/data".to_owned()];
    let plan = plan(&sm, &[Mount::anonymous("/own")], &[], &declared, false).unwrap();
    let created = |name: &str, mounts: &[Mount]| {
        let record = vm_with(&sm, name, mounts);
        requests(&volumes, &record.start_settings().unwrap().mounts).unwrap();
    };
    created("one", &plan.mounts);
    created("two", &plan.mounts[1..]);
    assert_eq!(names(&volumes).len(), 2);
    sm.vm("one")
        .unwrap()
        .remove_with_volumes(Force::No)
        .unwrap();
    assert_eq!(names(&volumes).len(), 1, "the other VM has it, too");
    sm.vm("two").unwrap().remove(Force::No).unwrap();
    let left = names(&volumes);
    assert_eq!(left.len(), 1, "as in Docker, without -v");
    let pruned = volumes.prune(Volume::is_anonymous).unwrap();
    assert_eq!(pruned.names, left);
}

#[test]
fn nothing_is_pruned_that_an_unreadable_vm_may_need() {
    let Fixture { volumes, .. } = fixture();
    volumes.create(Some("data"), &small()).unwrap();
    let record = vm_with(&volumes.sm, "web", &[Mount::volume("data", "/data")]);
    fs::write(record.directory().join("config.json"), "{").unwrap();
    let error = volumes.prune(|_| true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert_eq!(names(&volumes), ["data"]);
}

#[test]
fn names_are_listed_without_reading_volumes() {
    let Fixture { volumes, .. } = fixture();
    let bad = volumes.create(Some("bad"), &small()).unwrap();
    fs::remove_file(bad.path().join("volume.json")).unwrap();
    assert_eq!(volumes.names().unwrap(), ["bad"]);
}

#[test]
fn a_directory_has_no_size_and_is_not_cloned() {
    let Fixture { volumes, .. } = fixture();
    let options = VolumeOptions::new().kind(VolumeKind::Directory);
    let volume = volumes.create(Some("dir"), &options).unwrap();
    assert_eq!((volume.size_bytes(), volume.disk_bytes()), (None, None));
    assert_eq!(volumes.get("dir").unwrap(), volume);
    let json = serde_json::to_value(&volume).unwrap();
    assert_eq!(
        (&json["type"], &json["size_bytes"]),
        (&"dir".into(), &serde_json::Value::Null)
    );
    let sized = volumes.create(Some("other"), &options.size(1 << 30));
    assert_eq!(sized.unwrap_err().kind(), ErrorKind::Invalid);
    let cloned = volumes.copy("dir", "copy").unwrap_err().to_string();
    assert_eq!(
        cloned,
        "volume \"dir\" is a directory: only disks can be cloned"
    );
    // All that guests wrote is counted, and removed.
    fs::create_dir_all(volume.path().join("a/b")).unwrap();
    fs::write(volume.path().join("a/b/f"), vec![1; 1 << 20]).unwrap();
    assert!(volumes.disk_usage().unwrap().reclaimable_bytes >= 1 << 20);
    let pruned = volumes.prune(|_| true).unwrap();
    assert!(pruned.bytes >= 1 << 20 && pruned.names == ["dir"]);
    assert!(!volume.path().exists());
}

#[test]
fn volumes_of_earlier_programs_are_disks() {
    let Fixture { volumes, .. } = fixture();
    let volume = volumes.create(Some("old"), &small()).unwrap();
    let path = volume.path().join("volume.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(
        json.as_object_mut().unwrap().remove("kind"),
        Some("disk".into())
    );
    fs::write(&path, json.to_string()).unwrap();
    assert_eq!(volumes.get("old").unwrap(), volume);
}

/// Directories with temporary names.
fn temporary(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.join("data/volumes")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let is_temporary = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with(".tmp-")
    };
    paths.filter(is_temporary).collect()
}

/// A guest may have written any number of files.
#[test]
fn vms_are_created_while_the_files_of_a_volume_are_removed() {
    let Fixture { volumes, dir } = fixture();
    let options = VolumeOptions::new().kind(VolumeKind::Directory);
    let volume = volumes.create(Some("large"), &options).unwrap();
    for directory in 0..40 {
        let directory = volume.path().join(directory.to_string());
        fs::create_dir(&directory).unwrap();
        for file in 0..500 {
            fs::write(directory.join(file.to_string()), "").unwrap();
        }
    }
    let records = Records::open(volumes.sm.home()).unwrap();
    std::thread::scope(|scope| {
        let removal = scope.spawn(|| volumes.remove("large"));
        while volume.path().exists() {
            std::thread::yield_now();
        }
        let _registry = records.lock().unwrap();
        assert_eq!(temporary(dir.path()).len(), 1, "it was waited for");
        removal.join().unwrap().unwrap();
    });
    assert!(temporary(dir.path()).is_empty());
}

#[test]
fn a_removal_that_was_killed_is_completed_by_the_next_one() {
    let Fixture { volumes, dir } = fixture();
    for name in ["one", "two"] {
        volumes.create(Some(name), &small()).unwrap();
    }
    let at = |name: &str| dir.path().join("data/volumes").join(name);
    fs::create_dir_all(at(".tmp-killed/data/deep")).unwrap();
    fs::create_dir_all(at(".tmp-used/data/deep")).unwrap();
    let other = File::open(at(".tmp-used")).unwrap();
    flock(&other, FlockOperation::LockExclusive).unwrap();
    volumes.remove("one").unwrap();
    assert_eq!(temporary(dir.path()), [at(".tmp-used")]);
    drop(other);
    assert_eq!(volumes.prune(|_| true).unwrap().names, ["two"]);
    assert!(temporary(dir.path()).is_empty());
}
