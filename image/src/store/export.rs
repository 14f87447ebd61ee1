//! Export of a stored image: its manifest, configuration and layers.
//!
//! The export is byte for byte what the source had, if the manifest is known and the
//! original layers are stored or can be fetched again. An image without a manifest (from
//! a Docker archive or a directory) gets a new one, and its layers are reconstructed from
//! the converted files.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write as _};
use std::path::PathBuf;

use oci_spec::image::MediaType;

use super::Store;
use super::files::{StoredLayer, create};
use super::options::PullOptions;
use super::record::{DiskRecord, LayerRecord};
use super::written;
use crate::digest::{Digest, HashingReader};
use crate::error::{Error, ErrorKind};
use crate::platform::Platform;
use crate::progress::{LayerStep, Progress};
use crate::reference::Reference;
use crate::source::{self, Session};

const GZIP_LEVEL: u32 = 6;

/// An image in its external form.
pub(super) struct Exported {
    pub(super) manifest: Vec<u8>,
    pub(super) manifest_type: String,
    pub(super) config: Vec<u8>,
    pub(super) layers: Vec<ExportedLayer>,
}

/// A layer of an exported image.
pub(super) struct ExportedLayer {
    pub(super) digest: Digest,
    pub(super) size: u64,
    /// Its media type in a new manifest.
    media_type: MediaType,
    contents: ExportContents,
}

enum ExportContents {
    /// A file of the store.
    Stored(PathBuf),
    /// A file created for the export.
    Created(tempfile::TempDir),
    /// The plain tar stream of this layer.
    Plain(Digest),
    /// The recipient already has the layer.
    Elsewhere,
}

/// Returns true if the recipient of an image already has a layer.
pub(super) type Has<'a> = &'a dyn Fn(Digest, u64) -> bool;

/// Form of layers that must be reconstructed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    #[cfg_attr(
        not(feature = "archive"),
        expect(dead_code, reason = "layers in archives are not compressed")
    )]
    Plain,
    #[cfg_attr(
        not(feature = "registry"),
        expect(dead_code, reason = "layers in registries are compressed")
    )]
    Gzip,
}

const CREATED: &str = "layer";

impl Exported {
    /// Opens the layer's stream at its start.
    pub(super) fn open(
        &self,
        store: &Store,
        layer: &ExportedLayer,
    ) -> Result<Box<dyn Read + Send>, Error> {
        let file = |path: PathBuf| -> Result<Box<dyn Read + Send>, Error> {
            let file = File::open(&path).map_err(Error::file("open", &path))?;
            Ok(Box::new(file))
        };
        match &layer.contents {
            ExportContents::Stored(path) => file(path.clone()),
            ExportContents::Created(directory) => file(directory.path().join(CREATED)),
            ExportContents::Plain(diff_id) => Ok(Box::new(store.assemble(*diff_id)?)),
            ExportContents::Elsewhere => Err(Error::Blob {
                digest: layer.digest.to_string(),
                reason: "the recipient had it before, and has it no longer".to_owned(),
            }),
        }
    }
}

/// Returns true if the source of an image does not have it any more, or cannot be used by
/// this program: its layers are created again. After other errors another attempt may
/// succeed, and result in the same image.
fn is_gone(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::Unsupported | ErrorKind::Damaged
    )
}

impl Store {
    /// Exports an image. The caller needs all of it.
    pub(super) fn export(
        &self,
        digest: Digest,
        record: &DiskRecord,
        form: Form,
        has: Has<'_>,
        options: &PullOptions<'_>,
    ) -> Result<Exported, Error> {
        let config = self.needed(record.config_digest, "configuration")?;
        if let Some(manifest_type) = &record.manifest_type {
            let manifest = self.needed(digest, "manifest")?;
            if let Some(layers) = self.as_they_were(digest, record, has, options)? {
                return Ok(Exported {
                    manifest,
                    manifest_type: manifest_type.clone(),
                    config,
                    layers,
                });
            }
            (options.report)(Progress::Message(
                "The original layers are not stored, and cannot be pulled again: they \
                 are created again, and the image has another digest",
            ));
        }
        self.create_again(digest, record, config, form, has, options)
    }

    fn needed(&self, digest: Digest, what: &str) -> Result<Vec<u8>, Error> {
        self.document(digest)?.ok_or_else(|| Error::Blob {
            digest: digest.to_string(),
            reason: format!("the {what} is missing from the store"),
        })
    }

    /// Returns the layers of the manifest; `None` if some are not available.
    fn as_they_were(
        &self,
        digest: Digest,
        record: &DiskRecord,
        has: Has<'_>,
        options: &PullOptions<'_>,
    ) -> Result<Option<Vec<ExportedLayer>>, Error> {
        let (elsewhere, missing) = self.absent(&record.layers, has);
        if !missing.is_empty() && !self.fetch(digest, record, &missing, options)? {
            return Ok(None);
        }
        let export = |layer: &LayerRecord| match layer.digest == layer.diff_id {
            true => self.plain(layer.diff_id),
            false => self.original(layer, &elsewhere),
        };
        let layers = record.layers.iter().map(export);
        layers.collect::<Result<Vec<_>, Error>>().map(Some)
    }

    /// Returns the layers whose originals are not stored: those that the recipient has, and
    /// the others.
    fn absent<'r>(
        &self,
        layers: &'r [LayerRecord],
        has: Has<'_>,
    ) -> (Vec<&'r LayerRecord>, Vec<&'r LayerRecord>) {
        let absent = layers.iter().filter(|layer| {
            layer.digest != layer.diff_id && !self.blob_path(layer.digest).exists()
        });
        absent.partition(|layer| layer.size.is_some_and(|size| has(layer.digest, size)))
    }

    /// Returns the original of a layer, which is stored or `elsewhere`.
    fn original(
        &self,
        layer: &LayerRecord,
        elsewhere: &[&LayerRecord],
    ) -> Result<ExportedLayer, Error> {
        let media_type = written::layer_type(layer.media_type.as_deref());
        let media_type = media_type.unwrap_or(MediaType::ImageLayer);
        if elsewhere.iter().any(|other| other.digest == layer.digest) {
            return Ok(ExportedLayer {
                digest: layer.digest,
                size: layer.size.unwrap_or(0),
                media_type,
                contents: ExportContents::Elsewhere,
            });
        }
        let path = self.blob_path(layer.digest);
        let size = fs::metadata(&path).map_err(Error::file("read", &path))?;
        Ok(ExportedLayer {
            digest: layer.digest,
            size: size.len(),
            media_type,
            contents: ExportContents::Stored(path),
        })
    }

    /// Fetches original layers from the image's source. Returns `false` if the source
    /// does not have the image any more.
    fn fetch(
        &self,
        digest: Digest,
        record: &DiskRecord,
        missing: &[&LayerRecord],
        options: &PullOptions<'_>,
    ) -> Result<bool, Error> {
        let session = Session {
            scratch: &self.tmp,
            cancel: &options.cancel,
            message: &|text| (options.report)(Progress::Message(text)),
        };
        let origin = record.origin.as_ref();
        let digest = origin.and_then(|origin| origin.base).unwrap_or(digest);
        // The name may refer to another image by now; the digest does not.
        let reference = match &record.origin {
            Some(origin) => format!("{}/{}@{digest}", origin.registry, origin.repository),
            None => record.reference.clone(),
        };
        let Ok(reference) = Reference::parse(&reference) else {
            return Ok(false);
        };
        let platform = Platform::of(&record.config);
        let source = match source::open(&reference, session) {
            Ok(Some(source)) => source,
            Ok(None) => return Ok(false),
            Err(error) if is_gone(&error) => return Ok(false),
            Err(error) => return Err(error),
        };
        let image = match source.image(Some(&platform)) {
            Ok(image) if image.digest == digest => image,
            // The source has another image, or none.
            Ok(_) => return Ok(false),
            Err(error) if is_gone(&error) => return Ok(false),
            Err(error) => return Err(error),
        };
        let sizes = missing.iter();
        let sizes = sizes.map(|layer| (layer.digest, layer.size.unwrap_or(0)));
        self.check_free_space(&sizes.collect())?;
        let of = image.layers.len();
        for (number, layer) in (1..).zip(&image.layers) {
            if !missing.iter().any(|wanted| wanted.digest == layer.digest) {
                continue;
            }
            let report_step = |step| {
                (options.report)(Progress::Layer {
                    number,
                    of,
                    digest: layer.digest,
                    step,
                });
            };
            let created = self.temporary()?;
            let path = created.path().join(CREATED);
            let mut out = BufWriter::new(create(&path)?);
            let mut stream = HashingReader::new(source.layer(layer)?, std::rc::Rc::default());
            let mut done = 0;
            let mut chunk = vec![0; 256 << 10];
            loop {
                report_step(LayerStep::Moving {
                    done,
                    total: layer.size,
                });
                let count = stream
                    .read(&mut chunk)
                    .map_err(Error::file("read layers for", &path))?;
                let Some(bytes) = chunk.get(..count).filter(|bytes| !bytes.is_empty()) else {
                    break;
                };
                out.write_all(bytes).map_err(Error::file("write", &path))?;
                done += count as u64;
                let most = layer.size.unwrap_or(self.limits.stored_bytes());
                if done > most {
                    break;
                }
            }
            out.flush().map_err(Error::file("write", &path))?;
            let (found, _) = stream.finish();
            if found != layer.digest {
                return Err(Error::Blob {
                    digest: layer.digest.to_string(),
                    reason: format!("its contents have digest {found}"),
                });
            }
            let synced = out.get_ref().sync_all();
            synced.map_err(Error::file("write", &path))?;
            self.store_blob(layer.digest, &path)?;
            report_step(LayerStep::Done);
        }
        Ok(true)
    }

    /// Exports the image with a new manifest. Original layers that are available, such as
    /// those of the base of a committed image, are exported as they are.
    fn create_again(
        &self,
        digest: Digest,
        record: &DiskRecord,
        config: Vec<u8>,
        form: Form,
        has: Has<'_>,
        options: &PullOptions<'_>,
    ) -> Result<Exported, Error> {
        let of = record.layers.len();
        let mut layers = Vec::new();
        let (elsewhere, missing) = match form {
            Form::Plain => Default::default(),
            Form::Gzip => self.absent(&record.layers, has),
        };
        let is_base = record.manifest_type.is_none() && record.origin.is_some();
        let missing = match missing.is_empty() || !is_base {
            true => missing,
            false => match self.fetch(digest, record, &missing, options) {
                Ok(true) => Vec::new(),
                Err(error) if error.kind() == ErrorKind::Cancelled => return Err(error),
                // The layers can be created without their source, but have other digests.
                Ok(false) | Err(_) => missing,
            },
        };
        let has_original = |layer: &LayerRecord| {
            layer.digest != layer.diff_id
                && written::layer_type(layer.media_type.as_deref()).is_some()
                && !missing.iter().any(|other| other.digest == layer.digest)
        };
        for (number, layer) in (1..).zip(&record.layers) {
            layers.push(match form {
                Form::Plain => self.plain(layer.diff_id)?,
                Form::Gzip if has_original(layer) => self.original(layer, &elsewhere)?,
                Form::Gzip => self.compressed(layer.diff_id, &|done, total| {
                    (options.report)(Progress::Layer {
                        number,
                        of,
                        digest: layer.digest,
                        step: LayerStep::Moving { done, total },
                    });
                })?,
            });
        }
        let manifest = written::manifest(
            (record.config_digest, config.len() as u64),
            layers
                .iter()
                .map(|layer| (layer.media_type.clone(), layer.digest, layer.size)),
        )?;
        Ok(Exported {
            manifest,
            manifest_type: written::manifest_type(),
            config,
            layers,
        })
    }

    fn plain(&self, diff_id: Digest) -> Result<ExportedLayer, Error> {
        let stored = StoredLayer::open_published(self.layer_path(diff_id))?;
        Ok(ExportedLayer {
            digest: diff_id,
            size: stored.totals().tar_len,
            media_type: MediaType::ImageLayer,
            contents: ExportContents::Plain(diff_id),
        })
    }

    fn compressed(
        &self,
        diff_id: Digest,
        progress: &dyn Fn(u64, Option<u64>),
    ) -> Result<ExportedLayer, Error> {
        let total = self.plain(diff_id)?.size;
        let created = self.temporary()?;
        let path = created.path().join(CREATED);
        let failed = || Error::file("write", &path);
        let out = BufWriter::new(create(&path)?);
        let level = flate2::Compression::new(GZIP_LEVEL);
        let mut encoder = flate2::write::GzEncoder::new(out, level);
        let mut plain = self.assemble(diff_id)?;
        let mut chunk = vec![0; 1 << 20];
        let mut done = 0;
        loop {
            progress(done, Some(total));
            let count = plain.read(&mut chunk).map_err(failed())?;
            let Some(bytes) = chunk.get(..count).filter(|bytes| !bytes.is_empty()) else {
                break;
            };
            encoder.write_all(bytes).map_err(failed())?;
            done += count as u64;
        }
        let written = encoder.finish().and_then(|mut out| out.flush());
        written.map_err(failed())?;
        let file = File::open(&path).map_err(failed())?;
        let mut stream = HashingReader::new(file, std::rc::Rc::default());
        stream.drain().map_err(failed())?;
        let (digest, size) = stream.finish();
        Ok(ExportedLayer {
            digest,
            size,
            media_type: MediaType::ImageLayerGzip,
            contents: ExportContents::Created(created),
        })
    }
}
