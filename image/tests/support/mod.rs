//! Hand-written layers, and images of them.
#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod home;

use std::path::Path;

use sm_image::{Compression, Config, Digest, LayoutBuilder};

/// A tar entry, written field by field without checks.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: u8,
    pub(crate) mode: u32,
    pub(crate) owner: (u64, u64),
    pub(crate) mtime: u64,
    pub(crate) link: Vec<u8>,
    pub(crate) device: (u32, u32),
    pub(crate) data: Vec<u8>,
    /// Size in the header, instead of the data's length.
    pub(crate) size: Option<u64>,
    pub(crate) pax: Vec<(String, Vec<u8>)>,
}

pub(crate) fn entry(path: impl AsRef<[u8]>, kind: u8) -> Entry {
    Entry {
        path: path.as_ref().to_vec(),
        kind,
        mode: if kind == b'5' { 0o755 } else { 0o644 },
        owner: (0, 0),
        mtime: 1_700_000_000,
        link: Vec::new(),
        device: (0, 0),
        data: Vec::new(),
        size: None,
        pax: Vec::new(),
    }
}

pub(crate) fn file(path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Entry {
    Entry {
        data: data.as_ref().to_vec(),
        ..entry(path, b'0')
    }
}

pub(crate) fn dir(path: impl AsRef<[u8]>) -> Entry {
    entry(path, b'5')
}

pub(crate) fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Entry {
    Entry {
        link: target.as_ref().to_vec(),
        mode: 0o777,
        ..entry(path, b'2')
    }
}

pub(crate) fn hardlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Entry {
    Entry {
        link: target.as_ref().to_vec(),
        ..entry(path, b'1')
    }
}

pub(crate) fn whiteout(path: &str) -> Entry {
    file(path, b"")
}

impl Entry {
    pub(crate) fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub(crate) fn owner(mut self, uid: u64, gid: u64) -> Self {
        self.owner = (uid, gid);
        self
    }

    pub(crate) fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.to_owned(), value.as_ref().to_vec()));
        self
    }

    pub(crate) fn device(mut self, major: u32, minor: u32) -> Self {
        self.device = (major, minor);
        self
    }

    pub(crate) fn size(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }

    fn write(&self, tar: &mut Vec<u8>) {
        let mut pax = self.pax.clone();
        if self.path.len() > 100 {
            pax.push(("path".to_owned(), self.path.clone()));
        }
        if self.link.len() > 100 {
            pax.push(("linkpath".to_owned(), self.link.clone()));
        }
        if !pax.is_empty() {
            let mut records = Vec::new();
            for (key, value) in &pax {
                let rest = key.len() + value.len() + 3;
                let len = (1..8).map(|digits| rest + digits);
                let len = len
                    .into_iter()
                    .find(|len| len.to_string().len() + rest == *len);
                records.extend_from_slice(format!("{} {key}=", len.unwrap()).as_bytes());
                records.extend_from_slice(value);
                records.push(b'\n');
            }
            raw(
                tar,
                &entry("pax", b'x').size(records.len() as u64),
                &records,
            );
        }
        raw(tar, self, &self.data);
    }
}

/// Writes a header and padded data.
fn raw(tar: &mut Vec<u8>, entry: &Entry, data: &[u8]) {
    let mut header = tar::Header::new_ustar();
    {
        let old = header.as_old_mut();
        let path = &entry.path[..entry.path.len().min(100)];
        old.name[..path.len()].copy_from_slice(path);
        let link = &entry.link[..entry.link.len().min(100)];
        old.linkname[..link.len()].copy_from_slice(link);
        old.linkflag = [entry.kind];
    }
    header.set_mode(entry.mode);
    header.set_uid(entry.owner.0);
    header.set_gid(entry.owner.1);
    header.set_mtime(entry.mtime);
    header.set_size(entry.size.unwrap_or(data.len() as u64));
    header.set_device_major(entry.device.0).unwrap();
    header.set_device_minor(entry.device.1).unwrap();
    header.set_cksum();
    tar.extend_from_slice(header.as_bytes());
    tar.extend_from_slice(data);
    tar.resize(tar.len().next_multiple_of(512), 0);
}

pub(crate) fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut tar = Vec::new();
    for entry in entries {
        entry.write(&mut tar);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

/// Writes an image of these tar streams, tagged `latest`.
pub(crate) fn image(layout: &Path, layers: &[Vec<u8>]) -> Digest {
    let mut builder = LayoutBuilder::new(layout, Compression::Gzip(1)).unwrap();
    for layer in layers {
        builder.layer(layer.as_slice()).unwrap();
    }
    builder.finish("latest", Config::default()).unwrap()
}
