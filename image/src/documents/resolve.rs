//! Resolution of a reference to one image: through indexes, by platform.

use serde::Deserialize;

use super::model::{BlobDescriptor, ImageIndex, ImageManifest, OCI_INDEX, OCI_MANIFEST};
use super::{Named, parse};
use crate::Error;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::error::{Cause, ErrorKind};
use crate::platform::Platform;

/// Maximum nesting depth of indexes.
const MAX_DEPTH: usize = 4;
/// Maximum number of documents read to find one image.
const MAX_DOCUMENTS: usize = 16;
/// Maximum number of platforms listed in a message.
const MAX_LISTED: usize = 20;

const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// The manifest that was found.
#[derive(Debug)]
pub(crate) struct Resolved {
    /// Digest of the manifest.
    pub(crate) digest: Digest,
    /// Digest of the document that the search started with.
    pub(crate) named: Digest,
    pub(crate) media_type: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) manifest: ImageManifest,
}

/// A parsed manifest document.
enum Document {
    /// Manifests for several platforms.
    Index(Box<ImageIndex>),
    /// The manifest of one image.
    Manifest(Box<ImageManifest>),
}

/// Parses an index or a manifest. They are distinguished by their members, because the
/// media type inside is optional. An ambiguous document is refused, because other
/// software may have checked and signed the other interpretation (CVE-2021-41190).
fn parse_document(bytes: &[u8], media_type: Option<&str>) -> Result<Document, Error> {
    type Present = Option<serde::de::IgnoredAny>;
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct DocumentMembers {
        schema_version: Option<u64>,
        media_type: Option<String>,
        manifests: Present,
        config: Present,
        layers: Present,
        fs_layers: Present,
    }
    // The parser would accept a list with the members in order.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(Error::document("manifest", "it is not an object"));
    }
    let members: DocumentMembers = parse(bytes, "manifest")?;
    let declared = [members.media_type.as_deref(), media_type];
    if members.schema_version == Some(1)
        || members.fs_layers.is_some()
        || declared
            .iter()
            .flatten()
            .any(|declared| is_schema_1(declared))
    {
        let text = "it has Docker's schema 1, which does not identify the contents of layers; \
                    push the image again with any Docker or Podman since 2016";
        let reason = Cause::new(ErrorKind::Unsupported, text);
        return Err(Error::document("manifest", reason));
    }
    let is_index = members.manifests.is_some();
    if is_index && (members.config.is_some() || members.layers.is_some()) {
        let text = "it is an index and a manifest at once (CVE-2021-41190)";
        return Err(Error::document("manifest", text));
    }
    for declared in declared.into_iter().flatten() {
        let contradicted = match is_index {
            true => matches!(declared, OCI_MANIFEST | DOCKER_MANIFEST),
            false => matches!(declared, OCI_INDEX | DOCKER_LIST),
        };
        if contradicted {
            let kind = if is_index { "an index" } else { "a manifest" };
            let text = format!("it is {kind}, but called \"{declared}\" (CVE-2021-41190)");
            return Err(Error::document("manifest", text));
        }
    }
    Ok(match is_index {
        true => Document::Index(Box::new(parse(bytes, "index")?)),
        false => Document::Manifest(Box::new(parse(bytes, "manifest")?)),
    })
}

fn is_schema_1(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.docker.distribution.manifest.v1+")
}

/// Reads documents by their descriptors, without checks.
type Read<'a> = &'a dyn Fn(&Named) -> Result<Vec<u8>, Error>;

/// Follows the document `bytes` to the manifest for `platform`. `media_type` is the type
/// that the source reported for `bytes`.
pub(crate) fn resolve(
    bytes: Vec<u8>,
    media_type: Option<&str>,
    platform: Option<&Platform>,
    read: Read<'_>,
) -> Result<Resolved, Error> {
    let named = Digest::of(&bytes);
    let host = Platform::host();
    let mut search = Search {
        platform: platform.unwrap_or(&host),
        read,
        left: MAX_DOCUMENTS,
        offered: Vec::new(),
    };
    let found = search.follow(bytes, media_type, 0)?;
    found
        .map(|found| Resolved { named, ..found })
        .ok_or_else(|| search.nothing())
}

struct Search<'a> {
    platform: &'a Platform,
    read: Read<'a>,
    /// Number of documents that may still be read.
    left: usize,
    /// Platforms found so far.
    offered: Vec<Platform>,
}

impl Search<'_> {
    fn follow(
        &mut self,
        bytes: Vec<u8>,
        media_type: Option<&str>,
        depth: usize,
    ) -> Result<Option<Resolved>, Error> {
        let index = match parse_document(&bytes, media_type)? {
            Document::Index(index) => index,
            Document::Manifest(manifest) => {
                let digest = Digest::of(&bytes);
                let inside = manifest.media_type.clone();
                return Ok(Some(Resolved {
                    digest,
                    named: digest,
                    media_type: match (inside, media_type) {
                        (Some(inside), _) => inside,
                        (None, Some(DOCKER_MANIFEST)) => DOCKER_MANIFEST.to_owned(),
                        (None, _) => OCI_MANIFEST.to_owned(),
                    },
                    bytes,
                    manifest: *manifest,
                }));
            }
        };
        if depth == MAX_DEPTH {
            return Err(Error::document(
                "index",
                Cause::new(ErrorKind::LimitExceeded, "it refers to too many documents"),
            ));
        }
        for chosen in self.candidates(&index)? {
            let named = Named::from_descriptor(chosen, "index")?;
            self.left = self.left.checked_sub(1).ok_or_else(|| {
                Error::document(
                    "index",
                    Cause::new(ErrorKind::LimitExceeded, "it refers to too many documents"),
                )
            })?;
            let bytes = (self.read)(&named)?;
            named.check(&bytes)?;
            let found = self.follow(bytes, Some(&named.media_type), depth + 1)?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// Returns the entries of an index to follow: the best manifest, otherwise the nested
    /// indexes, otherwise the only entry.
    fn candidates<'i>(&mut self, index: &'i ImageIndex) -> Result<Vec<&'i BlobDescriptor>, Error> {
        let manifests = &index.manifests;
        if manifests.is_empty() {
            return Err(Error::document("index", "it lists no manifest"));
        }
        let mut best: Option<(u32, &BlobDescriptor)> = None;
        let mut nested = Vec::new();
        for descriptor in manifests {
            if is_attestation(descriptor) {
                continue;
            }
            let platform = platform_of(descriptor);
            let rank = platform.as_ref().map(|offered| self.platform.rank(offered));
            if is_index(descriptor) {
                if rank != Some(None) {
                    nested.push(descriptor);
                }
            } else if let Some(Some(rank)) = rank
                && best.is_none_or(|(best, _)| rank < best)
            {
                best = Some((rank, descriptor));
            }
            if let Some(platform) = platform
                && !self.offered.contains(&platform)
            {
                self.offered.push(platform);
            }
        }
        Ok(match (best, manifests.as_slice()) {
            (Some((_, best)), _) => vec![best],
            (None, [only]) if only.platform.is_none() => vec![only],
            (None, _) => nested,
        })
    }

    fn nothing(&self) -> Error {
        let mut offered: Vec<String> = self.offered.iter().map(Platform::to_string).collect();
        if offered.len() > MAX_LISTED {
            offered.truncate(MAX_LISTED);
            offered.push("others".to_owned());
        }
        Error::NoPlatform {
            wanted: self.platform.to_string(),
            offered: match offered.as_slice() {
                [] => "no named platform".to_owned(),
                offered => offered.join(", "),
            },
        }
    }
}

/// Returns the platform of a descriptor.
pub(crate) fn platform_of(descriptor: &BlobDescriptor) -> Option<Platform> {
    let platform = descriptor.platform.as_ref()?;
    Some(Platform::new(
        &platform.os,
        &platform.architecture,
        platform.variant.as_deref().unwrap_or_default(),
    ))
}

fn is_index(descriptor: &BlobDescriptor) -> bool {
    matches!(descriptor.media_type.as_str(), OCI_INDEX | DOCKER_LIST)
}

/// Returns true for an attestation of BuildKit, which describes a build and is not an
/// image.
fn is_attestation(descriptor: &BlobDescriptor) -> bool {
    let annotation = descriptor.annotation("vnd.docker.reference.type");
    let annotation = annotation == Some("attestation-manifest");
    let platform = platform_of(descriptor);
    annotation || platform.is_some_and(|p| p.os() == "unknown" && p.architecture() == "unknown")
}

/// Checks that an image is for the requested platform.
pub(crate) fn check_platform(
    config: &ImageConfig,
    platform: Option<&Platform>,
) -> Result<(), Error> {
    let offered = Platform::of(config);
    match platform {
        Some(wanted) if !wanted.accepts(&offered) => Err(Error::NoPlatform {
            wanted: wanted.to_string(),
            offered: offered.to_string(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;

    use super::*;

    #[derive(Default)]
    struct Documents {
        all: HashMap<Digest, Vec<u8>>,
        read: RefCell<Vec<Digest>>,
    }

    impl Documents {
        fn add(&mut self, text: String) -> (Digest, usize) {
            let bytes = text.into_bytes();
            let (digest, len) = (Digest::of(&bytes), bytes.len());
            self.all.insert(digest, bytes);
            (digest, len)
        }

        /// Adds a manifest that `name` makes distinct.
        fn manifest(&mut self, name: &str) -> (Digest, usize) {
            let digest = Digest::of(name.as_bytes());
            self.add(format!(
                r#"{{"schemaVersion": 2, "layers": [], "config": {{"digest": "{digest}", "size": 1,
                "mediaType": "application/vnd.oci.image.config.v1+json"}}}}"#
            ))
        }

        /// Adds an index of these entries, each with a platform (or none) and a media
        /// type.
        fn index(&mut self, entries: &[(&str, &str, (Digest, usize))]) -> (Digest, usize) {
            let entries: Vec<String> = entries
                .iter()
                .map(|(platform, media_type, (digest, size))| {
                    let mut parts = platform.split('/');
                    let platform = match (parts.next(), parts.next()) {
                        (Some(os), Some(architecture)) => format!(
                            r#", "platform": {{"os": "{os}", "architecture": "{architecture}",
                            "variant": "{}"}}"#,
                            parts.next().unwrap_or_default()
                        ),
                        _ => String::new(),
                    };
                    format!(
                        r#"{{"mediaType": "{media_type}", "digest": "{digest}", "size": {size}{platform}}}"#
                    )
                })
                .collect();
            self.add(format!(
                r#"{{"schemaVersion": 2, "manifests": [{}]}}"#,
                entries.join(", ")
            ))
        }

        fn find(&self, start: Digest, platform: &str) -> Result<Digest, Error> {
            let platform: Platform = platform.parse().unwrap();
            let read = |named: &Named| {
                self.read.borrow_mut().push(named.digest);
                Ok(self.all[&named.digest].clone())
            };
            let found = resolve(self.all[&start].clone(), None, Some(&platform), &read)?;
            assert_eq!(found.named, start);
            Ok(found.digest)
        }
    }

    #[test]
    fn the_best_variant_is_taken() {
        let mut all = Documents::default();
        let [v5, v6, amd, v3] = ["v5", "v6", "amd", "v3"].map(|name| all.manifest(name));
        let (index, _) = all.index(&[
            ("linux/arm/v5", OCI_MANIFEST, v5),
            ("linux/arm/v6", OCI_MANIFEST, v6),
            ("linux/amd64/v3", OCI_MANIFEST, v3),
            ("linux/amd64", OCI_MANIFEST, amd),
            ("unknown/unknown", OCI_MANIFEST, amd),
        ]);
        assert_eq!(all.find(index, "linux/arm").unwrap(), v6.0);
        assert_eq!(all.find(index, "linux/arm/v5").unwrap(), v5.0);
        assert_eq!(all.find(index, "linux/amd64").unwrap(), amd.0);
        assert_eq!(all.find(index, "linux/amd64/v4").unwrap(), v3.0);
        let error = all.find(index, "linux/s390x").unwrap_err().to_string();
        assert_eq!(
            error,
            "there is no image for linux/s390x; there are images for linux/arm/v5, \
             linux/arm/v6, linux/amd64/v3, linux/amd64"
        );
    }

    #[test]
    fn a_lone_manifest_without_a_platform_is_taken() {
        let mut all = Documents::default();
        let one = all.manifest("one");
        let (index, _) = all.index(&[("", OCI_MANIFEST, one)]);
        assert_eq!(all.find(index, "linux/arm64").unwrap(), one.0);
        let (index, _) = all.index(&[("", OCI_MANIFEST, one), ("", OCI_MANIFEST, one)]);
        assert!(all.find(index, "linux/arm64").is_err());
        let (index, _) = all.index(&[]);
        let error = all.find(index, "linux/arm64").unwrap_err().to_string();
        assert!(error.contains("lists no manifest"), "{error}");
    }

    #[test]
    fn indexes_in_indexes_are_followed_to_a_depth() {
        let mut all = Documents::default();
        let (arm, amd) = (all.manifest("arm"), all.manifest("amd"));
        let other = all.index(&[("linux/arm64", OCI_MANIFEST, arm)]);
        let mut last = all.index(&[("linux/amd64", OCI_MANIFEST, amd)]);
        let (mixed, _) = all.index(&[("", OCI_INDEX, other), ("", DOCKER_LIST, last)]);
        assert_eq!(all.find(mixed, "linux/amd64").unwrap(), amd.0);
        for depth in 0..MAX_DEPTH {
            assert_eq!(all.find(last.0, "linux/amd64").unwrap(), amd.0, "{depth}");
            last = all.index(&[("", OCI_INDEX, last)]);
        }
        let error = all.find(last.0, "linux/amd64").unwrap_err().to_string();
        assert!(error.contains("too many"), "{error}");
    }

    #[test]
    fn a_forest_of_indexes_is_bounded() {
        let mut all = Documents::default();
        let arm = all.manifest("arm");
        let mut last = all.index(&[("linux/arm64", OCI_MANIFEST, arm)]);
        for _ in 1..MAX_DEPTH {
            last = all.index(&[("", OCI_INDEX, last); 8]);
        }
        let error = all.find(last.0, "linux/amd64").unwrap_err().to_string();
        assert!(error.contains("too many"), "{error}");
        assert!(all.read.borrow().len() <= MAX_DOCUMENTS);
    }

    #[track_caller]
    fn refused(document: &str, media_type: Option<&str>, word: &str) {
        let read = |_: &Named| panic!("nothing is to be read");
        let resolved = resolve(document.as_bytes().to_vec(), media_type, None, &read);
        let error = resolved.unwrap_err().to_string();
        assert!(error.contains(word), "{word:?} is not in {error:?}");
    }

    #[test]
    fn ambiguous_documents_are_refused() {
        let mut all = Documents::default();
        let (digest, _) = all.manifest("one");
        let manifest = String::from_utf8(all.all[&digest].clone()).unwrap();
        let index = r#"{"schemaVersion": 2, "manifests": []}"#;
        let both = manifest.replace("\"layers\"", "\"manifests\": [], \"layers\"");
        refused(&both, None, "CVE-2021-41190");
        refused(r#"{"manifests": [], "config": {}}"#, None, "at once");
        // The media types inside and outside must match the contents.
        let other = ", \"mediaType\": \"application/vnd.oci.image.index.v1+json\", \"layers\"";
        refused(&manifest.replace(", \"layers\"", other), None, "called");
        refused(&manifest, Some(OCI_INDEX), "called");
        refused(&manifest, Some(DOCKER_LIST), "called");
        refused(index, Some(DOCKER_MANIFEST), "called");
        // Parsers differ in which of two equal members they use.
        let twice = manifest.replace("\"layers\"", "\"layers\": [], \"layers\"");
        refused(&twice, None, "duplicate field");
        let twice = manifest.replace("\"size\"", "\"size\": 2, \"size\"");
        refused(&twice, None, "duplicate field");
        // An unspecific media type of a registry is ignored.
        let read = |_: &Named| panic!("nothing is to be read");
        let bytes = manifest.into_bytes();
        let found = resolve(bytes, Some("application/json"), None, &read).unwrap();
        assert_eq!(found.media_type, OCI_MANIFEST);
    }

    #[test]
    fn schema_1_is_refused_with_the_reason() {
        let unsigned = r#"{"schemaVersion": 1, "fsLayers": [{"blobSum": "sha256:00"}]}"#;
        refused(unsigned, None, "schema 1");
        refused(r#"{"fsLayers": []}"#, None, "schema 1");
        let signed = "application/vnd.docker.distribution.manifest.v1+prettyjws";
        refused("{}", Some(signed), "push the image again");
    }

    #[test]
    fn documents_are_checked() {
        let mut all = Documents::default();
        let amd = all.manifest("amd");
        let (index, _) = all.index(&[("linux/amd64", OCI_MANIFEST, amd)]);
        all.all.get_mut(&amd.0).unwrap().push(b' ');
        let error = all.find(index, "linux/amd64").unwrap_err().to_string();
        assert!(error.contains("bytes instead of"), "{error}");
    }
}
