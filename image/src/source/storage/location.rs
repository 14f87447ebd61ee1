//! Location of the storage, by `containers-storage.conf(5)` and its defaults.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Deserialize;

const SYSTEM: [&str; 2] = [
    "/etc/containers/storage.conf",
    "/usr/share/containers/storage.conf",
];
const SYSTEM_ROOT: &str = "/var/lib/containers/storage";
/// Maximum size of a file in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Paths of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Location {
    /// Directory of the storage, and those of additional read-only storages.
    pub(super) roots: Vec<PathBuf>,
    /// The driver, if configured; otherwise, the one that has images.
    pub(super) driver: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StorageFile {
    storage: StorageTable,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StorageTable {
    driver: String,
    graphroot: String,
    rootless_storage_path: String,
    options: Options,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Options {
    additionalimagestores: Vec<String>,
}

type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl Location {
    /// Parses the text between brackets: `[DRIVER@]ROOT[+RUN][:OPTIONS]`.
    ///
    /// # Errors
    /// A sentence that describes the problem.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (driver, rest) = match text.split_once('@') {
            Some((driver, rest)) if !driver.contains('/') => (Some(driver.to_owned()), rest),
            _ => (None, text),
        };
        let root = rest.split(['+', ':']).next().unwrap_or_default();
        if !root.starts_with('/') {
            return Err(format!("[{text}] does not begin with an absolute path"));
        }
        Ok(Self {
            roots: vec![PathBuf::from(root)],
            driver,
        })
    }

    /// Finds this user's own storage.
    ///
    /// # Errors
    /// A sentence that describes a problem of the configuration.
    pub(super) fn find() -> Result<Self, String> {
        let uid = rustix::process::geteuid();
        let environment = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        Self::of(uid.as_raw(), &environment, &SYSTEM.map(PathBuf::from))
    }

    fn of(uid: u32, environment: Environment<'_>, system: &[PathBuf]) -> Result<Self, String> {
        let home = environment("HOME").map(PathBuf::from);
        let under = |variable: &str, usual: &str| {
            let set = environment(variable).map(PathBuf::from);
            set.or_else(|| home.as_ref().map(|home| home.join(usual)))
        };
        let own = under("XDG_CONFIG_HOME", ".config");
        let own = own.map(|own| own.join("containers/storage.conf"));
        let configured = environment("CONTAINERS_STORAGE_CONF").map(PathBuf::from);
        let is_root = uid == 0;
        let own = own.filter(|_| !is_root);
        let mut paths = configured.iter().chain(&own).chain(system);
        let path = paths.find(|path| path.exists());
        let table = path.map(|path| read(path)).transpose()?.unwrap_or_default();
        // The root in the system's configuration applies only to root.
        let is_own = path
            .is_some_and(|path| Some(path) == configured.as_ref() || Some(path) == own.as_ref());
        let expand = |text: &str| {
            let home = home.as_ref().map(|home| home.display().to_string());
            let text = text.replace("$UID", &uid.to_string());
            PathBuf::from(text.replace("$HOME", &home.unwrap_or_default()))
        };
        let root = if !table.graphroot.is_empty() && (is_root || is_own) {
            expand(&table.graphroot)
        } else if is_root {
            PathBuf::from(SYSTEM_ROOT)
        } else if !table.rootless_storage_path.is_empty() {
            expand(&table.rootless_storage_path)
        } else {
            let data = under("XDG_DATA_HOME", ".local/share");
            let data = data.ok_or("HOME is not set")?;
            data.join("containers/storage")
        };
        let others = table.options.additionalimagestores.iter();
        Ok(Self {
            roots: [root]
                .into_iter()
                .chain(others.map(|text| expand(text)))
                .collect(),
            driver: Some(table.driver).filter(|driver| !driver.is_empty()),
        })
    }
}

fn read(path: &Path) -> Result<StorageTable, String> {
    let failed = |reason: String| format!("{path:?} cannot be used: {reason}");
    let meta = path.metadata().map_err(|error| failed(error.to_string()))?;
    if meta.len() > MAX_FILE {
        return Err(failed("it is too large".to_owned()));
    }
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let file: StorageFile = toml::from_str(&text).map_err(|error| failed(error.to_string()))?;
    Ok(file.storage)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn brackets_are_read() {
        let parse = |text: &str| Location::parse(text).map(|it| (it.driver, it.roots));
        let expect = |driver: Option<&str>, root: &str| {
            Ok((driver.map(str::to_owned), vec![PathBuf::from(root)]))
        };
        assert_eq!(parse("overlay@/a+/b"), expect(Some("overlay"), "/a"));
        assert_eq!(parse("vfs@/a:x=y"), expect(Some("vfs"), "/a"));
        assert_eq!(parse("/a+/b:x"), expect(None, "/a"));
        assert_eq!(parse("/a@b"), expect(None, "/a@b"));
        for bad in ["", "overlay", "overlay@relative", "@"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn configurations_are_found_as_by_podman() {
        let directory = tempfile::tempdir().unwrap();
        let (home, etc) = (
            directory.path().join("home"),
            directory.path().join("etc.conf"),
        );
        let of = |uid: u32, variables: &[(&str, &Path)]| {
            let environment = |name: &str| match name {
                "HOME" => Some(home.clone().into_os_string()),
                name => {
                    let found = variables.iter().find(|(known, _)| *known == name);
                    found.map(|(_, value)| value.as_os_str().to_owned())
                }
            };
            let found = Location::of(uid, &environment, std::slice::from_ref(&etc))?;
            Ok::<_, String>((found.roots, found.driver))
        };
        let own = home.join(".local/share/containers/storage");
        assert_eq!(of(0, &[]), Ok((vec![SYSTEM_ROOT.into()], None)));
        assert_eq!(of(7, &[]), Ok((vec![own.clone()], None)));
        let text = "[storage]\ndriver = 'vfs'\ngraphroot = '/g'\n\
                    [storage.options]\nadditionalimagestores = ['/more']\n";
        fs::write(&etc, text).unwrap();
        let vfs = Some("vfs".to_owned());
        let more = PathBuf::from("/more");
        assert_eq!(
            of(0, &[]),
            Ok((vec!["/g".into(), more.clone()], vfs.clone()))
        );
        assert_eq!(of(7, &[]), Ok((vec![own, more], vfs)));
        fs::write(&etc, "[storage]\nrootless_storage_path = '/r/$UID$HOME'\n").unwrap();
        let expanded = PathBuf::from(format!("/r/7{}", home.display()));
        assert_eq!(of(7, &[]), Ok((vec![expanded], None)));
        let mine = home.join(".config/containers/storage.conf");
        fs::create_dir_all(mine.parent().unwrap()).unwrap();
        fs::write(&mine, "[storage]\ngraphroot = '/mine'\n").unwrap();
        assert_eq!(of(7, &[]), Ok((vec!["/mine".into()], None)));
        let configured = directory.path().join("given");
        fs::write(&configured, "[storage]\ngraphroot = '/given'\n").unwrap();
        let variables = [("CONTAINERS_STORAGE_CONF", &*configured)];
        assert_eq!(of(7, &variables), Ok((vec!["/given".into()], None)));
        fs::write(&configured, "[storage").unwrap();
        assert!(of(7, &variables).unwrap_err().contains("given"));
    }
}
