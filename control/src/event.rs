//! Events in the life of VMs, images and snapshots, as a log and `sm events` have them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::VmConfig;
use crate::timings::unix_nanos;

/// An event.
///
/// ```
/// use sm_control::event::{EventAction, EventRecord};
///
/// let line = r#"{"time_ns": 1, "type": "vm", "action": "die", "id": "ab",
///               "name": "web", "attributes": {"exit_code": "0"}}"#;
/// let event: EventRecord = serde_json::from_str(line)?;
/// assert_eq!(event.action, EventAction::Die);
/// assert_eq!(event.attributes["exit_code"], "0");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Time in nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// The kind of object that it is about.
    #[serde(rename = "type")]
    pub subject: EventSubject,
    /// What happened to it.
    pub action: EventAction,
    /// Identifier of the object: that of a VM, the digest of an image, or the name of a
    /// snapshot.
    pub id: String,
    /// Name of the object at that time.
    #[serde(default)]
    pub name: String,
    /// Details that depend on the action, such as `exit_code`, `signal` or `old_name`, and
    /// for VMs `image`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
    /// Labels of the VM.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// The kind of object of an [`EventRecord`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventSubject {
    /// A VM.
    Vm,
    /// An image in the store.
    Image,
    /// A snapshot.
    Snapshot,
    /// One that only a later version knows.
    #[serde(other)]
    Other,
}

/// What happened to the object of an [`EventRecord`]; the names are Docker's where it has
/// the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventAction {
    /// A VM, or a snapshot, was created.
    Create,
    /// The workload runs.
    Start,
    /// The VM has ended: `exit_code`.
    Die,
    /// A VM that a client asked to stop has ended.
    Stop,
    /// A client has sent a signal to the workload: `signal`.
    Kill,
    /// The vCPUs are paused.
    Pause,
    /// The vCPUs run again.
    Unpause,
    /// The VM has another name: `old_name`.
    Rename,
    /// Restart policy, stop timeout or labels were changed.
    Update,
    /// The VM was removed.
    Destroy,
    /// The guest's kernel has killed the workload for lack of memory.
    Oom,
    /// The result of the health check has changed: `health_status`.
    HealthStatus,
    /// A command beside the workload was requested: `command`.
    ExecCreate,
    /// It was sent to the guest.
    ExecStart,
    /// It has ended: `exit_code`.
    ExecDie,
    /// The VM was reset to its snapshot.
    Reset,
    /// An image was pulled.
    Pull,
    /// An image, or a snapshot, was removed.
    Remove,
    /// One that only a later version knows.
    #[serde(other)]
    Other,
}

impl EventSubject {
    /// Returns its name, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Image => "image",
            Self::Snapshot => "snapshot",
            Self::Other => "other",
        }
    }
}

impl EventAction {
    /// Returns its name, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Die => "die",
            Self::Stop => "stop",
            Self::Kill => "kill",
            Self::Pause => "pause",
            Self::Unpause => "unpause",
            Self::Rename => "rename",
            Self::Update => "update",
            Self::Destroy => "destroy",
            Self::Oom => "oom",
            Self::HealthStatus => "health_status",
            Self::ExecCreate => "exec_create",
            Self::ExecStart => "exec_start",
            Self::ExecDie => "exec_die",
            Self::Reset => "reset",
            Self::Pull => "pull",
            Self::Remove => "remove",
            Self::Other => "other",
        }
    }
}

impl fmt::Display for EventSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for EventAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl EventRecord {
    /// Returns an event of this moment.
    #[must_use]
    pub fn now(subject: EventSubject, action: EventAction, id: &str, name: &str) -> Self {
        Self {
            time_ns: unix_nanos(),
            subject,
            action,
            id: id.to_owned(),
            name: name.to_owned(),
            attributes: BTreeMap::new(),
            labels: BTreeMap::new(),
        }
    }

    /// Returns an event of this moment about a VM.
    #[must_use]
    pub fn of_vm(action: EventAction, config: &VmConfig) -> Self {
        let event = Self::now(EventSubject::Vm, action, config.id.as_str(), &config.name);
        let labels = config.labels.clone();
        Self { labels, ..event }.with("image", &config.image)
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.attributes.insert(name.to_owned(), value.to_string());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_json() {
        use EventAction as A;
        for action in [
            A::Create,
            A::Start,
            A::Die,
            A::Stop,
            A::Kill,
            A::Pause,
            A::Unpause,
            A::Rename,
            A::Update,
            A::Destroy,
            A::Oom,
            A::HealthStatus,
            A::ExecCreate,
            A::ExecStart,
            A::ExecDie,
            A::Reset,
            A::Pull,
            A::Remove,
        ] {
            assert_eq!(serde_json::to_value(action).unwrap(), action.as_str());
        }
        let later: EventAction = serde_json::from_str("\"dance\"").unwrap();
        assert_eq!(later, EventAction::Other);
    }
}
