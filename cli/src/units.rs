//! Sizes, durations and environment files, as people write them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};

/// Reads a size in bytes: `1024`, `64m`, `1g`, `512MiB`; units are powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("\"{text}\" is not a size: write a number and k, m or g, such as 256m");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text.get(digits.len()..).unwrap_or_default();
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = digits.trim().parse().map_err(|_| bad())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("\"{text}\" is too large"))
}

/// Parses a number of vCPUs. Docker writes whole numbers as fractions, too: `2.0`.
pub(crate) fn parse_cpus(text: &str) -> Result<u32, String> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    match whole.parse() {
        Ok(cpus) if fraction.bytes().all(|digit| digit == b'0') => Ok(cpus),
        _ => Err("a VM has whole CPUs: give a number such as 2".to_owned()),
    }
}

/// Reads a duration: `500ms`, `30s`, `2m`, `12h`; a number without a unit is in seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("\"{text}\" is not a time: write a number and ms, s, m or h, such as 30s");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let millis = match text.get(digits.len()..).unwrap_or_default() {
        "ms" => Some(number),
        "" | "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        _ => return Err(bad()),
    };
    millis
        .map(Duration::from_millis)
        .ok_or_else(|| format!("\"{text}\" is too long"))
}

/// Longest time that a connection can wait for a listener in the guest.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// Reads the time that a connection waits for a listener in the guest.
pub(crate) fn parse_publish_wait(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        wait if wait <= LONGEST_WAIT => Ok(wait),
        _ => Err(format!("\"{text}\" is too long: 10m is the most")),
    }
}

/// Formats a size for a listing, such as `12.3MiB`, in powers of 1024.
pub(crate) fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut tenths = bytes.saturating_mul(10) / 1024;
    let mut unit = 0;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    let unit = UNITS.get(unit).copied().unwrap_or_default();
    if tenths >= 1000 {
        format!("{} {unit}", tenths / 10)
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    }
}

/// Formats an age for a listing, such as `3 minutes`.
pub(crate) fn format_age(age: Duration) -> String {
    let seconds = age.as_secs();
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3_600 => (seconds / 60, "minute"),
        3_600..172_800 => (seconds / 3_600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {unit}{plural}")
}

/// Resolves a `-e` entry: `NAME=value` is unchanged, `NAME` gets its value from this
/// process's environment (no entry if it is not set, like Docker).
pub(crate) fn env_entry(entry: &str) -> anyhow::Result<Option<String>> {
    if entry.contains('=') {
        return Ok(Some(entry.to_owned()));
    }
    if entry.is_empty() {
        bail!("an environment entry is empty: write NAME=value or NAME");
    }
    match std::env::var(entry) {
        Ok(value) => Ok(Some(format!("{entry}={value}"))),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(error) => Err(anyhow!(error).context(format!("cannot pass on variable \"{entry}\""))),
    }
}

/// Reads an environment file: `NAME=value` or `NAME` in each line, `#` starts a comment
/// line, quotes have no meaning.
pub(crate) fn read_env_file(path: &Path) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read environment file {path:?}"))?;
    let mut entries = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let name = line.split('=').next().unwrap_or_default();
        if name.is_empty() || name.contains(char::is_whitespace) {
            bail!("line {number} of {path:?} has no valid name: write NAME=value");
        }
        entries.extend(env_entry(line)?);
    }
    Ok(entries)
}

/// Reads a label: `NAME=VALUE`, or `NAME` for an empty value.
pub(crate) fn parse_label(text: &str) -> anyhow::Result<(String, String)> {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    match name.is_empty() {
        true => bail!("label \"{text}\" has no name: write NAME=VALUE"),
        false => Ok((name.to_owned(), value.to_owned())),
    }
}

/// Reads a file of labels: one in each line, `#` starts a comment line.
pub(crate) fn read_label_file(path: &Path) -> anyhow::Result<Vec<(String, String)>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read label file {path:?}"))?;
    let lines = text.lines().map(str::trim_start);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(parse_label)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_whole() {
        for (text, cpus) in [("1", 1), ("2.0", 2), ("16.", 16)] {
            assert_eq!(parse_cpus(text), Ok(cpus), "{text}");
        }
        for text in ["0.5", "1.50", "", ".", "-1", "two", "1.x", "99999999999"] {
            assert!(parse_cpus(text).unwrap_err().contains("whole"), "{text}");
        }
    }

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [
            ("0", 0),
            ("1024", 1024),
            ("256m", 256 << 20),
            ("1G", 1 << 30),
            ("512MiB", 512 << 20),
            ("2k", 2048),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "lots", "1x", "-1m", "1.5g", "99999999999t"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(format_size(999), "999 B");
        assert_eq!(format_size(1536), "1.5 KiB");
        assert_eq!(format_size(200 << 20), "200 MiB");
        assert_eq!(format_size(5 << 30), "5.0 GiB");
    }

    #[test]
    fn ages_have_one_unit() {
        let age = |seconds| format_age(Duration::from_secs(seconds));
        assert_eq!(age(1), "1 second");
        assert_eq!(age(150), "2 minutes");
        assert_eq!(age(90_000), "25 hours");
        assert_eq!(age(400_000), "4 days");
    }

    #[test]
    fn environment_files_follow_dockers_rules() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("env");
        std::fs::write(
            &path,
            "# c\n\nA=1\n  B=two words # kept\nSURELY_NOT_SET_HERE\n",
        )
        .unwrap();
        assert_eq!(read_env_file(&path).unwrap(), ["A=1", "B=two words # kept"]);
        std::fs::write(&path, "A B=1\n").unwrap();
        assert!(
            read_env_file(&path)
                .unwrap_err()
                .to_string()
                .contains("line 1")
        );
        assert!(read_env_file(Path::new("/no/file")).is_err());
    }

    #[test]
    fn a_bare_name_takes_the_hosts_value() {
        let home = std::env::var("PATH").unwrap();
        assert_eq!(env_entry("PATH").unwrap(), Some(format!("PATH={home}")));
        assert_eq!(env_entry("SURELY_NOT_SET_HERE").unwrap(), None);
        assert!(env_entry("").is_err());
    }

    #[test]
    fn times_have_units() {
        for (text, millis) in [
            ("500ms", 500),
            ("0", 0),
            ("3", 3000),
            ("30s", 30_000),
            ("10m", 600_000),
        ] {
            assert_eq!(parse_publish_wait(text), Ok(Duration::from_millis(millis)));
        }
        for text in [
            "",
            "s",
            "-1s",
            "1h",
            "1.5s",
            "11m",
            "601",
            "99999999999999999999s",
            "18446744073709551615m",
        ] {
            assert!(parse_publish_wait(text).is_err(), "{text}");
        }
    }
}
