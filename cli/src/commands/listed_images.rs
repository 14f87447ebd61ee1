//! `sm images`.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;
use sm_runtime::Sm;
use sm_runtime::image::ImageSummary;

use crate::args::ImagesArgs;
use crate::failure::Failure;
use crate::filter::{Filters, has_label};
use crate::listing::Listing;
use crate::moment::timestamp;
use crate::printer::Printer;
use crate::units::{format_age, format_size};

/// Digits of an image's ID in a table.
const SHORT_ID: usize = 12;
/// The conditions for images.
const OF_IMAGES: &[&str] = &["before", "dangling", "id", "label", "reference", "since"];

pub(crate) fn list(sm: &Sm, args: &ImagesArgs, printer: &Printer) -> Result<u32, Failure> {
    let filters = Filters::parse(&args.filter, OF_IMAGES)?;
    let form = args.list.form()?;
    let mut images = sm.images().list()?;
    // Every image of the list has a name.
    if !filters.is("dangling", || false)? {
        images.clear();
    }
    for (name, later) in [("before", false), ("since", true)] {
        if filters.has(name) {
            let bounds = stored_times(&images, &filters, name)?;
            images.retain(|image| {
                bounds.iter().all(|bound| match later {
                    true => image.stored_ns > *bound,
                    false => image.stored_ns < *bound,
                })
            });
        }
    }
    images.retain(|image| {
        let id = image.digest.hex();
        let is_of = |pattern: &str| is_reference(&image.reference, pattern);
        filters.hold("reference", is_of)
            && args.name.as_deref().is_none_or(is_of)
            && filters.hold("id", |value| {
                id.starts_with(value.trim_start_matches("sha256:"))
            })
    });
    // Labels are in the images' configurations.
    if filters.has("label") {
        let mut labelled = Vec::new();
        for image in images {
            let details = sm.images().inspect(&image.reference)?;
            let labels = details.config.config.and_then(|config| config.labels);
            let labels: BTreeMap<_, _> = labels.unwrap_or_default();
            if filters.all_hold("label", |label| has_label(&labels, label)) {
                labelled.push(image);
            }
        }
        images = labelled;
    }
    let header: &[&str] = match args.digests {
        true => &["IMAGE", "DIGEST", "ID", "STORED", "SIZE"],
        false => &["IMAGE", "ID", "STORED", "SIZE"],
    };
    let listing = Listing {
        header,
        name: &|image: &ImageSummary| image.digest.to_string(),
        cells: &|image| {
            let mut cells = vec![image.reference.clone()];
            if args.digests {
                cells.push(image.named.to_string());
            }
            cells.extend([
                short(&image.digest.hex(), args.no_trunc),
                age(stored(image)),
                format_size(image.size),
            ]);
            cells
        },
        members: &|image| {
            let (repository, tag) = parts(&image.reference);
            json!({
                "Image": image.reference,
                "Repository": repository, "Tag": tag.unwrap_or("<none>"),
                "ID": short(&image.digest.hex(), args.no_trunc),
                "Digest": image.named.to_string(),
                "CreatedSince": age(stored(image)),
                "CreatedAt": timestamp(image.stored_ns),
                "Size": format_size(image.size),
            })
        },
    };
    listing.print(&images, &form, printer)?;
    Ok(0)
}

pub(super) fn short(id: &str, whole: bool) -> String {
    match whole {
        true => format!("sha256:{id}"),
        false => id.get(..SHORT_ID).unwrap_or(id).to_owned(),
    }
}

pub(super) fn age(time: SystemTime) -> String {
    let age = SystemTime::now().duration_since(time).unwrap_or_default();
    format!("{} ago", format_age(age))
}

fn stored(image: &ImageSummary) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(image.stored_ns)
}

/// Returns the times at which the images were stored that a condition names.
fn stored_times(
    images: &[ImageSummary],
    filters: &Filters,
    name: &str,
) -> anyhow::Result<Vec<u64>> {
    let mut times = Vec::new();
    for value in filters.values(name) {
        let is_named = |image: &&ImageSummary| {
            let id = image.digest.hex();
            let value = value.trim_start_matches("sha256:");
            is_reference(&image.reference, value) || (value.len() >= 4 && id.starts_with(value))
        };
        let Some(image) = images.iter().find(is_named) else {
            anyhow::bail!("there is no image \"{value}\", which --filter {name} names");
        };
        times.push(image.stored_ns);
    }
    Ok(times)
}

/// Splits a reference into name and tag. A reference by digest, and one that is a path, has
/// no tag.
fn parts(reference: &str) -> (&str, Option<&str>) {
    if let Some((name, _)) = reference.split_once('@') {
        return parts(name);
    }
    match reference.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (reference, None),
    }
}

/// Returns true if a pattern is that of a reference, or of its name without a tag. `*` stands
/// for any characters but `/`, and `?` for one.
fn is_reference(reference: &str, pattern: &str) -> bool {
    let dockers = |name: &str| {
        let name = name.strip_prefix("docker.io/").unwrap_or(name);
        name.strip_prefix("library/").unwrap_or(name).to_owned()
    };
    let pattern = dockers(pattern);
    let (name, _) = parts(reference);
    [reference, name]
        .iter()
        .any(|text| matches(pattern.as_bytes(), dockers(text).as_bytes()))
}

fn matches(pattern: &[u8], text: &[u8]) -> bool {
    // The position after the last star, and the text that it stood for so far.
    let (mut p, mut t, mut star) = (0, 0, None);
    while let Some(&byte) = text.get(t) {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
            }
            Some(b'?') if byte != b'/' => (p, t) = (p + 1, t + 1),
            Some(&wanted) if wanted == byte => (p, t) = (p + 1, t + 1),
            _ => match star {
                Some((after, until)) if text.get(until) != Some(&b'/') => {
                    star = Some((after, until + 1));
                    (p, t) = (after, until + 1);
                }
                _ => return false,
            },
        }
    }
    pattern
        .get(p..)
        .unwrap_or_default()
        .iter()
        .all(|&b| b == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_match_patterns_with_or_without_a_tag() {
        for (reference, pattern, is) in [
            ("docker.io/library/nginx:1.27", "nginx", true),
            ("docker.io/library/nginx:1.27", "nginx:1.27", true),
            ("docker.io/library/nginx:1.27", "nginx:1.*", true),
            ("docker.io/library/nginx:1.27", "ngin?", true),
            ("docker.io/library/nginx:1.27", "ngin", false),
            ("docker.io/library/nginx:1.27", "nginx:1.28", false),
            ("localhost:5000/a/b:x", "localhost:5000/a/b", true),
            ("localhost:5000/a/b:x", "localhost:5000/*/b", true),
            ("localhost:5000/a/b:x", "localhost:5000/*", false),
            ("localhost:5000/a/b", "localhost:5000/a/b", true),
            ("quay.io/a/b:x", "*/a/b", true),
            ("quay.io/a/b:x", "*/b", false),
            ("oci:dir", "oci", true),
        ] {
            assert_eq!(
                is_reference(reference, pattern),
                is,
                "{reference} {pattern}"
            );
        }
    }

    #[test]
    fn a_star_is_no_trap() {
        let pattern = "*a".repeat(50) + "b";
        let text = "a".repeat(10_000);
        assert!(!matches(pattern.as_bytes(), text.as_bytes()));
    }

    #[test]
    fn references_have_a_name_and_a_tag() {
        assert_eq!(parts("a/b:c"), ("a/b", Some("c")));
        assert_eq!(parts("h:5000/b"), ("h:5000/b", None));
        assert_eq!(parts("a/b@sha256:00"), ("a/b", None));
        assert_eq!(parts("a/b:c@sha256:00"), ("a/b", Some("c")));
    }
}
