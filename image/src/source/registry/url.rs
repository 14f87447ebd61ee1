//! Addresses in answers: locations relative to the request (RFC 3986 section 5.2), and
//! the comparison of origins, which decides about credentials.

use ureq::http::Uri;

/// Maximum length of a location in bytes. Signed locations are long.
const MAX_LEN: usize = 16 << 10;

/// Resolves `location` in an answer from `base`. Returns `None` if it is invalid or its
/// scheme is not HTTP.
pub(super) fn join(base: &Uri, location: &str) -> Option<Uri> {
    if location.is_empty() || location.len() > MAX_LEN {
        return None;
    }
    let location = location.split('#').next()?;
    let scheme = base.scheme_str()?;
    let authority = base.authority()?;
    let text = if has_scheme(location) {
        location.to_owned()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else {
        let (directory, _) = base.path().rsplit_once('/').unwrap_or_default();
        format!("{scheme}://{authority}{directory}/{location}")
    };
    let uri: Uri = text.parse().ok()?;
    let is_http = matches!(uri.scheme_str(), Some("http" | "https"));
    // User and password in a location are refused, because the server could choose them.
    let authority = uri.authority()?;
    let has_port = authority.as_str().len() > authority.host().len();
    let plain = !authority.as_str().contains('@')
        && !authority.host().is_empty()
        && (!has_port || authority.port_u16().is_some());
    (is_http && plain).then_some(uri)
}

/// Returns true if the text starts with `scheme:`.
fn has_scheme(text: &str) -> bool {
    let Some((scheme, _)) = text.split_once(':') else {
        return false;
    };
    let mut bytes = scheme.bytes();
    bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

/// Returns true if both have the same host, port and scheme, so that credentials for one
/// may be sent to the other.
pub(super) fn is_same_origin(one: &Uri, other: &Uri) -> bool {
    let parts = |uri: &Uri| {
        Some((
            uri.scheme_str()?.to_owned(),
            uri.host()?.to_ascii_lowercase(),
            port(uri)?,
        ))
    };
    parts(one).is_some_and(|one| Some(one) == parts(other))
}

/// Returns the port, or the default of the scheme.
pub(super) fn port(uri: &Uri) -> Option<u16> {
    uri.port_u16().or(match uri.scheme_str()? {
        "https" => Some(443),
        "http" => Some(80),
        _ => None,
    })
}

/// Appends a query parameter.
pub(super) fn with_query(uri: &Uri, name: &str, value: &str) -> String {
    let separator = match uri.query() {
        Some("") => "",
        Some(_) => "&",
        None => "?",
    };
    format!("{uri}{separator}{name}={}", escape(value))
}

/// Percent-encodes all characters except the unreserved ones (RFC 3986 section 2.3).
pub(super) fn escape(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut escaped, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                escaped.push(char::from(byte));
            }
            byte => {
                // Writing to a string cannot fail.
                let _ = write!(escaped, "%{byte:02X}");
            }
        }
        escaped
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn joined(location: &str) -> Option<String> {
        let base = "https://r.example:5000/v2/a/blobs/x?y=1".parse().unwrap();
        join(&base, location).map(|uri| uri.to_string())
    }

    #[test]
    fn locations_are_relative_to_what_was_asked() {
        for (location, expected) in [
            ("https://cdn.example/b?c=d", "https://cdn.example/b?c=d"),
            ("http://cdn.example:80/b", "http://cdn.example:80/b"),
            ("//cdn.example/b", "https://cdn.example/b"),
            ("/v2/b", "https://r.example:5000/v2/b"),
            ("b?c", "https://r.example:5000/v2/a/blobs/b?c"),
            ("?c=d", "https://r.example:5000/v2/a/blobs/x?c=d"),
            ("b#fragment", "https://r.example:5000/v2/a/blobs/b"),
            ("/a:b", "https://r.example:5000/a:b"),
        ] {
            assert_eq!(joined(location).as_deref(), Some(expected), "{location}");
        }
        for bad in [
            "",
            "file:///etc/passwd",
            "ftp://r.example/x",
            "javascript:x",
            "https://",
            "https://user:secret@r.example/",
            "/with space",
            "https://r.example:x/",
            &"x".repeat(20_000),
        ] {
            assert_eq!(joined(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same =
            |one: &str, other: &str| is_same_origin(&one.parse().unwrap(), &other.parse().unwrap());
        assert!(same("https://r.example/a", "https://R.example:443/b"));
        assert!(same("http://r.example:80/a", "http://r.example/b"));
        assert!(!same("https://r.example/a", "http://r.example/a"));
        assert!(!same("https://r.example/a", "https://r.example:444/a"));
        assert!(!same("https://r.example/a", "https://r.example.org/a"));
        assert!(!same("/a", "/a"));
    }

    #[test]
    fn queries_are_added() {
        let add = |uri: &str| with_query(&uri.parse().unwrap(), "digest", "sha256:a b");
        assert_eq!(add("http://a/b"), "http://a/b?digest=sha256%3Aa%20b");
        assert_eq!(
            add("http://a/b?c=d"),
            "http://a/b?c=d&digest=sha256%3Aa%20b"
        );
        assert_eq!(add("http://a/b?"), "http://a/b?digest=sha256%3Aa%20b");
    }

    proptest! {
        #[test]
        fn joined_locations_are_http(location in "\\PC{0,40}") {
            let base = "https://r.example/a/b".parse().unwrap();
            if let Some(uri) = join(&base, &location) {
                prop_assert!(matches!(uri.scheme_str(), Some("http" | "https")));
                prop_assert!(uri.host().is_some());
            }
        }
    }
}
