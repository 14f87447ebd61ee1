//! Parts of lines: links and spans of code.

use crate::lines;

/// A link of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkdownLink<'a> {
    /// The number of the line, from 1.
    pub line: usize,
    /// The target as written.
    pub target: &'a str,
}

/// Returns the inline links of a document, outside code.
pub fn links(document: &str) -> Vec<MarkdownLink<'_>> {
    let mut links = Vec::new();
    for (line, text) in lines::prose(document) {
        for plain in outside_code(text) {
            links.extend(plain.split("](").skip(1).filter_map(|rest| {
                let (target, _) = rest.split_once(')')?;
                // A title may follow.
                let target = target.split(' ').next().unwrap_or_default();
                Some(MarkdownLink { line, target })
            }));
        }
    }
    links
}

/// Returns the files that mdBook includes in a document (`{{#include FILE}}`).
pub fn includes(document: &str) -> Vec<MarkdownLink<'_>> {
    let mut includes = Vec::new();
    for (line, text) in lines::prose(document) {
        includes.extend(text.split("{{#include ").skip(1).filter_map(|rest| {
            let (target, _) = rest.split_once("}}")?;
            Some(MarkdownLink {
                line,
                target: target.trim(),
            })
        }));
    }
    includes
}

/// Returns the spans of code outside fenced blocks, with the numbers of their lines.
/// Spans that continue on another line are skipped.
pub fn code_spans(document: &str) -> Vec<(usize, &str)> {
    let mut spans = Vec::new();
    for (line, text) in lines::prose(document) {
        let parts = split(text);
        spans.extend(parts.filter_map(|part| match part {
            Part::Code(code) => Some((line, code)),
            Part::Text(_) => None,
        }));
    }
    spans
}

enum Part<'a> {
    Text(&'a str),
    Code(&'a str),
}

fn outside_code(line: &str) -> impl Iterator<Item = &str> {
    split(line).filter_map(|part| match part {
        Part::Text(text) => Some(text),
        Part::Code(_) => None,
    })
}

/// Splits a line into alternating text and code. The target of `[`x`](y)` is in the text
/// after the code.
fn split(line: &str) -> impl Iterator<Item = Part<'_>> {
    let mut rest = line;
    let mut parts = Vec::new();
    while let Some(start) = rest.find('`') {
        let after = &rest[start..];
        let body = after.trim_start_matches('`');
        let fence = &after[..after.len() - body.len()];
        let Some(end) = closing(body, fence.len()) else {
            break;
        };
        parts.push(Part::Text(&rest[..start]));
        parts.push(Part::Code(body[..end].trim()));
        rest = &body[end + fence.len()..];
    }
    parts.push(Part::Text(rest));
    parts.into_iter()
}

/// Returns the start of a run of exactly `count` backticks.
fn closing(text: &str, count: usize) -> Option<usize> {
    let mut at = 0;
    while let Some(found) = text[at..].find('`') {
        let start = at + found;
        let run = text[start..].len() - text[start..].trim_start_matches('`').len();
        if run == count {
            return Some(start);
        }
        at = start + run;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(document: &str) -> Vec<&str> {
        links(document).iter().map(|link| link.target).collect()
    }

    #[test]
    fn links_in_code_are_none() {
        let document = "[a](b.md#c) `[x](y)` [`d`](e)\n```\n[x](y)\n```\n![f](g.png \"t\") a`b\n";
        assert_eq!(targets(document), ["b.md#c", "e", "g.png"]);
        assert_eq!(links(document)[2].line, 5);
    }

    #[test]
    fn spans_of_code_have_fences_of_any_length() {
        let document = "see `sm ps` and ``a ` b``, not this: `";
        assert_eq!(code_spans(document), [(1, "sm ps"), (1, "a ` b")]);
    }

    #[test]
    fn includes_are_found() {
        let found = includes("x\n{{#include ../../SECURITY.md}}\n");
        assert_eq!((found[0].line, found[0].target), (2, "../../SECURITY.md"));
    }
}
