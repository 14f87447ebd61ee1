//! The initial RAM file system: the agent as `/init`, and the modules that a
//! distribution's kernel needs.
//!
//! It is a cpio archive in the `newc` format (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`), written to memory: it
//! is small, and writing it costs less than reading a cached copy.

use std::io;

use sm_snapshot::state_file::{combined_digest, hex_digest};

use crate::guest_agent::Agent;

/// Version of the layout. It must be raised when [`Initramfs::build`] writes another
/// archive from the same contents, because snapshots of the old one must not be used any
/// more.
const LAYOUT: u32 = 1;

/// The agent's list of modules in the archive: one path per line, in load order.
const MODULE_LIST: &str = "sm/modules.list";

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFCHR: u32 = 0o020_000;

/// A kernel module that the agent loads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// File name, such as `virtio_blk.ko.xz`.
    pub(crate) name: String,
    /// Contents.
    pub(crate) bytes: Vec<u8>,
}

/// Contents of an initial RAM file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Initramfs {
    pub(crate) agent: Agent,
    /// Modules in load order.
    pub(crate) modules: Vec<Module>,
}

impl Initramfs {
    /// Returns a hexadecimal digest that identifies the archive; computed without
    /// building it.
    pub(crate) fn digest(&self) -> String {
        let mut parts = vec![LAYOUT.to_string(), self.agent.digest()];
        for module in &self.modules {
            parts.push(module.name.clone());
            parts.push(hex_digest(&module.bytes));
        }
        let parts: Vec<_> = parts.iter().map(String::as_bytes).collect();
        combined_digest(&parts)
    }

    /// Builds the archive.
    pub(crate) fn build(&self) -> io::Result<Vec<u8>> {
        build(self.agent.bytes(), &self.modules)
    }
}

fn build(agent: &[u8], modules: &[Module]) -> io::Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "sm", "sm/modules"] {
        archive.entry(directory, S_IFDIR | 0o755, (0, 0), &[])?;
    }
    // The kernel opens the console for PID 1 before anything is mounted.
    archive.entry("dev/console", S_IFCHR | 0o600, (5, 1), &[])?;
    archive.entry("dev/null", S_IFCHR | 0o666, (1, 3), &[])?;
    archive.entry("init", S_IFREG | 0o755, (0, 0), agent)?;
    if !modules.is_empty() {
        let mut list = String::new();
        for module in modules {
            let path = format!("sm/modules/{}", module.name);
            archive.entry(&path, S_IFREG | 0o644, (0, 0), &module.bytes)?;
            list.push('/');
            list.push_str(&path);
            list.push('\n');
        }
        archive.entry(MODULE_LIST, S_IFREG | 0o644, (0, 0), list.as_bytes())?;
    }
    archive.finish()
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        (major, minor): (u32, u32),
        data: &[u8],
    ) -> io::Result<()> {
        self.inodes += 1;
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let too_long = |_| io::Error::new(io::ErrorKind::InvalidInput, "too long for an archive");
        let size = u32::try_from(data.len()).map_err(too_long)?;
        let name_size = u32::try_from(path.len() + 1).map_err(too_long)?;
        self.bytes.extend_from_slice(b"070701");
        for field in [
            self.inodes, // inode
            mode,
            0, // owner
            0, // group
            links,
            0, // modification time: the same input makes the same archive
            size,
            0, // device
            0,
            major,
            minor,
            name_size,
            0, // checksum, unused in this format
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        let len = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(len, 0);
    }

    fn finish(mut self) -> io::Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Parses an archive by the rules of the format.
    fn entries(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&bytes[110..110 + name_size - 1]).unwrap();
            assert_eq!(bytes[110 + name_size - 1], 0);
            let data = (110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return found;
            }
            found.push((name.to_owned(), mode, bytes[data..data + size].to_vec()));
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn everything_that_changes_the_archive_changes_its_digest() {
        let module = |name: &str, bytes: &str| Module {
            name: name.to_owned(),
            bytes: bytes.as_bytes().to_vec(),
        };
        let of = |agent: &str, modules: &[Module]| Initramfs {
            agent: agent.as_bytes().to_vec().into(),
            modules: modules.to_vec(),
        };
        let all = [
            of("agent", &[]),
            of("other", &[]),
            of("agent", &[module("a.ko", "1")]),
            of("agent", &[module("a.ko", "2")]),
            of("agent", &[module("b.ko", "1")]),
            of("agent", &[module("a.ko", "1"), module("b.ko", "1")]),
            of("agent", &[module("b.ko", "1"), module("a.ko", "1")]),
        ];
        let digests: HashSet<_> = all.iter().map(Initramfs::digest).collect();
        assert_eq!(digests.len(), all.len());
    }

    #[test]
    fn another_archive_of_the_same_contents_has_another_layout() {
        let contents = Initramfs {
            agent: b"agent".to_vec().into(),
            modules: vec![Module {
                name: "a.ko".to_owned(),
                bytes: b"module".to_vec(),
            }],
        };
        let built = hex_digest(&contents.build().unwrap());
        assert_eq!(
            (LAYOUT, &built[..16]),
            (1, "e1839f80a4f00995"),
            "raise LAYOUT, and then write the new digest here"
        );
    }

    #[test]
    fn the_agent_is_init_and_modules_are_listed_in_order() {
        let module = |name: &str| Module {
            name: name.to_owned(),
            bytes: name.as_bytes().to_vec(),
        };
        let bytes = build(b"agent", &[module("b.ko"), module("a.ko")]).unwrap();
        let entries = entries(&bytes);
        let find = |name: &str| entries.iter().find(|(n, ..)| n == name).unwrap();
        assert_eq!(find("init").1, 0o100_755);
        assert_eq!(find("init").2, b"agent");
        assert_eq!(find("sm/modules/a.ko").2, b"a.ko");
        assert_eq!(
            find("sm/modules.list").2,
            b"/sm/modules/b.ko\n/sm/modules/a.ko\n"
        );
        // A directory precedes its entries.
        let position = |name: &str| entries.iter().position(|(n, ..)| n == name).unwrap();
        assert!(position("dev") < position("dev/console"));
    }
}
