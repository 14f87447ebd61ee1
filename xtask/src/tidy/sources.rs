//! Rules for Rust files.

use super::{RepositoryFile, Violation};

/// Maximum number of lines of a file.
const MAX_LINES: usize = 600;
/// Predicates of conditional compilation about the operating system.
const SYSTEMS: [&str; 4] = ["target_os", "target_family", "unix", "windows"];

/// Folders of the one backend there is, and of the choice between backends.
const BACKENDS: [&str; 2] = ["hypervisor/src/kvm/", "hypervisor/src/sys/"];
/// Crates that only a backend uses.
const KVM_CRATES: [&str; 2] = ["kvm_bindings", "kvm_ioctls"];

fn rust(files: &[RepositoryFile]) -> impl Iterator<Item = &RepositoryFile> {
    files.iter().filter(|file| file.path.ends_with(".rs"))
}

/// Returns the files with too many lines.
pub(super) fn long(files: &[RepositoryFile]) -> Vec<Violation> {
    rust(files)
        .filter_map(|file| {
            let lines = file.text.lines().count();
            (lines > MAX_LINES).then(|| Violation {
                path: file.path.clone(),
                message: format!("it has {lines} lines, more than {MAX_LINES}"),
            })
        })
        .collect()
}

/// Returns files outside folders named `sys` that are compiled conditionally by operating
/// system.
pub(super) fn depends_on_system(files: &[RepositoryFile]) -> Vec<Violation> {
    rust(files)
        .filter(|file| !is_sys(&file.path))
        .filter_map(|file| {
            let system = system_asked_for(&file.text)?;
            Some(Violation {
                path: file.path.clone(),
                message: format!("it asks for \"{system}\", which only files in \"sys\" do"),
            })
        })
        .collect()
}

/// Product code that names KVM (its types, crates or device) outside the backend: what
/// stands above the hypervisor's seam works with every backend.
pub(super) fn knows_kvm(files: &[RepositoryFile]) -> Vec<Violation> {
    rust(files)
        .filter(|file| is_product(&file.path))
        .filter(|file| !BACKENDS.iter().any(|folder| file.path.starts_with(folder)))
        .filter_map(|file| {
            let known = kvm_named(&file.text)?;
            Some(Violation {
                path: file.path.clone(),
                message: format!("it names \"{known}\", which only hypervisor/src/kvm knows"),
            })
        })
        .collect()
}

fn kvm_named(text: &str) -> Option<&str> {
    let device = "/dev/kvm";
    let mut words = text.split(|character| !is_word(character));
    words
        .find(|word| word.starts_with("Kvm") || KVM_CRATES.contains(word))
        .or_else(|| text.contains(device).then_some(device))
}

/// Neither tests, benches and examples nor developer commands.
fn is_product(path: &str) -> bool {
    !path.starts_with("xtask/")
        && path
            .split('/')
            .all(|part| !matches!(part, "benches" | "examples" | "fuzz" | "tests" | "tests.rs"))
}

fn is_sys(path: &str) -> bool {
    path.split('/')
        .any(|part| part == "sys" || part == "sys.rs")
}

/// Returns the first predicate about the operating system in a condition of conditional
/// compilation.
fn system_asked_for(text: &str) -> Option<&'static str> {
    let code: String = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| [line, "\n"])
        .collect();
    let mut rest = code.as_str();
    while let Some(at) = rest.find("cfg") {
        let before = rest[..at].chars().next_back();
        rest = &rest[at + "cfg".len()..];
        if before.is_some_and(is_word) {
            continue;
        }
        let after = rest.strip_prefix("_attr").unwrap_or(rest);
        let after = after.strip_prefix('!').unwrap_or(after);
        if let Some(condition) = after.strip_prefix('(') {
            let system = words(inside(condition))
                .find_map(|word| SYSTEMS.into_iter().find(|system| *system == word));
            if system.is_some() {
                return system;
            }
        }
    }
    None
}

/// Returns the text up to the closing parenthesis.
fn inside(text: &str) -> &str {
    let mut depth = 1;
    let end = text.find(|character| {
        match character {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        depth == 0
    });
    end.map_or(text, |end| &text[..end])
}

/// Returns the words of a condition that are not in quotes.
fn words(condition: &str) -> impl Iterator<Item = &str> {
    condition
        .split('"')
        .step_by(2)
        .flat_map(|part| part.split(|character| !is_word(character)))
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: String) -> RepositoryFile {
        RepositoryFile {
            path: path.to_owned(),
            text,
        }
    }

    /// Built from parts, because this file is checked as well.
    fn attribute(condition: &str) -> String {
        format!("#[{}({condition})]\nfn f() {{}}\n", concat!("c", "fg"))
    }

    #[test]
    fn only_sys_asks_for_the_operating_system() {
        for (condition, system) in [
            ("target_os = \"linux\"", Some("target_os")),
            ("all(\n    feature = \"a\",\n    not(unix)\n)", Some("unix")),
            ("any(windows, test)", Some("windows")),
            ("feature = \"unix\"", None),
            ("test", None),
            ("target_arch = \"x86_64\"", None),
        ] {
            assert_eq!(
                system_asked_for(&attribute(condition)),
                system,
                "{condition}"
            );
        }
        let macros = format!("if {}!(unix) {{}}", concat!("c", "fg"));
        assert_eq!(system_asked_for(&macros), Some("unix"));
        let comment = format!("    // {}", attribute("unix"));
        assert_eq!(system_asked_for(&comment), None);
        assert_eq!(system_asked_for("let my_cfg = (unix);"), None);
        let broken = depends_on_system(&[
            file("a/src/sys/linux.rs", attribute("unix")),
            file("a/src/sys.rs", attribute("unix")),
            file("a/src/lib.rs", attribute("unix")),
            file("a/README.md", attribute("unix")),
        ]);
        let paths: Vec<_> = broken.iter().map(|broken| broken.path.as_str()).collect();
        assert_eq!(paths, ["a/src/lib.rs"]);
    }

    #[test]
    fn only_the_backend_knows_kvm() {
        for (text, named) in [
            ("use sm_hypervisor::kvm::Kvm;", Some("Kvm")),
            ("let vm: KvmVm = f();", Some("KvmVm")),
            ("use kvm_ioctls::VmFd;", Some("kvm_ioctls")),
            ("    /// Opens `/dev/kvm`.", Some("/dev/kvm")),
            ("pub mod kvm; // KVM, kvmclock, kvm_vcpu_events", None),
        ] {
            assert_eq!(kvm_named(text), named, "{text}");
        }
        let text = || "host: Kvm".to_owned();
        let broken = knows_kvm(&[
            file("hypervisor/src/kvm/vm.rs", text()),
            file("hypervisor/src/sys/mod.rs", text()),
            file("hypervisor/src/traits.rs", text()),
            file("vmm-core/tests/machine_kvm.rs", text()),
            file("vmm/src/saved/tests.rs", text()),
            file("benches/src/main.rs", text()),
            file("vmm/src/machine.rs", text()),
            file("README.md", text()),
        ]);
        let paths: Vec<_> = broken.iter().map(|broken| broken.path.as_str()).collect();
        assert_eq!(paths, ["hypervisor/src/traits.rs", "vmm/src/machine.rs"]);
    }

    #[test]
    fn files_end_at_600_lines() {
        let broken = long(&[
            file("a.rs", "x\n".repeat(600)),
            file("b.rs", "x\n".repeat(601)),
            file("c.md", "x\n".repeat(601)),
        ]);
        let paths: Vec<_> = broken.iter().map(|broken| broken.path.as_str()).collect();
        assert_eq!(paths, ["b.rs"]);
    }
}
