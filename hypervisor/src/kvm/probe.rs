//! The Linux capability probe.
//!
//! Some hosts have a `/dev/kvm` without hardware virtualisation behind it: guest user code
//! runs natively, guest kernel code is emulated incompletely. A tiny guest therefore
//! executes instructions that a kernel executes early and that an emulator is likely to
//! lack, and records its progress. A guest that hangs is kicked.

#![expect(unsafe_code, reason = "assembles a guest, and maps memory for it")]

use std::arch::global_asm;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::state::x86_64::{BootRegisters, Segment, Table};
use crate::{
    Bus, Error, Exit, FaultInfo, Hypervisor, Kicker, LinuxSupport, MemoryRegion, Vcpu as _,
    VcpuSeed as _, VirtualMachine as _, VmParameters, X86_64,
};

/// Timeout of the guest. Natively it needs microseconds; under an emulated hypervisor on a
/// busy host much more.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Guest memory: 64 KiB at guest physical address 0.
const MEMORY_LEN: usize = 0x1_0000;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PD: usize = 0x3000;
const GDT: usize = 0x4000;
/// Progress of the guest: an index into [`STAGES`] as a 32-bit number.
const STAGE: usize = 0x5000;
/// Set by the host if the guest's processor has XSAVE.
const WITH_XSAVE: usize = 0x5004;
const CODE: usize = 0x8000;
/// The port that the guest writes to at its end.
const DONE_PORT: u16 = 0x80;

/// The next action of the guest, by its progress.
const STAGES: [&str; 8] = [
    "start in 64-bit mode",
    "execute popcnt in the kernel",
    "execute cmpxchg16b in the kernel",
    "execute xrstor in the kernel",
    "go to user mode",
    "enter the kernel by the syscall instruction",
    "enter the kernel at ring 0 by the syscall instruction",
    "report",
];

global_asm!(
    ".pushsection .rodata.sm_probe, \"a\"",
    ".global sm_hypervisor_probe_start",
    ".hidden sm_hypervisor_probe_start",
    ".global sm_hypervisor_probe_end",
    ".hidden sm_hypervisor_probe_end",
    "sm_hypervisor_probe_start:",
    "mov dword ptr [0x5000], 1",
    "mov ebx, 5",
    "popcnt rax, rbx",
    "mov dword ptr [0x5000], 2",
    "xor eax, eax",
    "xor edx, edx",
    "lock cmpxchg16b xmmword ptr [0x5010]",
    "mov dword ptr [0x5000], 3",
    "cmp dword ptr [0x5004], 0",
    "je 2f",
    "xor ecx, ecx",
    "xor edx, edx",
    "mov eax, 3",
    "xsetbv",
    "xrstor [0x6000]",
    "2:",
    "mov dword ptr [0x5000], 4",
    // STAR: kernel code 0x08; user segments from 0x18 on. LSTAR, FMASK.
    "mov ecx, 0xc0000081",
    "xor eax, eax",
    "mov edx, 0x00180008",
    "wrmsr",
    "mov ecx, 0xc0000082",
    "lea rax, [rip + 3f]",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0xc0000084",
    "mov eax, 0x700",
    "wrmsr",
    "push 0x23",
    "push 0x7800",
    "push 2",
    "push 0x2b",
    "lea rax, [rip + 4f]",
    "push rax",
    "iretq",
    "4:",
    "mov dword ptr [0x5000], 5",
    "syscall",
    // Returned without entering the kernel: stay in user mode until kicked.
    "5: jmp 5b",
    "3:",
    "mov dword ptr [0x5000], 6",
    "mov eax, cs",
    "test al, 3",
    "jnz 5b",
    "mov dword ptr [0x5000], 7",
    "out 0x80, al",
    "6: hlt",
    "jmp 6b",
    "sm_hypervisor_probe_end:",
    ".popsection",
);

unsafe extern "C" {
    static sm_hypervisor_probe_start: u8;
    static sm_hypervisor_probe_end: u8;
}

fn guest_code() -> &'static [u8] {
    let start = &raw const sm_hypervisor_probe_start;
    let end = &raw const sm_hypervisor_probe_end;
    // SAFETY: both labels are in one section, the second behind the first, and
    // nothing changes read-only data.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}

/// Runs the probe on an open hypervisor.
pub(super) fn linux_support<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) -> LinuxSupport {
    let (outcome, stage) = match try_guest(hypervisor) {
        Ok(seen) => seen,
        Err(error) => {
            let source = std::error::Error::source(&error)
                .map_or_else(String::new, |source| format!(": {source}"));
            return unusable(format!(
                "a test guest could not be created: {error}{source}"
            ));
        }
    };
    let why = match outcome {
        Outcome::Done => return LinuxSupport::Native,
        Outcome::TimedOut => format!("it had not done so after {} s", TIMEOUT.as_secs()),
        Outcome::Exit(Exit::Fault(FaultInfo { reason, .. })) => reason,
        Outcome::Exit(Exit::TripleFault) => "it ended in a triple fault".to_owned(),
        Outcome::Exit(exit) => format!("it ended with {exit:?}"),
    };
    let what = usize::try_from(stage)
        .ok()
        .and_then(|stage| STAGES.get(stage))
        .unwrap_or(&"run");
    unusable(format!(
        "a test guest could not {what} ({why}): this host offers KVM without the hardware \
         virtualisation that Linux guests need"
    ))
}

fn unusable(finding: String) -> LinuxSupport {
    LinuxSupport::Unusable {
        reason: format!("this host's /dev/kvm cannot run Linux guests: {finding}"),
        remedy: "Use a host with hardware virtualisation (vmx or svm in /proc/cpuinfo)".to_owned(),
    }
}

enum Outcome {
    Done,
    TimedOut,
    Exit(Exit),
}

fn try_guest<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) -> Result<(Outcome, u32), Error> {
    let memory = Memory::new()?;
    memory.fill(offers_xsave());
    let vm = hypervisor.create_vm(&VmParameters { vcpus: 1 })?;
    let region = MemoryRegion {
        guest_address: 0,
        host_address: memory.0,
        len: MEMORY_LEN as u64,
    };
    // SAFETY: `memory` was declared before the VM and its vCPU, so it is dropped
    // after both, and it is only accessed through its pointer.
    unsafe { vm.map_memory(region) }?;
    let seed = vm.create_vcpu(0)?;
    let watch = Watch {
        kicker: seed.kicker(),
        done: AtomicBool::new(false),
        late: AtomicBool::new(false),
    };
    let mut vcpu = seed.bind(Some(&boot_registers()))?;
    let exit = std::thread::scope(|scope| {
        let (running, ended) = channel::<()>();
        scope.spawn(|| watch.wait(ended));
        let exit = vcpu.run(&watch);
        // Ends the watch.
        drop(running);
        exit
    })?;
    let outcome = match exit {
        Exit::Cancelled if watch.done.load(Ordering::SeqCst) => Outcome::Done,
        Exit::Cancelled if watch.late.load(Ordering::SeqCst) => Outcome::TimedOut,
        exit => Outcome::Exit(exit),
    };
    Ok((outcome, memory.stage()))
}

/// Kicks the vCPU when the guest has finished or its time is over.
struct Watch {
    kicker: Arc<dyn Kicker>,
    done: AtomicBool,
    late: AtomicBool,
}

impl Watch {
    fn wait(&self, ended: std::sync::mpsc::Receiver<()>) {
        if ended.recv_timeout(TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            self.late.store(true, Ordering::SeqCst);
            self.kicker.kick();
        }
    }
}

impl Bus for Watch {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, port: u16, _: &[u8]) {
        if port == DONE_PORT {
            self.done.store(true, Ordering::SeqCst);
            self.kicker.kick();
        }
    }
}

/// Anonymous memory for the guest.
struct Memory(NonNull<u8>);

impl Memory {
    fn new() -> Result<Self, Error> {
        // SAFETY: a new mapping, placed by the kernel.
        let pointer = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                MEMORY_LEN,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(|errno| Error::Os {
            operation: "allocate memory for a test guest",
            source: errno.into(),
        })?;
        // The kernel does not place mappings at zero.
        NonNull::new(pointer.cast())
            .map(Self)
            .ok_or(Error::Unsupported {
                what: "memory at address zero".to_owned(),
            })
    }

    /// Writes page tables, descriptors and code.
    fn fill(&self, xsave: bool) {
        // Present, writable, for user mode too; the last is a 2 MiB page.
        self.write(PML4, &(PDPT as u64 | 7).to_le_bytes());
        self.write(PDPT, &(PD as u64 | 7).to_le_bytes());
        self.write(PD, &0x87_u64.to_le_bytes());
        let descriptors: [u64; 6] = [
            0,
            0x00af_9b00_0000_ffff, // 0x08: kernel code, 64 bit
            0x00cf_9300_0000_ffff, // 0x10: kernel data
            0x00cf_fb00_0000_ffff, // 0x18: user code, 32 bit
            0x00cf_f300_0000_ffff, // 0x20: user data
            0x00af_fb00_0000_ffff, // 0x28: user code, 64 bit
        ];
        for (index, descriptor) in descriptors.iter().enumerate() {
            self.write(GDT + index * 8, &descriptor.to_le_bytes());
        }
        self.write(WITH_XSAVE, &u32::from(xsave).to_le_bytes());
        self.write(CODE, guest_code());
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        // True for all callers: offsets are constants, and a test checks that the code
        // fits. Asserted so that the unsafe block is sound by itself.
        assert!(offset + bytes.len() <= MEMORY_LEN);
        // SAFETY: within the mapping, checked above, and no guest runs yet.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.as_ptr().add(offset), bytes.len());
        }
    }

    fn stage(&self) -> u32 {
        // SAFETY: within the mapping and aligned; volatile, because the guest wrote it.
        unsafe { self.0.as_ptr().add(STAGE).cast::<u32>().read_volatile() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's own, and the VM is gone. Unmapping
        // a whole mapping does not fail.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), MEMORY_LEN) };
    }
}

/// Returns true if the host's processor has XSAVE; a guest's then has it as well.
fn offers_xsave() -> bool {
    std::arch::is_x86_feature_detected!("xsave")
}

/// 64-bit mode in ring 0, with SSE and XSAVE switched on and `syscall` enabled.
fn boot_registers() -> BootRegisters {
    let code = Segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x08,
        attributes: 0xa09b,
        unusable: false,
    };
    let data = Segment {
        selector: 0x10,
        attributes: 0xc093,
        ..code
    };
    let task = Segment {
        limit: 0x67,
        selector: 0,
        attributes: 0x008b,
        ..code
    };
    let xsave = if offers_xsave() { 1 << 18 } else { 0 };
    BootRegisters {
        rip: CODE as u64,
        rsp: CODE as u64,
        rflags: 2,
        cs: code,
        ds: data,
        tr: task,
        gdt: Table {
            base: GDT as u64,
            limit: 6 * 8 - 1,
        },
        cr0: 0x8000_0033,
        cr3: PML4 as u64,
        // PAE, OSFXSR, OSXMMEXCPT.
        cr4: 1 << 5 | 1 << 9 | 1 << 10 | xsave,
        // SCE, LME, LMA.
        efer: 1 | 1 << 8 | 1 << 10,
        ..BootRegisters::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_fits_its_memory() {
        assert!(guest_code().len() < MEMORY_LEN - CODE);
        assert!(!guest_code().is_empty());
    }

    /// The verdict must match the host's processor flags: visible hardware virtualisation
    /// means that guests run.
    #[test]
    fn the_verdict_agrees_with_the_processor() {
        let Some(kvm) = crate::testing::native() else {
            return;
        };
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let hardware = flags
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm");
        match kvm.capabilities().linux {
            LinuxSupport::Native => assert!(hardware),
            LinuxSupport::Unusable { reason, .. } => {
                eprintln!("{reason}");
                assert!(!hardware, "{reason}");
            }
        }
    }
}
