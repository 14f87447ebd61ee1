//! OCI image layouts (OCI image-spec image-layout.md), in a directory or a tar file.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::choice::Choice;
use super::{Files, Source, SourceImage, SourceLayer, blob_path, describe, read_named, read_small};
use crate::Error;
use crate::documents::{
    BlobDescriptor, FULL_NAME, ImageIndex, Named, REF_NAME, parse, platform_of, resolve,
};
use crate::error::Cause;
use crate::platform::Platform;

/// A layout in a collection of files.
pub(super) struct Layout<F> {
    files: F,
    /// Path of the layout, for messages.
    label: String,
    choice: Choice,
}

impl<F: Files> Layout<F> {
    pub(super) fn new(files: F, label: String, choice: Choice) -> Self {
        Self {
            files,
            label,
            choice,
        }
    }

    fn unknown(&self, reason: impl Into<Cause>) -> Error {
        Error::unknown(&self.label, reason)
    }

    fn index(&self) -> Result<ImageIndex, Error> {
        let bytes = read_small(&self.files, "index.json", "index")?
            .ok_or_else(|| self.unknown("it is not an OCI layout (no index.json)"))?;
        parse(&bytes, "index")
    }

    /// Returns the selected image. Some layouts contain an image for several platforms as
    /// several entries with one name.
    fn chosen<'i>(
        &self,
        index: &'i ImageIndex,
        platform: Option<&Platform>,
    ) -> Result<&'i BlobDescriptor, Error> {
        let unknown = |reason: Cause| self.unknown(reason);
        let manifests = &index.manifests;
        let all: Vec<_> = manifests.iter().map(names).collect();
        let meant = self.choice.all_among(&all).map_err(unknown)?;
        let host = Platform::host();
        let platform = platform.unwrap_or(&host);
        let serving = meant.iter().filter_map(|number| {
            let descriptor = manifests.get(*number)?;
            Some((platform.rank(&platform_of(descriptor)?)?, descriptor))
        });
        let best = serving.min_by_key(|(rank, _)| *rank);
        let is_one_image = meant.windows(2).all(|pair| match pair {
            [one, other] => all.get(*one) == all.get(*other),
            _ => true,
        });
        match best {
            Some((_, best)) if is_one_image => Ok(best),
            _ => {
                let chosen = self.choice.among(&all).map_err(unknown)?;
                manifests
                    .get(chosen)
                    .ok_or_else(|| self.unknown("it is empty"))
            }
        }
    }

    /// Returns the names of each image.
    #[cfg(feature = "archive")]
    pub(super) fn names(&self) -> Result<Vec<Vec<String>>, Error> {
        Ok(self.index()?.manifests.iter().map(names).collect())
    }
}

/// Returns the full name, then the name in the layout.
fn names(descriptor: &BlobDescriptor) -> Vec<String> {
    let name = |key: &str| descriptor.annotation(key).map(str::to_owned);
    [FULL_NAME, REF_NAME].into_iter().filter_map(name).collect()
}

impl<F: Files + Sync> Source for Layout<F> {
    fn image(&self, platform: Option<&Platform>) -> Result<SourceImage, Error> {
        let index = self.index()?;
        let first = Named::from_descriptor(self.chosen(&index, platform)?, "index")?;
        let read = |named: &Named, what: &str| read_named(&self.files, named, what);
        let manifest = |named: &Named| read(named, "manifest");
        let bytes = manifest(&first)?;
        let resolved = resolve(bytes, Some(&first.media_type), platform, &manifest)?;
        describe(&read, resolved, platform)
    }

    fn layer<'a>(&'a self, layer: &SourceLayer) -> Result<Box<dyn Read + Send + 'a>, Error> {
        let file = self.files.open(&blob_path(layer.digest))?;
        file.ok_or_else(|| Error::Blob {
            digest: layer.digest.to_string(),
            reason: "it is missing".to_owned(),
        })
    }
}

/// A directory as a collection of files.
pub(super) struct Directory(PathBuf);

impl Directory {
    pub(super) fn open(path: &Path) -> Result<Self, Cause> {
        match path.metadata() {
            Ok(meta) if meta.is_dir() => Ok(Self(path.to_owned())),
            Ok(_) => Err(format!("{path:?} is not a directory").into()),
            Err(error) => Err(Cause::with(format!("{path:?}: {error}"), &error)),
        }
    }
}

impl Files for Directory {
    fn open<'a>(&'a self, path: &str) -> Result<Option<Box<dyn Read + Send + 'a>>, Error> {
        let path = self.0.join(path);
        // Opening a pipe at this path must not block.
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let opened = options.open(&path).and_then(|file| {
            let is_file = file.metadata()?.is_file();
            let no_file = || io::Error::other("it is not a regular file");
            is_file.then_some(file).ok_or_else(no_file)
        });
        match opened {
            Ok(file) => Ok(Some(Box::new(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::file("open", &path)(error)),
        }
    }
}
