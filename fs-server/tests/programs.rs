//! Programs on a mounted server. They need root, for `/dev/fuse`.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Mounted, descriptors};
use sm_fs_server::{CacheMode, ShareOptions};

/// Runs a script in a directory; returns its output.
fn shell(directory: &Path, script: &str) -> String {
    let output = Command::new("sh")
        .args(["-euc", script])
        .current_dir(directory)
        .env("HOME", directory)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{script}: {text}{errors}");
    text
}

/// Returns true if tests run that take minutes.
fn is_full() -> bool {
    let is_full = std::env::var_os("SM_TEST_FULL").is_some();
    if !is_full {
        eprintln!("left out: it takes minutes; set SM_TEST_FULL=1 for it");
    }
    is_full
}

/// Operations of fsx, the exerciser of file systems, which Debian has no package of: reads and
/// writes, by calls and by maps, truncations, holes and reopening, compared with memory.
const EXERCISER: &str = r#"
import mmap, os, random, subprocess, sys
seed, count, most = int(sys.argv[1]), int(sys.argv[2]), 256 << 10
random.seed(seed)
fd, model = os.open("f", os.O_RDWR | os.O_CREAT | os.O_TRUNC), bytearray()
def place(limit):
    at = random.randrange(limit)
    return at, random.randint(1, min(limit - at, 64 << 10))
def grow(end):
    model.extend(bytes(max(0, end - len(model))))
for step in range(count):
    kind = random.choice(["read", "write", "map", "mapwrite", "truncate", "hole", "reopen", "append"])
    if kind == "write":
        at, size = place(most)
        data = random.randbytes(size)
        assert os.pwrite(fd, data, at) == size
        grow(at + size)
        model[at:at + size] = data
    elif kind == "append" and len(model) < most:
        other, data = os.open("f", os.O_WRONLY | os.O_APPEND), random.randbytes(1000)
        assert os.write(other, data) == 1000
        os.close(other)
        model += data
    elif kind == "truncate":
        size = random.randrange(most)
        os.truncate("f", size) if random.random() < 0.5 else os.ftruncate(fd, size)
        del model[size:]
        grow(size)
    elif kind == "reopen":
        os.close(fd)
        fd = os.open("f", os.O_RDWR)
    elif kind == "hole" and model:
        at, size = place(len(model))
        subprocess.run(["fallocate", "-p", "-o", str(at), "-l", str(size), "f"], check=True)
        model[at:at + size] = bytes(size)
    elif model and kind in ("read", "map", "mapwrite"):
        at, size = place(len(model))
        if kind == "read":
            found = os.pread(fd, size, at)
        else:
            with mmap.mmap(fd, len(model)) as view:
                if kind == "mapwrite":
                    data = random.randbytes(size)
                    view[at:at + size] = model[at:at + size] = data
                found = view[at:at + size]
        assert found == model[at:at + size], (seed, step, kind, at, size)
    assert os.fstat(fd).st_size == len(model), (seed, step, kind)
assert open("f", "rb").read() == model, seed
open("model", "wb").write(model)
"#;

#[test]
fn a_file_has_what_was_written_by_calls_and_maps() {
    if !sm_test_needs::programs(&["python3", "fallocate"]) {
        return;
    }
    let rounds = if is_full() { 20 } else { 1 };
    for cache in [CacheMode::Auto, CacheMode::Exclusive] {
        let folder = tempfile::tempdir().unwrap();
        let Some(mounted) = Mounted::new(folder.path(), ShareOptions::default().cache(cache))
        else {
            return;
        };
        fs::write(folder.path().join("exerciser"), EXERCISER).unwrap();
        for seed in 0..rounds {
            shell(
                &mounted.guest,
                &format!("python3 exerciser {seed} 1500; cmp f model"),
            );
        }
        mounted.unmount();
        let same = fs::read(folder.path().join("f")).unwrap();
        assert!(same == fs::read(folder.path().join("model")).unwrap());
    }
}

/// Random and sequential I/O of several processes, whose contents fio verifies.
#[test]
fn full_fio_verifies_what_it_has_written() {
    if !is_full() {
        return;
    }
    if Command::new("fio").arg("--version").output().is_err() {
        eprintln!("left out: there is no program \"fio\"");
        return;
    }
    for cache in [CacheMode::Auto, CacheMode::Exclusive] {
        let folder = tempfile::tempdir().unwrap();
        let Some(mounted) = Mounted::new(folder.path(), ShareOptions::default().cache(cache))
        else {
            return;
        };
        let jobs = "
            fio --minimal --name=random --rw=randrw --bs=4k --size=32m --numjobs=4 --verify=crc32c
            fio --minimal --name=large --rw=write --bs=1m --size=128m --verify=sha256 --fsync=16
            fio --minimal --name=odd --rw=randwrite --bsrange=1k-130k --bs_unaligned --size=32m \
                --verify=crc32c --fallocate=none
            fio --minimal --name=mapped --ioengine=mmap --rw=randrw --bs=4k --size=32m --verify=crc32c
            fio --minimal --name=direct --direct=1 --rw=randrw --bs=4k --size=16m --verify=crc32c";
        shell(&mounted.guest, jobs);
        mounted.unmount();
    }
}

#[test]
fn git_works() {
    if !sm_test_needs::programs(&["git"]) {
        return;
    }
    for cache in [CacheMode::Auto, CacheMode::Exclusive] {
        let folder = tempfile::tempdir().unwrap();
        let Some(mounted) = Mounted::new(folder.path(), ShareOptions::default().cache(cache))
        else {
            return;
        };
        let script = "
            git init -q -b main one; cd one
            git config user.email a@b; git config user.name a
            for d in a b c; do
                mkdir $d; for i in $(seq 60); do echo $d $i > $d/$i; done
            done
            chmod +x a/1; ln -s a/1 link
            git add .; git commit -qm first
            for i in $(seq 30); do echo more >> b/$i; done; git mv c/1 c/new; rm c/2
            git commit -qam second; git checkout -q -b other HEAD^; git checkout -q main
            git gc -q --prune=now; git fsck --strict
            git clone -q . ../two; cd ../two; git status --porcelain; git ls-tree -r HEAD | wc -l
            git -C ../one status --porcelain
            git ls-files -s a/1 link | cut -c1-6";
        let through = shell(&mounted.guest, script);
        let plain = tempfile::tempdir().unwrap();
        assert_eq!(through, shell(plain.path(), script));
        // The host sees the same repository.
        mounted.unmount();
        let host = shell(
            &folder.path().join("one"),
            "git fsck --strict; git status --porcelain",
        );
        assert_eq!(host, "");
    }
}

#[test]
fn sqlite_works() {
    if !sm_test_needs::programs(&["sqlite3"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(mounted) = Mounted::new(folder.path(), ShareOptions::default()) else {
        return;
    };
    let script = "
        sqlite3 db 'pragma journal_mode=wal; create table t(a integer primary key, b text);'
        for process in 1 2 3; do
            (for i in $(seq 40); do
                sqlite3 -cmd '.timeout 60000' db \"insert into t(b) values('$process $i')\"
            done) &
        done
        wait
        sqlite3 db 'select count(*), count(distinct b) from t; pragma integrity_check;'
        sqlite3 db 'pragma wal_checkpoint(truncate);' > /dev/null";
    assert_eq!(shell(&mounted.guest, script), "wal\n120|120\nok\n");
    mounted.unmount();
    let host = shell(folder.path(), "sqlite3 db 'select count(*) from t'");
    assert_eq!(host, "120\n");
}

/// Resident memory of this process in bytes, without pages of files.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib: usize = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib << 10
}

/// Walks a tree of `files` files in directories of 4; returns the most descriptors that the
/// server had.
fn walk(files: usize) -> usize {
    let folder = tempfile::tempdir().unwrap();
    for directory in 0..files / 4 {
        let path = folder
            .path()
            .join(format!("{}/{directory}", directory % 50));
        fs::create_dir_all(&path).unwrap();
        for file in 0..4 {
            fs::write(path.join(file.to_string()), "").unwrap();
        }
    }
    let (before, resident) = (descriptors(), resident());
    let Some(mounted) = Mounted::new(folder.path(), ShareOptions::default()) else {
        return 0;
    };
    for _ in 0..2 {
        let found = shell(&mounted.guest, "find . -type f -size 0 | wc -l");
        assert_eq!(found.trim(), (files / 4 * 4).to_string());
    }
    let used = descriptors().saturating_sub(before);
    // Beside the server, this process has only the list of its tests.
    let grown = self::resident().saturating_sub(resident);
    assert!(grown < 40 << 20, "{grown} bytes");
    let removed = shell(&mounted.guest, "rm -rf * && ls -A | wc -l");
    assert_eq!(removed, "0\n");
    mounted.unmount();
    used
}

#[test]
fn many_files_need_few_descriptors() {
    if sm_test_needs::programs(&["find"]) {
        let used = walk(8_000);
        assert!(used < 2000, "{used} descriptors");
    }
}

#[test]
fn full_200_000_files_need_few_descriptors_and_little_memory() {
    if is_full() && sm_test_needs::programs(&["find"]) {
        let used = walk(200_000);
        assert!(used < 2000, "{used} descriptors");
    }
}

/// The host changes files while they are used through the server.
#[test]
fn changes_of_the_host_are_seen() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mounted) = Mounted::new(folder.path(), ShareOptions::default()) else {
        return;
    };
    let (host, guest) = (folder.path().join("f"), mounted.guest.join("f"));
    for round in 0..20 {
        // An editor replaces the file; then it is written in place.
        let text = format!("replaced {round}");
        fs::write(folder.path().join("t"), &text).unwrap();
        fs::rename(folder.path().join("t"), &host).unwrap();
        assert_eq!(fs::read_to_string(&guest).unwrap_or_default(), text);
        let text = format!("in place {round}, and longer");
        fs::write(&host, &text).unwrap();
        assert_eq!(fs::read_to_string(&guest).unwrap_or_default(), text);
    }
    mounted.unmount();
}
