//! Instructions that set fields of an image's configuration, as in a Containerfile.

use std::path::Path;

use anyhow::{Result, bail};
use sm_runtime::image::Config;

/// Applies `instructions` to a configuration.
pub(in crate::commands) fn apply(instructions: &[String], config: &mut Config) -> Result<()> {
    let mut has_cmd = false;
    for text in instructions {
        let (name, value) = text
            .trim()
            .split_once(char::is_whitespace)
            .map(|(name, value)| (name, value.trim()))
            .unwrap_or((text.trim(), ""));
        if value.is_empty() {
            bail!(
                "--change \"{text}\" has no value: write it as in a Containerfile, such as \"CMD sh\""
            );
        }
        match name.to_ascii_uppercase().as_str() {
            "CMD" => {
                config.cmd = Some(command(value)?);
                has_cmd = true;
            }
            "ENTRYPOINT" => {
                config.entrypoint = Some(command(value)?);
                // The arguments were for another program.
                if !has_cmd {
                    config.cmd = None;
                }
            }
            "USER" => config.user = Some(value.to_owned()),
            "WORKDIR" => {
                let before = config.working_dir.as_deref().unwrap_or("/");
                let path = Path::new("/").join(before).join(value);
                config.working_dir = Some(path.to_string_lossy().into_owned());
            }
            "ONBUILD" => config
                .on_build
                .get_or_insert_default()
                .push(value.to_owned()),
            "STOPSIGNAL" => config.stop_signal = Some(value.to_owned()),
            "ENV" => {
                let pair = pair(text, value)?;
                let name = pair.split('=').next().unwrap_or_default();
                let env = config.env.get_or_insert_default();
                let known = env
                    .iter_mut()
                    .find(|entry| entry.split('=').next() == Some(name));
                match known {
                    Some(known) => *known = pair,
                    None => env.push(pair),
                }
            }
            "LABEL" => {
                let pair = pair(text, value)?;
                let (key, value) = pair.split_once('=').unwrap_or((&pair, ""));
                let labels = config.labels.get_or_insert_default();
                labels.insert(key.to_owned(), value.trim_matches('"').to_owned());
            }
            "EXPOSE" => {
                let ports = value
                    .split_whitespace()
                    .map(|port| match port.contains('/') {
                        true => port.to_owned(),
                        false => format!("{port}/tcp"),
                    });
                config.exposed_ports.get_or_insert_default().extend(ports);
            }
            "VOLUME" => {
                let volumes = config.volumes.get_or_insert_default();
                volumes.extend(command_or_words(value)?);
            }
            other => bail!(
                "--change \"{text}\": \"{other}\" is not known; there are CMD, ENTRYPOINT, ENV, \
                 EXPOSE, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME and WORKDIR"
            ),
        }
    }
    Ok(())
}

/// Parses a JSON array of words, or wraps a line in a shell command.
fn command(value: &str) -> Result<Vec<String>> {
    match value.starts_with('[') {
        true => Ok(serde_json::from_str(value)?),
        false => Ok(["/bin/sh", "-c", value].map(str::to_owned).to_vec()),
    }
}

fn command_or_words(value: &str) -> Result<Vec<String>> {
    match value.starts_with('[') {
        true => Ok(serde_json::from_str(value)?),
        false => Ok(value.split_whitespace().map(str::to_owned).collect()),
    }
}

/// Parses `NAME=VALUE`, or the old form `NAME VALUE`.
fn pair(text: &str, value: &str) -> Result<String> {
    if value.contains('=') {
        return Ok(value.to_owned());
    }
    match value.split_once(char::is_whitespace) {
        Some((name, value)) => Ok(format!("{name}={}", value.trim())),
        None => bail!("--change \"{text}\" has no value for \"{value}\": write NAME=VALUE"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(instructions: &[&str]) -> Result<Config> {
        let mut config = Config::default();
        change(&mut config, instructions)?;
        Ok(config)
    }

    fn change(config: &mut Config, instructions: &[&str]) -> Result<()> {
        let owned: Vec<_> = instructions.iter().map(|text| (*text).to_owned()).collect();
        apply(&owned, config)
    }

    #[test]
    fn instructions_change_what_is_there() {
        let mut config = of(&[
            "ENTRYPOINT [\"a\"]",
            "CMD b",
            "ENV A=1",
            "ENV B=2",
            "WORKDIR /srv",
        ])
        .unwrap();
        change(
            &mut config,
            &["ENV A=3", "WORKDIR sub", "LABEL k=v", "ONBUILD RUN x"],
        )
        .unwrap();
        assert_eq!(config.env.clone().unwrap(), ["A=3", "B=2"]);
        assert_eq!(config.working_dir.as_deref(), Some("/srv/sub"));
        assert_eq!(config.on_build.clone().unwrap(), ["RUN x"]);
        assert!(config.cmd.is_some());
        change(&mut config, &["ENTRYPOINT [\"c\"]"]).unwrap();
        assert_eq!(config.cmd, None);
        change(&mut config, &["CMD d", "ENTRYPOINT [\"e\"]"]).unwrap();
        assert!(config.cmd.is_some());
    }

    #[test]
    fn instructions_set_what_they_say() {
        let config = of(&[
            r#"ENTRYPOINT ["/init", "-x"]"#,
            "cmd echo hello",
            "ENV A=1",
            "ENV B two words",
            "LABEL k=\"v\"",
            "EXPOSE 80 53/udp",
            "USER nobody:nogroup",
            "WORKDIR /srv",
        ])
        .unwrap();
        let words = |list: &Option<Vec<String>>| list.clone().unwrap();
        assert_eq!(words(&config.entrypoint), ["/init", "-x"]);
        assert_eq!(words(&config.cmd), ["/bin/sh", "-c", "echo hello"]);
        assert_eq!(words(&config.env), ["A=1", "B=two words"]);
        let ports: Vec<_> = config.exposed_ports.iter().flatten().collect();
        assert_eq!(ports, ["53/udp", "80/tcp"]);
        assert_eq!(config.user.as_deref(), Some("nobody:nogroup"));
        assert_eq!(config.labels.as_ref().unwrap()["k"], "v");
    }

    #[test]
    fn invalid_instructions_are_refused() {
        for text in ["CMD", "ENV A", "FROM x", r#"CMD ["x""#, "  "] {
            assert!(of(&[text]).is_err(), "{text:?}");
        }
    }
}
