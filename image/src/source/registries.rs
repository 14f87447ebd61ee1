//! `registries.conf` (containers-registries.conf(5), version 2): where the images
//! of a registry really are, and what people mean by short names.
//!
//! Read are the file and its drop-in directories, where Podman looks for them. Of
//! what is in them, `unqualified-search-registries` and `short-name-mode` mean
//! nothing here: a short name is Docker's, unless `[aliases]` has it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::place::Place;
use crate::Error;
use crate::docker_reference::DockerReference;
use crate::reference::Reference;

/// Largest file read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most drop-in files of a directory.
const MAX_FILES: usize = 1000;

const SYSTEM: &str = "/etc/containers";

/// All that the files say.
#[derive(Debug, Default)]
pub(crate) struct Registries {
    registries: Vec<Table>,
    aliases: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    registry: Vec<Table>,
    aliases: BTreeMap<String, String>,
    /// Of version 1.
    registries: Option<serde::de::IgnoredAny>,
}

/// `[[registry]]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Table {
    prefix: String,
    location: String,
    insecure: bool,
    blocked: bool,
    mirror_by_digest_only: bool,
    mirror: Vec<Mirror>,
    /// The file that it is in.
    #[serde(skip)]
    file: PathBuf,
}

/// `[[registry.mirror]]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Mirror {
    location: String,
    insecure: bool,
    pull_from_mirror: PullFrom,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PullFrom {
    #[default]
    #[serde(alias = "")]
    All,
    DigestOnly,
    TagOnly,
}

/// Where to look for an image, in this order.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) mirrors: Vec<Place>,
    /// The registry itself.
    pub(super) own: Place,
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
}

impl Registries {
    /// What this user's and the system's files say.
    ///
    /// # Errors
    /// One of them is wrong.
    pub(crate) fn load() -> Result<Self, Error> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        Self::read(&files(Path::new(SYSTEM), &variable))
    }

    /// Later files go before earlier ones, for each prefix and each alias.
    fn read(paths: &[PathBuf]) -> Result<Self, Error> {
        let mut all = Self::default();
        for path in paths {
            let failed = Error::file("read", path);
            let text = match read_file(path) {
                Ok(text) => text,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            all.add(&text, path)
                .map_err(|reason| failed(std::io::Error::other(reason)))?;
        }
        Ok(all)
    }

    fn add(&mut self, text: &str, path: &Path) -> Result<(), String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        if file.registries.is_some() {
            return Err(
                "it is of version 1 of the format; see containers-registries.conf(5)".into(),
            );
        }
        for mut table in file.registry {
            table.check()?;
            table.file = path.to_owned();
            self.registries.retain(|known| known.prefix != table.prefix);
            self.registries.push(table);
        }
        for (name, full) in file.aliases {
            match full.as_str() {
                "" => drop(self.aliases.remove(&name)),
                full if is_full_name(full) => drop(self.aliases.insert(name, full.to_owned())),
                full => return Err(format!("alias \"{name}\": \"{full}\" has no registry")),
            }
        }
        Ok(())
    }

    /// Reads `text` and looks up `name` in it.
    #[cfg(any(feature = "fuzzing", test))]
    pub(crate) fn fuzz(text: &str, name: &str) {
        let mut all = Self::default();
        if all.add(text, Path::new("fuzzed")).is_ok() {
            let _ = all.alias(name);
            if let Ok(reference) = DockerReference::parse(name) {
                let _ = all.places(&reference);
            }
        }
    }

    /// What `name`, a short one without tag and digest, is an alias of.
    pub(crate) fn alias(&self, name: &str) -> Option<&str> {
        self.aliases.get(name).map(String::as_str)
    }

    /// The table with the longest prefix that matches, and how long that is.
    fn table(&self, name: &str) -> Option<(&Table, usize)> {
        let matching = self
            .registries
            .iter()
            .filter_map(|table| Some((table, match_prefix(name, &table.prefix)?)));
        matching.max_by_key(|(table, _)| table.prefix.len())
    }

    /// Where to look for an image.
    ///
    /// # Errors
    /// It is nowhere to be looked for.
    pub(super) fn places(&self, reference: &DockerReference) -> Result<Places, Error> {
        let name = full_name(reference);
        let Some((table, matched)) = self.table(&name) else {
            return Ok(Places {
                mirrors: Vec::new(),
                own: Place::of(reference),
            });
        };
        if table.blocked {
            return Err(Error::Registry {
                registry: reference.registry().to_owned(),
                reason: format!("it is blocked in {:?}", table.file),
            });
        }
        let at = |location: &str, insecure: bool| -> Result<Place, Error> {
            let place = match location {
                "" => Place::of(reference),
                location => {
                    let rest = name.get(matched..).unwrap_or_default();
                    let moved = format!("{location}{rest}");
                    let moved = DockerReference::parse(&moved).map_err(|reason| {
                        let text = format!("the image would be \"{moved}\", and {reason}");
                        Error::file("use", &table.file)(std::io::Error::other(text))
                    })?;
                    Place::of(&moved)
                }
            };
            Ok(place.insecure(insecure))
        };
        let has_digest = reference.digest().is_some();
        let serves = |mirror: &&Mirror| match mirror.pull_from_mirror {
            PullFrom::All => has_digest || !table.mirror_by_digest_only,
            PullFrom::DigestOnly => has_digest,
            PullFrom::TagOnly => !has_digest,
        };
        let mirrors = table.mirror.iter().filter(serves);
        Ok(Places {
            mirrors: mirrors
                .map(|mirror| at(&mirror.location, mirror.insecure))
                .collect::<Result<_, _>>()?,
            own: at(&table.location, table.insecure)?,
        })
    }
}

impl Table {
    fn check(&mut self) -> Result<(), String> {
        clean_location(&mut self.location)?;
        clean_location(&mut self.prefix)?;
        if self.prefix.is_empty() {
            self.prefix = self.location.clone();
        }
        if self.prefix.is_empty() {
            return Err("a registry has neither prefix nor location".to_owned());
        }
        let wildcard = self.prefix.strip_prefix("*.");
        if wildcard.unwrap_or(&self.prefix).contains('*') || wildcard == Some("") {
            return Err(format!("prefix \"{}\" is not understood", self.prefix));
        }
        if self.location.is_empty() && wildcard.is_none() {
            return Err(format!("registry \"{}\" has no location", self.prefix));
        }
        for mirror in &mut self.mirror {
            clean_location(&mut mirror.location)?;
            if mirror.location.is_empty() {
                return Err(format!("a mirror of \"{}\" has no location", self.prefix));
            }
            if self.mirror_by_digest_only && mirror.pull_from_mirror != PullFrom::All {
                return Err(format!(
                    "registry \"{}\" has both mirror-by-digest-only and pull-from-mirror",
                    self.prefix
                ));
            }
        }
        Ok(())
    }
}

fn clean_location(location: &mut String) -> Result<(), String> {
    if location.contains("://") {
        return Err(format!(
            "\"{location}\" is an address; only its host and path are meant"
        ));
    }
    location.truncate(location.trim_end_matches('/').len());
    Ok(())
}

/// The length of what `prefix` matches at the beginning of a name: whole
/// components of it, or for `*.HOST` any host below.
fn match_prefix(name: &str, prefix: &str) -> Option<usize> {
    let end = match prefix.strip_prefix('*') {
        None => name.starts_with(prefix).then_some(prefix.len())?,
        Some(suffix) => {
            let host = name.split(['/', '@']).next()?;
            let at = host.find(suffix)?;
            at + suffix.len()
        }
    };
    let next = name.as_bytes().get(end);
    matches!(next, None | Some(b'/' | b':' | b'@')).then_some(end)
}

/// A name with its registry, tag and digest.
fn full_name(reference: &DockerReference) -> String {
    let mut name = format!("{}/{}", reference.registry(), reference.repository());
    if let Some(tag) = reference.tag() {
        name.push(':');
        name.push_str(tag);
    }
    if let Some(digest) = reference.digest() {
        name.push('@');
        name.push_str(&digest.to_string());
    }
    name
}

/// Whether an alias leads to a name with a registry, and without a tag.
fn is_full_name(text: &str) -> bool {
    let Some((host, rest)) = text.split_once('/') else {
        return false;
    };
    (host.contains(['.', ':']) || host == "localhost")
        && !rest.contains([':', '@'])
        && DockerReference::parse(text).is_ok()
}

fn read_file(path: &Path) -> std::io::Result<String> {
    if path.metadata()?.len() > MAX_FILE {
        return Err(std::io::Error::other("it is too large"));
    }
    std::fs::read_to_string(path)
}

/// The files that there may be, in the order that they are read in.
fn files(system: &Path, variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let own = variable("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&variable("HOME")?).join(".config")))
        .map(|directory| directory.join("containers"));
    let own_file = own.as_ref().map(|own| own.join("registries.conf"));
    let own_file = own_file.filter(|path| path.exists());
    let (file, system_too) = match (variable("CONTAINERS_REGISTRIES_CONF"), own_file) {
        (Some(file), _) => (PathBuf::from(file), true),
        // Whoever has a file of their own has it instead of the system's.
        (None, Some(file)) => (file, false),
        (None, None) => (system.join("registries.conf"), true),
    };
    let mut files = vec![file];
    let directories = [system_too.then_some(system), own.as_deref()];
    for directory in directories.into_iter().flatten() {
        files.extend(drop_ins(&directory.join("registries.conf.d")));
    }
    files
}

/// The `.conf` files of a directory, by name.
fn drop_ins(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let paths = entries.flatten().map(|entry| entry.path());
    let is_conf = |path: &PathBuf| {
        path.extension()
            .is_some_and(|extension| extension == "conf")
    };
    let mut paths: Vec<PathBuf> = paths.filter(is_conf).take(MAX_FILES).collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests;
