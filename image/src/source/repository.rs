//! Location of a repository: the name of its registry, and the host that serves it.

use crate::docker_reference::{DEFAULT_REGISTRY, DockerReference};

/// Host that serves Docker's own registry.
const DEFAULT_HOST: &str = "registry-1.docker.io";

/// A repository on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Repository {
    /// The registry's name, for messages and for its credentials.
    pub(super) registry: String,
    /// The host, with a port if it is not the default.
    pub(super) host: String,
    pub(super) name: String,
    /// Every certificate is accepted, and plain HTTP is permitted.
    pub(super) insecure: bool,
}

impl Repository {
    /// Returns the location that the reference itself names.
    pub(super) fn of(reference: &DockerReference) -> Self {
        let registry = reference.registry();
        let host = match registry {
            DEFAULT_REGISTRY => DEFAULT_HOST,
            other => other,
        };
        Self {
            registry: registry.to_owned(),
            host: host.to_owned(),
            name: reference.repository().to_owned(),
            insecure: false,
        }
    }

    /// Sets whether the location is insecure.
    pub(super) fn insecure(self, insecure: bool) -> Self {
        Self { insecure, ..self }
    }
}
