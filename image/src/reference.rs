//! Image references, by their containers-transports names.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::docker_reference::DockerReference;
use crate::source::Registries;

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// `oci:DIR[:TAG]`: an OCI image layout.
    Oci {
        /// The layout's directory.
        directory: PathBuf,
        /// Which of its images; the only one when absent.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:TAG]`: an OCI image layout in a tar file.
    OciArchive {
        /// The tar file.
        file: PathBuf,
        /// Which of its images; the only one when absent.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:TAG]`: what `docker save` writes.
    DockerArchive {
        /// The tar file.
        file: PathBuf,
        /// Which of its images; the only one when absent.
        tag: Option<String>,
    },
    /// `rootfs:DIR`: a directory as it is.
    RootFs {
        /// The directory.
        directory: PathBuf,
    },
    /// `docker://NAME`, or a name without a transport: an image in a registry.
    Docker(DockerReference),
    /// Anything else: a name given to an image that is in the store.
    Stored(String),
}

impl Reference {
    /// Like [`Self::parse`], where a name without a registry may be an alias of
    /// another one in the `registries.conf` of this user or host
    /// (containers-registries.conf(5)).
    ///
    /// # Errors
    /// Likewise, or that file is wrong.
    pub fn parse_with_aliases(text: &str) -> Result<Self, Error> {
        let parsed = Self::parse(text)?;
        let short = text.strip_prefix("docker://").unwrap_or(text);
        let is_docker = matches!(&parsed, Self::Docker(name) if name.is_default_registry());
        let rest = short.find([':', '@']).unwrap_or(short.len());
        let (name, rest) = short.split_at(rest);
        if !is_docker || name.starts_with("docker.io/") || name.starts_with("index.docker.io/") {
            return Ok(parsed);
        }
        match Registries::load()?.alias(name) {
            Some(full) => Self::parse(&format!("docker://{full}{rest}")),
            None => Ok(parsed),
        }
    }

    /// Reads a reference. Relative paths are taken from the current directory.
    ///
    /// # Errors
    /// A transport that is not known, or nothing after it.
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
            "docker-daemon" | "containers-storage" => {
                return Err(bad(
                    "this transport is not available yet; copy the image with \
                     \"skopeo copy\" to an oci: directory",
                ));
            }
            _ => match DockerReference::parse(text) {
                Ok(docker) => Self::Docker(docker),
                Err(_) => Self::Stored(text.to_owned()),
            },
        })
    }
}

/// Splits `PATH[:TAG]`. A path that exists as it stands is taken whole.
fn split_tag(text: &str) -> (PathBuf, Option<String>) {
    match text.rsplit_once(':') {
        Some((path, tag))
            if !tag.contains('/') && !path.is_empty() && !Path::new(text).exists() =>
        {
            let tag = (!tag.is_empty()).then(|| tag.to_owned());
            (PathBuf::from(path), tag)
        }
        _ => (PathBuf::from(text), None),
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, path, tag) = match self {
            Self::Oci { directory, tag } => ("oci", directory, tag.as_deref()),
            Self::OciArchive { file, tag } => ("oci-archive", file, tag.as_deref()),
            Self::DockerArchive { file, tag } => ("docker-archive", file, tag.as_deref()),
            Self::RootFs { directory } => ("rootfs", directory, None),
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
                file: "x.tar:repo".into(),
                tag: Some("tag".into())
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
}
