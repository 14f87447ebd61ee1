//! Selection of the engine, by the rules of `docker`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::digest::Digest;

const DEFAULT_SOCKET: &str = "/var/run/docker.sock";
/// Maximum size of a configuration file in bytes.
const MAX_FILE: u64 = 4 << 20;

/// Address of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Host {
    Unix(PathBuf),
    /// Host and port.
    Tcp(String, Option<Tls>),
}

/// TLS authentication of the engine and of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tls {
    /// Directory with `ca.pem`, `cert.pem` and `key.pem`.
    pub(super) directory: PathBuf,
    pub(super) verify: bool,
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address, _) => write!(f, "tcp://{address}"),
        }
    }
}

type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl Host {
    /// Finds the engine by `DOCKER_HOST`, `DOCKER_CONTEXT`, the context selected by
    /// `docker context use`, or the usual sockets.
    ///
    /// # Errors
    /// A sentence that describes the problem.
    pub(super) fn find() -> Result<Self, String> {
        Self::from(&|name| std::env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from(environment: Environment<'_>) -> Result<Self, String> {
        let text = |name: &str| environment(name).and_then(|value| value.into_string().ok());
        let home = environment("HOME").map(PathBuf::from);
        let configuration = environment("DOCKER_CONFIG")
            .map(PathBuf::from)
            .or_else(|| home.map(|home| home.join(".docker")));
        if let Some(host) = text("DOCKER_HOST") {
            let tls = text("DOCKER_TLS_VERIFY").and_then(|_| {
                let directory = environment("DOCKER_CERT_PATH").map(PathBuf::from);
                Some(Tls {
                    directory: directory.or(configuration)?,
                    verify: true,
                })
            });
            return Self::parse(&host, tls);
        }
        if let Some(configuration) = configuration {
            let name = text("DOCKER_CONTEXT").or_else(|| current_context(&configuration));
            let name = name.filter(|name| !name.is_empty() && name != "default");
            if let Some(name) = name {
                return Self::of_context(&configuration, &name);
            }
        }
        let usual = PathBuf::from(DEFAULT_SOCKET);
        let rootless = environment("XDG_RUNTIME_DIR").map(|it| Path::new(&it).join("docker.sock"));
        let rootless = rootless.filter(|path| !usual.exists() && path.exists());
        Ok(Self::Unix(rootless.unwrap_or(usual)))
    }

    fn parse(text: &str, tls: Option<Tls>) -> Result<Self, String> {
        match text.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(("tcp" | "http" | "https", address)) => {
                let address = address.trim_end_matches('/');
                let port = if tls.is_some() { 2376 } else { 2375 };
                let has_port = address
                    .rsplit(']')
                    .next()
                    .is_some_and(|rest| rest.contains(':'));
                match address {
                    "" => Ok(Self::Tcp(format!("localhost:{port}"), tls)),
                    address if has_port => Ok(Self::Tcp(address.to_owned(), tls)),
                    address => Ok(Self::Tcp(format!("{address}:{port}"), tls)),
                }
            }
            _ => Err(format!(
                "engines are supported at unix:// and tcp:// only, \
                 not at \"{text}\"; forward its socket, or save the image to an archive"
            )),
        }
    }

    /// Reads `~/.docker/contexts/meta/HASH/meta.json`.
    fn of_context(configuration: &Path, name: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Meta {
            #[serde(rename = "Endpoints")]
            endpoints: Endpoints,
        }
        #[derive(Deserialize)]
        struct Endpoints {
            docker: Endpoint,
        }
        #[derive(Deserialize)]
        struct Endpoint {
            #[serde(rename = "Host")]
            host: String,
            #[serde(rename = "SkipTLSVerify", default)]
            skip_verify: bool,
        }
        let id = Digest::of(name.as_bytes()).hex();
        let contexts = configuration.join("contexts");
        let path = contexts.join("meta").join(&id).join("meta.json");
        let meta: Meta = read_json(&path)
            .ok_or_else(|| format!("there is no context \"{name}\" of docker's ({path:?})"))?;
        let endpoint = meta.endpoints.docker;
        let directory = contexts.join("tls").join(&id).join("docker");
        let tls = directory.is_dir().then_some(Tls {
            directory,
            verify: !endpoint.skip_verify,
        });
        Self::parse(&endpoint.host, tls)
    }
}

fn current_context(configuration: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Configuration {
        #[serde(rename = "currentContext")]
        context: Option<String>,
    }
    read_json::<Configuration>(&configuration.join("config.json"))?.context
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    if path.metadata().ok()?.len() > MAX_FILE {
        return None;
    }
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn from(variables: &[(&str, &Path)]) -> Result<Host, String> {
        Host::from(&|name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.as_os_str().to_owned())
        })
    }

    #[test]
    fn hosts_are_sockets_and_addresses() {
        let tcp = |address: &str| Ok(Host::Tcp(address.to_owned(), None));
        let parse = |text| Host::parse(text, None);
        assert_eq!(
            parse("unix:///run/x.sock"),
            Ok(Host::Unix("/run/x.sock".into()))
        );
        assert_eq!(parse("tcp://10.0.0.1:2375"), tcp("10.0.0.1:2375"));
        assert_eq!(parse("tcp://engine/"), tcp("engine:2375"));
        assert_eq!(parse("tcp://[::1]"), tcp("[::1]:2375"));
        assert_eq!(parse("tcp://[::1]:1"), tcp("[::1]:1"));
        assert_eq!(parse("tcp://"), tcp("localhost:2375"));
        for bad in [
            "ssh://me@host",
            "npipe:////./pipe/x",
            "unix://relative",
            "x",
            "",
        ] {
            assert!(
                parse(bad).unwrap_err().contains("unix:// and tcp:// only"),
                "{bad}"
            );
        }
    }

    #[test]
    fn the_engine_is_selected_as_by_docker() {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path();
        let unix = |path: &str| Ok(Host::Unix(path.into()));
        assert_eq!(from(&[("HOME", home)]), unix(DEFAULT_SOCKET));
        let host = Path::new("unix:///a");
        assert_eq!(from(&[("HOME", home), ("DOCKER_HOST", host)]), unix("/a"));
        let verified = [
            ("HOME", home),
            ("DOCKER_HOST", Path::new("tcp://engine")),
            ("DOCKER_TLS_VERIFY", Path::new("1")),
        ];
        let tls = Tls {
            directory: home.join(".docker"),
            verify: true,
        };
        assert_eq!(
            from(&verified),
            Ok(Host::Tcp("engine:2376".to_owned(), Some(tls)))
        );

        // A context, over which other variables take precedence.
        let id = Digest::of(b"mine").hex();
        let meta = home.join(".docker/contexts/meta").join(&id);
        fs::create_dir_all(&meta).unwrap();
        let json = r#"{"Name": "mine", "Endpoints": {"docker": {"Host": "unix:///mine"}}}"#;
        fs::write(meta.join("meta.json"), json).unwrap();
        fs::write(
            home.join(".docker/config.json"),
            r#"{"currentContext": "mine"}"#,
        )
        .unwrap();
        assert_eq!(from(&[("HOME", home)]), unix("/mine"));
        assert_eq!(from(&[("HOME", home), ("DOCKER_HOST", host)]), unix("/a"));
        let default = [("HOME", home), ("DOCKER_CONTEXT", Path::new("default"))];
        assert_eq!(from(&default), unix(DEFAULT_SOCKET));
        let other = [("HOME", home), ("DOCKER_CONTEXT", Path::new("../other"))];
        assert!(
            from(&other)
                .unwrap_err()
                .contains("no context \"../other\"")
        );
        let tls = home.join(".docker/contexts/tls").join(&id).join("docker");
        fs::create_dir_all(&tls).unwrap();
        let json = r#"{"Endpoints": {"docker": {"Host": "tcp://far", "SkipTLSVerify": true}}}"#;
        fs::write(meta.join("meta.json"), json).unwrap();
        let tls = Tls {
            directory: tls,
            verify: false,
        };
        assert_eq!(
            from(&[("HOME", home)]),
            Ok(Host::Tcp("far:2376".to_owned(), Some(tls)))
        );
    }
}
