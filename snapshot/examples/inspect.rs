//! Lists, shows and verifies snapshots, without a hypervisor: `inspect DIRECTORY [NAME]`.
//!
//! `sm` has its snapshots in `~/.local/share/sm/snapshots`.

use std::error::Error;
use std::io::{self, Write};
use std::path::Path;

use sm_snapshot::chain::Chain;
use sm_snapshot::extents::ExtentKind;
use sm_snapshot::store::SnapshotStore;
use sm_snapshot::verify::verify;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut out = io::stdout().lock();
    match arguments.as_slice() {
        [directory] => list(Path::new(directory), &mut out),
        [directory, name] => show(Path::new(directory), name, &mut out),
        _ => Err("usage: inspect DIRECTORY [NAME]".into()),
    }
}

/// A line for each snapshot of a store.
fn list(directory: &Path, out: &mut impl Write) -> Result<()> {
    // Creates, locks and removes nothing.
    for entry in SnapshotStore::read_only(directory).list()? {
        match entry.manifest {
            Ok(manifest) => writeln!(
                out,
                "{}: {:?}, {} MiB, {} vCPUs, {} bytes on disk",
                entry.name,
                manifest.layer,
                manifest.memory_bytes >> 20,
                manifest.vcpus,
                entry.disk_bytes,
            )?,
            Err(error) => writeln!(out, "{}: {error}", entry.name)?,
        }
    }
    Ok(())
}

/// A snapshot and all that it builds on, root first, and whether every byte is as written.
fn show(directory: &Path, name: &str, out: &mut impl Write) -> Result<()> {
    let chain = Chain::open(&SnapshotStore::read_only(directory), name)?;
    for member in chain.members() {
        let manifest = member.lease.manifest();
        writeln!(out, "{} (format {})", member.lease.name(), manifest.format)?;
        for (label, value) in &manifest.labels {
            writeln!(out, "  label {label}: {value}")?;
        }
        for section in &member.state.sections {
            let len = section.payload.len();
            writeln!(
                out,
                "  section {} {}: {len} bytes",
                section.name, section.version
            )?;
        }
        writeln!(
            out,
            "  pages: {} of {} stored, {} zero over the parent",
            member.index.count(ExtentKind::Data),
            member.index.pages(),
            member.index.count(ExtentKind::Zero),
        )?;
    }
    writeln!(out, "memory is mapped in {} pieces", chain.pieces().len())?;
    let verified = verify(&chain)?;
    writeln!(
        out,
        "{} snapshots and {} pages are sound",
        verified.snapshots, verified.pages
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;

    use sm_snapshot::capture::{Ancestry, Capture, Description};
    use sm_snapshot::cpu::CpuFeatures;
    use sm_snapshot::manifest::Layer;
    use sm_snapshot::state_file::Section;
    use sm_snapshot::store::SnapshotStore;
    use sm_vmm_core::memory::{MIN_MEMORY, MachineMemory, MemoryConfig};
    use vm_memory::{Bytes as _, GuestAddress};

    use super::{list, show};

    /// A snapshot of memory in which two pages were written.
    fn store(root: &Path) {
        let store = SnapshotStore::open(root).unwrap();
        let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
        for page in [0, 3] {
            memory
                .guest
                .write_slice(b"used", GuestAddress(page * 4096))
                .unwrap();
        }
        let description = Description {
            layer: Layer::App,
            sm_version: "0.1.0".into(),
            machine_version: 2,
            vcpus: 1,
            kernel: "a kernel".into(),
            agent: "an agent".into(),
            cpu: CpuFeatures::default(),
            protocol: 1,
            devices: Vec::new(),
            labels: BTreeMap::from([("image".into(), "busybox".into())]),
        };
        let section = Section {
            name: "vm".into(),
            version: 1,
            payload: vec![1, 2, 3],
        };
        let capture = Capture::begin(&store, &memory, Ancestry::Booted).unwrap();
        capture
            .finish(&store, "warm", description, vec![section])
            .unwrap();
    }

    fn text(print: impl FnOnce(&mut Vec<u8>) -> super::Result<()>) -> super::Result<String> {
        let mut out = Vec::new();
        print(&mut out)?;
        Ok(String::from_utf8(out)?)
    }

    #[test]
    fn a_snapshot_is_listed_shown_and_verified() {
        let root = tempfile::tempdir().unwrap();
        store(root.path());
        let listed = text(|out| list(root.path(), out)).unwrap();
        assert!(listed.starts_with("warm: App, "), "{listed}");
        let shown = text(|out| show(root.path(), "warm", out)).unwrap();
        assert!(shown.contains("label image: busybox"), "{shown}");
        assert!(shown.contains("section vm 1: 3 bytes"), "{shown}");
        assert!(
            shown.ends_with("1 snapshots and 2 pages are sound\n"),
            "{shown}"
        );
    }

    #[test]
    fn a_changed_byte_is_found() {
        let root = tempfile::tempdir().unwrap();
        store(root.path());
        let memory = root.path().join("warm/memory.bin");
        let memory = File::options().write(true).open(memory).unwrap();
        memory.write_all_at(b"X", 1).unwrap();
        let error = text(|out| show(root.path(), "warm", out)).unwrap_err();
        assert!(error.to_string().contains("memory.bin"), "{error}");
    }
}
