//! Authentication challenges in 401 answers of registries (RFC 9110 section 11.6.1, and
//! the token flow of the distribution project).

use std::collections::BTreeMap;

/// Authentication scheme of a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A user and a password with each request.
    Basic,
    /// A token issued by another server.
    Bearer {
        /// URL of the token server.
        realm: String,
        /// Parameter for the token server.
        service: Option<String>,
        /// Parameter for the token server.
        scope: Option<String>,
    },
}

/// Maximum length of a parsed header in bytes.
const MAX_LEN: usize = 16 << 10;

impl Challenge {
    /// Parses a `WWW-Authenticate` header and returns the best of its supported schemes.
    pub(super) fn parse(header: &str) -> Option<Self> {
        let header = header.get(..header.len().min(MAX_LEN))?;
        let mut basic = false;
        let mut rest = header.trim_start();
        while !rest.is_empty() {
            let end = rest
                .find(|c: char| c.is_ascii_whitespace() || c == ',')
                .unwrap_or(rest.len());
            let (scheme, after) = rest.split_at(end);
            let (parameters, next) = parameters(after);
            if scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = parameters.get("realm")
            {
                return Some(Self::Bearer {
                    realm: realm.clone(),
                    service: parameters.get("service").cloned(),
                    scope: parameters.get("scope").cloned(),
                });
            }
            basic |= scheme.eq_ignore_ascii_case("basic");
            // Parsing stops if no input was consumed.
            if next.len() >= rest.len() {
                break;
            }
            rest = next;
        }
        basic.then_some(Self::Basic)
    }
}

/// Parses `name=value` and `name="value"` pairs up to the next scheme. Returns them and
/// the rest.
fn parameters(text: &str) -> (BTreeMap<String, String>, &str) {
    let mut found = BTreeMap::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == ',');
        let Some(end) = rest.find(|c: char| c == '=' || c == ',' || c.is_ascii_whitespace()) else {
            return (found, rest);
        };
        let (name, after) = rest.split_at(end);
        let Some(value) = after.strip_prefix('=') else {
            // The word is the name of the next scheme.
            return (found, rest);
        };
        let (value, after) = match value.strip_prefix('"') {
            Some(quoted) => unquoted(quoted),
            None => {
                let end = value.find(',').unwrap_or(value.len());
                let (value, after) = value.split_at(end);
                (value.trim().to_owned(), after)
            }
        };
        found.insert(name.to_ascii_lowercase(), value);
        rest = after;
    }
}

/// Parses a quoted string after its opening quote, and returns its value and the text after
/// the closing quote.
fn unquoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return (value, text.get(at + 1..).unwrap_or_default()),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            c => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        })
    }

    #[test]
    fn the_usual_headers_are_read() {
        let header = "Bearer realm=\"https://auth.example/token\",service=\"r.example\",\
                      scope=\"repository:a/b:pull,push\"";
        let expected = bearer(
            "https://auth.example/token",
            Some("r.example"),
            Some("repository:a/b:pull,push"),
        );
        assert_eq!(Challenge::parse(header), expected);
        assert_eq!(
            Challenge::parse("Basic realm=\"x y\""),
            Some(Challenge::Basic)
        );
        let both = "Basic realm=\"a\", Bearer realm=\"b\"";
        assert_eq!(Challenge::parse(both), bearer("b", None, None));
        assert_eq!(
            Challenge::parse("bearer REALM=plain , service = x"),
            bearer("plain", None, None)
        );
        assert_eq!(
            Challenge::parse("Bearer realm=\"a\\\"b\""),
            bearer("a\"b", None, None)
        );
        for useless in [
            "",
            "Digest realm=\"a\"",
            "Bearer",
            "Bearer scope=\"x\"",
            ",,",
        ] {
            assert_eq!(Challenge::parse(useless), None, "{useless:?}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_read_in_bounded_time(header in "[Bbearis =\",\\\\x\u{e9}]{0,200}") {
            let _ = Challenge::parse(&header);
        }
    }
}
