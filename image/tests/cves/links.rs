//! Links that a later entry writes through.

use super::Outcome::{Inside, Refused};
use super::support::{Entry, dir, entry, file, hardlink, symlink, tar, whiteout};
use super::{Case, DOTS, one, raw};

pub(crate) fn links() -> Vec<Case> {
    let out = || symlink("l", "/etc");
    let up = || symlink("l", "../../../../../../etc");
    let deep = "d".repeat(247);
    let mut chain: Vec<Entry> = Vec::new();
    let mut path = String::new();
    for letter in "abcdefghijklmnop".chars() {
        chain.push(dir(format!("{path}{deep}")));
        chain.push(symlink(format!("{path}{letter}"), &deep));
        path = format!("{path}{letter}/");
    }
    chain.push(symlink(format!("{path}escape"), "../".repeat(17) + "etc"));
    chain.push(file(format!("{path}escape/x"), b"x"));
    vec![
        one(
            "CVE-2002-1216",
            "GNU tar: through a link",
            &[out(), file("l/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2006-6097",
            "GNU tar: a record of names",
            &[entry("names", b'N')],
            Refused(&["type 'N'"]),
        ),
        one(
            "CVE-2011-5325",
            "BusyBox: through a link",
            &[up(), file("l/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2015-8860",
            "node-tar: a link that leaves",
            &[up(), file("l/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2018-12015",
            "Perl: a link and a file of one name",
            &[symlink("l", "/etc/passwd"), file("l", b"x")],
            Inside,
        ),
        one(
            "CVE-2018-20834",
            "node-tar: a hard link, then a file of its name",
            &[hardlink("h", "/etc/passwd"), file("h", b"x")],
            Refused(&["does not exist"]),
        ),
        one(
            "CVE-2018-20990",
            "tar-rs: a hard link that leaves",
            &[hardlink("h", "../../etc/passwd")],
            DOTS,
        ),
        one(
            "CVE-2021-38511",
            "tar-rs: directories through a link",
            &[out(), dir("l/made"), dir("l/made/too")],
            Inside,
        ),
        one(
            "CVE-2021-32803",
            "node-tar: a directory becomes a link",
            &[dir("d"), symlink("d", "/etc"), file("d/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2021-37701",
            "node-tar: names that differ by slashes",
            &[dir("a\\b"), symlink("a\\b", "/etc"), file("a\\b/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2021-37712",
            "node-tar: names that look alike",
            &[
                dir("\u{e9}"),
                symlink("e\u{301}", "/etc"),
                file("e\u{301}/x", b"x"),
            ],
            Inside,
        ),
        one(
            "CVE-2020-29529",
            "go-slug: a chain of links",
            &[
                symlink("a", "b/.."),
                symlink("b", ".."),
                file("a/b/x", b"x"),
            ],
            Inside,
        ),
        one(
            "CVE-2021-21272",
            "ORAS: a hard link to a link",
            &[
                symlink("l", "/etc/passwd"),
                hardlink("h", "l"),
                file("h", b"x"),
            ],
            Inside,
        ),
        one(
            "CVE-2024-0406",
            "archiver: through a link",
            &[symlink("l", "/tmp"), file("l/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2025-4517",
            "Python: a path too long to be resolved",
            &chain,
            Inside,
        ),
        one(
            "CVE-2024-12718",
            "Python: metadata of what is outside",
            &[symlink("l", ".."), dir("l").mode(0o777)],
            Inside,
        ),
        raw(
            "CVE-2025-45582",
            "GNU tar: in two steps",
            vec![
                tar(&[symlink("x", "../../.ssh")]),
                tar(&[file("x/authorized_keys", b"x")]),
            ],
            Inside,
        ),
        one(
            "CVE-2026-26158",
            "BusyBox: a hard link that is not checked",
            &[hardlink("h", "/etc/shadow")],
            Refused(&["does not exist"]),
        ),
        one(
            "CVE-2026-42496",
            "Perl: a link to anywhere",
            &[symlink("l", "/etc/shadow")],
            Inside,
        ),
        one(
            "CVE-2016-5418",
            "libarchive: a hard link with contents",
            &[
                symlink("l", "/etc/passwd"),
                Entry {
                    data: b"xxxx".to_vec(),
                    ..hardlink("h", "l")
                },
            ],
            Refused(&["not a tar archive"]),
        ),
        one(
            "CVE-2021-31566",
            "libarchive: attributes of what a link means",
            &[symlink("l", "/etc")
                .mode(0o777)
                .pax("SCHILY.xattr.user.a", b"b")],
            Inside,
        ),
        raw(
            "CVE-2014-6407",
            "Docker: links of a lower layer",
            vec![
                tar(&[out(), hardlink("k", "l")]),
                tar(&[file("l/x", b"x"), file("k/y", b"y")]),
            ],
            Inside,
        ),
        one(
            "CVE-2014-9356",
            "Docker: an absolute link",
            &[symlink("tmp", "/"), file("tmp/etc/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2015-3629",
            "libcontainer: a link in place of a mount point",
            &[symlink("proc", "/etc"), symlink("dev", "../..")],
            Inside,
        ),
        one(
            "CVE-2018-15664",
            "docker cp: a directory that becomes a link",
            &[dir("d"), whiteout(".wh.d"), symlink("d", "/")],
            Inside,
        ),
        one(
            "CVE-2019-5736",
            "runc: a program that is the runtime",
            &[symlink("bin", "/proc/self/exe")],
            Inside,
        ),
        one(
            "CVE-2019-19921",
            "runc: /proc is elsewhere",
            &[symlink("proc", "/evil/level1")],
            Inside,
        ),
        one(
            "CVE-2020-10696",
            "buildah: through a link",
            &[out(), file("l/cron.d/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2021-29136",
            "umoci: the root is a link",
            &[symlink(".", "/etc")],
            Refused(&["root of the file system"]),
        ),
        one(
            "CVE-2021-29136",
            "umoci: the root is a link, by a slash",
            &[symlink("/", "/etc")],
            Refused(&["root of the file system"]),
        ),
        one(
            "CVE-2021-30465",
            "runc: a directory that becomes a link",
            &[symlink("m", "/"), dir("m"), symlink("m", "/etc")],
            Inside,
        ),
        one(
            "CVE-2021-32760",
            "containerd: permissions through a hard link",
            &[file("f", b"x").mode(0o4755), hardlink("h", "f").mode(0o777)],
            Inside,
        ),
        one(
            "CVE-2024-9676",
            "containers/storage: /etc/passwd is a link",
            &[
                symlink("etc/passwd", "/dev/zero"),
                symlink("etc/group", "/proc/self/mem"),
            ],
            Inside,
        ),
        one(
            "CVE-2026-41579",
            "runc: /dev is a link",
            &[symlink("dev", "/home/user")],
            Inside,
        ),
    ]
}
