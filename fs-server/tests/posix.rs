//! Cases of POSIX, on a directory of the host and on the same through the server, whose
//! results must be equal. They need root, for `/dev/fuse`.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use common::Mounted;
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags,
};
use rustix::io::Errno;
use sm_fs_server::{CacheMode, ShareOptions};

type Case = (&'static str, fn(&Path) -> String);

fn text<T: std::fmt::Debug>(result: Result<T, Errno>) -> String {
    format!("{result:?}")
}

fn io<T: std::fmt::Debug>(result: std::io::Result<T>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(error) => format!("errno {:?}", error.raw_os_error()),
    }
}

fn open(path: &Path, flags: OFlags) -> String {
    io(
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
            .map(drop)
            .map_err(Into::into),
    )
}

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> String {
    text(rustix::fs::renameat_with(CWD, from, CWD, to, flags))
}

/// Attributes that do not depend on times and places.
fn stat(path: &Path) -> String {
    io(fs::symlink_metadata(path).map(|meta| {
        let size = if meta.is_dir() { 0 } else { meta.size() };
        (meta.mode(), meta.nlink(), meta.uid(), meta.gid(), size)
    }))
}

/// Unix sockets and device nodes are not among them: the server refuses them.
const CASES: &[Case] = &[
    ("open a missing file", |d| {
        open(&d.join("x"), OFlags::RDONLY)
    }),
    ("create exclusively twice", |d| {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
        open(&d.join("x"), flags) + &open(&d.join("x"), flags)
    }),
    ("create below a file", |d| {
        fs::write(d.join("f"), "").unwrap();
        open(&d.join("f/x"), OFlags::CREATE | OFlags::WRONLY)
    }),
    ("open a directory for writing", |d| open(d, OFlags::WRONLY)),
    ("open a file as a directory", |d| {
        fs::write(d.join("f"), "").unwrap();
        open(&d.join("f"), OFlags::DIRECTORY)
    }),
    ("open a link without following it", |d| {
        std::os::unix::fs::symlink("f", d.join("l")).unwrap();
        open(&d.join("l"), OFlags::NOFOLLOW)
    }),
    ("links in circles", |d| {
        std::os::unix::fs::symlink("b", d.join("a")).unwrap();
        std::os::unix::fs::symlink("a", d.join("b")).unwrap();
        open(&d.join("a"), OFlags::RDONLY)
    }),
    ("follow a link to a file", |d| {
        fs::write(d.join("f"), "text").unwrap();
        std::os::unix::fs::symlink("f", d.join("l")).unwrap();
        io(fs::read(d.join("l"))) + &io(fs::read_link(d.join("l"))) + &stat(&d.join("l"))
    }),
    ("names of 255 and 256 bytes", |d| {
        let long = "x".repeat(255);
        io(fs::write(d.join(&long), "")) + &io(fs::write(d.join(long + "x"), ""))
    }),
    ("names of any bytes", |d| {
        use std::os::unix::ffi::OsStrExt as _;
        let name = std::ffi::OsStr::from_bytes(b"\xff \n\\");
        fs::write(d.join(name), "text").unwrap();
        io(fs::read(d.join(name))) + &format!("{:?}", names(d))
    }),
    ("mkdir twice", |d| {
        io(fs::create_dir(d.join("x"))) + &io(fs::create_dir(d.join("x")))
    }),
    ("mkdir with a mode", |d| {
        text(rustix::fs::mkdir(d.join("x"), Mode::from_raw_mode(0o1770))) + &stat(&d.join("x"))
    }),
    ("rmdir a directory with entries", |d| {
        fs::create_dir_all(d.join("x/y")).unwrap();
        io(fs::remove_dir(d.join("x"))) + &stat(&d.join("x"))
    }),
    ("rmdir a file, unlink a directory", |d| {
        fs::write(d.join("f"), "").unwrap();
        fs::create_dir(d.join("x")).unwrap();
        io(fs::remove_dir(d.join("f"))) + &io(fs::remove_file(d.join("x")))
    }),
    ("unlink twice", |d| {
        fs::write(d.join("f"), "").unwrap();
        io(fs::remove_file(d.join("f"))) + &io(fs::remove_file(d.join("f")))
    }),
    ("use a file without a name", |d| {
        let mut file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(d.join("f"))
            .unwrap();
        fs::remove_file(d.join("f")).unwrap();
        file.write_all(b"text").unwrap();
        file.set_len(3).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o123))
            .unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut read = String::new();
        file.read_to_string(&mut read).unwrap();
        let meta = file.metadata().unwrap();
        format!("{read} {} {} {:o}", meta.len(), meta.nlink(), meta.mode())
    }),
    ("use a directory without a name", |d| {
        fs::create_dir(d.join("x")).unwrap();
        let x = File::open(d.join("x")).unwrap();
        fs::remove_dir(d.join("x")).unwrap();
        let created = rustix::fs::openat(&x, "f", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU);
        text(created.map(drop)) + &x.metadata().unwrap().is_dir().to_string()
    }),
    ("hard links", |d| {
        fs::write(d.join("a"), "one").unwrap();
        fs::hard_link(d.join("a"), d.join("b")).unwrap();
        fs::write(d.join("b"), "other").unwrap();
        let same = d.join("a").metadata().unwrap().ino() == d.join("b").metadata().unwrap().ino();
        let read = io(fs::read_to_string(d.join("a")));
        fs::remove_file(d.join("a")).unwrap();
        format!("{same} {read} {}", stat(&d.join("b")))
    }),
    ("hard links of directories and onto files", |d| {
        fs::create_dir(d.join("x")).unwrap();
        fs::write(d.join("a"), "").unwrap();
        fs::write(d.join("b"), "").unwrap();
        io(fs::hard_link(d.join("x"), d.join("y"))) + &io(fs::hard_link(d.join("a"), d.join("b")))
    }),
    ("rename onto a file", |d| {
        fs::write(d.join("a"), "new").unwrap();
        fs::write(d.join("b"), "old").unwrap();
        let open = File::open(d.join("b")).unwrap();
        let done = io(fs::rename(d.join("a"), d.join("b")));
        let old = open.metadata().unwrap().nlink();
        done + &io(fs::read(d.join("b"))) + &stat(&d.join("a")) + &old.to_string()
    }),
    ("rename onto directories", |d| {
        fs::create_dir_all(d.join("x/y")).unwrap();
        fs::create_dir_all(d.join("full/z")).unwrap();
        fs::create_dir(d.join("empty")).unwrap();
        fs::write(d.join("f"), "").unwrap();
        let none = RenameFlags::empty();
        [
            ("x", "full"),
            ("x", "f"),
            ("f", "x"),
            ("x", "x/y/x"),
            ("x", "empty"),
            ("x", "gone"),
        ]
        .map(|(from, to)| rename(&d.join(from), &d.join(to), none))
        .concat()
    }),
    ("rename with flags", |d| {
        fs::write(d.join("a"), "a").unwrap();
        fs::create_dir_all(d.join("x/y")).unwrap();
        rename(&d.join("a"), &d.join("x"), RenameFlags::NOREPLACE)
            + &rename(&d.join("a"), &d.join("x"), RenameFlags::EXCHANGE)
            + &stat(&d.join("a/y"))
            + &io(fs::read(d.join("x")))
    }),
    ("files in a renamed directory", |d| {
        fs::create_dir_all(d.join("x/y")).unwrap();
        let mut file = File::create(d.join("x/y/f")).unwrap();
        fs::rename(d.join("x"), d.join("z")).unwrap();
        file.write_all(b"text").unwrap();
        io(fs::read(d.join("z/y/f"))) + &io(fs::read(d.join("x/y/f")))
    }),
    ("modes of all bits", |d| {
        fs::write(d.join("f"), "").unwrap();
        [0o7777, 0o000, 0o4755, 0o2745, 0o1644]
            .map(|mode| {
                let file = fs::Permissions::from_mode(mode);
                io(fs::set_permissions(d.join("f"), file)) + &stat(&d.join("f"))
            })
            .concat()
    }),
    ("chown", |d| {
        fs::write(d.join("f"), "").unwrap();
        fs::set_permissions(d.join("f"), fs::Permissions::from_mode(0o6755)).unwrap();
        std::os::unix::fs::symlink("f", d.join("l")).unwrap();
        io(std::os::unix::fs::chown(d.join("f"), Some(7), None))
            + &io(std::os::unix::fs::lchown(d.join("l"), None, Some(8)))
            + &stat(&d.join("f"))
            + &stat(&d.join("l"))
    }),
    ("times", |d| {
        fs::write(d.join("f"), "").unwrap();
        std::os::unix::fs::symlink("f", d.join("l")).unwrap();
        let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
        let times = Timestamps {
            last_access: time(-5, 7),
            last_modification: time(1_000_000_000, 999_999_999),
        };
        let set = |name: &str| {
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            let set = text(rustix::fs::utimensat(CWD, d.join(name), &times, flags));
            let meta = fs::symlink_metadata(d.join(name)).unwrap();
            format!(
                "{set} {} {} {}",
                meta.atime(),
                meta.mtime(),
                meta.mtime_nsec()
            )
        };
        set("f") + &set("l") + &set(".")
    }),
    ("truncate and grow", |d| {
        fs::write(d.join("f"), "0123456789").unwrap();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(d.join("f"))
            .unwrap();
        file.set_len(4).unwrap();
        file.set_len(6).unwrap();
        let mut bytes = [9; 10];
        let read = file.read_at(&mut bytes, 0).unwrap();
        format!("{read} {bytes:?}")
            + &open(&d.join("f"), OFlags::WRONLY | OFlags::TRUNC)
            + &stat(&d.join("f"))
    }),
    ("holes", |d| {
        let file = File::create(d.join("f")).unwrap();
        file.write_at(b"x", 1 << 20).unwrap();
        let seek = |from| text(rustix::fs::seek(&file, from));
        seek(rustix::fs::SeekFrom::Data(0))
            + &seek(rustix::fs::SeekFrom::Hole(0))
            + &seek(rustix::fs::SeekFrom::Data(1 << 30))
    }),
    ("fallocate", |d| {
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(d.join("f"))
            .unwrap();
        file.write_all_at(&[7; 20_000], 0).unwrap();
        let done = [
            (FallocateFlags::empty(), 0, 30_000),
            (FallocateFlags::KEEP_SIZE, 0, 90_000),
            (
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                4096,
                4096,
            ),
            (FallocateFlags::ZERO_RANGE, 9000, 500),
        ]
        .map(|(flags, at, len)| text(rustix::fs::fallocate(&file, flags, at, len)))
        .concat();
        let bytes = fs::read(d.join("f")).unwrap();
        let sum: u64 = bytes.iter().map(|byte| u64::from(*byte)).sum();
        format!("{done} {} {sum}", bytes.len())
    }),
    ("append", |d| {
        let append = || {
            OpenOptions::new()
                .append(true)
                .create(true)
                .open(d.join("f"))
                .unwrap()
        };
        let (mut a, mut b) = (append(), append());
        for _ in 0..3 {
            a.write_all(b"a").unwrap();
            b.write_all(b"b").unwrap();
        }
        io(fs::read(d.join("f")))
    }),
    ("copy a range", |d| {
        fs::write(d.join("a"), vec![5; 300_000]).unwrap();
        let from = File::open(d.join("a")).unwrap();
        let to = File::create(d.join("b")).unwrap();
        let (mut at, mut into) = (10, 20);
        let copied =
            rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut into), 200_000);
        text(copied)
            + &fs::read(d.join("b"))
                .unwrap()
                .iter()
                .filter(|byte| **byte == 5)
                .count()
                .to_string()
    }),
    ("map a file", |d| {
        fs::write(d.join("f"), "mapped").unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .open(d.join("f"))
            .unwrap();
        mapped(&file)
    }),
    ("attributes of users", |d| {
        fs::write(d.join("f"), "").unwrap();
        let (path, none) = (d.join("f"), XattrFlags::empty());
        let get = || {
            let mut value = [0; 20];
            text(rustix::fs::getxattr(&path, "user.a", &mut value[..])) + &format!("{value:?}")
        };
        text(rustix::fs::setxattr(&path, "user.a", b"value", none))
            + &get()
            + &text(rustix::fs::setxattr(
                &path,
                "user.a",
                b"v",
                XattrFlags::CREATE,
            ))
            + &text(rustix::fs::setxattr(
                &path,
                "user.b",
                b"v",
                XattrFlags::REPLACE,
            ))
            + &text(rustix::fs::removexattr(&path, "user.a"))
            + &get()
    }),
    ("locks in one process", |d| {
        fs::write(d.join("f"), "").unwrap();
        let lock = || {
            let file = File::options()
                .read(true)
                .write(true)
                .open(d.join("f"))
                .unwrap();
            let operation = rustix::fs::FlockOperation::NonBlockingLockExclusive;
            (text(rustix::fs::flock(&file, operation)), file)
        };
        let (first, file) = lock();
        let (second, _) = lock();
        drop(file);
        first + &second + &lock().0
    }),
    ("direct input and output", |d| {
        fs::write(d.join("f"), vec![3; 8192]).unwrap();
        let mut options = OpenOptions::new();
        let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap();
        io(options
            .read(true)
            .custom_flags(direct)
            .open(d.join("f"))
            .map(drop))
    }),
    ("synchronise", |d| {
        let mut file = File::create(d.join("f")).unwrap();
        file.write_all(b"text").unwrap();
        io(file.sync_all()) + &io(file.sync_data()) + &io(File::open(d).unwrap().sync_all())
    }),
    ("a fifo between two threads", |d| {
        let path = d.join("fifo");
        rustix::fs::mknodat(CWD, &path, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        let writer = {
            let path = path.clone();
            std::thread::spawn(move || fs::write(path, "through"))
        };
        let read = io(fs::read_to_string(&path));
        writer.join().unwrap().unwrap();
        read + &stat(&path)
    }),
    ("list a directory of any size", |d| {
        for i in 0..700 {
            fs::write(d.join(format!("file-{i}")), "").unwrap();
        }
        let before = names(d).len();
        // Entries that are removed while they are listed.
        for entry in fs::read_dir(d).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        format!("{before} {}", names(d).len())
    }),
    ("permissions of others", |d| {
        fs::write(d.join("f"), "").unwrap();
        fs::set_permissions(d.join("f"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(d, fs::Permissions::from_mode(0o755)).unwrap();
        let path = d.join("f");
        // Users are those of a thread.
        std::thread::spawn(move || {
            let user = rustix::thread::Uid::from_raw(4321);
            rustix::thread::set_thread_res_uid(user, user, user).unwrap();
            open(&path, OFlags::RDONLY) + &io(fs::create_dir(path.with_file_name("new")))
        })
        .join()
        .unwrap()
    }),
    ("owners of new files", |d| {
        fs::set_permissions(d, fs::Permissions::from_mode(0o777)).unwrap();
        let path = d.to_owned();
        std::thread::spawn(move || {
            let group = rustix::thread::Gid::from_raw(4322);
            rustix::thread::set_thread_res_gid(group, group, group).unwrap();
            let user = rustix::thread::Uid::from_raw(4321);
            rustix::thread::set_thread_res_uid(user, user, user).unwrap();
            fs::write(path.join("f"), "").unwrap();
            fs::create_dir(path.join("x")).unwrap();
            std::os::unix::fs::symlink("f", path.join("l")).unwrap();
        })
        .join()
        .unwrap();
        ["f", "x", "l"].map(|name| stat(&d.join(name))).concat()
    }),
    ("writes of others clear bits", |d| {
        fs::write(d.join("f"), "").unwrap();
        fs::set_permissions(d.join("f"), fs::Permissions::from_mode(0o6777)).unwrap();
        fs::set_permissions(d, fs::Permissions::from_mode(0o777)).unwrap();
        let path = d.join("f");
        std::thread::spawn(move || {
            let user = rustix::thread::Uid::from_raw(4321);
            rustix::thread::set_thread_res_uid(user, user, user).unwrap();
            fs::write(path, "x").unwrap();
        })
        .join()
        .unwrap();
        stat(&d.join("f"))
    }),
];

fn names(path: &Path) -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    names
}

#[expect(unsafe_code, reason = "a mapping of a file that nobody else uses")]
fn mapped(file: &File) -> String {
    use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the mapping is new, and is only used within its first page, here.
    unsafe {
        let at = mmap(
            std::ptr::null_mut(),
            4096,
            access,
            MapFlags::SHARED,
            file,
            0,
        )
        .unwrap();
        let bytes = std::slice::from_raw_parts_mut(at.cast::<u8>(), 6);
        let before = String::from_utf8_lossy(bytes).into_owned();
        bytes[0] = b'M';
        msync(at, 4096, MsyncFlags::SYNC).unwrap();
        munmap(at, 4096).unwrap();
        let mut after = [0; 6];
        file.read_exact_at(&mut after, 0).unwrap();
        format!("{before} {after:?}")
    }
}

/// Compares the results of all cases but some.
fn compare(options: ShareOptions, except: &[&str]) {
    let (shared, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let Some(mounted) = Mounted::new(shared.path(), options) else {
        return;
    };
    let cases = CASES.iter().filter(|case| !except.contains(&case.0));
    for (index, (name, case)) in cases.enumerate() {
        let results = [plain.path(), mounted.guest.as_path()].map(|root| {
            let folder = root.join(index.to_string());
            fs::create_dir(&folder).unwrap();
            case(&folder)
        });
        assert_eq!(
            results[1], results[0],
            "{name}: the server differs from the host"
        );
        // Nothing is only in the guest's cache.
        let host = mounted.host.join(index.to_string());
        assert_eq!(
            names(&host),
            names(&plain.path().join(index.to_string())),
            "{name}"
        );
    }
    let server = mounted.unmount();
    assert_eq!(server.counts().handles, 0);
}

#[test]
fn cases_of_posix() {
    compare(ShareOptions::default(), &[]);
}

#[test]
fn cases_of_posix_in_an_exclusive_share() {
    // With delayed writes, only the guest knows holes, and it reports none.
    let options = ShareOptions::default().cache(CacheMode::Exclusive);
    compare(options, &["holes"]);
}
