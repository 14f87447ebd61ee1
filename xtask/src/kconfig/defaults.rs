//! Symbols that are enabled by default, and the list of reviewed ones.
//!
//! `olddefconfig` gives each symbol that a fragment makes visible its default, which is
//! often "on": the vsock loopback got into a kernel this way. Only symbols with a prompt
//! count. The others (`HAVE_...`, `CC_HAS_...`) are facts about the architecture and the
//! compiler, or follow from selected symbols.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::symbols;

/// Directories without options of an x86 kernel.
const ELSEWHERE: [&str; 3] = ["Documentation", "tools", "samples"];

/// Returns the symbols in a kernel tree that a person can select.
pub(crate) fn prompts(tree: &Path) -> Result<HashSet<String>> {
    let mut found = HashSet::new();
    let mut directories = vec![tree.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory)
            .with_context(|| format!("cannot list {:?}", directory.display()))?;
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if entry.file_type()?.is_dir() {
                let foreign = directory.ends_with("arch") && name != "x86";
                if !foreign && !name.starts_with('.') && !ELSEWHERE.contains(&&*name) {
                    directories.push(entry.path());
                }
            } else if name.starts_with("Kconfig") {
                let text = fs::read(entry.path())
                    .with_context(|| format!("cannot read {:?}", entry.path().display()))?;
                prompts_of(&String::from_utf8_lossy(&text), &mut found);
            }
        }
    }
    Ok(found)
}

/// Adds the symbols that one Kconfig file defines with a prompt.
fn prompts_of(text: &str, found: &mut HashSet<String>) {
    let mut symbol = None;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("config" | "menuconfig"), Some(name)) => symbol = Some(name),
            (Some("bool" | "tristate" | "prompt"), Some(prompt)) => {
                if let Some(name) = symbol
                    && prompt.starts_with(['"', '\''])
                {
                    found.insert(format!("CONFIG_{name}"));
                }
            }
            // Help texts have sentences that look like attributes.
            (
                Some(
                    "help" | "choice" | "endchoice" | "menu" | "endmenu" | "if" | "endif"
                    | "source" | "comment",
                ),
                _,
            ) => symbol = None,
            _ => {}
        }
    }
}

/// Returns the symbols with a prompt that are enabled in `config` and not set by the
/// fragment; sorted.
pub(crate) fn newly_enabled(
    prompts: &HashSet<String>,
    fragment: &str,
    config: &str,
) -> Vec<String> {
    let requested = symbols(fragment);
    let mut on: Vec<_> = symbols(config)
        .into_iter()
        .filter(|(symbol, value)| {
            matches!(*value, "y" | "m")
                && prompts.contains(*symbol)
                && !requested.contains_key(symbol)
        })
        .map(|(symbol, _)| symbol.to_owned())
        .collect();
    on.sort();
    on
}

/// Returns those of `newly_enabled` that are not in the `reviewed` list.
///
/// The list has one symbol per line; one that ends with `*` is a prefix. `#` starts a
/// remark.
pub(crate) fn unreviewed<'a>(newly_enabled: &[&'a str], reviewed: &str) -> Vec<&'a str> {
    let entries: Vec<_> = entries(reviewed).collect();
    let is_reviewed = |symbol: &str| {
        entries.iter().any(|entry| match entry.strip_suffix('*') {
            Some(start) => symbol.starts_with(start),
            None => symbol == *entry,
        })
    };
    newly_enabled
        .iter()
        .copied()
        .filter(|symbol| !is_reviewed(symbol))
        .collect()
}

/// Returns the symbols of a list with one per line.
pub(crate) fn entries(list: &str) -> impl Iterator<Item = &str> {
    list.lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|entry| !entry.is_empty())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs;

    use super::{entries, newly_enabled, prompts, unreviewed};
    use crate::kconfig::{REVIEWED, symbols};

    const KCONFIG: &str = "\
menuconfig VSOCKETS
\ttristate \"Virtual Socket protocol\"
\tdepends on NET
config VSOCKETS_LOOPBACK
\ttristate \"Virtual Sockets loopback transport\"
\tdepends on VSOCKETS
\tdefault y
config HAVE_THING
\tdef_bool y
\thelp
\t  bool \"not a prompt\"
choice
\tprompt \"Which\"
config FIRST
\tbool 'first'
endchoice
config SECOND
\tbool
\tprompt \"second\" if EXPERT
";

    fn tree() -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        for directory in ["net/vmw_vsock", "arch/arm", "arch/x86", "Documentation"] {
            fs::create_dir_all(tree.path().join(directory)).unwrap();
        }
        let write = |path: &str, text: &str| fs::write(tree.path().join(path), text).unwrap();
        write("net/vmw_vsock/Kconfig", KCONFIG);
        write("net/vmw_vsock/Makefile", "config MAKE\n bool \"no\"\n");
        write("arch/arm/Kconfig", "config ARM_ONLY\n bool \"no\"\n");
        write("arch/x86/Kconfig.cpu", "config X86_ONLY\n bool \"yes\"\n");
        write("Documentation/Kconfig", "config WARN\n bool \"no\"\n");
        tree
    }

    #[test]
    fn only_what_can_be_chosen_has_a_prompt() {
        let found = prompts(tree().path()).unwrap();
        let mut found: Vec<_> = found.iter().map(String::as_str).collect();
        found.sort_unstable();
        assert_eq!(
            found,
            [
                "CONFIG_FIRST",
                "CONFIG_SECOND",
                "CONFIG_VSOCKETS",
                "CONFIG_VSOCKETS_LOOPBACK",
                "CONFIG_X86_ONLY"
            ]
        );
    }

    #[test]
    fn an_unrequested_default_is_found_by_name() {
        let found = prompts(tree().path()).unwrap();
        let fragment = "CONFIG_VSOCKETS=y\n";
        let config = "CONFIG_VSOCKETS=y\nCONFIG_VSOCKETS_LOOPBACK=y\nCONFIG_HAVE_THING=y\n\
                      # CONFIG_FIRST is not set\n";
        let on = newly_enabled(&found, fragment, config);
        assert_eq!(on, ["CONFIG_VSOCKETS_LOOPBACK"]);
        let on = [on[0].as_str()];
        assert_eq!(unreviewed(&on, "# CONFIG_VSOCKETS_LOOPBACK\n"), on);
        assert_eq!(unreviewed(&on, "CONFIG_VSOCKETS\nCONFIG_OTHER_*\n"), on);
        assert!(unreviewed(&on, "CONFIG_VSOCKETS_LOOPBACK # as it is\n").is_empty());
        assert!(unreviewed(&on, "CONFIG_VSOCKETS_*\n").is_empty());
    }

    #[test]
    fn symbols_of_the_fragment_are_no_defaults() {
        let found = HashSet::from(["CONFIG_A".to_owned(), "CONFIG_B".to_owned()]);
        let config = "CONFIG_A=y\nCONFIG_B=n\n";
        assert!(newly_enabled(&found, "CONFIG_A=n\n", config).is_empty());
    }

    #[test]
    fn the_reviewed_list_repeats_neither_itself_nor_the_fragment() {
        let fragment = symbols(crate::kconfig::FRAGMENT);
        let mut seen = HashSet::new();
        for entry in entries(REVIEWED) {
            assert!(entry.starts_with("CONFIG_"), "{entry}");
            assert!(seen.insert(entry), "{entry} is there twice");
            assert!(
                !fragment.contains_key(entry),
                "{entry} is asked for: it is no default"
            );
        }
    }
}
