//! The lab's machine: QEMU emulates a processor with SVM, so that a distribution's kernel
//! in it has a real `/dev/kvm`.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A machine to start.
pub(crate) struct QemuMachine {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// File for the kernel's messages.
    pub(crate) console: PathBuf,
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u32,
}

/// A directory of the host that is shared with the machine.
pub(crate) struct Share<'a> {
    pub(crate) tag: &'a str,
    pub(crate) path: &'a Path,
    pub(crate) read_only: bool,
}

impl QemuMachine {
    /// Returns the QEMU command. The standard streams of the process are the machine's
    /// three ports (1: input, 2: output, 3: errors) and have to be sockets.
    pub(crate) fn command(&self, shares: &[Share<'_>]) -> Command {
        // setpriv makes the machine end with xtask, even if xtask is killed.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-rtc", "base=utc"])
            .args(["-M", "q35", "-accel", "tcg,thread=multi"])
            // Five-level page tables are not needed. Without fast string instructions,
            // which are slow because they are emulated byte by byte, Linux clears and
            // copies memory three times as fast.
            .args(["-cpu", "max,+svm,+npt,la57=off,-erms,-fsrm"])
            .args(["-smp", &self.cpus.to_string()])
            .args(["-m", &self.memory_mib.to_string()])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 mitigations=off cgroup_no_v1=all",
            ])
            .arg("-serial")
            .arg(format!("file:{}", escaped(&self.console)))
            .args(["-device", "virtio-rng-pci"])
            .args(["-device", "virtio-serial-pci,id=ports"]);
        for (descriptor, name) in ["in", "out", "err"].into_iter().enumerate() {
            qemu.arg("-chardev")
                .arg(format!("socket,id={name},fd={descriptor}"))
                .arg("-device")
                .arg(format!(
                    "virtserialport,bus=ports.0,nr={},chardev={name},name={name}",
                    descriptor + 1
                ));
        }
        for share in shares {
            let mode = if share.read_only { ",readonly=on" } else { "" };
            qemu.arg("-fsdev")
                .arg(format!(
                    "local,id={tag},path={path},security_model=none,multidevs=remap{mode}",
                    tag = share.tag,
                    path = escaped(share.path),
                ))
                .arg("-device")
                .arg(format!(
                    "virtio-9p-pci,fsdev={tag},mount_tag={tag}",
                    tag = share.tag
                ));
        }
        qemu
    }
}

/// Escapes a path for a QEMU option, in which a comma is doubled.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}
