//! The DSDT: devices that a kernel cannot find by probing.

use acpi_tables::aml::{
    AmlStr, Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify,
    ONE, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{AcpiConfig, GENERATION_ID, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{COM1_GSI, COM1_PORT, GED_GSI, VIRTIO_WINDOW_SIZE, virtio_gsi, virtio_window};
use crate::power::SLEEP_TYPE_S5;

/// Generated AML.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn raw(aml: &dyn Aml) -> Raw {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    Raw(bytes)
}

/// Returns a device with `_HID`, `_UID` and further objects.
fn device(name: &str, hid: &dyn Aml, uid: u32, objects: &[&dyn Aml]) -> Raw {
    let hid = Name::new(Path::new("_HID"), hid);
    let uid = Name::new(Path::new("_UID"), &uid);
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid];
    children.extend(objects);
    raw(&Device::new(Path::new(name), children))
}

fn resources(resources: Vec<&dyn Aml>) -> Name {
    Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources))
}

/// Returns the resource of an IOAPIC input that one device pulses.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// Builds the differentiated system description table.
pub(super) fn build(config: &AcpiConfig) -> Sdt {
    let mut system_bus: Vec<Raw> = (0..config.vcpus).map(processor).collect();
    system_bus.push(console());
    system_bus.extend(config.slots.iter().map(|&slot| virtio(slot)));
    // Behind the object that its method refers to.
    system_bus.push(generation_id());
    system_bus.push(event_device());

    let children = system_bus.iter().map(|device| device as &dyn Aml).collect();
    let mut aml = raw(&Scope::new(Path::new("\\_SB_"), children)).0;
    soft_off().to_aml_bytes(&mut aml);

    // Revision 2: integers are 64 bits wide.
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// The only sleeping state: power off (section 7.4.2.6).
fn soft_off() -> Name {
    Name::new(
        Path::new("\\_S5_"),
        &Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]),
    )
}

/// Connects a processor's MADT entry to the namespace (section 8.4).
fn processor(index: u32) -> Raw {
    device(&format!("C{index:03X}"), &"ACPI0007", index, &[])
}

/// The 16550 at COM1.
fn console() -> Raw {
    let port = IO::new(COM1_PORT, COM1_PORT, 1, 8);
    let interrupt = edge(COM1_GSI);
    let resources = resources(vec![&port, &interrupt]);
    device("COM1", &EISAName::new("PNP0501"), 0, &[&resources])
}

/// The virtio-mmio transport of a slot.
fn virtio(slot: u32) -> Raw {
    // The window is below 4 GiB.
    let address = u32::try_from(virtio_window(slot)).unwrap_or(0);
    let size = u32::try_from(VIRTIO_WINDOW_SIZE).unwrap_or(0);
    let window = Memory32Fixed::new(true, address, size);
    let interrupt = edge(virtio_gsi(slot));
    let resources = resources(vec![&window, &interrupt]);
    let coherent = Name::new(Path::new("_CCA"), &ONE);
    device(
        &format!("V{slot:03X}"),
        &"LNRO0005",
        slot,
        &[&coherent, &resources],
    )
}

const GENERATION_DEVICE: &str = "\\_SB_.VGEN";

/// The VM generation ID ("Virtual Machine Generation ID", Microsoft).
fn generation_id() -> Raw {
    let compatible = Name::new(Path::new("_CID"), &"VM_Gen_Counter");
    let description: AmlStr = "VM_Gen_Counter";
    let description = Name::new(Path::new("_DDN"), &description);
    let low = u32::try_from(GENERATION_ID & 0xffff_ffff).unwrap_or(0);
    let high = u32::try_from(GENERATION_ID >> 32).unwrap_or(0);
    let address = Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high]));
    device(
        "VGEN",
        &"SMVM0001",
        0,
        &[&compatible, &description, &address],
    )
}

/// The generic event device (section 5.6.9): its interrupt notifies the guest of a new
/// generation ID.
fn event_device() -> Raw {
    let interrupt = edge(GED_GSI);
    let resources = resources(vec![&interrupt]);
    let generation = Path::new(GENERATION_DEVICE);
    let changed = Notify::new(&generation, &0x80u8);
    let which = Equal::new(&Arg(0), &GED_GSI);
    let body = If::new(&which, vec![&changed]);
    let event = Method::new(Path::new("_EVT"), 1, true, vec![&body]);
    device("GED0", &"ACPI0013", 0, &[&resources, &event])
}
