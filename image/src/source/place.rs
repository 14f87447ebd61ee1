//! Where a repository is: what the registry is called, and who answers for it.

use crate::docker_reference::{DEFAULT_REGISTRY, DockerReference};

/// Where Docker's own registry answers.
const DEFAULT_HOST: &str = "registry-1.docker.io";

/// A repository at a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The registry, for people and their credentials.
    pub(super) registry: String,
    /// Who answers, with a port if it is not the usual one.
    pub(super) host: String,
    pub(super) repository: String,
    /// Any certificate is believed, or none is asked for.
    pub(super) insecure: bool,
}

impl Place {
    /// Where the reference itself says.
    pub(super) fn of(reference: &DockerReference) -> Self {
        let registry = reference.registry();
        let host = match registry {
            DEFAULT_REGISTRY => DEFAULT_HOST,
            other => other,
        };
        Self {
            registry: registry.to_owned(),
            host: host.to_owned(),
            repository: reference.repository().to_owned(),
            insecure: false,
        }
    }

    /// The same, where anything is believed.
    pub(super) fn insecure(self, insecure: bool) -> Self {
        Self { insecure, ..self }
    }
}
