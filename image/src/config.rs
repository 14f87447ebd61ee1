//! The configuration of an image (OCI image-spec config.md).

use std::collections::{BTreeMap, BTreeSet};

use crate::digest::Digest;
use serde::{Deserialize, Serialize};

/// The configuration document of an image, as far as it is used. The store has the whole
/// document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ImageConfig {
    /// Time of creation (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Name or address of the author.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// Architecture, as written; see [`Platform::of`](crate::Platform::of).
    pub architecture: String,
    /// Operating system, as written; see [`Platform::of`](crate::Platform::of).
    pub os: String,
    /// Version of the operating system.
    #[serde(
        default,
        rename = "os.version",
        skip_serializing_if = "Option::is_none"
    )]
    pub os_version: Option<String>,
    /// Mandatory features of the operating system.
    #[serde(
        default,
        rename = "os.features",
        skip_serializing_if = "Option::is_none"
    )]
    pub os_features: Option<Vec<String>>,
    /// Variant of the architecture, as written; see [`Platform::of`](crate::Platform::of).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Defaults of containers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Config>,
    /// The layers.
    pub rootfs: RootFs,
    /// Steps that created the image, first to last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<Vec<History>>,
}

impl ImageConfig {
    /// Creates the configuration of an image for a platform (operating system,
    /// architecture and variant) with these layers, lowest first.
    pub(crate) fn new(platform: (&str, &str, Option<&str>), diff_ids: &[Digest]) -> Self {
        let (os, architecture, variant) = platform;
        Self {
            created: None,
            author: None,
            architecture: architecture.to_owned(),
            os: os.to_owned(),
            os_version: None,
            os_features: None,
            variant: variant.map(str::to_owned),
            config: None,
            rootfs: RootFs {
                kind: LAYERS.to_owned(),
                diff_ids: diff_ids.iter().map(Digest::to_string).collect(),
            },
            history: None,
        }
    }
}

/// Defaults of containers of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[non_exhaustive]
pub struct Config {
    /// User and group, by name or number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Ports that a container listens on, such as `80/tcp`.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "go_set")]
    pub exposed_ports: Option<BTreeSet<String>>,
    /// Environment variables, as `NAME=VALUE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<Vec<String>>,
    /// Command to which arguments are appended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Default arguments of the entry point, or a command if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// Directories with data of a container.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "go_set")]
    pub volumes: Option<BTreeSet<String>>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// Labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    /// Signal that asks a container to exit, such as `SIGTERM`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Instructions for builds on this image, as in a Containerfile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_build: Option<Vec<String>>,
    /// Check of a container's health: an extension of Docker's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<Healthcheck>,
}

/// A command that shows whether a container is healthy, as `HEALTHCHECK` in a Dockerfile
/// sets it. Times are in nanoseconds; 0 stands for the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[non_exhaustive]
pub struct Healthcheck {
    /// `NONE`, `CMD` with program and arguments, or `CMD-SHELL` with a command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test: Option<Vec<String>>,
    /// Time between two checks.
    #[serde(skip_serializing_if = "is_zero")]
    pub interval: i64,
    /// Time limit of a check.
    #[serde(skip_serializing_if = "is_zero")]
    pub timeout: i64,
    /// Time after the start in which failures do not count.
    #[serde(skip_serializing_if = "is_zero")]
    pub start_period: i64,
    /// Consecutive failures after which a container is unhealthy.
    #[serde(skip_serializing_if = "is_zero")]
    pub retries: i64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde expects"
)]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

const LAYERS: &str = "layers";

/// The layers of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RootFs {
    /// Always `layers`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<String>,
}

/// A step that created an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct History {
    /// Time of creation (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Name or address of the author.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// The command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    /// A comment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// The step created no layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_layer: Option<bool>,
}

/// The JSON form of a set: an object with empty values, as Go writes
/// `map[string]struct{}`.
mod go_set {
    use std::collections::{BTreeMap, BTreeSet};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Empty {}

    pub(super) fn serialize<S: Serializer>(
        set: &Option<BTreeSet<String>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(set.iter().flatten().map(|name| (name, Empty {})))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<BTreeSet<String>>, D::Error> {
        let map = Option::<BTreeMap<String, Empty>>::deserialize(deserializer)?;
        Ok(map.map(|map| map.into_keys().collect()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// A configuration as Docker writes it, with members that are not in the
    /// specification.
    const DOCKERS: &str = r#"{
        "created": "2024-01-02T03:04:05Z", "architecture": "amd64", "os": "linux",
        "config": {
            "User": "app", "ExposedPorts": {"443/tcp": {}, "80/tcp": {}},
            "Env": ["A=b"], "Entrypoint": ["/bin/app"], "Cmd": ["x"],
            "Volumes": {"/data": {}}, "WorkingDir": "/", "Labels": {"a": "b"},
            "StopSignal": "SIGQUIT", "ArgsEscaped": true, "OnBuild": null,
            "Healthcheck": {"Test": ["CMD", "true"], "Interval": 30000000000}
        },
        "rootfs": {"type": "layers", "diff_ids": ["sha256:00"]},
        "history": [{"created_by": "RUN x", "empty_layer": true}],
        "container": "0123", "docker_version": "20.10"
    }"#;

    #[test]
    fn members_of_the_specification_are_serialized_again() {
        let config: ImageConfig = serde_json::from_str(DOCKERS).unwrap();
        let defaults = config.config.as_ref().unwrap();
        let ports: Vec<_> = defaults.exposed_ports.iter().flatten().collect();
        assert_eq!(ports, ["443/tcp", "80/tcp"]);
        assert_eq!(defaults.stop_signal.as_deref(), Some("SIGQUIT"));
        let health = defaults.healthcheck.as_ref().unwrap();
        assert_eq!(health.interval, 30_000_000_000);
        let mut again: Value = serde_json::from_str(DOCKERS).unwrap();
        for name in ["container", "docker_version"] {
            again.as_object_mut().unwrap().remove(name);
        }
        for name in ["ArgsEscaped", "OnBuild"] {
            again["config"].as_object_mut().unwrap().remove(name);
        }
        assert_eq!(serde_json::to_value(&config).unwrap(), again);
    }

    #[test]
    fn a_new_configuration_has_only_what_is_set() {
        let platform = ("linux", "arm", Some("v7"));
        let digest = Digest::of(b"layer");
        let mut config = ImageConfig::new(platform, &[digest]);
        config.config = Some(Config {
            cmd: Some(vec!["/x".to_owned()]),
            ..Config::default()
        });
        assert_eq!(
            serde_json::to_string(&config).unwrap(),
            format!(
                r#"{{"architecture":"arm","os":"linux","variant":"v7","config":{{"Cmd":["/x"]}},"rootfs":{{"type":"layers","diff_ids":["{digest}"]}}}}"#
            )
        );
    }

    /// The whole document stays in the store as it came. A copy of its other members in
    /// memory would be a hundred times as large as their text.
    #[test]
    fn other_members_cost_no_memory_and_no_depth() {
        let deep = format!("{}{}", "[".repeat(126), "]".repeat(126));
        let text = DOCKERS.replacen('{', &format!("{{\"x\": {deep},"), 1);
        let config: ImageConfig = serde_json::from_str(&text).unwrap();
        // Records wrap it once more.
        let record = serde_json::to_string(&[config]).unwrap();
        assert!(record.len() < DOCKERS.len());
        assert!(serde_json::from_str::<[ImageConfig; 1]>(&record).is_ok());
    }

    #[test]
    fn invalid_configurations_are_refused() {
        for bad in [
            "[]",
            "{}",
            r#"{"os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}"#,
            r#"{"os": "linux", "os": "linux", "architecture": "x",
                "rootfs": {"type": "layers", "diff_ids": []}}"#,
            r#"{"os": "linux", "architecture": "x", "config": {"ExposedPorts": {"80": 1}},
                "rootfs": {"type": "layers", "diff_ids": []}}"#,
        ] {
            assert!(serde_json::from_str::<ImageConfig>(bad).is_err(), "{bad}");
        }
    }
}
