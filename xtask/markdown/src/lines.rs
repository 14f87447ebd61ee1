//! Blocks of a document: fenced code and headings.

use std::collections::{BTreeMap, BTreeSet};

/// A fenced block of code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MarkdownBlock {
    /// The words after the opening fence.
    pub info: String,
    /// The number of the first line within the fence, from 1.
    pub line: usize,
    /// Everything between the fences, without the fence's indentation.
    pub text: String,
}

impl MarkdownBlock {
    /// Returns the language of the block, which may be empty.
    pub fn language(&self) -> &str {
        let end = self.info.find([' ', ',', '{']).unwrap_or(self.info.len());
        &self.info[..end]
    }

    /// Returns the reason for which the commands of the block are not parsed: the words
    /// after `unchecked:` in its info string, empty if there are none.
    pub fn unchecked(&self) -> Option<&str> {
        let (_, rest) = self.info.split_once("unchecked")?;
        Some(rest.strip_prefix(':').unwrap_or_default().trim())
    }
}

/// Returns the fenced blocks of a document.
pub fn blocks(document: &str) -> Vec<MarkdownBlock> {
    parse(document).0
}

/// Returns the anchors of a document's headings, by the rules of GitHub and mdBook, and
/// those of `id="..."` attributes.
pub fn anchors(document: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut uses: BTreeMap<String, usize> = BTreeMap::new();
    for (_, line) in prose(document) {
        anchors.extend(ids(line).map(str::to_owned));
        let Some(title) = heading(line) else { continue };
        let slug = slug(title);
        let count = uses.entry(slug.clone()).or_default();
        anchors.insert(match *count {
            0 => slug,
            count => format!("{slug}-{count}"),
        });
        *count += 1;
    }
    anchors
}

/// Returns the lines of a document outside fenced blocks, with their numbers from 1.
pub(crate) fn prose(document: &str) -> Vec<(usize, &str)> {
    parse(document).1
}

fn parse(document: &str) -> (Vec<MarkdownBlock>, Vec<(usize, &str)>) {
    let (mut blocks, mut prose) = (Vec::new(), Vec::new());
    let mut open: Option<(usize, usize, MarkdownBlock)> = None;
    for (number, line) in (1..).zip(document.lines()) {
        let unindented = line.trim_start();
        let indent = line.len() - unindented.len();
        let ticks = unindented.len() - unindented.trim_start_matches('`').len();
        let info = unindented[ticks..].trim();
        match &mut open {
            None if ticks >= 3 && !info.contains('`') => {
                let block = MarkdownBlock {
                    info: info.to_owned(),
                    line: number + 1,
                    text: String::new(),
                };
                open = Some((ticks, indent, block));
            }
            None => prose.push((number, line)),
            Some((fence, ..)) if ticks >= *fence && info.is_empty() => {
                blocks.extend(open.take().map(|(.., block)| block));
            }
            Some((_, indent, block)) => {
                let blanks = line.len() - line.trim_start_matches(' ').len();
                block.text.push_str(&line[blanks.min(*indent)..]);
                block.text.push('\n');
            }
        }
    }
    // A block without an end extends to the end of the document.
    blocks.extend(open.map(|(.., block)| block));
    (blocks, prose)
}

/// Returns the text of a heading.
fn heading(line: &str) -> Option<&str> {
    let rest = line.trim_start_matches('#');
    let level = line.len() - rest.len();
    let is_heading = (1..=6).contains(&level) && rest.starts_with(' ');
    is_heading.then(|| rest.trim().trim_end_matches('#').trim_end())
}

fn ids(line: &str) -> impl Iterator<Item = &str> {
    let parts = line.split(" id=\"").skip(1);
    parts.filter_map(|rest| rest.split_once('"').map(|(id, _)| id))
}

fn slug(title: &str) -> String {
    title
        .to_lowercase()
        .chars()
        .filter_map(|character| match character {
            ' ' => Some('-'),
            '-' | '_' => Some(character),
            _ => character.is_alphanumeric().then_some(character),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_end_at_a_fence_of_their_length() {
        let document = "a\n````text\n```sh\n````\n  ```sh x\n    sm ps\n  ```\nb ```c``` d\n";
        let found = blocks(document);
        let texts: Vec<_> = found.iter().map(|block| block.text.as_str()).collect();
        assert_eq!(texts, ["```sh\n", "  sm ps\n"]);
        assert_eq!((found[1].language(), found[1].line), ("sh", 6));
        let lines: Vec<_> = prose(document).iter().map(|(number, _)| *number).collect();
        assert_eq!(lines, [1, 8]);
        assert_eq!(blocks("```\nno end").len(), 1);
    }

    #[test]
    fn anchors_are_those_of_headings() {
        let document = "# Ports, sockets & TLS\n## `sm run`\n## `sm run`\n```\n# no\n```\n#no\n\
                        <a id=\"here\"></a>\n### A-b_c (d)\n";
        let expected = [
            "a-b_c-d",
            "here",
            "ports-sockets--tls",
            "sm-run",
            "sm-run-1",
        ];
        assert_eq!(anchors(document).into_iter().collect::<Vec<_>>(), expected);
    }
}
