//! `containers-storage:`: images of Podman, Buildah and CRI-O, read in place (the format
//! of containers/storage, drivers `overlay` and `vfs`).
//!
//! ```text
//! DRIVER-images/images.json       names, and the topmost layers
//! DRIVER-images/ID/KEY            manifest, configuration
//! DRIVER-layers/layers.json       parents of layers
//! DRIVER-layers/ID.tar-split.gz   data to reconstruct a layer's stream
//! overlay/ID/diff, vfs/dir/ID     the layer's files
//! ```
//!
//! Nothing is written or locked: other programs replace these files atomically, and all
//! data is checked against its digests.

mod location;
mod tar_split;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use self::location::Location;
use self::tar_split::TarSplit;
use super::{RawManifest, Source, SourceImage, SourceLayer};
use crate::Error;
use crate::config::ImageConfig;
use crate::docker_reference::DockerReference;
use crate::documents::{MAX_DOCUMENT, Named, Parts, check_platform, diff_ids, parse, resolve};
use crate::error::{Cause, ErrorKind};
use crate::platform::Platform;

/// Returns the stream of a layer from its tar-split data and its directory.
#[cfg(any(feature = "fuzzing", test))]
pub(crate) fn tar_split(entries: File, layer: OwnedFd) -> impl Read {
    TarSplit::new(entries, layer)
}

/// Supported drivers.
const DRIVERS: [&str; 2] = ["overlay", "vfs"];
/// Maximum size of a list of images or layers in bytes.
const MAX_LIST: u64 = 256 << 20;
/// Minimum number of digits of an ID without prefix.
const SHORTEST_ID: usize = 6;

#[derive(Clone, Debug, Deserialize)]
struct Image {
    id: String,
    #[serde(default)]
    digest: Option<String>,
    #[serde(default)]
    names: Option<Vec<String>>,
    /// ID of the topmost layer; empty if there is none.
    #[serde(default)]
    layer: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Layer {
    id: String,
    #[serde(default)]
    parent: String,
    #[serde(rename = "diff-digest", default)]
    diff_digest: Option<String>,
}

/// A directory with images.
#[derive(Clone, Debug)]
struct Root {
    path: PathBuf,
    driver: String,
}

/// An image in a storage.
pub(super) struct Storage {
    root: Root,
    image: Image,
    /// All layers of all roots.
    layers: HashMap<String, (Root, Layer)>,
    /// The reference, for messages.
    label: String,
}

impl Storage {
    /// Finds the image `name` in the storage `brackets`, or in this user's.
    pub(super) fn open(brackets: Option<&str>, name: &str) -> Result<Self, Error> {
        let label = match brackets {
            Some(brackets) => format!("containers-storage:[{brackets}]{name}"),
            None => format!("containers-storage:{name}"),
        };
        let unknown = |reason: Cause| Error::unknown(&label, reason);
        let location = match brackets {
            Some(brackets) => Location::parse(brackets),
            None => Location::find(),
        };
        let location = location.map_err(|reason| unknown(reason.into()))?;
        let roots = roots(&location).map_err(unknown)?;
        let mut found = None;
        let mut layers = HashMap::new();
        for root in &roots {
            let images: Vec<Image> = root.list("images")?;
            if found.is_none() {
                let image = find(&images, name).map_err(unknown)?;
                found = image.map(|image| (root.clone(), image.clone()));
            }
            for layer in root.list::<Layer>("layers")? {
                let entry = layers.entry(layer.id.clone());
                entry.or_insert_with(|| (root.clone(), layer));
            }
        }
        let paths: Vec<String> = roots
            .iter()
            .map(|root| root.path.display().to_string())
            .collect();
        let (root, image) = found
            .ok_or_else(|| unknown(format!("there is none in {}", paths.join(" or ")).into()))?;
        Ok(Self {
            root,
            image,
            layers,
            label,
        })
    }

    /// Returns the image's layers, lowest first.
    fn chain(&self) -> Result<Vec<&(Root, Layer)>, Error> {
        let mut chain = Vec::new();
        let mut next = &self.image.layer;
        while !next.is_empty() {
            let layer = self
                .layers
                .get(next)
                .filter(|_| chain.len() <= self.layers.len());
            let layer = layer.ok_or_else(|| {
                let text = format!("its layer {next} is missing from the storage");
                Error::unknown(&self.label, Cause::new(ErrorKind::Damaged, text))
            })?;
            chain.push(layer);
            next = &layer.1.parent;
        }
        chain.reverse();
        Ok(chain)
    }
}

impl Source for Storage {
    fn image(&self, platform: Option<&Platform>) -> Result<SourceImage, Error> {
        let big = |key: &str, what: &str| self.root.big_data(&self.image.id, key, what);
        let read = |named: &Named| big(&format!("manifest-{}", named.digest), "manifest");
        let resolved = resolve(big("manifest", "manifest")?, None, platform, &read)?;
        let parts = Parts::of(&resolved.manifest)?;
        let config_bytes = big(&parts.config.digest.to_string(), "configuration")?;
        parts.config.check(&config_bytes)?;
        let config: ImageConfig = parse(&config_bytes, "configuration")?;
        check_platform(&config, platform)?;
        let diff_ids = diff_ids(&config, parts.layers.len())?;
        let chain = self.chain()?;
        if chain.len() != diff_ids.len() {
            let text = format!(
                "the storage has {} layers of it, its configuration {}",
                chain.len(),
                diff_ids.len()
            );
            return Err(Error::document("configuration", text));
        }
        // An uncompressed layer is reconstructed exactly, and can be exported with its
        // manifest. Compressed layers are not kept in a storage.
        let exact = parts.layers.iter().zip(&diff_ids);
        let exact = exact
            .into_iter()
            .all(|(named, diff_id)| named.digest == *diff_id);
        let stored = chain.iter().map(|(_, layer)| layer);
        let layers = stored
            .zip(diff_ids)
            .zip(parts.layers)
            .map(|((stored, diff_id), named)| {
                let recorded = stored.diff_digest.as_deref();
                if recorded.is_some_and(|recorded| recorded != diff_id.to_string()) {
                    let text = format!("the storage has another layer in place of {diff_id}");
                    return Err(Error::document("configuration", text));
                }
                let named = exact.then_some(named);
                Ok(SourceLayer {
                    digest: diff_id,
                    size: named.as_ref().map(|named| named.size),
                    media_type: named.map(|named| named.media_type),
                    diff_id,
                    location: Some(stored.id.clone()),
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(SourceImage {
            digest: if exact {
                resolved.digest
            } else {
                parts.config.digest
            },
            named: resolved.named,
            manifest: exact.then_some(RawManifest {
                media_type: resolved.media_type,
                bytes: resolved.bytes,
            }),
            config_bytes,
            config,
            layers,
            origin: None,
        })
    }

    fn layer<'a>(&'a self, layer: &SourceLayer) -> Result<Box<dyn Read + Send + 'a>, Error> {
        let id = layer.location.as_deref().unwrap_or_default();
        let (root, _) = self.layers.get(id).ok_or_else(|| Error::Blob {
            digest: layer.digest.to_string(),
            reason: "it is missing".to_owned(),
        })?;
        Ok(Box::new(root.stream(id)?))
    }
}

impl Root {
    /// Reads the list `images` or `layers`.
    fn list<T: serde::de::DeserializeOwned>(&self, what: &str) -> Result<Vec<T>, Error> {
        let path = self
            .path
            .join(format!("{}-{what}", self.driver))
            .join(format!("{what}.json"));
        match read_file(&path, MAX_LIST) {
            Ok(bytes) => parse(&bytes, what),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(Error::file("read", &path)(error)),
        }
    }

    /// Reads a document of an image.
    fn big_data(&self, id: &str, key: &str, what: &str) -> Result<Vec<u8>, Error> {
        check_id(id)?;
        let name = file_name(key);
        if name.contains('/') {
            return Err(Error::document(what, "its name is invalid"));
        }
        let path = self
            .path
            .join(format!("{}-images", self.driver))
            .join(id)
            .join(name);
        read_file(&path, MAX_DOCUMENT).map_err(Error::file("read", &path))
    }

    /// Opens the stream of a layer.
    fn stream(&self, id: &str) -> Result<TarSplit, Error> {
        check_id(id)?;
        let path = self
            .path
            .join(format!("{}-layers", self.driver))
            .join(format!("{id}.tar-split.gz"));
        let entries = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Layer {
                layer: id.to_owned(),
                reason: Cause::new(
                    ErrorKind::Unsupported,
                    "the storage has no tar-split data to reconstruct its stream; copy the \
                     image to an oci: directory with skopeo",
                ),
            },
            _ => Error::file("open", &path)(error),
        })?;
        let files = match self.driver.as_str() {
            "vfs" => self.path.join("vfs/dir").join(id),
            driver => self.path.join(driver).join(id).join("diff"),
        };
        let root = File::open(&files).map_err(Error::file("open", &files))?;
        Ok(TarSplit::new(entries, OwnedFd::from(root)))
    }
}

/// Checks an ID, which becomes part of a path.
fn check_id(id: &str) -> Result<(), Error> {
    let is_id = !id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    match is_id {
        true => Ok(()),
        false => Err(Error::document("storage", format!("{id:?} is not an ID"))),
    }
}

/// Returns the name of the file with the value of a key.
fn file_name(key: &str) -> String {
    let is_plain = |byte: u8| byte == b'.' || byte.is_ascii_digit() || byte.is_ascii_lowercase();
    match key.bytes().all(is_plain) {
        true => key.to_owned(),
        false => format!("={}", STANDARD.encode(key)),
    }
}

fn read_file(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > most {
        true => Err(io::Error::other("it is too large")),
        false => Ok(bytes),
    }
}

/// Returns the existing directories with their drivers.
fn roots(location: &Location) -> Result<Vec<Root>, Cause> {
    let mut roots = Vec::new();
    for path in &location.roots {
        let has = |driver: &&str| path.join(format!("{driver}-images")).is_dir();
        let driver = match location.driver.as_deref() {
            Some(driver) if !DRIVERS.contains(&driver) => {
                let text = format!(
                    "only storages of the drivers {} are supported, not \"{driver}\"",
                    DRIVERS.join(" and ")
                );
                return Err(Cause::new(ErrorKind::Unsupported, text));
            }
            Some(driver) => Some(driver).filter(has),
            None => DRIVERS.into_iter().find(has),
        };
        if let Some(driver) = driver {
            roots.push(Root {
                path: path.clone(),
                driver: driver.to_owned(),
            });
        }
    }
    if roots.is_empty() {
        let paths: Vec<String> = location
            .roots
            .iter()
            .map(|it| it.display().to_string())
            .collect();
        return Err(format!(
            "there is no storage of the drivers {} in {}, or you may not read it",
            DRIVERS.join(" and "),
            paths.join(" or ")
        )
        .into());
    }
    Ok(roots)
}

/// Finds an image by Podman's rules: a short name refers to a locally built image
/// (`localhost/`), then to one of Docker's registry, then to an ID.
fn find<'a>(images: &'a [Image], name: &str) -> Result<Option<&'a Image>, Cause> {
    let by_id = |digits: &str| {
        let mut matching = images.iter().filter(|image| image.id.starts_with(digits));
        match (matching.next(), matching.next()) {
            (Some(_), Some(_)) => Err(Cause::new(
                ErrorKind::Ambiguous,
                format!("several images have IDs that begin with {digits}"),
            )),
            (found, _) => Ok(found),
        }
    };
    if let Some(digits) = name
        .strip_prefix('@')
        .or_else(|| name.strip_prefix("sha256:"))
    {
        return by_id(digits);
    }
    let parsed = DockerReference::parse(name)?;
    let here = DockerReference::parse(&format!("localhost/{name}")).ok();
    let is_short = parsed.is_default_registry() && !name.starts_with("docker.io/");
    for reference in here.filter(|_| is_short).iter().chain([&parsed]) {
        let repository = format!("{}/{}", reference.registry(), reference.repository());
        let matches = |image: &&Image| {
            let digest = reference.digest().map(|digest| digest.to_string());
            let has_digest = digest.is_none() || digest == image.digest;
            let mut names = image.names.iter().flatten();
            has_digest
                && names.any(|known| match reference.tag() {
                    Some(tag) => *known == format!("{repository}:{tag}"),
                    None => known
                        .strip_prefix(&repository)
                        .is_some_and(|rest| rest.starts_with([':', '@'])),
                })
        };
        if let Some(found) = images.iter().find(matches) {
            return Ok(Some(found));
        }
    }
    let is_id = name.len() >= SHORTEST_ID && name.bytes().all(|b| b.is_ascii_hexdigit());
    if is_id { by_id(name) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn image(id: &str, names: &[&str], digest: &str) -> Image {
        Image {
            id: id.to_owned(),
            digest: Some(digest.to_owned()),
            names: Some(names.iter().map(|name| (*name).to_owned()).collect()),
            layer: String::new(),
        }
    }

    #[test]
    fn names_are_podmans() {
        let digest = Digest::of(b"x").to_string();
        let images = [
            image(
                "aaaaaa11",
                &["localhost/app:latest", "r.example/app:v1"],
                &digest,
            ),
            image(
                "aaaaaa22",
                &["docker.io/library/app:latest", "docker.io/library/nginx:1"],
                "y",
            ),
        ];
        let id = |name: &str| find(&images, name).map(|image| image.map(|it| it.id.as_str()));
        assert_eq!(
            id("app"),
            Ok(Some("aaaaaa11")),
            "what was made here goes first"
        );
        assert_eq!(id("docker.io/app"), Ok(Some("aaaaaa22")));
        assert_eq!(id("nginx:1"), Ok(Some("aaaaaa22")));
        assert_eq!(id("nginx"), Ok(None));
        assert_eq!(id("r.example/app:v1"), Ok(Some("aaaaaa11")));
        assert_eq!(id(&format!("r.example/app@{digest}")), Ok(Some("aaaaaa11")));
        assert_eq!(id(&format!("nginx@{digest}")), Ok(None));
        assert_eq!(id("@aaaaaa2"), Ok(Some("aaaaaa22")));
        assert_eq!(id("sha256:aaaaaa11"), Ok(Some("aaaaaa11")));
        assert_eq!(id("aaaaaa2"), Ok(Some("aaaaaa22")));
        assert!(id("aaaaaa").unwrap_err().to_string().contains("several"));
        assert_eq!(id("bbbbbb"), Ok(None));
    }

    #[test]
    fn keys_are_file_names() {
        assert_eq!(file_name("manifest"), "manifest");
        assert_eq!(file_name("sha256:0"), "=c2hhMjU2OjA=");
    }

    #[test]
    fn ids_are_no_paths() {
        let long = "a".repeat(65);
        for bad in ["", "..", "../x", "a/b", "xyz", &long] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
        assert!(check_id("0123abcdef").is_ok());
    }

    #[test]
    fn an_invalid_storage_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let fails = |driver: &str, words: &[&str]| {
            let brackets = format!("{driver}{}", root.display());
            let opened = Storage::open(Some(&brackets), "app");
            let error = opened.and_then(|storage| storage.image(None)).unwrap_err();
            for word in words {
                assert!(
                    error.to_string().contains(word),
                    "{word:?} is not in {error}"
                );
            }
        };
        fails("", &["no storage"]);
        fails("btrfs@", &["overlay and vfs", "btrfs"]);
        let images = root.join("vfs-images");
        std::fs::create_dir(&images).unwrap();
        fails("", &["there is none in", &root.display().to_string()]);
        fails("overlay@", &["no storage"]);
        let write = |json: &str| std::fs::write(images.join("images.json"), json).unwrap();
        write("{");
        fails("", &["images"]);
        write(r#"[{"id": "../../etc", "names": ["localhost/app:latest"]}]"#);
        fails("", &["is not an ID"]);
        write(r#"[{"id": "aa", "names": ["localhost/app:latest"], "layer": "bb"}]"#);
        fails("", &["cannot read"]);
        // Layers whose parents form a cycle.
        let layers = root.join("vfs-layers");
        std::fs::create_dir(&layers).unwrap();
        let json = r#"[{"id": "bb", "parent": "cc"}, {"id": "cc", "parent": "bb"}]"#;
        std::fs::write(layers.join("layers.json"), json).unwrap();
        let brackets = root.display().to_string();
        let storage = Storage::open(Some(&brackets), "app").unwrap();
        assert!(storage.chain().is_err());
    }
}
