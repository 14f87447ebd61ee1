//! Tests of guest memory.

use std::io::Write;

use vm_memory::Bytes;

use super::*;

const MIB: u64 = 1 << 20;

fn file(contents: &[u8]) -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(contents).unwrap();
    Arc::new(file)
}

#[test]
fn regions_leave_the_hole_free() {
    assert_eq!(ram_regions(256 * MIB).len(), 1);
    assert_eq!(ram_regions(HOLE_START).len(), 1);
    let regions = ram_regions(6144 * MIB);
    assert_eq!(regions[0].len, HOLE_START);
    assert_eq!(
        regions[1],
        RamRegion {
            guest_address: HOLE_END,
            len: 3072 * MIB,
            offset: HOLE_START,
        }
    );
}

#[test]
fn invalid_sizes_are_refused() {
    for bytes in [0, 63 * MIB, 64 * MIB + 4096, MAX_MEMORY + MIB, u64::MAX] {
        assert!(matches!(
            MachineMemory::anonymous(&MemoryConfig::new(bytes)),
            Err(MemoryError::Size { .. })
        ));
    }
}

#[test]
fn memory_above_the_hole_is_usable_and_the_hole_is_not() {
    let memory = MachineMemory::anonymous(&MemoryConfig::new(6144 * MIB)).unwrap();
    let last = GuestAddress(HOLE_END + 3072 * MIB - 8);
    memory.guest.write_obj(7u64, last).unwrap();
    assert_eq!(memory.guest.read_obj::<u64>(last).unwrap(), 7);
    assert!(
        memory
            .guest
            .read_obj::<u8>(GuestAddress(HOLE_START))
            .is_err()
    );
    assert_eq!(memory.bytes(), 6144 * MIB);
}

#[test]
fn extents_are_mapped_at_their_offsets_and_stay_private() {
    let base = file(&[1; 3 * 4096]);
    let diff = file(&[2; 4096]);
    // The base spans the hole; the diff replaces its middle page.
    let offset = HOLE_START - 4096;
    let extents = [
        FileExtent {
            offset,
            len: 3 * 4096,
            file: base.clone(),
            file_offset: 0,
        },
        FileExtent {
            offset: offset + 4096,
            len: 4096,
            file: diff,
            file_offset: 0,
        },
    ];
    let config = MemoryConfig {
        huge_pages: true,
        ..MemoryConfig::new(4096 * MIB)
    };
    let memory = MachineMemory::from_files(&config, &extents).unwrap();
    let read = |address| memory.guest.read_obj::<u8>(GuestAddress(address)).unwrap();
    assert_eq!(read(HOLE_START - 4097), 0);
    assert_eq!(read(HOLE_START - 1), 1);
    assert_eq!(read(HOLE_END), 2);
    assert_eq!(read(HOLE_END + 4096), 1);
    assert_eq!(read(HOLE_END + 2 * 4096), 0);

    memory
        .guest
        .write_obj(9u8, GuestAddress(HOLE_END + 4096))
        .unwrap();
    memory.guest.write_obj(9u8, GuestAddress(0)).unwrap();
    memory.revert().unwrap();
    assert_eq!(read(HOLE_END + 4096), 1);
    assert_eq!(read(0), 0);
    memory
        .guest
        .write_obj(9u8, GuestAddress(HOLE_END + 4096))
        .unwrap();

    // Only the requested pages, on either side of the hole.
    memory.guest.write_obj(8u8, GuestAddress(HOLE_END)).unwrap();
    memory
        .guest
        .write_obj(8u8, GuestAddress(HOLE_START - 1))
        .unwrap();
    let page = HOLE_START / PAGE_SIZE;
    memory
        .revert_pages(&[(page - 1, 2), (u64::MAX, 7)])
        .unwrap();
    assert_eq!((read(HOLE_START - 1), read(HOLE_END)), (1, 2));
    assert_eq!(read(HOLE_END + 4096), 9, "not requested");

    let again = MachineMemory::from_files(&config, &extents).unwrap();
    let byte: u8 = again.guest.read_obj(GuestAddress(HOLE_END + 4096)).unwrap();
    assert_eq!(byte, 1);
}

#[test]
fn extents_that_do_not_fit_are_refused() {
    let file = file(&[1; 8192]);
    let extent = |offset, len, file_offset| FileExtent {
        offset,
        len,
        file: file.clone(),
        file_offset,
    };
    for bad in [
        extent(0, 0, 0),
        extent(1, 4096, 0),
        extent(0, 4095, 0),
        extent(0, 4096, 12),
        extent(0, 3 * 4096, 0),
        extent(0, 8192, 4096),
        extent(0, 4096, u64::MAX - 4095),
        extent(64 * MIB - 4096, 8192, 0),
        extent(u64::MAX - 4095, 4096, 0),
    ] {
        let result =
            MachineMemory::from_files(&MemoryConfig::new(64 * MIB), std::slice::from_ref(&bad));
        assert!(matches!(result, Err(MemoryError::Extent { .. })), "{bad:?}");
    }
}
