//! The configuration in a VM's record.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::stored::StoredConfigV1;
use super::{StartSettingsV1, VmConfig};

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
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RecordConfigV1 {
    /// Version of this form; records written before it existed have none.
    pub version: u32,
    /// The other members.
    #[serde(flatten)]
    pub config: StoredConfigV1,
    /// Settings of its starts; absent in records of versions that could not start a VM
    /// again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<StartSettingsV1>,
}

impl From<VmConfig> for RecordConfigV1 {
    fn from(config: VmConfig) -> Self {
        Self {
            version: FIRST,
            config: config.into(),
            start: None,
        }
    }
}

impl RecordConfigV1 {
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
        /// The member beside the configuration.
        #[derive(Deserialize)]
        struct Start {
            #[serde(default)]
            start: Option<StartSettingsV1>,
        }
        /// Members that are part of the network since there is one.
        #[derive(Deserialize)]
        struct Early {
            #[serde(default)]
            start: EarlyNames,
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct EarlyNames {
            extra_hosts: Vec<(String, String)>,
            nameservers: Vec<IpAddr>,
        }
        match serde_json::from_slice::<Version>(json)?.version {
            FIRST => {
                let mut config: StoredConfigV1 = serde_json::from_slice(json)?;
                if let Ok(Early { start: early }) = serde_json::from_slice(json) {
                    config.network.hosts.extend(early.extra_hosts);
                    config.network.dns.extend(early.nameservers);
                }
                Ok(Self {
                    version: FIRST,
                    config,
                    start: serde_json::from_slice::<Start>(json)?.start,
                })
            }
            other => Err(RecordFormError::UnknownVersion(other)),
        }
    }
}

impl VmConfig {
    /// Reads the contents of a record's `config.json`, of any version.
    ///
    /// # Errors
    /// See [`RecordFormError`].
    pub fn from_record(json: &[u8]) -> Result<Self, RecordFormError> {
        Ok(RecordConfigV1::from_record(json)?.config.into())
    }
}
