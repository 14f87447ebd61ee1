//! `--filter`: conditions of listings, with Docker's names.
//!
//! Conditions of one name are alternatives, and those of different names all apply.

use std::collections::BTreeMap;

use sm_runtime::{Inspection, VmStatus};

/// The conditions of a command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filters(BTreeMap<String, Vec<String>>);

/// The conditions for VMs.
pub(crate) const OF_VMS: &[&str] = &[
    "ancestor", "exited", "health", "id", "label", "name", "publish", "restart", "status", "volume",
];

impl Filters {
    /// Reads `NAME=VALUE` texts; only `known` names have a meaning.
    pub(crate) fn parse(texts: &[String], known: &[&str]) -> anyhow::Result<Self> {
        let mut filters: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for text in texts {
            let Some((name, value)) = text.split_once('=') else {
                anyhow::bail!("\"{text}\" is not a filter: write NAME=VALUE, such as label=web");
            };
            if !known.contains(&name) {
                let known = known.join(", ");
                anyhow::bail!("\"{name}\" is not a filter here; these are: {known}");
            }
            filters
                .entry(name.to_owned())
                .or_default()
                .push(value.to_owned());
        }
        Ok(Self(filters))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the values of a condition.
    pub(crate) fn values(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.get(name).into_iter().flatten().map(String::as_str)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Returns true if there is no condition `name`, or a value of it holds.
    pub(crate) fn hold(&self, name: &str, holds: impl Fn(&str) -> bool) -> bool {
        let values = self.0.get(name);
        values.is_none_or(|values| values.iter().any(|value| holds(value)))
    }

    /// Returns true if all values of condition `name` hold.
    pub(crate) fn all_hold(&self, name: &str, holds: impl Fn(&str) -> bool) -> bool {
        let values = self.0.get(name);
        values.is_none_or(|values| values.iter().all(|value| holds(value)))
    }

    /// Returns true if there is no condition `name`, or `holds` is its value: true or false.
    ///
    /// # Errors
    /// The value is neither.
    pub(crate) fn is(&self, name: &str, holds: impl Fn() -> bool) -> anyhow::Result<bool> {
        let wanted = match self.0.get(name).map(Vec::as_slice) {
            None => return Ok(true),
            Some([value]) => match value.as_str() {
                "true" | "1" | "t" => true,
                "false" | "0" | "f" => false,
                other => anyhow::bail!("\"{other}\" is no value of {name}: write true or false"),
            },
            Some(_) => anyhow::bail!("the filter {name} is given more than once"),
        };
        Ok(holds() == wanted)
    }

    /// Returns true if the conditions for VMs apply to `vm`.
    pub(crate) fn match_vm(&self, vm: &Inspection) -> bool {
        let config = &vm.config;
        self.hold("name", |value| {
            config.name.contains(value.trim_start_matches('/'))
        }) && self.hold("id", |value| config.id.as_str().starts_with(value))
            && self.all_hold("label", |value| has_label(&config.labels, value))
            && self.hold("status", |value| is_status(vm.state.status, value))
            && self.hold("exited", |value| {
                vm.state
                    .exit_code
                    .is_some_and(|code| code.to_string() == value)
            })
            && self.hold("health", |value| match &vm.state.health {
                Some(health) => health.status.as_str() == value,
                None => value == "none",
            })
            && self.hold("ancestor", |value| is_of_image(vm, value))
            && self.hold("volume", |value| {
                let mut mounts = vm.storage.mounts.iter();
                mounts.any(|mount| mount.target == value || mount.name.as_deref() == Some(value))
            })
            && self.hold("restart", |value| config.restart.to_string() == value)
            && self.hold("publish", |value| {
                let ports = vm.state.published.iter();
                let mut ports = ports.filter_map(|port| port.publication.guest);
                ports.any(|port| port.to_string() == value)
            })
    }
}

/// Returns true if one of the labels is `NAME`, or `NAME=VALUE`.
pub(crate) fn has_label(labels: &BTreeMap<String, String>, wanted: &str) -> bool {
    match wanted.split_once('=') {
        Some((name, value)) => labels.get(name).is_some_and(|found| found == value),
        None => labels.contains_key(wanted),
    }
}

fn is_status(status: VmStatus, wanted: &str) -> bool {
    // Docker has no words for the moments before and after a run.
    let dockers = match status {
        VmStatus::Starting | VmStatus::Ending => VmStatus::Running.as_str(),
        other => other.as_str(),
    };
    wanted == status.as_str() || wanted == dockers
}

/// Returns true if the VM's image has this name, with or without its tag, or this digest.
fn is_of_image(vm: &Inspection, wanted: &str) -> bool {
    let config = &vm.config;
    let digest = config.image_digest.trim_start_matches("sha256:");
    let wanted_digest = wanted.trim_start_matches("sha256:");
    let without_tag = config.image.rsplit_once(':').map(|(name, _)| name);
    config.image == wanted
        || without_tag == Some(wanted)
        || (wanted_digest.len() >= 4 && digest.starts_with(wanted_digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_names_and_values() {
        let parse = |texts: &[&str]| {
            let texts: Vec<_> = texts.iter().map(|&text| text.to_owned()).collect();
            Filters::parse(&texts, OF_VMS)
        };
        let filters = parse(&["name=a", "name=b", "label=x=y"]).unwrap();
        assert!(filters.hold("name", |value| value == "b"));
        assert!(!filters.all_hold("name", |value| value == "b"));
        assert!(filters.hold("status", |_| false), "there is no condition");
        let error = parse(&["colour=red"]).unwrap_err().to_string();
        assert!(
            error.contains("\"colour\"") && error.contains("status"),
            "{error}"
        );
        assert!(parse(&["name"]).is_err());
    }

    #[test]
    fn labels_match_by_name_or_value() {
        let labels = [("role".to_owned(), "web=1".to_owned())].into();
        assert!(has_label(&labels, "role"));
        assert!(has_label(&labels, "role=web=1"));
        assert!(!has_label(&labels, "role=web"));
        assert!(!has_label(&labels, "rol"));
    }

    #[test]
    fn moments_count_as_running() {
        assert!(is_status(VmStatus::Ending, "running"));
        assert!(is_status(VmStatus::Ending, "ending"));
        assert!(!is_status(VmStatus::Exited, "running"));
    }
}
