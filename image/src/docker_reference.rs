//! Names of images in registries, in Docker's syntax.
//!
//! The grammar is that of the distribution project's `reference` package:
//! `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`. A first component is a host if it contains a dot
//! or a colon, or is `localhost`. A name without a host refers to Docker's own registry,
//! where a path of a single component is prefixed with `library/`.

use std::fmt;

use crate::digest::Digest;

/// Name of Docker's own registry in references.
pub(crate) const DEFAULT_REGISTRY: &str = "docker.io";
/// Former name of Docker's own registry.
const LEGACY_REGISTRY: &str = "index.docker.io";
/// Prefix of Docker's official images.
const OFFICIAL: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// Maximum length of a name without tag and digest.
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// The name of an image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DockerReference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl DockerReference {
    /// Parses a name.
    ///
    /// # Errors
    /// The reason why the name is invalid.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest =
                    Digest::parse(digest).ok_or("the text after @ is not a sha256 digest")?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        // A colon before the last slash separates a port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if name.is_empty() {
            return Err("it has no name");
        }
        if name.len() > MAX_NAME {
            return Err("its name is too long");
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err("its tag is not letters, digits, dots, dashes and underscores");
        }
        let (registry, path) = match name.split_once('/') {
            Some((LEGACY_REGISTRY, path)) => (DEFAULT_REGISTRY, path),
            Some((host, path)) if is_host(host) => (host, path),
            _ => (DEFAULT_REGISTRY, name),
        };
        if !is_host_name(registry) {
            return Err("its registry is not a host name");
        }
        if !path.split('/').all(is_component) {
            return Err("its name is not lower-case letters, digits and separators between them");
        }
        let official = registry == DEFAULT_REGISTRY && !path.contains('/');
        let prefix = if official { OFFICIAL } else { "" };
        let tag = match (tag, digest) {
            (None, None) => Some(DEFAULT_TAG),
            (tag, _) => tag,
        };
        Ok(Self {
            registry: registry.to_owned(),
            repository: format!("{prefix}{path}"),
            tag: tag.map(str::to_owned),
            digest,
        })
    }

    /// Returns the registry's host as written, with its port if it has one.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Returns the complete name, including Docker's own registry and `library/`.
    #[must_use]
    pub fn full(&self) -> String {
        let mut name = format!("{}/{}", self.registry, self.repository);
        if let Some(tag) = &self.tag {
            name.push(':');
            name.push_str(tag);
        }
        if let Some(digest) = self.digest {
            name.push_str(&format!("@{digest}"));
        }
        name
    }

    /// Returns true if the name refers to Docker's own registry.
    #[must_use]
    pub fn is_default_registry(&self) -> bool {
        self.registry == DEFAULT_REGISTRY
    }

    /// Returns the image's path in the registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Returns the tag, unless only a digest was given.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Returns the digest, if one was given.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }
}

/// Writes the short form, without Docker's own registry and `library/`.
impl fmt::Display for DockerReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_default_registry() {
            let path = self.repository.strip_prefix(OFFICIAL);
            // A path with several components would be parsed as another name.
            let path = path.filter(|path| !path.contains('/'));
            let path = path.unwrap_or(&self.repository);
            if path.split_once('/').is_some_and(|(host, _)| is_host(host)) {
                write!(f, "{DEFAULT_REGISTRY}/")?;
            }
            f.write_str(path)?;
        } else {
            write!(f, "{}/{}", self.registry, self.repository)?;
        }
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

fn is_host(component: &str) -> bool {
    component.contains(['.', ':']) || component == "localhost"
}

/// Returns true for a name or an address of a host, with or without a port.
fn is_host_name(text: &str) -> bool {
    let is_port = |port: &str| port.parse::<u16>().is_ok() && !port.starts_with('+');
    if let Some(rest) = text.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return false;
        };
        return address.parse::<std::net::Ipv6Addr>().is_ok()
            && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
    }
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    host.split('.').all(is_label) && port.is_none_or(is_port)
}

/// Matches `[a-z0-9]+` with separators `.`, `_`, `__` or dashes.
fn is_component(text: &str) -> bool {
    let bytes = text.as_bytes();
    let is_word = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !is_word(first) || !is_word(last) {
        return false;
    }
    bytes
        .split(is_word)
        .all(|gap| matches!(gap, b"" | b"." | b"_" | b"__") || gap.iter().all(|b| *b == b'-'))
}

fn is_tag(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MAX_TAG
        && text.bytes().next().is_some_and(is_word)
        && text
            .bytes()
            .all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parts(text: &str) -> (String, String, Option<String>) {
        let parsed = DockerReference::parse(text).unwrap();
        (parsed.registry, parsed.repository, parsed.tag)
    }

    #[test]
    fn short_names_are_completed_as_docker_does() {
        let expect = |text: &str, registry: &str, repository: &str, tag: Option<&str>| {
            let expected = (
                registry.to_owned(),
                repository.to_owned(),
                tag.map(str::to_owned),
            );
            assert_eq!(parts(text), expected, "{text}");
        };
        let latest = Some("latest");
        expect("nginx", "docker.io", "library/nginx", latest);
        expect("nginx:1.27", "docker.io", "library/nginx", Some("1.27"));
        expect("org/app", "docker.io", "org/app", latest);
        expect(
            "index.docker.io/nginx",
            "docker.io",
            "library/nginx",
            latest,
        );
        expect("docker.io/nginx", "docker.io", "library/nginx", latest);
        expect("host.example/a/b/c:x", "host.example", "a/b/c", Some("x"));
        expect("localhost/app", "localhost", "app", latest);
        expect("127.0.0.1:5000/app:v1", "127.0.0.1:5000", "app", Some("v1"));
        expect("[::1]:5000/app", "[::1]:5000", "app", latest);
        let digest = Digest::of(b"x");
        expect(&format!("app@{digest}"), "docker.io", "library/app", None);
        let both = DockerReference::parse(&format!("app:v1@{digest}")).unwrap();
        assert_eq!((both.tag(), both.digest()), (Some("v1"), Some(digest)));
        assert_eq!(both.to_string(), format!("app:v1@{digest}"));
        let long = DockerReference::parse("docker.io/library/nginx").unwrap();
        assert_eq!(long.to_string(), "nginx:latest");
        // A component after a host is not a host.
        for name in ["docker.io/a.b/c:latest", "docker.io/localhost/c:latest"] {
            let odd = DockerReference::parse(name).unwrap();
            assert!(odd.is_default_registry());
            assert_eq!(odd.to_string(), name);
        }
    }

    #[test]
    fn invalid_names_are_refused() {
        let long = "a".repeat(256);
        for text in [
            "",
            ":tag",
            "App",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a:b c",
            "a@sha256:12",
            "a@md5:1",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "host.example:port/a",
            "host.example:99999/a",
            "-h.example/a",
            "[::1/a",
            "[x]:1/a",
            "a:.x",
            &long,
        ] {
            assert!(DockerReference::parse(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn displayed_references_are_parsed_back(
            text in "[a-z0-9A-Z:/@._\\[\\]-]{0,40}"
        ) {
            if let Ok(parsed) = DockerReference::parse(&text) {
                let again = DockerReference::parse(&parsed.to_string());
                prop_assert_eq!(again, Ok(parsed));
            }
        }
    }
}
