//! Credentials stored by `docker login` and `podman login`.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::docker_reference::DEFAULT_REGISTRY;

/// Docker's key for its own registry in its configuration.
const DEFAULT_KEY: &str = "https://index.docker.io/v1/";
/// Maximum size of a configuration file in bytes.
const MAX_FILE: u64 = 4 << 20;
/// User name with which a helper marks an identity token.
const TOKEN_USER: &str = "<token>";

/// Credentials of a user.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    /// A user and a password.
    Password { user: String, password: String },
    /// A token to request other tokens with (OAuth 2 refresh token).
    Identity(String),
}

/// Secrets are not shown.
impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Password { user, .. } => write!(f, "Password of {user:?}"),
            Self::Identity(_) => f.write_str("Identity"),
        }
    }
}

/// The parts of Docker's and Podman's configuration that contain credentials.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Configuration {
    auths: std::collections::BTreeMap<String, CredentialEntry>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
    #[serde(rename = "credHelpers")]
    helpers: std::collections::BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CredentialEntry {
    auth: Option<String>,
    identitytoken: Option<String>,
}

/// Output of a helper.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    username: String,
    secret: String,
}

/// Returns the credentials for `repository` of `registry`, from the first file that
/// contains any. A file that cannot be read counts as absent.
pub(super) fn find(registry: &str, repository: &str) -> Option<Credentials> {
    let keys = keys(registry, repository);
    files()
        .iter()
        .find_map(|path| from_file(path, &keys, &run_helper))
}

/// Returns possible keys of credentials, best first: Podman's paths from long to short,
/// then Docker's key for the host.
fn keys(registry: &str, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut path = format!("{registry}/{repository}");
    while path.contains('/') {
        keys.push(path.clone());
        path.truncate(path.rfind('/').unwrap_or_default());
    }
    keys.push(registry.to_owned());
    keys.push(format!("https://{registry}"));
    keys.push(format!("https://{registry}/v1/"));
    keys.push(format!("https://{registry}/v2/"));
    if registry == DEFAULT_REGISTRY {
        keys.push(DEFAULT_KEY.to_owned());
    }
    keys
}

fn files() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let home = variable("HOME").map(PathBuf::from);
    let under_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let docker =
        variable("DOCKER_CONFIG").map(|directory| Path::new(&directory).join("config.json"));
    let podman = variable("XDG_RUNTIME_DIR")
        .map(|directory| Path::new(&directory).join("containers/auth.json"));
    [
        variable("REGISTRY_AUTH_FILE").map(PathBuf::from),
        docker.or_else(|| under_home(".docker/config.json")),
        podman,
        variable("XDG_CONFIG_HOME")
            .map(|directory| Path::new(&directory).join("containers/auth.json"))
            .or_else(|| under_home(".config/containers/auth.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

type Helper<'a> = &'a dyn Fn(&str, &str) -> Option<Credentials>;

fn from_file(path: &Path, keys: &[String], helper: Helper<'_>) -> Option<Credentials> {
    let size = path.metadata().ok()?.len();
    if size > MAX_FILE {
        return None;
    }
    let bytes = std::fs::read(path).ok()?;
    let configuration: Configuration = serde_json::from_slice(&bytes).ok()?;
    from_configuration(&configuration, keys, helper)
}

fn from_configuration(
    configuration: &Configuration,
    keys: &[String],
    helper: Helper<'_>,
) -> Option<Credentials> {
    let helpers = keys
        .iter()
        .find_map(|key| Some((configuration.helpers.get(key)?, key)));
    if let Some((name, key)) = helpers {
        return helper(name, key);
    }
    if let Some(name) = &configuration.store {
        // Keys in the store are usually listed. If none is, Docker asks for the registry
        // itself.
        let listed = |key: &&String| configuration.auths.contains_key(*key);
        let mut candidates: Vec<&String> = keys.iter().filter(listed).collect();
        if candidates.is_empty() {
            candidates.extend(canonical(keys));
        }
        if let Some(found) = candidates.into_iter().find_map(|key| helper(name, key)) {
            return Some(found);
        }
    }
    keys.iter()
        .find_map(|key| from_entry(configuration.auths.get(key)?))
}

/// Returns Docker's key for a registry's credentials.
fn canonical(keys: &[String]) -> Option<&String> {
    let own = keys.iter().find(|key| *key == DEFAULT_KEY);
    own.or_else(|| keys.iter().find(|key| !key.contains('/')))
}

fn from_entry(entry: &CredentialEntry) -> Option<Credentials> {
    if let Some(token) = entry
        .identitytoken
        .as_ref()
        .filter(|token| !token.is_empty())
    {
        return Some(Credentials::Identity(token.clone()));
    }
    let decoded = STANDARD.decode(entry.auth.as_ref()?.trim()).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (user, password) = text.trim_end_matches('\0').split_once(':')?;
    Some(Credentials::Password {
        user: user.to_owned(),
        password: password.to_owned(),
    })
}

/// Runs `docker-credential-NAME` (protocol of docker-credential-helpers).
fn run_helper(name: &str, key: &str) -> Option<Credentials> {
    if !name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    {
        return None;
    }
    let mut helper = Command::new(format!("docker-credential-{name}"));
    query(helper.arg("get"), key)
}

/// Writes `key` to a helper, and waits for its answer and its exit.
fn query(helper: &mut Command, key: &str) -> Option<Credentials> {
    let mut child = helper
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    // A helper that exits without reading must be reaped as well.
    let written = child.stdin.take()?.write_all(key.as_bytes());
    let output = child.wait_with_output().ok()?;
    if written.is_err() || !output.status.success() {
        return None;
    }
    let helped: Helped = serde_json::from_slice(&output.stdout).ok()?;
    Some(match helped.username.as_str() {
        TOKEN_USER => Credentials::Identity(helped.secret),
        _ => Credentials::Password {
            user: helped.username,
            password: helped.secret,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_in(json: &str, registry: &str, repository: &str) -> Option<Credentials> {
        let configuration: Configuration = serde_json::from_str(json).unwrap();
        let helper = |name: &str, key: &str| Some(Credentials::Identity(format!("{name} {key}")));
        let keys = keys(registry, repository);
        from_configuration(&configuration, &keys, &helper)
    }

    fn password(user: &str, password: &str) -> Option<Credentials> {
        Some(Credentials::Password {
            user: user.to_owned(),
            password: password.to_owned(),
        })
    }

    #[test]
    fn credentials_of_docker_login_are_found() {
        // "me:se:cret"
        let json = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "bWU6c2U6Y3JldA=="},
            "r.example:5000": {"auth": "YTpi"},
            "token.example": {"identitytoken": "t"},
            "r.example/team": {"auth": "dGVhbTp4"},
            "broken.example": {"auth": "?"}
        }}"#;
        assert_eq!(
            find_in(json, "docker.io", "library/a"),
            password("me", "se:cret")
        );
        assert_eq!(find_in(json, "r.example:5000", "a"), password("a", "b"));
        assert_eq!(
            find_in(json, "r.example", "team/app"),
            password("team", "x")
        );
        assert_eq!(find_in(json, "r.example", "other/app"), None);
        assert_eq!(
            find_in(json, "token.example", "a"),
            Some(Credentials::Identity("t".to_owned()))
        );
        assert_eq!(find_in(json, "broken.example", "a"), None);
    }

    #[test]
    fn configured_helpers_are_called() {
        let json = r#"{"credHelpers": {"r.example": "one"}, "credsStore": "two",
                       "auths": {"s.example": {}}}"#;
        let identity = |text: &str| Some(Credentials::Identity(text.to_owned()));
        assert_eq!(find_in(json, "r.example", "a"), identity("one r.example"));
        assert_eq!(find_in(json, "s.example", "a"), identity("two s.example"));
        assert_eq!(find_in(json, "t.example", "a"), identity("two t.example"));
        let docker = find_in(json, "docker.io", "library/a");
        assert_eq!(docker, identity(&format!("two {DEFAULT_KEY}")));
        assert_eq!(run_helper("../x", "k"), None);
    }

    /// A process that is not waited for remains as a zombie.
    #[test]
    fn a_helper_that_does_not_read_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let asked = |script: &str, key: &str| {
            let script = format!("echo $$ >\"$0\"; {script}");
            let mut helper = Command::new("sh");
            let answer = query(helper.args(["-c", &script]).arg(&pid), key);
            let pid = std::fs::read_to_string(&pid).unwrap();
            let process = Path::new("/proc").join(pid.trim());
            assert!(!process.exists(), "{script}");
            answer
        };
        // More than the capacity of a pipe, so that writing fails.
        let long = "k".repeat(1 << 20);
        let json = r#"{"Username": "u", "Secret": "s"}"#;
        assert_eq!(asked("exit 0", &long), None);
        assert_eq!(asked(&format!("echo '{json}'"), &long), None);
        assert_eq!(asked("cat >/dev/null; exit 1", "key"), None);
        let reads = format!("cat >/dev/null; echo '{json}'");
        assert_eq!(asked(&reads, &long), password("u", "s"));
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", password("me", "hidden").unwrap());
        assert!(shown.contains("me") && !shown.contains("hidden"));
    }
}
