//! Images of what a VM has changed.

use sm_control::signal;
use sm_control::workload::Workload;
use sm_image::{Commit, Config, Digest, PullOptions, Store};

use crate::files::{FileAccess, FileScope, Processes};
use crate::image::docker_name;
use crate::vm::Vm;
use crate::{Error, Refusal};

/// Options of [`Vm::commit`].
#[derive(Debug)]
pub struct CommitOptions {
    created: String,
    author: Option<String>,
    comment: Option<String>,
    processes: Processes,
}

impl CommitOptions {
    /// Creates options for an image with this time of creation (RFC 3339). Processes are
    /// paused while the root file system is read.
    #[must_use]
    pub fn new(created: impl Into<String>) -> Self {
        Self {
            created: created.into(),
            author: None,
            comment: None,
            processes: Processes::Pause,
        }
    }

    /// Sets the author.
    #[must_use]
    pub fn author(mut self, author: Option<String>) -> Self {
        self.author = author;
        self
    }

    /// Sets the comment in the history of the image.
    #[must_use]
    pub fn comment(mut self, comment: Option<String>) -> Self {
        self.comment = comment;
        self
    }

    /// Sets what the VM's processes do meanwhile.
    #[must_use]
    pub fn processes(mut self, processes: Processes) -> Self {
        self.processes = processes;
        self
    }
}

impl Vm {
    /// Creates an image in the local store of the VM's image and the changes of its root
    /// file system. Its configuration is that of the image with the command, environment,
    /// user and directory of the VM, changed by `change`. Returns its ID.
    ///
    /// # Errors
    /// The files of the VM cannot be opened ([`Self::open_files`]), its image is not in the
    /// store any more, or the store cannot be written.
    pub fn commit(
        &self,
        name: Option<&str>,
        options: CommitOptions,
        change: impl FnOnce(&mut Config),
        pull: &PullOptions<'_>,
    ) -> Result<Digest, Error> {
        let name = name.map(docker_name).transpose()?;
        let config = self.config();
        let base = Digest::parse(&config.image_digest)
            .ok_or_else(|| Refusal::Vm(format!("{:?} is no image", config.image_digest)))?;
        let store = Store::open(&self.sm().home().images())?;
        let files = self.open_files(FileScope::Root, FileAccess::Read)?;
        let processes = match files.is_of_idle_vm() {
            true => Processes::Run,
            false => options.processes,
        };
        let stream = files.layer(processes)?;
        let workload = &config.workload;
        let mut change = Some(change);
        let commit = Commit {
            name: name.as_ref(),
            created: options.created,
            author: options.author,
            created_by: workload.argv.join(" "),
            comment: options.comment,
            change: &mut |config: &mut Config| {
                adopt(workload, config);
                if let Some(change) = change.take() {
                    change(config);
                }
            },
        };
        let digest = store.commit(base, stream, commit, pull)?.digest;
        files.close()?;
        Ok(digest)
    }
}

/// Applies what the VM was started with to the configuration of its image.
fn adopt(workload: &Workload, config: &mut Config) {
    let entrypoint = config.entrypoint.as_deref().unwrap_or_default();
    match workload.argv.strip_prefix(entrypoint) {
        Some(rest) if rest == config.cmd.as_deref().unwrap_or_default() => {}
        Some(rest) => config.cmd = Some(rest.to_vec()),
        None => {
            config.entrypoint = None;
            config.cmd = Some(workload.argv.clone());
        }
    }
    let env = config.env.clone().unwrap_or_default();
    let has = |name: &str| {
        let mut names = env.iter().filter_map(|entry| entry.split_once('='));
        names.any(|(known, _)| known == name)
    };
    // These are added to the environment of every VM.
    let is_default = |entry: &String| {
        let default = |name, value: &str| {
            !has(name)
                && entry
                    .strip_prefix(name)
                    .and_then(|rest| rest.strip_prefix('='))
                    == Some(value)
        };
        default("HOSTNAME", &workload.hostname)
            || default("PATH", sm_control::workload::DEFAULT_PATH)
            || (workload.tty && default("TERM", "xterm"))
    };
    let own: Vec<_> = workload
        .env
        .iter()
        .filter(|entry| !is_default(entry))
        .cloned()
        .collect();
    let mut same = (own.clone(), env);
    same.0.sort_unstable();
    same.1.sort_unstable();
    if same.0 != same.1 {
        config.env = Some(own);
    }
    let directory = config.working_dir.as_deref().unwrap_or_default();
    if workload.cwd.trim_matches('/') != directory.trim_matches('/') {
        config.working_dir = Some(workload.cwd.clone());
    }
    if workload.user != config.user.as_deref().unwrap_or_default() {
        config.user = Some(workload.user.clone());
    }
    let stop = config
        .stop_signal
        .as_deref()
        .filter(|text| !text.is_empty());
    let stop = stop.map_or(Ok(signal::TERM), signal::parse);
    if stop.is_ok_and(|stop| stop != workload.stop_signal) {
        config.stop_signal = Some(workload.stop_signal.to_string());
    }
}

#[cfg(test)]
mod tests {
    use sm_control::workload::{ImageDefaults, Overrides};

    use super::*;

    fn list(items: &[&str]) -> Vec<String> {
        items.iter().map(|item| (*item).to_owned()).collect()
    }

    fn config() -> Config {
        let mut config = Config::default();
        config.entrypoint = Some(list(&["/entry"]));
        config.cmd = Some(list(&["x"]));
        config.env = Some(list(&["A=1"]));
        config.stop_signal = Some("SIGQUIT".to_owned());
        config
    }

    fn adopted(change: impl FnOnce(&mut Overrides)) -> Config {
        let mut config = config();
        let defaults = ImageDefaults {
            entrypoint: config.entrypoint.clone().unwrap(),
            cmd: config.cmd.clone().unwrap(),
            env: config.env.clone().unwrap(),
            stop_signal: config.stop_signal.clone(),
            ..ImageDefaults::default()
        };
        let mut overrides = Overrides::default();
        change(&mut overrides);
        let workload = Workload::merge(&defaults, &overrides, "abc").unwrap();
        adopt(&workload, &mut config);
        config
    }

    #[test]
    fn a_vm_without_overrides_changes_nothing() {
        assert_eq!(adopted(|_| {}), config());
        assert_eq!(adopted(|overrides| overrides.tty = true), config());
    }

    #[test]
    fn overrides_become_defaults() {
        let config = adopted(|overrides| {
            overrides.command = list(&["y", "z"]);
            overrides.env = list(&["B=2", "HOSTNAME=mine"]);
            overrides.user = Some("app".to_owned());
            overrides.cwd = Some("/srv".to_owned());
            overrides.stop_signal = Some("KILL".to_owned());
        });
        assert_eq!(config.entrypoint, Some(list(&["/entry"])));
        assert_eq!(config.cmd, Some(list(&["y", "z"])));
        assert_eq!(config.env, Some(list(&["HOSTNAME=mine", "A=1", "B=2"])));
        assert_eq!(config.user.as_deref(), Some("app"));
        assert_eq!(config.working_dir.as_deref(), Some("/srv"));
        assert_eq!(config.stop_signal.as_deref(), Some("9"));
        let config = adopted(|overrides| {
            overrides.entrypoint = Some("sh".to_owned());
            overrides.command = list(&["-c", "y"]);
        });
        assert_eq!(
            (config.entrypoint, config.cmd),
            (None, Some(list(&["sh", "-c", "y"])))
        );
    }
}
