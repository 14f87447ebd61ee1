//! Image references with the transport names of containers-transports(5).

use std::fmt;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::digest::Digest;
use crate::docker_reference::DockerReference;

/// A parsed image reference.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reference {
    /// `oci:DIR[:TAG]`: an OCI image layout.
    Oci {
        /// The layout's directory.
        directory: PathBuf,
        /// Name of an image in the layout; absent for the only one.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:TAG]`: an OCI image layout in a tar file.
    OciArchive {
        /// The tar file, uncompressed or compressed with gzip or zstd; `-` is the
        /// standard input.
        file: PathBuf,
        /// An image in the archive, by a name or as `@NUMBER`; absent for the only one.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:NAME]`: an archive written by `docker save`.
    DockerArchive {
        /// The tar file, as in [`Self::OciArchive`].
        file: PathBuf,
        /// An image in the archive, by a name or as `@NUMBER`; absent for the only one.
        tag: Option<String>,
    },
    /// `docker-daemon:NAME[:TAG]` or `docker-daemon:ID`: an image of the Docker engine
    /// selected by `DOCKER_HOST` or by Docker's current context.
    DockerDaemon {
        /// The name with its tag, or the ID.
        image: String,
    },
    /// `containers-storage:[[[DRIVER@]ROOT[+RUN]]]NAME[:TAG]`, or an ID instead of
    /// a name: an image of Podman, Buildah or CRI-O.
    ContainersStorage {
        /// The storage, as written between the brackets; absent for this user's own.
        storage: Option<String>,
        /// The name as written, or the ID.
        image: String,
    },
    /// `rootfs:DIR`: a directory with the contents of a root file system.
    RootFs {
        /// The directory.
        directory: PathBuf,
    },
    /// `docker://NAME`, or a name without a transport: an image in a registry.
    Docker(DockerReference),
    /// Any other text: the name of an image in the store.
    Stored(String),
}

impl Reference {
    /// Parses a reference. Relative paths are resolved from the current directory.
    ///
    /// # Errors
    /// The transport is unknown, or nothing follows it.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bad = |reason| Error::Reference {
            reference: text.to_owned(),
            reason,
        };
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        let (transport, rest) = text.split_once(':').unwrap_or((text, ""));
        if text.ends_with(':') {
            return Err(bad("nothing follows the colon"));
        }
        Ok(match transport {
            "oci" => {
                let (directory, tag) = split_tag(rest);
                Self::Oci { directory, tag }
            }
            "oci-archive" => {
                let (file, tag) = split_tag(rest);
                Self::OciArchive { file, tag }
            }
            "docker-archive" => {
                let (file, tag) = split_tag(rest);
                Self::DockerArchive { file, tag }
            }
            "rootfs" => Self::RootFs {
                directory: PathBuf::from(rest),
            },
            "docker" if rest.starts_with("//") => {
                let name = rest.trim_start_matches('/');
                Self::Docker(DockerReference::parse(name).map_err(bad)?)
            }
            "docker-daemon" if !rest.is_empty() => Self::DockerDaemon {
                image: engine_image(rest).map_err(bad)?,
            },
            "containers-storage" if !rest.is_empty() => {
                let (storage, image) = storage_image(rest).map_err(bad)?;
                Self::ContainersStorage { storage, image }
            }
            _ => match DockerReference::parse(text) {
                Ok(docker) => Self::Docker(docker),
                Err(_) => Self::Stored(text.to_owned()),
            },
        })
    }
}

impl Reference {
    /// Returns the feature of this crate that the source of the image needs; `None` if
    /// it is always available.
    #[must_use]
    pub fn feature(&self) -> Option<&'static str> {
        match self {
            Self::Oci { .. } | Self::RootFs { .. } | Self::Stored(_) => None,
            Self::OciArchive { .. } | Self::DockerArchive { .. } => Some("archive"),
            Self::DockerDaemon { .. } => Some("engine"),
            Self::ContainersStorage { .. } => Some("containers-storage"),
            Self::Docker(_) => Some("registry"),
        }
    }
}

/// Splits `PATH[:TAG]`. The longest existing path is used; without one, the path ends at
/// the first colon, as in containers-transports(5).
fn split_tag(text: &str) -> (PathBuf, Option<String>) {
    let colons = text.char_indices().filter(|(_, c)| *c == ':');
    let colons: Vec<usize> = colons.map(|(at, _)| at).filter(|at| *at > 0).collect();
    let exists = |end: &usize| {
        text.get(..*end)
            .is_some_and(|path| Path::new(path).exists())
    };
    let end = [text.len()]
        .into_iter()
        .chain(colons.iter().rev().copied())
        .find(exists)
        .or_else(|| colons.first().copied())
        .unwrap_or(text.len());
    let (path, tag) = text.split_at(end);
    let tag = tag.strip_prefix(':').filter(|tag| !tag.is_empty());
    (PathBuf::from(path), tag.map(str::to_owned))
}

/// Minimum number of digits of an engine's ID, as opposed to a name.
const ENGINE_ID: usize = 12;

/// Returns the form of a name or an ID that an engine accepts.
fn engine_image(text: &str) -> Result<String, &'static str> {
    if Digest::parse(text).is_some() {
        return Ok(text.to_owned());
    }
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() >= ENGINE_ID && text.bytes().all(is_digit) {
        return Ok(text.to_owned());
    }
    Ok(DockerReference::parse(text)?.to_string())
}

/// Splits the storage between brackets from the image after them.
fn storage_image(text: &str) -> Result<(Option<String>, String), &'static str> {
    let (storage, image) = match text.strip_prefix('[') {
        Some(rest) => {
            let split = rest.split_once(']').ok_or("the bracket is not closed")?;
            (Some(split.0.to_owned()), split.1)
        }
        None => (None, text),
    };
    let id = image
        .strip_prefix('@')
        .or_else(|| image.strip_prefix("sha256:"));
    let is_id = id.is_some_and(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_hexdigit()));
    if !is_id {
        DockerReference::parse(image)?;
    }
    Ok((storage, image.to_owned()))
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, path, tag) = match self {
            Self::Oci { directory, tag } => ("oci", directory, tag.as_deref()),
            Self::OciArchive { file, tag } => ("oci-archive", file, tag.as_deref()),
            Self::DockerArchive { file, tag } => ("docker-archive", file, tag.as_deref()),
            Self::RootFs { directory } => ("rootfs", directory, None),
            Self::DockerDaemon { image } => return write!(f, "docker-daemon:{image}"),
            Self::ContainersStorage { storage, image } => {
                f.write_str("containers-storage:")?;
                if let Some(storage) = storage {
                    write!(f, "[{storage}]")?;
                }
                return f.write_str(image);
            }
            Self::Docker(name) => return name.fmt(f),
            Self::Stored(name) => return f.write_str(name),
        };
        write!(f, "{transport}:{}", path.display())?;
        match tag {
            Some(tag) => write!(f, ":{tag}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transports_and_tags() {
        let parse = |text| Reference::parse(text).unwrap();
        assert_eq!(
            parse("oci:/a/b:v1"),
            Reference::Oci {
                directory: "/a/b".into(),
                tag: Some("v1".into())
            }
        );
        assert_eq!(parse("oci:dir").to_string(), "oci:dir");
        assert_eq!(
            parse("docker-archive:x.tar:repo:tag"),
            Reference::DockerArchive {
                file: "x.tar".into(),
                tag: Some("repo:tag".into())
            }
        );
        assert_eq!(parse("rootfs:/x:y").to_string(), "rootfs:/x:y");
        assert_eq!(parse("name").to_string(), "name:latest");
        assert_eq!(
            parse("docker://host.example/a:b").to_string(),
            "host.example/a:b"
        );
        assert_eq!(parse("No/Name"), Reference::Stored("No/Name".into()));
        assert!(Reference::parse("").is_err());
        assert!(Reference::parse("oci:").is_err());
        assert!(Reference::parse("docker://A").is_err());
    }

    #[test]
    fn a_path_that_exists_is_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a:b.tar");
        std::fs::write(&path, "").unwrap();
        let (path, text) = (path.clone(), path.display().to_string());
        assert_eq!(split_tag(&text), (path.clone(), None));
        let tagged = split_tag(&format!("{text}:repo:tag"));
        assert_eq!(tagged, (path, Some("repo:tag".to_owned())));
        assert_eq!(
            split_tag("/no:b.tar"),
            ("/no".into(), Some("b.tar".to_owned()))
        );
        assert_eq!(split_tag(":x"), (":x".into(), None));
    }

    #[test]
    fn engines_and_storages() {
        let shown = |text: &str| Reference::parse(text).unwrap().to_string();
        assert_eq!(shown("docker-daemon:app"), "docker-daemon:app:latest");
        let same = |text: &str| assert_eq!(shown(text), text);
        same("docker-daemon:r.example/app:v1");
        same("docker-daemon:0123456789ab");
        same(&format!("docker-daemon:{}", Digest::of(b"x")));
        same("containers-storage:localhost/app");
        same("containers-storage:[/x]app:v1");
        same(
            "containers-storage:[overlay@/x+/y]app@sha256:\
              e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        );
        same("containers-storage:@0123");
        same("containers-storage:sha256:0123");
        for bad in [
            "docker-daemon:",
            "docker-daemon:A",
            "docker-daemon:../x",
            "containers-storage:[/x",
            "containers-storage:[/x]",
            "containers-storage:@",
            "containers-storage:@../x",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad}");
        }
    }
}
