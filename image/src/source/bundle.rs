//! Archives of either kind with any number of images, as written by `docker save`,
//! `podman save` and `skopeo copy`.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::archive::TarArchive;
use super::choice::Choice;
use super::docker::DockerArchive;
use super::layout::Layout;
use super::{Session, Source, spool};
use crate::Error;
use crate::error::{Cause, ErrorKind};

/// An archive whose headers have been read.
pub(crate) struct Bundle {
    archive: TarArchive,
    /// Source of the archive, for messages.
    label: String,
    is_layout: bool,
}

impl Bundle {
    /// Opens the archive at `path`, or on the standard input for `-`. It may be
    /// compressed.
    ///
    /// # Errors
    /// The archive cannot be read, or contains no images.
    pub(crate) fn open(path: &Path, session: Session<'_>) -> Result<Self, Error> {
        let label = match path.as_os_str() == "-" {
            true => "the standard input".to_owned(),
            false => path.display().to_string(),
        };
        Self::of(spool::open(path, session), label)
    }

    /// Reads an archive, which may be compressed, from a stream that errors call `label`.
    /// The archive is stored in a file of the session's scratch directory.
    ///
    /// # Errors
    /// The stream cannot be read, or contains no images.
    pub(crate) fn read(
        stream: impl Read,
        label: &str,
        session: Session<'_>,
    ) -> Result<Self, Error> {
        Self::of(spool::spool(stream, session), label.to_owned())
    }

    fn of(file: io::Result<File>, label: String) -> Result<Self, Error> {
        let unknown = |reason: Cause| Error::unknown(&label, reason);
        let file = file.map_err(|error| unknown(Cause::of_stream(&error)))?;
        let damaged = |cause: Cause| unknown(cause.or(ErrorKind::Damaged));
        let archive = TarArchive::new(file).map_err(damaged)?;
        // Newer engines write both formats; the layout contains more information.
        let has = |name: &str| Ok::<_, Error>(archive.open_file(name)?.is_some());
        let is_layout = has("index.json")? && has("oci-layout")?;
        if !is_layout && !has("manifest.json")? && !has("repositories")? {
            return Err(damaged("it is not an archive of images".into()));
        }
        Ok(Self {
            archive,
            label,
            is_layout,
        })
    }

    /// Returns the names of each image; an image may have none.
    ///
    /// # Errors
    /// The archive's list of images is invalid.
    pub(crate) fn images(&self) -> Result<Vec<Vec<String>>, Error> {
        match self.is_layout {
            true => self.layout(Choice::Only).names(),
            false => self.docker(Choice::Only).names(),
        }
    }

    /// Returns the image with this index in [`Self::images`].
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
    #[cfg(feature = "engine")]
    pub(super) fn layer(
        &self,
        layer: &super::SourceLayer,
    ) -> Result<Box<dyn Read + Send + '_>, Error> {
        let missing = || Error::Blob {
            digest: layer.digest.to_string(),
            reason: "it is missing".to_owned(),
        };
        let path = layer.location.clone();
        let path = path.unwrap_or_else(|| super::blob_path(layer.digest));
        self.archive.open_file(&path)?.ok_or_else(missing)
    }

    fn layout(&self, choice: Choice) -> Layout<&TarArchive> {
        Layout::new(&self.archive, self.label.clone(), choice)
    }

    fn docker(&self, choice: Choice) -> DockerArchive<&TarArchive> {
        DockerArchive::new(&self.archive, self.label.clone(), choice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builder::{Compression, LayoutBuilder, MemoryFile};
    use crate::cancel::Cancel;

    fn with_session<T>(act: impl FnOnce(Session<'_>) -> T) -> T {
        let scratch = tempfile::tempdir().unwrap();
        act(Session {
            scratch: scratch.path(),
            cancel: &Cancel::new(),
            message: &|_| {},
        })
    }

    fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, bytes) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, *bytes).unwrap();
        }
        tar.into_inner().unwrap()
    }

    #[test]
    fn a_layout_has_images_by_name_and_number() {
        let directory = tempfile::tempdir().unwrap();
        let mut digests = Vec::new();
        for name in ["one", "two"] {
            let mut image = LayoutBuilder::new(directory.path(), Compression::Gzip(1)).unwrap();
            let file = MemoryFile::File(name.into());
            image.memory_layer(&[("file", 0o644, file)]).unwrap();
            digests.push(image.finish(name, crate::Config::default()).unwrap());
        }
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_dir_all(".", directory.path()).unwrap();
        let tar = zstd::encode_all(tar.into_inner().unwrap().as_slice(), 1).unwrap();
        with_session(|session| {
            let bundle = Bundle::read(tar.as_slice(), "x", session).unwrap();
            assert_eq!(bundle.images().unwrap(), [["one"], ["two"]]);
            for (number, digest) in digests.iter().enumerate() {
                let source = bundle.source(number);
                let image = source.image(None).unwrap();
                assert_eq!(image.digest, *digest);
                let mut layer = Vec::new();
                let stream = source.layer(&image.layers[0]);
                stream.unwrap().read_to_end(&mut layer).unwrap();
                assert_eq!(crate::Digest::of(&layer), image.layers[0].digest);
            }
            let error = bundle.source(2).image(None).unwrap_err().to_string();
            assert!(error.contains("no image @2"), "{error}");
        });
    }

    #[test]
    fn dockers_list_has_images_without_names_too() {
        let config = br#"{"architecture": "amd64", "os": "linux",
                          "rootfs": {"type": "layers", "diff_ids": []}}"#;
        let list = br#"[{"Config": "./c.json", "RepoTags": ["a:1", "b:2"], "Layers": []},
                        {"Config": "c.json", "RepoTags": null, "Layers": null}]"#;
        let tar = tar_of(&[("c.json", config), ("manifest.json", list)]);
        with_session(|session| {
            let bundle = Bundle::read(tar.as_slice(), "x", session).unwrap();
            assert_eq!(bundle.images().unwrap(), [vec!["a:1", "b:2"], vec![]]);
            for number in 0..2 {
                let image = bundle.source(number).image(None).unwrap();
                assert_eq!(image.digest, crate::Digest::of(config));
            }
        });
    }

    #[test]
    fn archives_without_images_are_reported() {
        let fails = |tar: &[u8], word: &str| {
            let error = with_session(|session| {
                let bundle = Bundle::read(tar, "this one", session)?;
                bundle.images().map(drop)
            });
            let error = error.unwrap_err().to_string();
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        };
        fails(&tar_of(&[("x", b"")]), "not an archive of images");
        fails(&tar_of(&[("repositories", b"{}")]), "before 1.10");
        fails(&tar_of(&[("manifest.json", b"[{")]), "manifest");
        fails(b"", "this one");
    }
}
