//! Export of images to one archive for `docker load`, `podman load`, skopeo, and
//! [`Store::load`]: an OCI image layout together with the `manifest.json` of Docker
//! archives, as Docker writes since version 25.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read, Write};

use serde::Serialize;

use super::Store;
use super::export::{Exported, Form};
use super::options::PullOptions;
use super::written;
use crate::Error;
use crate::digest::{Digest, HashingReader};
use crate::docker_reference::DockerReference;
use crate::documents::{FULL_NAME, REF_NAME};
use sm_tar::{END, TarHeader, TarKind, encode, padding};

/// An item of `manifest.json`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ManifestItem {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

impl Store {
    /// Writes images, each given by a name or an ID prefix, to an archive. Stored
    /// original data is written byte for byte; layers whose original was uncompressed, or
    /// is not stored, are written as plain tar streams.
    ///
    /// # Errors
    /// An image is missing or corrupt, or `out` cannot be written.
    pub fn save(
        &self,
        queries: &[String],
        out: &mut dyn Write,
        options: &PullOptions<'_>,
    ) -> Result<(), Error> {
        let options = &options.child();
        let work = self.begin()?;
        let store = &work.store;
        let mut archive = ArchiveWriter {
            out,
            written: BTreeSet::new(),
        };
        archive.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let mut manifests = Vec::new();
        let mut items: Vec<ManifestItem> = Vec::new();
        for query in queries {
            let (found, record) = work.needed_image(query)?;
            let exported =
                store.export(found.digest, &record, Form::Plain, &|_, _| false, options)?;
            archive.image(store, &exported)?;
            let size = exported.manifest.len() as u64;
            let digest = Digest::of(&exported.manifest);
            let name = DockerReference::parse(&found.reference).ok();
            let name = name.filter(|_| found.reference != found.digest.to_string());
            let annotations = name
                .as_ref()
                .map(|name| annotations(&name.full(), name.tag().unwrap_or_default()));
            let kind = &exported.manifest_type;
            manifests.push(written::entry(kind, digest, size, annotations)?);
            let tag = name.filter(|name| name.tag().is_some());
            items.push(ManifestItem {
                config: blob(Digest::of(&exported.config)),
                repo_tags: tag.iter().map(ToString::to_string).collect(),
                layers: exported
                    .layers
                    .iter()
                    .map(|layer| blob(layer.digest))
                    .collect(),
            });
        }
        archive.json("index.json", &written::index(manifests)?)?;
        archive.json("manifest.json", &merged(items))?;
        archive.out.write_all(&END).map_err(unwritable)?;
        archive.out.flush().map_err(unwritable)
    }
}

/// Merges items into one for each image, with all its names.
fn merged(items: Vec<ManifestItem>) -> Vec<ManifestItem> {
    let mut merged: Vec<ManifestItem> = Vec::new();
    for item in items {
        match merged.iter_mut().find(|known| known.config == item.config) {
            Some(known) => known.repo_tags.extend(item.repo_tags),
            None => merged.push(item),
        }
    }
    merged
}

/// Returns the annotations of an image in an index: its name, in the forms that tools
/// use.
fn annotations(name: &str, tag: &str) -> HashMap<String, String> {
    HashMap::from(
        [(FULL_NAME, name), (REF_NAME, tag)].map(|(key, value)| (key.to_owned(), value.to_owned())),
    )
}

fn blob(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn unwritable(error: io::Error) -> Error {
    Error::Archive(error)
}

/// An archive that is being written.
struct ArchiveWriter<'o> {
    out: &'o mut dyn Write,
    /// Blobs that have been written.
    written: BTreeSet<Digest>,
}

impl ArchiveWriter<'_> {
    fn image(&mut self, store: &Store, image: &Exported) -> Result<(), Error> {
        for document in [&image.config, &image.manifest] {
            let digest = Digest::of(document);
            if self.written.insert(digest) {
                self.file(&blob(digest), document)?;
            }
        }
        for layer in &image.layers {
            if !self.written.insert(layer.digest) {
                continue;
            }
            let mut stream = HashingReader::new(image.open(store, layer)?, std::rc::Rc::default());
            self.stream(&blob(layer.digest), layer.size, &mut stream)?;
            let (found, _) = stream.finish();
            if found != layer.digest {
                return Err(Error::Blob {
                    digest: layer.digest.to_string(),
                    reason: format!("its contents in the store have digest {found}"),
                });
            }
        }
        Ok(())
    }

    fn json(&mut self, path: &str, value: &impl Serialize) -> Result<(), Error> {
        let bytes = serde_json::to_vec(value).map_err(|error| Error::document(path, error))?;
        self.file(path, &bytes)
    }

    fn file(&mut self, path: &str, bytes: &[u8]) -> Result<(), Error> {
        self.stream(path, bytes.len() as u64, &mut &*bytes)
    }

    fn stream(&mut self, path: &str, size: u64, contents: &mut dyn Read) -> Result<(), Error> {
        let header = encode(&TarHeader {
            path: path.as_bytes().to_vec(),
            kind: TarKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            size,
            sparse: None,
            xattrs: Vec::new(),
        });
        self.out.write_all(&header).map_err(unwritable)?;
        let copied = io::copy(&mut contents.take(size), self.out).map_err(unwritable)?;
        if copied != size {
            return Err(unwritable(io::ErrorKind::UnexpectedEof.into()));
        }
        let zeros = [0; 512];
        let padding = zeros.get(..padding(size)).unwrap_or_default();
        self.out.write_all(padding).map_err(unwritable)
    }
}
