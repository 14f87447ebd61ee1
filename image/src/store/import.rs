//! Import of an image of one layer from a tar stream.

use std::io::Read;

use super::files::StoredLayer;
use super::options::PullOptions;
use super::{Store, StoredImage};
use crate::Error;
use crate::config::{Config, History, ImageConfig};
use crate::digest::Digest;
use crate::docker_reference::DockerReference;
use crate::layer::Expected;
use crate::platform::Platform;
use crate::progress::{LayerStep, Progress};
use crate::source::{SourceImage, SourceLayer};

impl Store {
    /// Creates an image of the root file system in a tar stream, which may be compressed
    /// with gzip or Zstandard. An image without a name is identified by its ID.
    ///
    /// # Errors
    /// The stream is not an archive, or the store cannot be written.
    pub fn import(
        &self,
        stream: impl Read + Send,
        name: Option<&DockerReference>,
        config: Config,
        comment: &str,
        options: &PullOptions<'_>,
    ) -> Result<StoredImage, Error> {
        let work = self.begin()?;
        let store = &work.store;
        // Placeholder in progress reports and errors until the digest is known.
        let unknown = Digest::of(b"");
        let expected = Expected {
            digest: unknown,
            size: None,
            diff_id: None,
        };
        let mut progress = |done| {
            (options.report)(Progress::Layer {
                number: 1,
                of: 1,
                digest: unknown,
                step: LayerStep::Moving { done, total: None },
            });
        };
        let converted = work.convert_unknown(stream, &expected, &mut progress, options)?;
        let platform = options.platform.clone().unwrap_or_default();
        let config = configuration(converted.diff_id, config, comment, &platform);
        let config_bytes =
            serde_json::to_vec(&config).map_err(|error| Error::document("configuration", error))?;
        let digest = Digest::of(&config_bytes);
        let image = SourceImage {
            digest,
            named: digest,
            manifest: None,
            config_bytes,
            config,
            layers: vec![SourceLayer::plain(converted.diff_id)],
            origin: None,
        };
        let name = name.map_or_else(|| digest.to_string(), ToString::to_string);
        let layers = std::iter::once((converted.diff_id, converted.diff_id));
        let parts = store.parts_of(digest, digest, layers);
        work.need(parts.into_iter().chain([store.disk_path(digest)]))?;
        let _creating = store.lock_creation("disk", digest, &options.message())?;
        let stored = StoredLayer::open_published(store.layer_path(converted.diff_id))?;
        let stored = match store.stored(digest)? {
            Some(stored) => stored,
            None => store.finish(&image, &name, vec![stored])?,
        };
        store.name(&name, digest, &stored)?;
        Ok(stored)
    }
}

fn configuration(
    diff_id: Digest,
    config: Config,
    comment: &str,
    platform: &Platform,
) -> ImageConfig {
    let mut image = ImageConfig::new(platform.parts(), &[diff_id]);
    image.config = Some(config);
    image.history = Some(vec![History {
        comment: Some(comment.to_owned()),
        ..History::default()
    }]);
    image
}
