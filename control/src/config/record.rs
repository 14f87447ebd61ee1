//! The configuration in a VM's record.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::stored::{PublicationV1, WorkloadV1};
use super::{VmConfig, default_wait_ms, from_ns, from_wait_ms, to_ms, to_ns, to_wait_ms};
use crate::id::VmId;

/// Failure to read the configuration of a record.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecordFormError {
    /// It is not the JSON of a configuration.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// It has a version that this program does not know.
    #[error("it has version {0}, and this program knows version {FIRST}")]
    UnknownVersion(u32),
}

const FIRST: u32 = 1;

fn first_version() -> u32 {
    FIRST
}

/// The contents of `config.json`, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordConfigV1 {
    /// Version of this form; records written before it existed have none.
    #[serde(default = "first_version")]
    pub version: u32,
    /// Identifier.
    pub id: VmId,
    /// Name.
    pub name: String,
    /// The image reference that the caller gave.
    pub image: String,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// Creation time in nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// The command that runs in the VM.
    pub workload: WorkloadV1,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Path of the kernel image that was booted.
    pub kernel: PathBuf,
    /// The VM's record is removed when the VM exits.
    pub auto_remove: bool,
    /// The root file system has no writable layer.
    pub read_only: bool,
    /// Milliseconds between the stop signal and SIGKILL.
    pub stop_timeout_ms: u64,
    /// Guest ports published on the host, as the caller requested them.
    #[serde(default)]
    pub publish: Vec<PublicationV1>,
    /// Milliseconds that a connection to a published port waits for a listener in the
    /// guest.
    #[serde(default = "default_wait_ms")]
    pub publish_wait_ms: u32,
}

impl From<VmConfig> for RecordConfigV1 {
    fn from(config: VmConfig) -> Self {
        let VmConfig {
            id,
            name,
            image,
            image_digest,
            created,
            workload,
            memory_bytes,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout,
            publish,
            publish_wait,
        } = config;
        Self {
            version: FIRST,
            id,
            name,
            image,
            image_digest,
            created_ns: to_ns(created),
            workload: workload.into(),
            memory: memory_bytes,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout_ms: to_ms(stop_timeout),
            publish: publish.into_iter().map(Into::into).collect(),
            publish_wait_ms: to_wait_ms(publish_wait),
        }
    }
}

impl VmConfig {
    /// Reads the contents of a record's `config.json`, of any version.
    ///
    /// # Errors
    /// See [`RecordFormError`].
    pub fn from_record(json: &[u8]) -> Result<Self, RecordFormError> {
        /// The member that decides how the others are read.
        #[derive(Deserialize)]
        struct Version {
            #[serde(default = "first_version")]
            version: u32,
        }
        match serde_json::from_slice::<Version>(json)?.version {
            FIRST => Ok(serde_json::from_slice::<RecordConfigV1>(json)?.into()),
            other => Err(RecordFormError::UnknownVersion(other)),
        }
    }
}

impl From<RecordConfigV1> for VmConfig {
    fn from(config: RecordConfigV1) -> Self {
        let RecordConfigV1 {
            version: _,
            id,
            name,
            image,
            image_digest,
            created_ns,
            workload,
            memory,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout_ms,
            publish,
            publish_wait_ms,
        } = config;
        Self {
            id,
            name,
            image,
            image_digest,
            created: from_ns(created_ns),
            workload: workload.into(),
            memory_bytes: memory,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout: Duration::from_millis(stop_timeout_ms),
            publish: publish.into_iter().map(Into::into).collect(),
            publish_wait: from_wait_ms(publish_wait_ms),
        }
    }
}
