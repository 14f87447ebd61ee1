//! The package source of this release, and of its backports.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

/// Returns the backports suite of this release and a sources entry for it, derived from
/// the configured entry of the release: same mirror, same key.
pub(super) fn backports_entry() -> Result<(String, String)> {
    let (codename, origin) =
        release_origin().context("cannot tell where this release's backports are")?;
    let suite = format!("{codename}-backports");
    let entry = origin.entry(&suite);
    Ok((suite, entry))
}

/// Returns this release's code name, and its configured archive as a one-line entry.
pub(crate) fn release_source() -> Result<(String, String)> {
    let (codename, origin) = release_origin()?;
    let line = origin.line(&codename);
    Ok((codename, line))
}

fn release_origin() -> Result<(String, AptOrigin)> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release has no VERSION_CODENAME")?;
    if !release.lines().any(|line| line == "ID=debian") {
        bail!("this distribution is not Debian");
    }
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    for file in files {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let origin = match file.extension().and_then(|name| name.to_str()) {
            Some("sources") => origin_of_stanzas(&text, &codename),
            Some("list") => origin_of_lines(&text, &codename),
            _ => None,
        };
        if let Some(origin) = origin {
            return Ok((codename, origin));
        }
    }
    bail!("no apt source for {codename}/main is configured")
}

/// The origin of a suite.
#[derive(Debug, PartialEq, Eq)]
struct AptOrigin {
    uris: String,
    signed_by: Option<String>,
}

impl AptOrigin {
    fn entry(&self, suite: &str) -> String {
        let mut entry = format!(
            "Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n",
            self.uris
        );
        if let Some(key) = &self.signed_by {
            entry.push_str(&format!("Signed-By: {key}\n"));
        }
        entry
    }

    fn line(&self, suite: &str) -> String {
        let uri = self.uris.split_whitespace().next().unwrap_or_default();
        match &self.signed_by {
            Some(key) => format!("deb [signed-by={key}] {uri} {suite} main"),
            None => format!("deb {uri} {suite} main"),
        }
    }
}

/// Parses deb822 stanzas (sources.list(5)).
fn origin_of_stanzas(text: &str, codename: &str) -> Option<AptOrigin> {
    let text: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    text.split(|line| line.trim().is_empty())
        .find_map(|stanza| {
            let field = |name: &str| {
                stanza.iter().find_map(|line| {
                    let (key, value) = line.split_once(':')?;
                    key.eq_ignore_ascii_case(name).then(|| value.trim())
                })
            };
            let has =
                |name, word| field(name).is_some_and(|v| v.split_whitespace().any(|w| w == word));
            let usable = has("Types", "deb")
                && has("Suites", codename)
                && has("Components", "main")
                && !has("Enabled", "no");
            Some(AptOrigin {
                uris: field("URIs").filter(|_| usable)?.to_owned(),
                // A key block of several lines cannot be copied as one word; without it,
                // apt uses its default keyring.
                signed_by: field("Signed-By")
                    .filter(|key| key.starts_with('/'))
                    .map(str::to_owned),
            })
        })
}

/// Parses one-line entries (sources.list(5)).
fn origin_of_lines(text: &str, codename: &str) -> Option<AptOrigin> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        let usable = words.next() == Some(codename) && words.any(|word| word == "main");
        usable.then(|| AptOrigin {
            uris: uri.to_owned(),
            signed_by: options
                .split_whitespace()
                .find_map(|option| option.strip_prefix("signed-by="))
                .map(str::to_owned),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::{AptOrigin, origin_of_lines, origin_of_stanzas};

    #[test]
    fn a_stanza_of_the_release_is_found_among_others() {
        let text = "Types: deb\nURIs: http://security.example/d\nSuites: twelve-security\n\
                    Components: main\n\n# the archive\nTypes: deb\n# old\nURIs: http://mirror.example/d\n\
                    Suites: twelve twelve-updates\nComponents: main contrib\nSigned-By: /k.gpg\n";
        let origin = origin_of_stanzas(text, "twelve").unwrap();
        assert_eq!(origin.uris, "http://mirror.example/d");
        assert_eq!(
            origin.entry("twelve-backports"),
            "Types: deb\nURIs: http://mirror.example/d\nSuites: twelve-backports\n\
             Components: main\nSigned-By: /k.gpg\n"
        );
        assert_eq!(origin_of_stanzas(text, "thirteen"), None);
    }

    #[test]
    fn a_line_of_the_release_is_found_among_others() {
        let text = "# deb http://no.example/d twelve main\ndeb-src http://s.example/d twelve main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/d twelve contrib main\n";
        assert_eq!(
            origin_of_lines(text, "twelve"),
            Some(AptOrigin {
                uris: "http://mirror.example/d".into(),
                signed_by: Some("/k.gpg".into())
            })
        );
    }
}
