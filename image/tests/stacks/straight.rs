//! Conversion of stacks to paths without links.

use std::path::{Path, PathBuf};

use crate::compare::{Appliers, Stack};
use crate::random::Layer;
use crate::tree::{self, Tree};

/// Returns the stack with every path, including those of hard links' targets, resolved to
/// one without links, or `None` if this crate refuses the stack.
pub(crate) fn straight(appliers: &Appliers, stack: &Stack) -> Option<Stack> {
    let mut layers: Vec<Layer> = Vec::new();
    for layer in &stack.layers {
        layers.push(Layer::new());
        for entry in layer {
            let tree = appliers.ours(&Stack::new(layers.clone()))?;
            let mut entry = entry.clone();
            entry.path = without_links(&tree, &entry.path);
            if entry.kind == b'1' {
                entry.link = without_links(&tree, &entry.link);
            }
            layers.last_mut()?.push(entry);
        }
    }
    Some(Stack::new(layers))
}

/// Resolves a path except its last name. Missing components are kept unchanged.
fn without_links(tree: &Tree, path: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(String::from_utf8_lossy(path).into_owned());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return path.into_os_string().into_encoded_bytes();
    };
    let found = parent.ancestors().find_map(|ancestor| {
        let resolved = tree::resolve(tree, ancestor.to_str()?)?;
        Some(resolved.join(parent.strip_prefix(ancestor).ok()?))
    });
    let parent = found.as_deref().unwrap_or(Path::new(""));
    parent.join(name).into_os_string().into_encoded_bytes()
}
