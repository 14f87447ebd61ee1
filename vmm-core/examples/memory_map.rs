//! The memory map that a guest of some size receives, and the windows of its devices:
//! `memory_map [MIB]`. Needs neither KVM nor a kernel.

use std::error::Error;

use sm_vmm_core::layout::{VIRTIO_SLOTS, VIRTIO_WINDOW_SIZE, virtio_gsi, virtio_window};
use sm_vmm_core::loader::memory_map;

fn main() -> Result<(), Box<dyn Error>> {
    let mib: u64 = std::env::args()
        .nth(1)
        .map_or(Ok(4096), |mib| mib.parse())?;
    println!("{}", describe(mib << 20));
    Ok(())
}

fn describe(bytes: u64) -> String {
    let mut lines: Vec<String> = memory_map(bytes)
        .iter()
        .map(|entry| {
            let end = entry.start + entry.len;
            format!("{:#013x}..{end:#013x} {:?}", entry.start, entry.kind)
        })
        .collect();
    for slot in 0..VIRTIO_SLOTS {
        let start = virtio_window(slot);
        let end = start + VIRTIO_WINDOW_SIZE;
        lines.push(format!(
            "{start:#013x}..{end:#013x} virtio slot {slot}, GSI {}",
            virtio_gsi(slot)
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_beyond_the_hole_is_a_range_of_its_own() {
        let small = super::describe(64 << 20);
        let large = super::describe(4 << 30);
        assert!(
            small.lines().count() < large.lines().count(),
            "{small}\n{large}"
        );
        assert!(
            large.contains("0x00100000000..0x00140000000 Ram"),
            "{large}"
        );
        assert!(large.contains("virtio slot 0, GSI 10"), "{large}");
    }
}
