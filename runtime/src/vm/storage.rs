//! The mounts of a VM, for people and programs to read.

use std::path::PathBuf;

use serde::Serialize;
use sm_control::config::{MountSourceV1, MountV1};

use crate::record::Record;

/// The mounts of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct StorageView {
    /// File systems that are mounted in its root. Those of a clone are in its snapshot, and
    /// are not listed.
    pub mounts: Vec<MountView>,
    /// Directories that the image declares as volumes and that are in the root instead: there
    /// are more than a VM has disks, or the guest's own file systems are there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes_in_root: Vec<String>,
}

/// A mount of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MountView {
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: MountKindView,
    /// The name of the volume; absent for a disk that is removed with the VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The path on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<PathBuf>,
    /// The path in the workload's root.
    pub target: String,
    /// The workload cannot write to it.
    pub read_only: bool,
    /// The volume was created for this VM.
    pub anonymous: bool,
}

/// The kind of a [`MountView`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MountKindView {
    /// A volume, or a disk that is removed with the VM.
    Volume,
    /// A directory or a file of the host.
    Bind,
    /// Guest memory.
    Tmpfs,
}

impl MountKindView {
    /// Returns its name, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Volume => "volume",
            Self::Bind => "bind",
            Self::Tmpfs => "tmpfs",
        }
    }
}

impl StorageView {
    pub(super) fn of(record: &Record) -> Self {
        let Some(settings) = record.start_settings() else {
            return Self::default();
        };
        Self {
            mounts: settings.mounts.iter().map(view).collect(),
            volumes_in_root: settings.volumes_in_root.clone(),
        }
    }
}

fn view(mount: &MountV1) -> MountView {
    let (kind, name, source, anonymous) = match &mount.source {
        MountSourceV1::Volume {
            name, anonymous, ..
        } => (MountKindView::Volume, name.clone(), None, *anonymous),
        MountSourceV1::Host { path, .. } => (MountKindView::Bind, None, Some(path.clone()), false),
        MountSourceV1::Tmpfs { .. } => (MountKindView::Tmpfs, None, None, false),
    };
    MountView {
        kind,
        name,
        source,
        target: mount.target.clone(),
        read_only: mount.read_only,
        anonymous,
    }
}
