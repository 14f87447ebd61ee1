//! Loading of images from archives that are read as a stream.

use std::io::Read;
use std::path::Path;

use serde::Serialize;

use super::Store;
use super::options::PullOptions;
use crate::Error;
use crate::digest::Digest;
use crate::docker_reference::DockerReference;
use crate::progress::Progress;
use crate::source::{Bundle, Session};

/// An image that was loaded from an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Loaded {
    /// ID of the image.
    #[serde(rename = "id")]
    pub digest: Digest,
    /// Names of the image in the store; its ID, if the archive has no name for it.
    pub names: Vec<String>,
}

impl Store {
    /// Loads all images of an archive written by `docker save`, `podman save`, skopeo or
    /// [`Self::save`], which may be compressed. Errors refer to the archive as `label`.
    ///
    /// # Errors
    /// The stream contains no images, or one of them is refused. Images before it remain
    /// in the store.
    pub fn load(
        &self,
        stream: impl Read,
        label: &str,
        options: &PullOptions<'_>,
    ) -> Result<Vec<Loaded>, Error> {
        self.load_bundle(options, |session| Bundle::read(stream, label, session))
    }

    /// As [`Self::load`], from a file, which can be read in place.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_file(&self, path: &Path, options: &PullOptions<'_>) -> Result<Vec<Loaded>, Error> {
        self.load_bundle(options, |session| Bundle::open(path, session))
    }

    fn load_bundle(
        &self,
        options: &PullOptions<'_>,
        open: impl FnOnce(Session<'_>) -> Result<Bundle, Error>,
    ) -> Result<Vec<Loaded>, Error> {
        let options = &options.child();
        let work = self.begin()?;
        let bundle = open(Session {
            scratch: &work.store.tmp,
            cancel: &options.cancel,
            message: &|text| (options.report)(Progress::Message(text)),
        })?;
        let mut loaded = Vec::new();
        for (number, names) in bundle.images()?.into_iter().enumerate() {
            let source = bundle.source(number);
            let image = source.image(options.platform.as_ref())?;
            let mut names: Vec<_> = names.iter().filter_map(|name| known_as(name)).collect();
            if names.is_empty() {
                names.push(image.digest.to_string());
            }
            let mut digest = image.digest;
            for name in &names {
                // The archive may not be available later, so original layers are stored.
                let stored = work.import_image(&*source, &image, name, true, options)?;
                digest = stored.digest;
            }
            loaded.push(Loaded { digest, names });
        }
        Ok(loaded)
    }
}

/// Returns the form of a name in the store; `None` for a tag alone, or a name that cannot
/// be pulled or pushed.
fn known_as(name: &str) -> Option<String> {
    let reference = DockerReference::parse(name).ok()?;
    let is_name = name.contains([':', '/', '.']);
    is_name.then(|| reference.to_string())
}
