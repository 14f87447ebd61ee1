//! Images from archives that come as a stream.

use std::io::Read;
use std::path::Path;

use serde::Serialize;

use super::Store;
use super::pull::PullOptions;
use crate::Error;
use crate::digest::Digest;
use crate::docker_reference::DockerReference;
use crate::progress::Progress;
use crate::source::{Bundle, Session};

/// An image that was in an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loaded {
    /// Its ID.
    #[serde(rename = "id")]
    pub digest: Digest,
    /// The names that it has in the store now; its ID, if the archive has none.
    pub names: Vec<String>,
}

impl Store {
    /// Brings all images of an archive into the store: of what `docker save`, `podman
    /// save`, skopeo or [`Self::save`] write, compressed or not. `place` is what
    /// errors call it.
    ///
    /// # Errors
    /// The stream is no archive of images, or one of them is refused; those before
    /// it are in the store then.
    pub fn load(
        &self,
        stream: impl Read,
        place: &str,
        options: &PullOptions<'_>,
    ) -> Result<Vec<Loaded>, Error> {
        self.load_bundle(options, |session| Bundle::read(stream, place, session))
    }

    /// Like [`Self::load`], from a file, which need not be copied to be read.
    ///
    /// # Errors
    /// Likewise.
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
            notice: &|text| (options.report)(Progress::Notice(text)),
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
                // The archive is gone afterwards: what came is kept as it came.
                let stored = work.bring(&*source, &image, name, true, options)?;
                digest = stored.digest;
            }
            loaded.push(Loaded { digest, names });
        }
        Ok(loaded)
    }
}

/// A name as it is written in the store; `None` for what is only a tag, or nothing
/// that could be pulled or pushed.
fn known_as(name: &str) -> Option<String> {
    let reference = DockerReference::parse(name).ok()?;
    let is_name = name.contains([':', '/', '.']);
    is_name.then(|| reference.to_string())
}
