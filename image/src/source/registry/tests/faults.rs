//! Tests of connection failures and invalid answers.

use super::server::{Answer, Heard, ok, registry, status};
use crate::digest::Digest;

#[test]
fn a_broken_connection_is_resumed() {
    let mut cuts = 0;
    let fixture = registry(move |request, content| {
        let honest = content.honest(request);
        let is_layer = request.path.contains("/blobs/");
        match honest {
            Answer::Say(status, headers, body) if is_layer && body.len() > 100_000 && cuts < 3 => {
                cuts += 1;
                Answer::Cut(status, headers, body, 70_000)
            }
            other => other,
        }
    });
    fixture.pull().unwrap();
    let ranges: Vec<_> = fixture
        .requests()
        .iter()
        .filter_map(|request| request.headers.get("range").cloned())
        .collect();
    assert_eq!(ranges.first().map(String::as_str), Some("bytes=70000-"));
    assert_eq!(ranges.len(), 3, "{ranges:?}");
}

#[test]
fn a_registry_without_ranges_is_read_again() {
    let mut cut = false;
    let fixture = registry(move |request, content| {
        let mut plain = request.clone();
        plain.headers.remove("range");
        match content.honest(&plain) {
            Answer::Say(status, headers, body) if body.len() > 100_000 && !cut => {
                cut = true;
                Answer::Cut(status, headers, body, 50_000)
            }
            other => other,
        }
    });
    fixture.pull().unwrap();
}

#[test]
fn a_connection_that_always_breaks_is_an_error() {
    let fixture = registry(|request, content| match content.honest(request) {
        Answer::Say(status, headers, body) if body.len() > 100_000 => {
            Answer::Cut(status, headers, body, 10)
        }
        other => other,
    });
    fixture.fails(&["layer"]);
    assert!(fixture.requests().len() < 20);
}

#[test]
fn temporary_failures_are_retried() {
    let mut troubles = vec![
        status(503),
        Answer::Say(429, vec![("Retry-After", "0".to_owned())], Vec::new()),
        Answer::HangUp,
    ];
    let fixture = registry(move |request, content| {
        if request.path.contains("/manifests/")
            && let Some(trouble) = troubles.pop()
        {
            return trouble;
        }
        content.honest(request)
    });
    fixture.pull().unwrap();
}

#[test]
fn permanent_failures_are_reported() {
    let fixture = registry(|request, _| match request.path.as_str() {
        "/v2/" => status(200),
        _ => Answer::Say(500, vec![("Retry-After", "0".to_owned())], Vec::new()),
    });
    fixture.fails(&["127.0.0.1", "500", "5 times"]);
}

#[test]
fn wrong_contents_are_refused() {
    let fixture = registry(|request, content| match content.honest(request) {
        Answer::Say(status, headers, mut body) if body.len() > 100_000 => {
            let middle = body.len() / 2;
            body[middle] ^= 1;
            Answer::Say(status, headers, body)
        }
        other => other,
    });
    fixture.fails(&["blob sha256:", "contents have digest"]);

    let mut fixture = registry(|request, content| content.honest(request));
    let digest = Digest::of(b"another manifest");
    fixture.reference = format!("{}@{digest}", fixture.reference);
    fixture.fails(&[&digest.to_string()]);
}

#[test]
fn wrong_lengths_are_errors() {
    // The answer is longer than the manifest permits.
    let fixture = registry(|request, content| match content.honest(request) {
        Answer::Say(status, headers, mut body) if body.len() > 100_000 => {
            body.extend(vec![0; 4 << 20]);
            Answer::Say(status, headers, body)
        }
        other => other,
    });
    fixture.fails(&["announces", "337587"]);
    // An endless manifest.
    let fixture = registry(
        |request, content| match request.path.contains("/manifests/") {
            true => ok(&vec![b' '; 9 << 20]),
            false => content.honest(request),
        },
    );
    fixture.fails(&["larger than 8 MiB"]);
    let fixture = registry(
        |request, content| match request.path.contains("/manifests/") {
            true => ok(b"{\"schemaVersion\": 2, \"manifests\": ["),
            false => content.honest(request),
        },
    );
    fixture.fails(&["manifest"]);
}

#[test]
fn connections_cut_anywhere_are_resumed() {
    let mut random = 1_u64;
    let mut next = move |below: usize| {
        // The sequence is arbitrary, but reproducible.
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(random >> 33).unwrap() % below
    };
    for _ in 0..8 {
        let points: Vec<usize> = (0..3).map(|_| next(150_000)).collect();
        let mut cuts = points.into_iter();
        let fixture = registry(move |request, content| match content.honest(request) {
            Answer::Say(status, headers, body) if body.len() > 1000 => match cuts.next() {
                Some(at) => {
                    let at = at.min(body.len());
                    Answer::Cut(status, headers, body, at)
                }
                None => Answer::Say(status, headers, body),
            },
            other => other,
        });
        let heard = Heard::default();
        heard
            .with(|session| fixture.read_through(&[], session))
            .unwrap();
    }
}

#[test]
fn mismatched_parts_are_not_combined() {
    let wrong: [fn(usize, usize) -> String; 4] = [
        // The range omits a byte.
        |from, len| format!("bytes {}-{}/{len}", from + 1, len - 1),
        // The range belongs to another blob.
        |from, len| format!("bytes {from}-{len}/{}", len + 1),
        |_, len| format!("bytes */{len}"),
        |_, _| "nonsense".to_owned(),
    ];
    for range in wrong {
        let fixture = registry(move |request, content| match content.honest(request) {
            Answer::Say(200, headers, body) if body.len() > 100_000 => {
                Answer::Cut(200, headers, body, 70_000)
            }
            Answer::Say(206, _, body) => {
                let whole = body.len() + 70_000;
                let skip = usize::from(range(70_000, whole).starts_with("bytes 70001"));
                let headers = vec![("Content-Range", range(70_000, whole))];
                Answer::Say(206, headers, body[skip..].to_vec())
            }
            other => other,
        });
        let heard = Heard::default();
        let error = heard.with(|session| fixture.read_through(&[], session));
        assert!(error.is_err(), "{}", range(1, 2));
    }
}

#[test]
fn the_known_start_of_a_part_is_skipped() {
    let fixture = registry(move |request, content| {
        let mut earlier = request.clone();
        if let Some(range) = earlier.headers.get_mut("range") {
            *range = "bytes=60000-".to_owned();
        }
        match content.honest(&earlier) {
            Answer::Say(200, headers, body) if body.len() > 100_000 => {
                Answer::Cut(200, headers, body, 70_000)
            }
            other => other,
        }
    });
    let heard = Heard::default();
    heard
        .with(|session| fixture.read_through(&[], session))
        .unwrap();
}

#[test]
fn a_blob_shorter_than_announced_is_an_error() {
    let fixture = registry(|request, content| match content.honest(request) {
        Answer::Say(200, headers, body) if body.len() > 100_000 => {
            Answer::Cut(200, headers, body, 70_000)
        }
        Answer::Say(206, ..) => status(416),
        other => other,
    });
    fixture.fails(&["layer", "416"]);
}

#[test]
fn truncated_manifests_are_requested_again() {
    let mut cuts = 2;
    let fixture = registry(move |request, content| match content.honest(request) {
        Answer::Say(status, headers, body) if request.path.contains("/manifests/") && cuts > 0 => {
            cuts -= 1;
            Answer::Cut(status, headers, body, 50)
        }
        other => other,
    });
    fixture.pull().unwrap();
    let fixture = registry(|request, content| match content.honest(request) {
        Answer::Say(status, headers, body) if request.path.contains("/manifests/") => {
            Answer::Cut(status, headers, body, 50)
        }
        other => other,
    });
    fixture.fails(&["the transfer of a manifest was interrupted", "5 times"]);
}

#[test]
fn a_requested_pause_is_respected() {
    let mut troubles = vec![Answer::Say(
        429,
        vec![("Retry-After", "1".to_owned())],
        br#"{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow\u001b down"}]}"#.to_vec(),
    )];
    let fixture = registry(move |request, content| {
        if request.path.contains("/blobs/")
            && let Some(trouble) = troubles.pop()
        {
            return trouble;
        }
        content.honest(request)
    });
    let heard = Heard::default();
    heard
        .with(|session| fixture.read_through(&[], session))
        .unwrap();
    let expected = format!("waiting 1 s, as requested by {}", fixture.address);
    assert_eq!(heard.said(), [expected]);
}

#[test]
fn an_excessive_pause_is_an_error() {
    let far = "Fri, 31 Dec 2100 00:00:00 GMT";
    for pause in ["3600", far] {
        let fixture = registry(move |request, content| match request.path.as_str() {
            "/v2/" => status(200),
            path if path.contains("/blobs/") => Answer::Say(
                429,
                vec![("Retry-After", pause.to_owned())],
                br#"{"errors": [{"message": "pull rate limit\u001b reached"}]}"#.to_vec(),
            ),
            _ => content.honest(request),
        });
        fixture.fails(&["429", "pull rate limit  reached", "a pause of"]);
        let blobs = fixture.requests();
        assert_eq!(
            blobs.iter().filter(|r| r.path.contains("/blobs/")).count(),
            1
        );
    }
}

#[test]
fn cancelling_ends_reads_and_waits() {
    let silent = registry(|request, content| match content.honest(request) {
        Answer::Say(200, _, body) if body.len() > 100_000 => Answer::Silence,
        other => other,
    });
    let busy = registry(|request, content| match content.honest(request) {
        Answer::Say(200, _, body) if body.len() > 100_000 => {
            Answer::Say(503, vec![("Retry-After", "100".to_owned())], Vec::new())
        }
        other => other,
    });
    for fixture in [silent, busy] {
        let heard = Heard::default();
        // The second request is for the layer, after the configuration.
        let reached = || {
            let blobs = fixture.requests();
            blobs.iter().filter(|r| r.path.contains("/blobs/")).count() == 2
        };
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| heard.with(|session| fixture.read_through(&[], session)));
            while !reached() {
                std::thread::yield_now();
            }
            heard.cancel.cancel();
            let error = reading.join().unwrap().unwrap_err().to_string();
            assert!(error.contains("cancelled"), "{error}");
        });
    }
}

#[test]
fn wrong_content_lengths_are_handled() {
    // Content-Length is too short, which the reader sees as a truncation on every
    // attempt.
    let fixture = registry(|request, content| match content.honest(request) {
        Answer::Say(status, mut headers, body) if body.len() > 100_000 => {
            headers.push(("Content-Length", "1000".to_owned()));
            Answer::Say(status, headers, body)
        }
        other => other,
    });
    fixture.fails(&["announces 1000 bytes"]);
    // Without Content-Length, the body ends with the connection.
    let fixture = registry(|request, content| match content.honest(request) {
        Answer::Say(status, mut headers, body) if body.len() > 100_000 => {
            headers.push(("Content-Length", String::new()));
            Answer::Say(status, headers, body)
        }
        other => other,
    });
    fixture.pull().unwrap();
}
