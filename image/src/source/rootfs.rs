//! `rootfs:DIR`: a directory of the host, as an image of one layer.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::{Source, SourceImage, SourceLayer};
use crate::Error;
use crate::config::ImageConfig;
use crate::digest::{Digest, HashingReader};
use crate::documents::check_platform;
use crate::platform::Platform;
use sm_tar::DirectoryTar;

/// A directory. Its tar stream, and so its digest, depends only on its contents.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

impl Source for Directory {
    /// Reads the whole directory once to compute its digest.
    fn image(&self, platform: Option<&Platform>) -> Result<SourceImage, Error> {
        let mut stream = HashingReader::new(DirectoryTar::new(&self.0), Rc::default());
        stream.drain().map_err(Error::file("read", &self.0))?;
        let (diff_id, _) = stream.finish();
        let config = ImageConfig::new(Platform::host().parts(), &[diff_id]);
        check_platform(&config, platform)?;
        let json =
            serde_json::to_vec(&config).map_err(|error| Error::document("configuration", error))?;
        let digest = Digest::of(&json);
        Ok(SourceImage {
            digest,
            named: digest,
            manifest: None,
            config_bytes: json,
            config,
            layers: vec![SourceLayer {
                digest: diff_id,
                size: None,
                media_type: None,
                diff_id,
                location: None,
            }],
            origin: None,
        })
    }

    fn layer<'a>(&'a self, _: &SourceLayer) -> Result<Box<dyn Read + Send + 'a>, Error> {
        let stream = DirectoryTar::new(&self.0);
        Ok(Box::new(io::BufReader::with_capacity(64 << 10, stream)))
    }
}
