//! Images with many files, and with unusual files.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::Result;

use super::FidelityBuilder;
use crate::paths;

const LAYERS: usize = 100;
const SMALL_FILES: usize = 60_000;
/// A size that exceeds 31 bits.
const LARGE: u64 = (2 << 30) + 12_345;

impl FidelityBuilder {
    /// Creates a hundred layers that add, change and remove files of earlier ones.
    pub(super) fn many_layers(&self) -> Result<()> {
        self.empty("layers")?;
        let root = self.directory.path().join("one");
        for number in 0..LAYERS - 1 {
            fs::create_dir_all(root.join("srv/d"))?;
            fs::write(root.join("srv/counter"), format!("{number}\n"))?;
            fs::write(
                root.join(format!("srv/d/file-{number}")),
                number.to_string(),
            )?;
            if number % 10 == 9 {
                fs::write(root.join(format!("srv/d/.wh.file-{}", number - 5)), "")?;
            }
            if number == 50 {
                fs::create_dir_all(root.join("srv/e"))?;
                fs::write(root.join("srv/e/.wh..wh..opq"), "")?;
            }
            if number % 25 == 3 {
                fs::create_dir_all(root.join("srv/e"))?;
                fs::write(root.join(format!("srv/e/{number}")), "e")?;
            }
            self.add_directory("layers", &root)?;
            paths::remove(&root)?;
        }
        self.finish("layers")
    }

    /// Creates as many small files as a large `node_modules`.
    pub(super) fn small_files(&self) -> Result<()> {
        let root = self.directory.path().join("small");
        for number in 0..SMALL_FILES {
            let directory = root.join(format!("p{}/d{}", number / 600, number / 40 % 15));
            if number % 40 == 0 {
                fs::create_dir_all(&directory)?;
            }
            let text = format!("module.exports = {number};\n").repeat(number % 97);
            fs::write(directory.join(format!("m{number}.js")), text)?;
        }
        self.empty("small")?;
        self.add_directory("small", &root)?;
        paths::remove(&root)?;
        self.finish("small")
    }

    /// Creates a sparse file of more than 2 GiB.
    pub(super) fn large_file(&self) -> Result<()> {
        let root = self.directory.path().join("large");
        fs::create_dir(&root)?;
        let file = File::create(root.join("large"))?;
        file.set_len(LARGE)?;
        for place in (0..LARGE).step_by(33 << 20) {
            file.write_all_at(format!("at {place}").as_bytes(), place)?;
        }
        file.write_all_at(b"the end", LARGE - 7)?;
        self.empty("large")?;
        self.add_directory("large", &root)?;
        paths::remove(&root)?;
        self.finish("large")
    }

    /// Creates files with unusual names, types, times and attributes.
    pub(super) fn odd_files(&self) -> Result<()> {
        let root = self.directory.path().join("odd");
        fs::create_dir_all(root.join("names"))?;
        let long = "n".repeat(255);
        let names: [&[u8]; 12] = [
            b"new\nline",
            b"tab\tand \"quotes\"",
            b"not-utf8-\xff\xfe",
            b" leading and trailing ",
            b"-dash",
            b"back\\slash",
            b"\xc3\xa9",
            b"e\xcc\x81",
            b"Case",
            b"case",
            b"...",
            long.as_bytes(),
        ];
        for name in names {
            fs::write(root.join("names").join(OsStr::from_bytes(name)), name)?;
        }
        let deep = root.join(["d"; 200].join("/"));
        fs::create_dir_all(&deep)?;
        fs::write(deep.join("bottom"), "deep")?;

        // The sizes around the limits between storage formats.
        fs::create_dir(root.join("sizes"))?;
        for size in [
            0, 1, 2047, 2048, 2049, 3000, 4031, 4032, 4095, 4096, 4097, 65_537,
        ] {
            fs::write(root.join(format!("sizes/{size}")), vec![b'x'; size])?;
        }
        std::os::unix::fs::symlink("t/".repeat(1000), root.join("long-link"))?;
        fs::write(root.join("linked"), "linked")?;
        for number in 0..50 {
            fs::hard_link(root.join("linked"), root.join(format!("linked-{number}")))?;
        }
        let sh = |script: &str, at: &Path| self.run("sh", &["-ec", script, "sh"], &[at]);
        sh(
            "cd \"$1\"
            mkfifo fifo; mknod null c 1 3; mknod disk b 259 70000; chmod 666 null
            echo suid >suid; chmod 4755 suid; echo sgid >sgid; chmod 2755 sgid
            mkdir sticky; chmod 1777 sticky; echo none >none; chmod 0 none
            echo owner >owner; chown 4000000000:3000000000 owner
            echo old >old; touch -d '1960-02-03 04:05:06.789' old
            echo future >future; touch -d '2200-01-01 00:00:00.123456789' future
            mkdir xattrs; cd xattrs; cp /bin/busybox ping; setcap cap_net_raw+ep ping
            echo x >user; setfattr -n user.one -v 1 user; setfattr -n user.two -v 0x000a3d user
            setfattr -n user.long -v $(head -c 2500 /dev/zero | tr '\\0' v) user
            echo x >trusted; setfattr -n trusted.t -v secret trusted
            for n in 1 2 3 4 5 6 7 8 9; do echo $n >label-$n
            setfattr -n user.label -v system_u:object_r:bin_t:s0 label-$n; done
            mkdir dir; setfattr -n user.d -v dir dir",
            &root,
        )?;
        self.empty("odd")?;
        self.add_directory("odd", &root)?;
        paths::remove(&root)?;
        self.finish("odd")
    }
}
