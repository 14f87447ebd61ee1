//! Snapshots of real machines with a guest of a few bytes. Without KVM, only snapshots in
//! the source tree are read.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use sm_event_loop::EventLoop;
use sm_hypervisor::{Hypervisor as _, Native};
use sm_snapshot::extents::ExtentKind;
use sm_snapshot::manifest::{Manifest, OLDEST_FORMAT, StateEntry};
use sm_snapshot::state_file::StateFile;
use sm_snapshot::store::read_manifest;
use sm_snapshot::verify::verify;
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::layout::SLOT_RNG;
use sm_vmm_core::machine::{Machine, MachineConfig};
use sm_vmm_core::memory::{MIN_MEMORY, MemoryConfig};
use sm_vmm_core::virtio::disk::Disk;
use sm_vmm_core::virtio::rng::Rng;

use super::*;
use crate::capturing::{CaptureCallbacks, Capturing, FrozenDisk, Origin, PublishedCapture};
use crate::disks::{DiskDirectory, Templates};

const ENTRY: u32 = 0x10_0000;

/// Returns an ELF file with a PVH note (Linux `Documentation/arch/x86/boot.rst`), whose
/// code is `cli; hlt; jmp back`.
fn kernel() -> File {
    let mut elf = vec![0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    let load = [0x1000, 0, u64::from(ENTRY), 4, 4, 0x1000];
    for (at, kind, values) in [(64, 1u32, load), (120, 4, [0x300, 0, 0, 20, 20, 4])] {
        put(at, &kind.to_le_bytes());
        for (index, value) in values.into_iter().enumerate() {
            put(at + 8 + index * 8, &u64::to_le_bytes(value));
        }
    }
    put(0x300, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(0x30c, b"Xen\0");
    put(0x310, &ENTRY.to_le_bytes());
    elf.extend_from_slice(&[0xfa, 0xf4, 0xeb, 0xfc]);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&elf).unwrap();
    file
}

struct Fixture {
    dir: tempfile::TempDir,
    store: SnapshotStore,
    machine: Machine<Native>,
    cpu: CpuFeatures,
    _event_loop: EventLoop,
}

/// Returns `None`, with a message, if there is no KVM.
fn fixture() -> Option<Fixture> {
    let kvm = Native::open()
        .map_err(|error| eprintln!("skipped: {error}"))
        .ok()?;
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(&dir.path().join("snapshots")).unwrap();
    let event_loop = EventLoop::spawn("devices").unwrap();
    let mut machine = Machine::boot(
        &kvm,
        MachineConfig {
            memory: MemoryConfig::new(MIN_MEMORY),
            vcpus: 2,
            kernel: kernel(),
            initramfs: Vec::new(),
            cmdline: "golden".to_owned(),
            generation_id: [7; 16],
            console: tempfile::tempfile().unwrap(),
            devices: vec![DeviceConfig::new(
                SLOT_RNG,
                Arc::new(Mutex::new(Rng::new())),
            )],
        },
        &event_loop.handle(),
    )
    .unwrap();
    machine.resume().unwrap();
    let cpu = CpuFeatures::of(&kvm.guest_features().unwrap().cpuid);
    Some(Fixture {
        dir,
        store,
        machine,
        cpu,
        _event_loop: event_loop,
    })
}

fn identity() -> Identity {
    Identity {
        kernel: "1".repeat(64),
        agent: "2".repeat(64),
    }
}

fn plan(store: &SnapshotStore, name: &str) -> Plan {
    Plan {
        store: store.clone(),
        name: name.to_owned(),
        layer: Layer::Base,
        identity: identity(),
        labels: BTreeMap::from([("made".to_owned(), "by a test".to_owned())]),
        content: Content {
            kernel: "/a/kernel".into(),
            ..Content::default()
        },
    }
}

/// The results that a capture reports.
struct Heard {
    copied: Receiver<Result<(), String>>,
    published: Receiver<Result<PublishedCapture, String>>,
}

fn callbacks() -> (CaptureCallbacks, Heard) {
    let ((copied, is_copied), (made, is_made)) = (channel(), channel());
    let callbacks = CaptureCallbacks {
        copied: Box::new(move |result| copied.send(result).unwrap()),
        published: Box::new(move |result| made.send(result).unwrap()),
    };
    let heard = Heard {
        copied: is_copied,
        published: is_made,
    };
    (callbacks, heard)
}

fn no_disks() -> Result<Vec<FrozenDisk>, String> {
    Ok(Vec::new())
}

fn capture(f: &mut Fixture, name: &str, origin: Origin) -> Result<PublishedCapture, String> {
    capture_with(f, name, origin, no_disks)
}

fn capture_with(
    f: &mut Fixture,
    name: &str,
    origin: Origin,
    disks: impl FnOnce() -> Result<Vec<FrozenDisk>, String>,
) -> Result<PublishedCapture, String> {
    let (callbacks, heard) = callbacks();
    let plan = plan(&f.store, name);
    let (capturing, thread) = Capturing::begin(plan, &mut f.machine, origin, disks, callbacks)?;
    assert!(!f.machine.is_running());
    let copied = heard.copied.recv().unwrap();
    f.machine.resume().unwrap();
    copied?;
    capturing.end();
    let made = heard.published.recv().unwrap();
    thread.join().unwrap();
    made
}

/// Changes the manifest and encodes it with a valid digest.
fn rewrite(dir: &Path, change: impl FnOnce(&mut Manifest)) {
    let mut manifest = read_manifest(dir).unwrap();
    change(&mut manifest);
    fs::write(dir.join("manifest.json"), manifest.encode().unwrap()).unwrap();
}

#[test]
fn incompatible_snapshots_are_refused_by_name() {
    let Some(mut f) = fixture() else { return };
    capture(&mut f, "base", Origin::default()).unwrap();
    let open = |cpu: &CpuFeatures, identity: Option<&Identity>| {
        Saved::open(&f.store, "base", cpu, identity)
    };
    let opened = open(&f.cpu, Some(&identity())).unwrap();
    assert_eq!(opened.content.kernel, Path::new("/a/kernel"));
    assert_eq!(opened.state.vcpus.len(), 2);
    assert_eq!(opened.chain.tip().lease.manifest().kernel, "1".repeat(64));
    drop(opened);

    let refused = |cpu: &CpuFeatures, identity: Option<&Identity>, why: &str| {
        let error = open(cpu, identity).err().expect("it is refused");
        assert!(matches!(error, Error::Incompatible { .. }), "{error:?}");
        let error = error.to_string();
        assert!(error.contains("\"base\"") && error.contains(why), "{error}");
    };
    let other = |kernel: &str, agent: &str| Identity {
        kernel: kernel.repeat(64),
        agent: agent.repeat(64),
    };
    refused(&f.cpu, Some(&other("3", "2")), "another guest kernel");
    refused(&f.cpu, Some(&other("1", "3")), "another guest agent");
    open(&f.cpu, None).unwrap();

    // Every x86-64 CPU has SSE2.
    let mut poorer = f.cpu.clone();
    *poorer.words.get_mut("00000001.0.edx").unwrap() &= !(1 << 26);
    refused(&poorer, None, "CPUID 00000001.0.edx bit 26");
    let mut richer = f.cpu.clone();
    *richer.words.get_mut("00000007.0.ebx").unwrap() |= 1 << 16;
    open(&richer, None).unwrap();

    let dir = f.dir.path().join("snapshots/base");
    let whole = read_manifest(&dir).unwrap();
    rewrite(&dir, |manifest| manifest.machine_version += 1);
    let version = format!("of machine version {}", MACHINE_VERSION + 1);
    refused(&f.cpu, None, &version);
    rewrite(&dir, |manifest| {
        *manifest = whole.clone();
        manifest.protocol += 1;
    });
    refused(&f.cpu, None, "speaks protocol");
    rewrite(&dir, |manifest| {
        *manifest = whole.clone();
        manifest.page_bytes = Some(1 << 14);
    });
    refused(&f.cpu, None, "pages of 16384 bytes");
    refused(&f.cpu, None, "has pages of 4096");
    rewrite(&dir, |manifest| {
        *manifest = whole.clone();
        manifest.cpu.arch = "aarch64".to_owned();
    });
    refused(&f.cpu, None, "created on aarch64, and this host is x86_64");
    rewrite(&dir, |manifest| {
        *manifest = whole.clone();
        manifest.format += 1;
    });
    let error = open(&f.cpu, None).err().unwrap();
    assert!(matches!(error, Error::Newer { .. }), "{error}");
}

/// Sections that are missing, or that this program does not know, are named.
#[test]
fn sections_of_another_machine_are_refused_by_name() {
    let Some(mut f) = fixture() else { return };
    let made = capture(&mut f, "base", Origin::default()).unwrap();
    let slots = |manifest: &Manifest| -> Vec<_> {
        let devices = manifest.devices.iter();
        devices.map(|d| (d.slot, d.kind.clone())).collect()
    };
    let devices = slots(&made.captured.manifest);
    assert_eq!(devices, [(SLOT_RNG, "rng".to_owned())]);
    let dir = f.dir.path().join("snapshots/base");
    let path = dir.join("state.bin");
    let whole = fs::read(&path).unwrap();
    let whole = StateFile::decode(&path, &whole, &read_manifest(&dir).unwrap().state.digest);
    let whole = whole.unwrap();
    let refusal = |change: &dyn Fn(&mut Vec<Section>)| {
        let mut state = whole.clone();
        change(&mut state.sections);
        let (bytes, digest) = state.encode();
        let len = bytes.len() as u64;
        fs::write(&path, bytes).unwrap();
        rewrite(&dir, |manifest| manifest.state = StateEntry { len, digest });
        Saved::open(&f.store, "base", &f.cpu, None).err().unwrap()
    };
    for section in &whole.sections {
        let name = &*section.name;
        if ["memory", "vm"].contains(&name) {
            continue;
        }
        let error = refusal(&|sections| sections.retain(|section| section.name != name));
        assert!(
            matches!(error, Error::Damaged { .. }) || name == "virtio-mmio/1",
            "{error}"
        );
        let named = match name {
            "rng/1" => "the device in slot 1",
            // Its device is left over.
            "virtio-mmio/1" => "\"rng/1\"",
            _ => name,
        };
        assert!(error.to_string().contains(named), "{error}");
    }
    let error = refusal(&|sections| {
        sections.push(Section {
            name: "net/4".to_owned(),
            version: 1,
            payload: Vec::new(),
        });
    });
    assert!(matches!(error, Error::Incompatible { .. }), "{error}");
    assert!(error.to_string().contains("net/4"), "{error}");
    let error = refusal(&|sections| {
        let uart = sections.iter_mut().find(|section| section.name == "uart/0");
        uart.unwrap().version = 9;
    });
    assert!(matches!(error, Error::Incompatible { .. }), "{error}");
    assert!(
        error.to_string().contains("\"uart/0\" has version 9"),
        "{error}"
    );
}

/// The snapshot has the CPUID that this host offers to guests, not that of the host.
#[test]
fn cpu_features_are_those_of_the_guest() {
    let Some(mut f) = fixture() else { return };
    let made = capture(&mut f, "base", Origin::default()).unwrap();
    let cpu = &made.captured.manifest.cpu;
    assert_eq!(cpu.check(&f.cpu), Ok(()));
    for (register, word) in &cpu.words {
        let offered = f.cpu.words.get(register).copied().unwrap_or(0);
        assert_eq!(word & !offered, 0, "{register}");
    }
    // VMX and SVM are never offered to guests.
    assert_eq!(cpu.words["00000001.0.ecx"] & 1 << 5, 0);
    let amd = cpu.words.get("80000001.0.ecx").copied();
    assert_eq!(amd.unwrap_or(0) & 1 << 2, 0);
}

#[test]
fn a_machine_whose_memory_cannot_be_stored_runs_on() {
    let Some(mut f) = fixture() else { return };
    // The directory of the store does not exist any more.
    let root = f.dir.path().join("snapshots");
    fs::rename(&root, f.dir.path().join("elsewhere")).unwrap();
    let error = capture(&mut f, "base", Origin::default()).unwrap_err();
    assert!(error.contains("No such file"), "{error}");
    assert!(f.machine.is_running());
    fs::rename(f.dir.path().join("elsewhere"), &root).unwrap();
    capture(&mut f, "base", Origin::default()).unwrap();
    assert!(f.machine.is_running());
}

/// A cancelled capture is not published, complete or not.
#[test]
fn disks_of_a_snapshot_are_verified() {
    let Some(mut f) = fixture() else {
        return;
    };
    let template = Templates::new(f.dir.path()).get(64 << 20).unwrap();
    let directory = DiskDirectory::at(f.dir.path().join("disk"));
    let disk = directory.create(&[template]).unwrap();
    disk.store(&[7; 5000], 0).unwrap();
    let disks = || {
        Ok(vec![FrozenDisk {
            slot: 3,
            layers: directory.layers().unwrap(),
            backing: Arc::new(Disk::layered(disk)),
        }])
    };
    capture_with(&mut f, "one", Origin::default(), disks).unwrap();
    let chain = Chain::open(&f.store, "one").unwrap();
    let verified = verify_disks(&chain).unwrap();
    assert_eq!(verified.layers, 2);
    assert!(verified.bytes > 2 * 4096, "{verified:?}");
    let top = chain.tip().lease.dir().join("disk-3.1");
    fs::remove_file(&top).unwrap();
    let error = with_causes(&verify_disks(&chain).unwrap_err());
    assert!(error.contains("disk-3.1"), "{error}");
    fs::write(&top, [1; 100]).unwrap();
    let error = with_causes(&verify_disks(&chain).unwrap_err());
    assert!(error.contains("disk-3.1"), "{error}");
}

#[test]
fn a_cancelled_capture_publishes_nothing() {
    let Some(mut f) = fixture() else { return };
    for after_copying in [false, true] {
        let (callbacks, heard) = callbacks();
        let plan = plan(&f.store, "base");
        let (capturing, thread) =
            Capturing::begin(plan, &mut f.machine, Origin::default(), no_disks, callbacks).unwrap();
        if after_copying {
            heard.copied.recv().unwrap().unwrap();
        }
        drop(capturing);
        thread.join().unwrap();
        if let Ok(Err(error)) = heard.copied.try_recv() {
            assert!(error.contains("cancelled"), "{error}");
        }
        assert!(heard.published.recv().is_err());
        f.machine.resume().unwrap();
        assert_eq!(f.store.list().unwrap().len(), 0);
    }
    capture(&mut f, "base", Origin::default()).unwrap();
}

/// Returns the directory of snapshots in a format, created by the first version that
/// writes it: a root and a diff over it. `memory.bin` has only the stored pages, one
/// after the other.
fn golden(format: u32) -> PathBuf {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    all.join(format!("format-{format}"))
}

/// The compatibility promise (`docs/src/formats/snapshot.md`, "Compatibility"). If this
/// fails because a structure was changed, its section (or the machine, or the format) needs
/// a new number, and the old one must be refused by name or read; the files stay unchanged.
#[test]
fn snapshots_of_all_formats_are_read() {
    for format in OLDEST_FORMAT..=FORMAT {
        snapshots_are_read(format);
    }
}

fn snapshots_are_read(format: u32) {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(dir.path()).unwrap();
    for name in ["root", "diff"] {
        let (from, to) = (golden(format).join(name), dir.path().join(name));
        fs::create_dir(&to).unwrap();
        for file in ["manifest.json", "state.bin"] {
            fs::copy(from.join(file), to.join(file)).unwrap();
        }
        let memory = File::create(to.join("memory.bin")).unwrap();
        memory.set_len(MIN_MEMORY).unwrap();
        let chain = Chain::open(&store, name).unwrap();
        let pages = fs::read(from.join("memory.pages")).unwrap();
        let mut pages = pages.chunks_exact(4096);
        for extent in &chain.tip().index.extents {
            for page in (extent.first..extent.end()).filter(|_| extent.content == ExtentKind::Data)
            {
                use std::os::unix::fs::FileExt as _;
                let bytes = pages.next().unwrap();
                memory.write_all_at(bytes, page * 4096).unwrap();
            }
        }
        assert!(pages.next().is_none());
        verify(&chain).unwrap();
        let manifest = chain.tip().lease.manifest();
        assert_eq!((manifest.format, manifest.vcpus), (format, 2));
        assert_eq!(manifest.host_page_bytes(), 4096);
        // The host on which it was created; format 1 has only some of its words.
        let cpus = machine::decode(&chain).unwrap().vcpus;
        let host = CpuFeatures::of(&cpus[0].cpuid);
        let saved = Saved::open(&store, name, &host, Some(&identity()));
        if manifest.machine_version != MACHINE_VERSION {
            let error = saved.err().unwrap().to_string();
            assert!(error.contains("machine version"), "{error}");
            continue;
        }
        let saved = saved.unwrap();
        assert_eq!(saved.content.kernel, Path::new("/a/kernel"));
        assert_eq!(saved.state.memory_bytes, MIN_MEMORY);
        let devices = saved.state.devices.iter();
        let devices: Vec<_> = devices
            .map(|d| {
                (
                    d.slot,
                    &*d.transport.device.kind,
                    d.transport.device.version,
                )
            })
            .collect();
        assert_eq!(devices, [(SLOT_RNG, "rng", 1)]);
        // Those of format 3 are encoded as they were; those of older ones are decoded to
        // the same structures, and have other sections now.
        let sections = saved.state.encode().unwrap();
        let written = sections.iter().all(|section| {
            let mut stored = chain.tip().state.sections.iter();
            stored.any(|s| {
                (&s.name, s.version, &s.payload)
                    == (&section.name, section.version, &section.payload)
            })
        });
        assert_eq!(written, format >= 3);
        let again = sections.iter();
        let again = again.map(|s| (&*s.name, s.version, &*s.payload));
        assert_eq!(MachineState::decode(again).unwrap(), saved.state);
        let vcpus: Vec<_> = saved.state.vcpus.iter().map(|vcpu| vcpu.index).collect();
        assert_eq!(vcpus, [0, 1]);
        let mut cpu = CpuFeatures::of(&saved.state.vcpus[0].cpuid);
        if format == 1 {
            // Format 1 has some of the words, and zeros for others.
            let words = manifest.cpu.words.iter();
            let known: BTreeMap<_, _> = words
                .map(|(key, _)| (key.clone(), cpu.words.get(key).copied().unwrap_or(0)))
                .collect();
            cpu.words = known;
        }
        assert_eq!(cpu, manifest.cpu);
        // A word that is in no manifest of format 1: paravirtual features of KVM.
        let mut older = host.clone();
        let features = older.words.get_mut("40000001.0.eax").unwrap();
        assert_ne!(*features & 1 << 11, 0);
        *features &= !(1 << 11);
        let error = Saved::open(&store, name, &older, None).err().unwrap();
        assert!(error.to_string().contains("kvm-pv-ipi"), "{error}");
        let parent = manifest.parent.as_ref().map(|parent| parent.name.as_str());
        assert_eq!(parent, (name == "diff").then_some("root"));
    }
}

/// Writes the files of [`golden`], once per format.
#[test]
#[ignore = "writes files of the source tree"]
fn write_golden() {
    let mut f = fixture().expect("this needs KVM");
    capture(&mut f, "root", Origin::default()).unwrap();
    let chain = Chain::open(&f.store, "root").unwrap();
    let state = machine::decode(&chain).unwrap();
    let memory = sm_snapshot::restore::map_memory(&chain).unwrap();
    let event_loop = EventLoop::spawn("devices").unwrap();
    let devices = vec![DeviceConfig::new(
        SLOT_RNG,
        Arc::new(Mutex::new(Rng::new())),
    )];
    let console = File::from(std::io::stderr().as_fd().try_clone_to_owned().unwrap());
    let kvm = Native::open().unwrap();
    f.machine =
        Machine::restore(&kvm, state, memory, devices, console, &event_loop.handle()).unwrap();
    f.machine.set_generation_id([8; 16]).unwrap();
    let origin = Origin {
        chain: Some(Arc::new(chain)),
        ..Origin::default()
    };
    capture(&mut f, "diff", origin).unwrap();
    for name in ["root", "diff"] {
        let chain = Chain::open(&f.store, name).unwrap();
        let (from, to) = (chain.tip().lease.dir(), golden(FORMAT).join(name));
        fs::create_dir_all(&to).unwrap();
        for file in ["manifest.json", "state.bin"] {
            fs::copy(from.join(file), to.join(file)).unwrap();
        }
        let memory = fs::read(from.join("memory.bin")).unwrap();
        let mut pages = Vec::new();
        for extent in &chain.tip().index.extents {
            if extent.content == ExtentKind::Data {
                let range = extent.first * 4096..extent.end() * 4096;
                let range =
                    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                pages.extend_from_slice(&memory[range]);
            }
        }
        fs::write(to.join("memory.pages"), pages).unwrap();
    }
}
