//! Kernel modules of a distribution and what they need, in loading order.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Paths of `wanted` and all they depend on, dependencies first. Names that the
/// kernel has built in, or does not have, are left out.
pub fn in_order(tree: &Path, wanted: &[&str]) -> Result<Vec<PathBuf>> {
    let path = tree.join("modules.dep");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let needs: HashMap<&str, Vec<&str>> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, rest)| (module, rest.split_whitespace().collect()))
        .collect();
    let mut order = Vec::new();
    for name in wanted {
        let module = needs.keys().find(|path| module_name(path) == *name);
        if let Some(module) = module {
            add(module, &needs, &mut order);
        }
    }
    Ok(order.into_iter().map(|relative| tree.join(relative)).collect())
}

fn add<'a>(module: &'a str, needs: &HashMap<&'a str, Vec<&'a str>>, order: &mut Vec<&'a str>) {
    if order.contains(&module) {
        return;
    }
    for needed in needs.get(module).into_iter().flatten() {
        add(needed, needs, order);
    }
    if !order.contains(&module) {
        order.push(module);
    }
}

/// `kvm_amd` for `kernel/arch/x86/kvm/kvm-amd.ko.xz`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}
