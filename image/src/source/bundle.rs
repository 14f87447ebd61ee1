//! Archives of either kind, with any number of images: what `docker save`,
//! `podman save` and `skopeo copy` write.

use std::io::Read;

use super::archive::Archive;
use super::choice::Choice;
use super::docker::DockerArchive;
use super::layout::Layout;
use super::{Session, Source, SourceLayer, blob_path, spool};
use crate::Error;

/// An archive that has been read to its end.
pub(crate) struct Bundle {
    archive: Archive,
    /// Where it came from, for people.
    place: String,
    is_layout: bool,
}

#[allow(dead_code, reason = "loading archives is about to use it")]
impl Bundle {
    /// Reads an archive, compressed or not, from a stream, which errors call
    /// `place`. It is kept in a file of the session's scratch directory.
    ///
    /// # Errors
    /// The stream cannot be read, or is no archive of images.
    pub(crate) fn read(
        stream: impl Read,
        place: &str,
        session: Session<'_>,
    ) -> Result<Self, Error> {
        let unknown = |reason: String| Error::Unknown {
            reference: place.to_owned(),
            reason,
        };
        let file = spool::spool(stream, session).map_err(|error| unknown(error.to_string()))?;
        let archive = Archive::new(file).map_err(unknown)?;
        // Newer engines write both; there is more in a layout. So does Podman,
        // which has no `oci-layout` in what is not one.
        let has = |name: &str| Ok::<_, Error>(archive.open_file(name)?.is_some());
        let is_layout = has("index.json")? && has("oci-layout")?;
        if !is_layout && !has("manifest.json")? && !has("repositories")? {
            return Err(unknown("it is no archive of images".to_owned()));
        }
        Ok(Self {
            archive,
            place: place.to_owned(),
            is_layout,
        })
    }

    /// The names of each image; some have none.
    ///
    /// # Errors
    /// The archive's list of images is wrong.
    pub(crate) fn images(&self) -> Result<Vec<Vec<String>>, Error> {
        match self.is_layout {
            true => self.layout(Choice::Only).names(),
            false => self.docker(Choice::Only).names(),
        }
    }

    /// The image at a place of [`Self::images`].
    pub(crate) fn source(&self, number: usize) -> Box<dyn Source + '_> {
        self.chosen(Choice::Number(number))
    }

    pub(super) fn chosen(&self, choice: Choice) -> Box<dyn Source + '_> {
        match self.is_layout {
            true => Box::new(self.layout(choice)),
            false => Box::new(self.docker(choice)),
        }
    }

    /// Opens the stream of a layer of one of the images.
    pub(super) fn layer(&self, layer: &SourceLayer) -> Result<Box<dyn Read + Send + '_>, Error> {
        let missing = || Error::Blob {
            digest: layer.digest.to_string(),
            reason: "it is missing".to_owned(),
        };
        let path = layer.place.clone();
        let path = path.unwrap_or_else(|| blob_path(layer.digest));
        self.archive.open_file(&path)?.ok_or_else(missing)
    }

    fn layout(&self, choice: Choice) -> Layout<&Archive> {
        Layout::new(&self.archive, self.place.clone(), choice)
    }

    fn docker(&self, choice: Choice) -> DockerArchive<&Archive> {
        DockerArchive::new(&self.archive, self.place.clone(), choice)
    }
}
