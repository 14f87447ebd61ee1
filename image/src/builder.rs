//! Writing of OCI image layouts (OCI image-spec image-layout.md), for demo and test
//! images, and for users who want an image of a root file system.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use crate::Error;
use crate::config::{Config, ImageConfig};
use crate::digest::{Digest, HashingReader};
use crate::documents::{
    BlobDescriptor, ImageIndex, ImageManifest, OCI_CONFIG, OCI_LAYER, OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD, OCI_MANIFEST, REF_NAME, parse,
};
use crate::platform::Platform;
use sm_tar::{DirectoryTar, END, TarHeader, TarKind, encode, padding};

/// Compression of a stored layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// No compression.
    None,
    /// Gzip, at this level (0 to 9).
    Gzip(u32),
    /// Zstandard, at this level (1 to 22).
    Zstd(i32),
}

/// Type of a file created from memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryFile {
    /// A regular file.
    File(Vec<u8>),
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// A hard link to this path.
    Hardlink(Vec<u8>),
}

/// Creates one image in a layout directory.
///
/// Layers are written immediately. [`Self::finish`] adds the image to the layout's index.
#[derive(Debug)]
pub struct LayoutBuilder<'a> {
    directory: &'a Path,
    compression: Compression,
    platform: Platform,
    layers: Vec<BlobDescriptor>,
    diff_ids: Vec<Digest>,
}

impl<'a> LayoutBuilder<'a> {
    /// Starts an image in the layout at `directory`, which is created if it does not
    /// exist.
    ///
    /// # Errors
    /// The directory cannot be created or written.
    pub fn new(directory: &'a Path, compression: Compression) -> Result<Self, Error> {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(Error::file("create directory", &blobs))?;
        let version = directory.join("oci-layout");
        fs::write(&version, br#"{"imageLayoutVersion":"1.0.0"}"#)
            .map_err(Error::file("write", &version))?;
        Ok(Self {
            directory,
            compression,
            platform: Platform::host(),
            layers: Vec::new(),
            diff_ids: Vec::new(),
        })
    }

    /// Sets the platform of the image. The default is Linux on this host's architecture.
    #[must_use]
    pub fn platform(mut self, platform: Platform) -> Self {
        self.platform = platform;
        self
    }

    /// Adds the contents of a host directory as a layer, with owners, times and extended
    /// attributes.
    ///
    /// # Errors
    /// A file cannot be read, or the blob cannot be written.
    pub fn directory_layer(&mut self, directory: &Path) -> Result<(), Error> {
        self.layer(DirectoryTar::new(directory))
    }

    /// Adds files from memory as a layer: path, permission bits, contents. They are owned
    /// by root and have time 0.
    ///
    /// # Errors
    /// The blob cannot be written.
    pub fn memory_layer(&mut self, files: &[(&str, u16, MemoryFile)]) -> Result<(), Error> {
        let mut tar = Vec::new();
        for (path, mode, file) in files {
            let (kind, data) = match file {
                MemoryFile::File(data) => (TarKind::File, data.as_slice()),
                MemoryFile::Directory => (TarKind::Directory, &b""[..]),
                MemoryFile::Symlink(target) => (TarKind::Symlink(target.clone()), &b""[..]),
                MemoryFile::Hardlink(target) => (TarKind::Hardlink(target.clone()), &b""[..]),
            };
            let size = data.len() as u64;
            tar.extend_from_slice(&encode(&TarHeader {
                path: path.as_bytes().to_vec(),
                kind,
                mode: *mode,
                uid: 0,
                gid: 0,
                mtime: (0, 0),
                size,
                sparse: None,
                xattrs: Vec::new(),
            }));
            tar.extend_from_slice(data);
            tar.resize(tar.len() + padding(size), 0);
        }
        tar.extend_from_slice(&END);
        self.layer(tar.as_slice())
    }

    /// Adds a layer from a tar stream, without changes.
    ///
    /// # Errors
    /// The stream cannot be read or the blob cannot be written.
    pub fn layer(&mut self, tar: impl Read) -> Result<(), Error> {
        let blobs = self.directory.join("blobs/sha256");
        let failed = |error| Error::file("write a layer to", &blobs)(error);
        let mut blob = tempfile::NamedTempFile::new_in(&blobs).map_err(failed)?;
        let mut tar = HashingReader::new(tar, std::rc::Rc::default());
        compress(&mut tar, self.compression, blob.as_file_mut()).map_err(failed)?;
        let (diff_id, _) = tar.finish();
        let stored = blob.reopen().map_err(failed)?;
        let mut stored = HashingReader::new(stored, std::rc::Rc::default());
        stored.drain().map_err(failed)?;
        let (digest, size) = stored.finish();
        let path = blobs.join(digest.hex());
        blob.persist(&path)
            .map_err(|error| Error::file("write", &path)(error.error))?;
        let kind = match self.compression {
            Compression::None => OCI_LAYER,
            Compression::Gzip(_) => OCI_LAYER_GZIP,
            Compression::Zstd(_) => OCI_LAYER_ZSTD,
        };
        self.layers.push(BlobDescriptor::new(kind, size, digest));
        self.diff_ids.push(diff_id);
        Ok(())
    }

    /// Writes configuration and manifest, and names the image `tag`. An image that had
    /// this name before loses it. Returns the manifest's digest.
    ///
    /// # Errors
    /// The layout's index cannot be read, or a file cannot be written.
    pub fn finish(self, tag: &str, config: Config) -> Result<Digest, Error> {
        let mut image = ImageConfig::new(self.platform.parts(), &self.diff_ids);
        image.config = Some(config);
        let (digest, size) = self.document("configuration", &image)?;
        let config = BlobDescriptor::new(OCI_CONFIG, size, digest);
        let manifest = ImageManifest::new(config, self.layers.clone());
        let (digest, size) = self.document("manifest", &manifest)?;
        let mut named = BlobDescriptor::new(OCI_MANIFEST, size, digest);
        named.annotations = Some([(REF_NAME.to_owned(), tag.to_owned())].into());
        self.add_to_index(tag, named)?;
        Ok(digest)
    }

    fn document(&self, what: &str, value: &impl serde::Serialize) -> Result<(Digest, u64), Error> {
        let bytes = serde_json::to_vec(value).map_err(|error| Error::document(what, error))?;
        let digest = Digest::of(&bytes);
        let path = self.directory.join("blobs/sha256").join(digest.hex());
        fs::write(&path, &bytes).map_err(Error::file("write", &path))?;
        Ok((digest, bytes.len() as u64))
    }

    fn add_to_index(&self, tag: &str, image: BlobDescriptor) -> Result<(), Error> {
        let path = self.directory.join("index.json");
        let mut index: ImageIndex = match fs::read(&path) {
            Ok(bytes) => parse(&bytes, "index")?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => ImageIndex::new(Vec::new()),
            Err(error) => return Err(Error::file("read", &path)(error)),
        };
        let has_tag = |known: &BlobDescriptor| known.annotation(REF_NAME) == Some(tag);
        index.manifests.retain(|known| !has_tag(known));
        index.manifests.push(image);
        let bytes = serde_json::to_vec(&index).map_err(|error| Error::document("index", error))?;
        let failed = |error| Error::file("write", &path)(error);
        let mut fresh = tempfile::NamedTempFile::new_in(self.directory).map_err(failed)?;
        fresh.write_all(&bytes).map_err(failed)?;
        fresh.persist(&path).map_err(|error| failed(error.error))?;
        Ok(())
    }
}

fn compress(tar: &mut impl Read, compression: Compression, blob: &mut File) -> io::Result<()> {
    match compression {
        Compression::None => io::copy(tar, blob).map(drop),
        Compression::Gzip(level) => {
            let level = flate2::Compression::new(level.min(9));
            let mut encoder = flate2::write::GzEncoder::new(blob, level);
            io::copy(tar, &mut encoder)?;
            encoder.finish().map(drop)
        }
        Compression::Zstd(level) => zstd::stream::copy_encode(tar, blob, level),
    }
}
