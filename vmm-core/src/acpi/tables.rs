//! RSDP, XSDT, FADT and MADT (ACPI 6.5 section 5.2).

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::{AcpiConfig, AcpiError, MAX_VCPUS, OEM_ID, OEM_REVISION, OEM_TABLE_ID, TABLES, dsdt};
use crate::layout::{VIRTIO_GSI_BASE, VIRTIO_SLOTS};
use crate::power::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};

const LOCAL_APIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;

/// FADT `IAPC_BOOT_ARCH`: VGA not present, CMOS RTC not present; the clear bits mean no
/// 8042 and no legacy devices (section 5.2.9.3).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// Alignment of tables, in bytes.
const ALIGNMENT: usize = 64;

/// Bytes reserved for the RSDP, which comes first.
const RSDP_RESERVED: usize = 64;

/// Consecutive tables, with their guest addresses.
struct Image {
    bytes: Vec<u8>,
}

impl Image {
    fn push(&mut self, table: &dyn Aml) -> u64 {
        let start = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(start, 0);
        table.to_aml_bytes(&mut self.bytes as &mut dyn AmlSink);
        TABLES.start + u64::try_from(start).unwrap_or(0)
    }
}

/// Builds all tables in their layout from the start of [`TABLES`].
pub(super) fn build(config: &AcpiConfig) -> Result<Vec<u8>, AcpiError> {
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return Err(AcpiError::Vcpus {
            vcpus: config.vcpus,
        });
    }
    if let Some(&slot) = config.slots.iter().find(|&&slot| slot >= VIRTIO_SLOTS) {
        return Err(AcpiError::Slot { slot });
    }

    let mut image = Image {
        bytes: vec![0; RSDP_RESERVED],
    };
    let dsdt = image.push(&dsdt::build(config));
    let fadt = image.push(&fadt(dsdt).finalize());
    let madt = image.push(&madt(config.vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = image.push(&xsdt);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    image.bytes.splice(..rsdp.len(), rsdp);
    Ok(image.bytes)
}

fn port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}

/// Builds the fixed description table of a hardware-reduced platform: no SCI, no PM timer,
/// power control by three ports.
fn fadt(dsdt: u64) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::Wbinvd)
        // No fixed buttons: set, those bits mean that the buttons are devices or absent.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt
}

/// Builds the table of local APICs and the IOAPIC. There is no 8259 (`PCAT_COMPAT` clear).
fn madt(vcpus: u32) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LOCAL_APIC),
    );
    for id in 0..vcpus {
        // `build` limits the number.
        let id = u8::try_from(id).unwrap_or(u8::MAX);
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    madt
}

// The IOAPIC has 24 inputs.
const _: () = assert!(VIRTIO_GSI_BASE + VIRTIO_SLOTS <= 24);

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn config(vcpus: u32) -> AcpiConfig {
        AcpiConfig {
            vcpus,
            slots: vec![0, 1, 2, 3, 13],
        }
    }

    fn u32_at(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn offset_at(bytes: &[u8], at: usize) -> usize {
        let address = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        usize::try_from(address - TABLES.start).unwrap()
    }

    /// Returns the table at `offset`, with its checksum verified.
    fn table(image: &[u8], offset: usize) -> &[u8] {
        let len = u32_at(image, offset + 4);
        let table = &image[offset..offset + len];
        assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        table
    }

    fn all(image: &[u8]) -> Vec<&[u8]> {
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!(sum(&image[..20]), 0);
        assert_eq!(sum(&image[..36]), 0);
        let xsdt = table(image, offset_at(image, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(image, offset_at(xsdt, 36));
        let madt = table(image, offset_at(xsdt, 44));
        let dsdt = table(image, offset_at(fadt, 140));
        vec![xsdt, fadt, madt, dsdt]
    }

    #[test]
    fn tables_are_linked_and_checksummed() {
        for vcpus in [1, 4, MAX_VCPUS] {
            let image = build(&config(vcpus)).unwrap();
            let tables = all(&image);
            let names: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
            assert_eq!(names, [b"XSDT", b"FACP", b"APIC", b"DSDT"]);
            let entries = tables[2][44..].chunks(8).take(vcpus as usize);
            assert!(entries.enumerate().all(|(id, e)| e[3] as usize == id));
        }
    }

    #[test]
    fn the_largest_configuration_fits() {
        let image = build(&AcpiConfig {
            vcpus: MAX_VCPUS,
            slots: (0..VIRTIO_SLOTS).collect(),
        })
        .unwrap();
        assert!(TABLES.start + image.len() as u64 <= super::super::GENERATION_ID);
    }

    #[test]
    fn configurations_beyond_the_limits_are_refused() {
        for vcpus in [0, MAX_VCPUS + 1] {
            assert!(matches!(
                build(&config(vcpus)),
                Err(AcpiError::Vcpus { .. })
            ));
        }
        let slots = vec![VIRTIO_SLOTS];
        assert!(matches!(
            build(&AcpiConfig { vcpus: 1, slots }),
            Err(AcpiError::Slot { .. })
        ));
    }

    /// Intel's own disassembler decodes every table and finds no errors.
    #[test]
    fn iasl_accepts_every_table() {
        if !sm_test_needs::programs(&["iasl"]) {
            return;
        }
        let image = build(&config(4)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for table in all(&image) {
            let name = String::from_utf8_lossy(&table[..4]).into_owned();
            let path = dir.path().join(format!("{name}.aml"));
            std::fs::write(&path, table).unwrap();
            let output = Command::new("iasl").arg("-d").arg(&path).output();
            let output = output.expect("iasl can be run (install acpica-tools)");
            assert!(output.status.success(), "{name}: {output:?}");
            let source = std::fs::read_to_string(path.with_extension("dsl")).unwrap();
            for bad in [
                "Invalid",
                "Incorrect checksum",
                "Unknown",
                "ERROR",
                "Unresolved",
            ] {
                assert!(!source.contains(bad), "{name}: {bad}: {source}");
            }
            if name == "DSDT" {
                let output = Command::new("iasl")
                    .args(["-ve", "-p"])
                    .arg(dir.path().join("again"))
                    .arg(path.with_extension("dsl"))
                    .output()
                    .unwrap();
                assert!(output.status.success(), "{output:?}\n{source}");
            }
        }
    }
}
