//! Files of records: atomic writes of JSON, and removal of directories.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sm_control::config::RecordConfigV1;

use super::{CONFIG, Record, RecordError, RecordFormError, VmConfig, io_error};

pub(super) fn dir_names(directory: &Path) -> Result<Vec<String>, RecordError> {
    let entries = std::fs::read_dir(directory).map_err(io_error("list", directory))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io_error("list", directory))?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

/// Reads a JSON file; `None` if it does not exist.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, RecordError> {
    read(path, |bytes| Ok(serde_json::from_slice(bytes)?))
}

/// Reads the configuration in a record; `None` if the file does not exist.
pub(super) fn read_config(path: &Path) -> Result<Option<RecordConfigV1>, RecordError> {
    read(path, RecordConfigV1::from_record)
}

impl Record {
    /// Reads the configuration again, which callers change while the VM runs.
    pub(crate) fn reread_config(&self) -> Result<VmConfig, RecordError> {
        match read_config(&self.directory.join(CONFIG))? {
            Some(read) => Ok(read.config.into()),
            None => Err(RecordError::NotFound(self.config.name.clone())),
        }
    }

    /// Writes the configuration durably to the record in `directory`.
    pub(super) fn write_config(&self, directory: &Path) -> Result<(), RecordError> {
        let stored = RecordConfigV1 {
            start: self.start.clone(),
            ..RecordConfigV1::from(self.config.clone())
        };
        write_json(directory, CONFIG, &stored)
    }
}

/// Returns name and removal of a record of a later version, if it has these members.
pub(super) fn read_name(path: &Path) -> Option<(String, bool)> {
    #[derive(Deserialize)]
    struct Named {
        name: String,
        #[serde(default)]
        auto_remove: bool,
    }

    let named: Named = read_json(path).ok()??;
    Some((named.name, named.auto_remove))
}

fn read<T>(
    path: &Path,
    parse: impl FnOnce(&[u8]) -> Result<T, RecordFormError>,
) -> Result<Option<T>, RecordError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("read", path)(error)),
    };
    match parse(&bytes) {
        Ok(value) => Ok(Some(value)),
        Err(source) => Err(RecordError::Form {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Writes `directory/name` atomically; the file survives a crash of the host once this
/// returns.
pub(super) fn write_json(
    directory: &Path,
    name: &str,
    value: &impl Serialize,
) -> Result<(), RecordError> {
    let path = directory.join(name);
    let bytes =
        serde_json::to_vec_pretty(value).map_err(|error| io_error("write", &path)(error.into()))?;
    let fresh = directory.join(format!(".{name}.new"));
    let write = || {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(&fresh, &path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(io_error("write", &path))
}

pub(super) fn remove_tree(path: &Path) -> Result<(), RecordError> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error("remove", path)(error)),
    }
}
