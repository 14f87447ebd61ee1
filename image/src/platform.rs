//! Platforms of images: `OS/ARCHITECTURE[/VARIANT]`.

use std::fmt;
use std::str::FromStr;

use crate::Error;
use crate::config::ImageConfig;

/// An operating system and an architecture, with Go's names (OCI image-spec
/// image-index.md), normalized as in containerd: `x86_64` is `amd64`, `aarch64` and
/// `arm64/v8` are `arm64`, `arm` is `arm/v7`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Platform {
    os: String,
    architecture: String,
    /// The variant, or an empty string.
    variant: String,
}

impl Platform {
    /// Returns Linux on this host's architecture, which is the platform of guests.
    #[must_use]
    pub fn host() -> Self {
        Self::new("linux", std::env::consts::ARCH, "")
    }

    pub(crate) fn new(os: &str, architecture: &str, variant: &str) -> Self {
        let os = match os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let architecture = architecture.to_ascii_lowercase();
        let variant = variant.to_ascii_lowercase();
        let (architecture, variant) = normalized(&architecture, &variant);
        Self {
            os,
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        }
    }

    /// Returns the platform in an image's configuration.
    #[must_use]
    pub fn of(config: &ImageConfig) -> Self {
        Self::new(
            &config.os,
            &config.architecture,
            config.variant.as_deref().unwrap_or_default(),
        )
    }

    /// Returns operating system, architecture and variant.
    pub(crate) fn parts(&self) -> (&str, &str, Option<&str>) {
        (self.os(), self.architecture(), self.variant())
    }

    /// Returns the operating system, such as `linux`.
    #[must_use]
    pub fn os(&self) -> &str {
        &self.os
    }

    /// Returns the architecture, such as `amd64`.
    #[must_use]
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Returns the variant of the architecture, such as `v7` of `arm`.
    #[must_use]
    pub fn variant(&self) -> Option<&str> {
        Some(self.variant.as_str()).filter(|variant| !variant.is_empty())
    }

    /// Returns true if the platform is that of this host's guests. The variant is not
    /// compared, because that of the host is unknown.
    #[must_use]
    pub fn is_host(&self) -> bool {
        let host = Self::host();
        self.os == host.os && self.architecture == host.architecture
    }

    /// Returns true if an image for `offered` runs on this platform: the platform is the
    /// same, or its variant is lower.
    #[must_use]
    pub fn accepts(&self, offered: &Self) -> bool {
        self.rank(offered).is_some()
    }

    /// Ranks an image for `offered` on this platform: 0 is best, `None` means that it
    /// does not run. As in containerd, a variant of `arm` or `amd64` runs images for
    /// lower ones. Unlike in containerd, other architectures that a processor may support
    /// (`386` on `amd64`, `arm` on `arm64`) must be requested explicitly.
    pub(crate) fn rank(&self, offered: &Self) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        if self.variant == offered.variant {
            return Some(0);
        }
        let (lowest, default) = match self.architecture.as_str() {
            "arm" => (5, 7),
            "amd64" => (1, 1),
            "arm64" => (8, 8),
            _ => return None,
        };
        let level = |variant: &str| match variant {
            "" => Some(default),
            variant => variant.strip_prefix('v')?.parse::<u32>().ok(),
        };
        let (wanted, offered) = (level(&self.variant)?, level(&offered.variant)?);
        (offered >= lowest)
            .then(|| wanted.checked_sub(offered))
            .flatten()
    }
}

/// Normalizes the names of architectures (containerd's `platforms` package).
fn normalized<'a>(architecture: &'a str, variant: &'a str) -> (&'a str, &'a str) {
    match (architecture, variant) {
        ("i386" | "x86" | "386", _) => ("386", ""),
        ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
        ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant),
        ("aarch64" | "arm64", "8" | "v8" | "v8.0") => ("arm64", ""),
        ("aarch64" | "arm64", variant) => ("arm64", variant),
        ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
        ("armel", _) | ("arm", "6") => ("arm", "v6"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "8") => ("arm", "v8"),
        ("riscv64gc", variant) => ("riscv64", variant),
        other => other,
    }
}

impl Default for Platform {
    fn default() -> Self {
        Self::host()
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match self.variant() {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = Error;

    /// Parses `OS/ARCHITECTURE[/VARIANT]`, or an architecture alone for Linux on it.
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::Platform(text.to_owned());
        let is_part = |part: &&str| {
            let mut bytes = part.bytes();
            !part.is_empty()
                && part.len() <= 32
                && bytes.all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        let parts: Vec<&str> = text.split('/').collect();
        if !parts.iter().all(is_part) {
            return Err(bad());
        }
        match parts.as_slice() {
            [architecture] if is_architecture(architecture) => {
                Ok(Self::new("linux", architecture, ""))
            }
            [os, architecture] => Ok(Self::new(os, architecture, "")),
            [os, architecture, variant] => Ok(Self::new(os, architecture, variant)),
            _ => Err(bad()),
        }
    }
}

fn is_architecture(text: &str) -> bool {
    let (architecture, _) = normalized(text, "");
    matches!(
        architecture,
        "386"
            | "amd64"
            | "arm"
            | "arm64"
            | "loong64"
            | "mips64le"
            | "ppc64le"
            | "riscv64"
            | "s390x"
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn names_are_normalized() {
        for (text, normal) in [
            ("linux/amd64", "linux/amd64"),
            ("Linux/x86_64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/arm/6", "linux/arm/v6"),
            ("armhf", "linux/arm/v7"),
            ("windows/amd64", "windows/amd64"),
            ("linux/new-one", "linux/new-one"),
        ] {
            assert_eq!(platform(text).to_string(), normal, "{text}");
        }
        for bad in [
            "",
            "/",
            "linux/",
            "linux",
            "a/b/c/d",
            "linux/a b",
            "linux/ä",
        ] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }

    #[test]
    fn lower_variants_are_accepted() {
        let rank = |wanted: &str, offered: &str| platform(wanted).rank(&platform(offered));
        assert_eq!(rank("linux/arm/v7", "linux/arm/v7"), Some(0));
        assert_eq!(rank("linux/arm/v7", "linux/arm/v5"), Some(2));
        assert_eq!(rank("linux/arm/v6", "linux/arm/v7"), None);
        assert_eq!(rank("linux/amd64", "linux/amd64/v2"), None);
        assert_eq!(rank("linux/amd64/v3", "linux/amd64"), Some(2));
        assert_eq!(rank("linux/amd64/v3", "linux/amd64/v2"), Some(1));
        assert_eq!(rank("linux/amd64", "linux/386"), None);
        assert_eq!(rank("linux/arm64", "linux/arm64/v8"), Some(0));
        assert_eq!(rank("linux/arm64", "linux/amd64"), None);
        assert_eq!(rank("linux/amd64", "windows/amd64"), None);
    }

    #[test]
    fn the_platform_of_this_host_is_recognised() {
        assert!(Platform::host().is_host());
        assert!(!platform("windows/amd64").is_host());
        assert_eq!(Platform::host().rank(&Platform::host()), Some(0));
    }

    proptest! {
        #[test]
        fn displayed_platforms_are_parsed_back(text in "[a-z0-9]{1,8}/[a-z0-9_]{1,8}(/[a-z0-9.]{1,4})?") {
            let first = platform(&text);
            prop_assert_eq!(platform(&first.to_string()), first);
        }

        #[test]
        fn parsing_any_platform_does_not_panic(text in "\\PC{0,40}") {
            let _ = text.parse::<Platform>();
        }
    }
}
