//! OCI image layouts (OCI image-spec image-layout.md), in a directory or a tar
//! file.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageIndex};

use super::{Files, Source, SourceImage, SourceLayer, blob_path, describe, read_named, read_small};
use crate::Error;
use crate::documents::{Named, REF_NAME, parse, resolve};
use crate::platform::Platform;
use crate::reference::Reference;

/// A layout over some files.
pub(crate) struct Layout<F> {
    files: F,
    reference: Reference,
    tag: Option<String>,
}

impl<F: Files> Layout<F> {
    pub(crate) fn new(files: F, reference: Reference, tag: Option<String>) -> Self {
        Self {
            files,
            reference,
            tag,
        }
    }

    fn unknown(&self, reason: String) -> Error {
        Error::Unknown {
            reference: self.reference.to_string(),
            reason,
        }
    }

    fn choose<'a>(&self, index: &'a ImageIndex) -> Result<&'a Descriptor, Error> {
        let name = |descriptor: &'a Descriptor| -> Option<&'a str> {
            descriptor
                .annotations()
                .as_ref()?
                .get(REF_NAME)
                .map(String::as_str)
        };
        let names = || {
            let names: Vec<&str> = index.manifests().iter().filter_map(name).collect();
            match names.as_slice() {
                [] => "it names none".to_owned(),
                names => format!("it has {}", names.join(", ")),
            }
        };
        match (&self.tag, index.manifests().as_slice()) {
            (Some(tag), manifests) => manifests
                .iter()
                .find(|descriptor| name(descriptor) == Some(tag))
                .ok_or_else(|| {
                    self.unknown(format!("the layout has no image \"{tag}\"; {}", names()))
                }),
            (None, [only]) => Ok(only),
            (None, []) => Err(self.unknown("the layout is empty".to_owned())),
            (None, _) => {
                let text = format!("the layout has several images, add :TAG; {}", names());
                Err(self.unknown(text))
            }
        }
    }
}

impl<F: Files + Sync> Source for Layout<F> {
    fn image(&self, platform: Option<&Platform>) -> Result<SourceImage, Error> {
        let bytes = read_small(&self.files, "index.json", "index")?
            .ok_or_else(|| self.unknown("it is not an OCI layout (no index.json)".to_owned()))?;
        let index: ImageIndex = parse(&bytes, "index")?;
        let first = Named::from_descriptor(self.choose(&index)?, "index")?;
        let read = |named: &Named, what: &str| read_named(&self.files, named, what);
        let manifest = |named: &Named| read(named, "manifest");
        let bytes = manifest(&first)?;
        let resolved = resolve(bytes, Some(&first.media_type), platform, &manifest)?;
        describe(&read, resolved, platform)
    }

    fn layer<'a>(&'a self, layer: &SourceLayer) -> Result<Box<dyn Read + Send + 'a>, Error> {
        self.files
            .open(&blob_path(layer.digest))?
            .ok_or_else(|| Error::Blob {
                digest: layer.digest.to_string(),
                reason: "it is missing".to_owned(),
            })
    }
}

/// A directory as named files.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        match path.metadata() {
            Ok(meta) if meta.is_dir() => Ok(Self(path.to_owned())),
            Ok(_) => Err(format!("{path:?} is not a directory")),
            Err(error) => Err(format!("{path:?}: {error}")),
        }
    }
}

impl Files for Directory {
    fn open<'a>(&'a self, path: &str) -> Result<Option<Box<dyn Read + Send + 'a>>, Error> {
        let path = self.0.join(path);
        match File::open(&path) {
            Ok(file) => Ok(Some(Box::new(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::file("open", &path)(error)),
        }
    }
}
