//! Kernel configurations: comparison of a fragment with the result.

use std::collections::HashMap;

mod defaults;

pub(crate) use defaults::{newly_enabled, prompts, unreviewed};

/// The fragment with the options that `sm` needs.
pub(crate) const FRAGMENT: &str = include_str!("../../guest/kernel/guest.config");
/// Symbols that may be enabled by default.
pub(crate) const REVIEWED: &str = include_str!("../../guest/kernel/defaults.reviewed");
/// Symbols without which `sm` cannot run the guest. Other symbols of the fragment may be
/// missing in a kernel version, and are only reported.
const ESSENTIAL: [&str; 14] = [
    "CONFIG_SMP",
    "CONFIG_PVH",
    "CONFIG_ACPI",
    "CONFIG_BLK_DEV_INITRD",
    "CONFIG_VIRTIO_MMIO",
    "CONFIG_VIRTIO_BLK",
    "CONFIG_VIRTIO_VSOCKETS",
    "CONFIG_HW_RANDOM_VIRTIO",
    "CONFIG_EROFS_FS",
    "CONFIG_OVERLAY_FS",
    "CONFIG_TMPFS",
    "CONFIG_DEVTMPFS",
    "CONFIG_SERIAL_8250_CONSOLE",
    "CONFIG_VMGENID",
];

/// Differences between a fragment and the resulting configuration.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct FragmentMismatch {
    /// Missing essential symbols.
    pub(crate) essential: Vec<String>,
    /// Lines of the fragment that are not in the result.
    pub(crate) other: Vec<String>,
}

/// Compares the `fragment` with the final `config`.
pub(crate) fn mismatches(fragment: &str, config: &str) -> FragmentMismatch {
    let result = symbols(config);
    let mut mismatches = FragmentMismatch::default();
    for (symbol, wanted) in symbols(fragment) {
        let got = result.get(symbol).copied().unwrap_or("n");
        if got == wanted {
            continue;
        }
        let line = format!("{symbol}={wanted} (is {got})");
        if ESSENTIAL.contains(&symbol) {
            mismatches.essential.push(line);
        } else {
            mismatches.other.push(line);
        }
    }
    for symbol in ESSENTIAL {
        if result.get(symbol).copied() != Some("y") && !symbols(fragment).contains_key(symbol) {
            mismatches.essential.push(format!("{symbol} is not set"));
        }
    }
    mismatches.essential.sort();
    mismatches.other.sort();
    mismatches
}

fn symbols(text: &str) -> HashMap<&str, &str> {
    text.lines()
        .filter_map(|line| line.trim().split_once('='))
        .filter(|(symbol, _)| symbol.starts_with("CONFIG_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{ESSENTIAL, FRAGMENT, defaults, mismatches, symbols};

    fn essential() -> String {
        ESSENTIAL.map(|symbol| format!("{symbol}=y\n")).concat()
    }

    #[test]
    fn unset_is_what_n_asks_for() {
        let fragment = format!("{}CONFIG_VT=n\nCONFIG_HZ=100\n", essential());
        let config = format!("{}# CONFIG_VT is not set\nCONFIG_HZ=100\n", essential());
        assert_eq!(
            mismatches(&fragment, &config),
            super::FragmentMismatch::default()
        );
    }

    #[test]
    fn losses_are_told_apart() {
        let fragment = format!("{}CONFIG_TUN=y\n", essential());
        let config = essential().replace("CONFIG_PVH=y", "# CONFIG_PVH is not set");
        let mismatches = mismatches(&fragment, &config);
        assert_eq!(mismatches.essential, ["CONFIG_PVH=y (is n)"]);
        assert_eq!(mismatches.other, ["CONFIG_TUN=y (is n)"]);
    }

    #[test]
    fn a_fragment_without_an_essential_symbol_is_rejected() {
        let config = essential().replace("CONFIG_PVH=y\n", "");
        assert_eq!(mismatches("", &config).essential, ["CONFIG_PVH is not set"]);
    }

    #[test]
    fn the_fragment_has_all_that_containers_need() {
        let needed = include_str!("../../guest/kernel/containers.required");
        let on = symbols(FRAGMENT);
        let missing: Vec<_> = defaults::entries(needed)
            .filter(|symbol| on.get(symbol).copied() != Some("y"))
            .collect();
        assert_eq!(missing, [""; 0]);
    }

    #[test]
    fn the_agents_ports_are_not_reached_by_a_loopback() {
        for line in ["CONFIG_VSOCKETS_LOOPBACK=n", "CONFIG_VSOCKETS_DIAG=n"] {
            assert!(FRAGMENT.lines().any(|asked| asked == line), "{line}");
        }
    }
}
