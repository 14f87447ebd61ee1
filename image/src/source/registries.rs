//! `registries.conf` (containers-registries.conf(5), version 2): locations of registries'
//! images, and aliases of short names.
//!
//! The file and its drop-in directories are read from Podman's paths. The settings
//! `unqualified-search-registries` and `short-name-mode` are ignored: a short name
//! without an entry in `[aliases]` refers to Docker's registry.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::repository::Repository;
use crate::Error;
use crate::docker_reference::DockerReference;
use crate::reference::Reference;

/// Maximum size of a file in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Maximum number of drop-in files in a directory.
const MAX_FILES: usize = 1000;

const SYSTEM: &str = "/etc/containers";

/// The merged contents of the files.
#[derive(Debug, Default)]
pub(crate) struct Registries {
    registries: Vec<RegistryTable>,
    aliases: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RegistriesFile {
    registry: Vec<RegistryTable>,
    aliases: BTreeMap<String, String>,
    /// Present in version 1 only.
    registries: Option<serde::de::IgnoredAny>,
}

/// A `[[registry]]` table.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct RegistryTable {
    prefix: String,
    location: String,
    insecure: bool,
    blocked: bool,
    mirror_by_digest_only: bool,
    mirror: Vec<Mirror>,
    /// The file that contains the table.
    #[serde(skip)]
    file: PathBuf,
}

/// A `[[registry.mirror]]` table.
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

/// Locations of an image, in the order in which they are tried.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Locations {
    pub(super) mirrors: Vec<Repository>,
    /// The registry itself.
    pub(super) own: Repository,
}

impl Reference {
    /// As [`Self::parse`], but a name without a registry may be an alias in the
    /// `registries.conf` of this user or host (containers-registries.conf(5)).
    ///
    /// # Errors
    /// As [`Self::parse`], or a file is invalid.
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
    /// Reads the files of this user and of the system.
    ///
    /// # Errors
    /// A file is invalid.
    pub(crate) fn load() -> Result<Self, Error> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        Self::read(&files(Path::new(SYSTEM), &variable))
    }

    /// Reads files in order. Later ones override earlier ones, for each prefix and each
    /// alias.
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
        let file: RegistriesFile = toml::from_str(text).map_err(|error| error.to_string())?;
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

    /// Resolves an alias. `name` is a short name without tag and digest.
    pub(crate) fn alias(&self, name: &str) -> Option<&str> {
        self.aliases.get(name).map(String::as_str)
    }

    /// Returns the table with the longest matching prefix, and the length of the match.
    fn table(&self, name: &str) -> Option<(&RegistryTable, usize)> {
        let matching = self
            .registries
            .iter()
            .filter_map(|table| Some((table, match_prefix(name, &table.prefix)?)));
        matching.max_by_key(|(table, _)| table.prefix.len())
    }

    /// Returns the locations of an image.
    ///
    /// # Errors
    /// The registry is blocked, or the resulting name is invalid.
    pub(super) fn locations(&self, reference: &DockerReference) -> Result<Locations, Error> {
        let name = full_name(reference);
        let Some((table, matched)) = self.table(&name) else {
            return Ok(Locations {
                mirrors: Vec::new(),
                own: Repository::of(reference),
            });
        };
        if table.blocked {
            return Err(Error::Registry {
                registry: reference.registry().to_owned(),
                reason: format!("it is blocked in {:?}", table.file).into(),
            });
        }
        let at = |location: &str, insecure: bool| -> Result<Repository, Error> {
            let repository = match location {
                "" => Repository::of(reference),
                location => {
                    let rest = name.get(matched..).unwrap_or_default();
                    let moved = format!("{location}{rest}");
                    let moved = DockerReference::parse(&moved).map_err(|reason| {
                        let text = format!("the image would be \"{moved}\", and {reason}");
                        Error::file("use", &table.file)(std::io::Error::other(text))
                    })?;
                    Repository::of(&moved)
                }
            };
            Ok(repository.insecure(insecure))
        };
        let has_digest = reference.digest().is_some();
        let serves = |mirror: &&Mirror| match mirror.pull_from_mirror {
            PullFrom::All => has_digest || !table.mirror_by_digest_only,
            PullFrom::DigestOnly => has_digest,
            PullFrom::TagOnly => !has_digest,
        };
        let mirrors = table.mirror.iter().filter(serves);
        Ok(Locations {
            mirrors: mirrors
                .map(|mirror| at(&mirror.location, mirror.insecure))
                .collect::<Result<_, _>>()?,
            own: at(&table.location, table.insecure)?,
        })
    }
}

impl RegistryTable {
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
            return Err(format!("prefix \"{}\" is not valid", self.prefix));
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
            "\"{location}\" is a URL, but only host and path are permitted"
        ));
    }
    location.truncate(location.trim_end_matches('/').len());
    Ok(())
}

/// Parses `text` and looks up `name` in it.
#[cfg(any(feature = "fuzzing", test))]
pub(crate) fn fuzz_registries(text: &str, name: &str) {
    let mut all = Registries::default();
    if all.add(text, Path::new("fuzzed")).is_ok() {
        let _ = all.alias(name);
        if let Ok(reference) = DockerReference::parse(name) {
            let _ = all.locations(&reference);
        }
    }
}

/// Returns the length of the match of `prefix` at the start of a name: complete
/// components, or any host below `HOST` for `*.HOST`.
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

/// Returns the name with its registry, tag and digest.
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

/// Returns true if an alias refers to a name with a registry and without a tag.
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

/// Returns the paths of all possible files, in the order in which they are read.
fn files(system: &Path, variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let own = variable("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&variable("HOME")?).join(".config")))
        .map(|directory| directory.join("containers"));
    let own_file = own.as_ref().map(|own| own.join("registries.conf"));
    let own_file = own_file.filter(|path| path.exists());
    let (file, system_too) = match (variable("CONTAINERS_REGISTRIES_CONF"), own_file) {
        (Some(file), _) => (PathBuf::from(file), true),
        // A user's own file replaces that of the system.
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

/// Returns the `.conf` files of a directory, sorted by name.
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
