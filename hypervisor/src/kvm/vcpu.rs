//! A vCPU: bound to a thread, run, kicked.
//!
//! Kicks are sticky and never lost: a kick first sets a flag, then the
//! `immediate_exit` byte in the page shared with KVM, then signals the thread.
//! If the vCPU is in the guest, the signal ends KVM_RUN; if it is about to
//! enter, KVM sees the byte; if it is outside, it sees the flag. The vCPU clears
//! the byte *before* it looks at the flag.

#![expect(
    unsafe_code,
    reason = "another thread writes a byte that KVM reads, and signals a thread"
)]

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Kvm, convert, os, state};
use crate::state::{BootRegisters, VcpuState};
use crate::{Bus, Error, Exit, FaultInfo, Kicker, RestoredVcpu, Vcpu, VcpuSeed};

/// The real-time signal (counted from `SIGRTMIN`) that ends KVM_RUN.
const KICK_SIGNAL: i32 = 0;
/// Instruction bytes reported with a fault.
const INSTRUCTION_LEN: usize = 16;

/// Where a kick has to go while the vCPU is bound.
struct Target {
    thread: libc::pthread_t,
    /// `kvm_run.immediate_exit`.
    immediate_exit: *const AtomicU8,
}

// SAFETY: the pointer is only used under the mutex, while the mapping it points
// into is alive; what it points to is atomic.
unsafe impl Send for Target {}

/// What a vCPU and its kickers share.
struct Shared {
    kicked: AtomicBool,
    target: Mutex<Option<Target>>,
}

impl Shared {
    fn target(&self) -> MutexGuard<'_, Option<Target>> {
        // Nothing can panic with the lock held, and the value is always whole.
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmKicker")
            .field("kicked", &self.kicked)
            .finish_non_exhaustive()
    }
}

impl Kicker for Shared {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        let target = self.target();
        if let Some(target) = &*target {
            // SAFETY: a target is only registered while the vCPU's mapping lives;
            // it is unregistered, under this lock, before that ends.
            unsafe { &*target.immediate_exit }.store(1, Ordering::SeqCst);
            // SAFETY: for the same reason the thread is alive: the vCPU never
            // leaves it. The handler does nothing.
            unsafe {
                libc::pthread_kill(target.thread, libc::SIGRTMIN() + KICK_SIGNAL);
            }
        }
    }
}

extern "C" fn ignore(_: libc::c_int) {}

/// Installs the handler that makes the kick signal interrupt system calls and
/// do nothing else. Once for the process, like the disposition it sets.
fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: zero is a valid value of every field; no SA_RESTART, so that
        // KVM_RUN returns.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = ignore as *const () as usize;
        // SAFETY: the handler is async-signal-safe: it is empty.
        unsafe {
            libc::sigaction(
                libc::SIGRTMIN() + KICK_SIGNAL,
                &raw const action,
                std::ptr::null_mut(),
            );
        }
    });
}

/// A vCPU that no thread runs yet.
#[derive(Debug)]
pub struct KvmSeed {
    kvm: Kvm,
    fd: VcpuFd,
    index: u32,
    xsave_len: usize,
    cpuid: kvm_bindings::CpuId,
    shared: Arc<Shared>,
}

impl KvmSeed {
    pub(super) fn new(
        kvm: Kvm,
        fd: VcpuFd,
        index: u32,
        xsave_len: usize,
        cpuid: kvm_bindings::CpuId,
    ) -> Self {
        Self {
            kvm,
            fd,
            index,
            xsave_len,
            cpuid,
            shared: Arc::new(Shared {
                kicked: AtomicBool::new(false),
                target: Mutex::new(None),
            }),
        }
    }

    /// Registers the calling thread as the one to kick.
    fn into_vcpu(mut self) -> KvmVcpu {
        install_handler();
        let immediate_exit = (&raw mut self.fd.get_kvm_run().immediate_exit).cast::<AtomicU8>();
        *self.shared.target() = Some(Target {
            // SAFETY: has no preconditions.
            thread: unsafe { libc::pthread_self() },
            immediate_exit,
        });
        KvmVcpu {
            kvm: self.kvm,
            fd: self.fd,
            index: self.index,
            xsave_len: self.xsave_len,
            immediate_exit,
            shared: self.shared,
        }
    }
}

impl VcpuSeed for KvmSeed {
    type Vcpu = KvmVcpu;

    fn index(&self) -> u32 {
        self.index
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        self.shared.clone()
    }

    fn bind(self, boot: Option<&BootRegisters>) -> Result<KvmVcpu, Error> {
        self.fd.set_cpuid2(&self.cpuid).map_err(os("write CPUID"))?;
        if let Some(boot) = boot {
            set_boot_registers(&self.fd, boot)?;
        }
        Ok(self.into_vcpu())
    }

    fn bind_restored(self, state: &VcpuState) -> Result<(KvmVcpu, RestoredVcpu), Error> {
        if state.index != self.index {
            return Err(Error::State {
                reason: format!("it is of vCPU {}, not {}", state.index, self.index),
            });
        }
        let mut vcpu = self.into_vcpu();
        let proof = vcpu.put(state, true)?;
        Ok((vcpu, proof))
    }
}

fn set_boot_registers(fd: &VcpuFd, boot: &BootRegisters) -> Result<(), Error> {
    let mut sregs = fd.get_sregs().map_err(os("read system registers"))?;
    sregs.cs = convert::to_segment(boot.cs);
    let data = convert::to_segment(boot.ds);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = convert::to_segment(boot.tr);
    sregs.gdt = convert::to_table(boot.gdt);
    sregs.idt = convert::to_table(boot.idt);
    sregs.cr0 = boot.cr0;
    sregs.cr3 = boot.cr3;
    sregs.cr4 = boot.cr4;
    sregs.efer = boot.efer;
    fd.set_sregs(&sregs).map_err(os("write system registers"))?;
    let regs = kvm_bindings::kvm_regs {
        rip: boot.rip,
        rbx: boot.rbx,
        rsi: boot.rsi,
        rsp: boot.rsp,
        rflags: boot.rflags | 2,
        ..kvm_bindings::kvm_regs::default()
    };
    fd.set_regs(&regs).map_err(os("write registers"))
}

/// A vCPU on its thread.
#[derive(Debug)]
pub struct KvmVcpu {
    kvm: Kvm,
    fd: VcpuFd,
    index: u32,
    xsave_len: usize,
    /// Also what keeps the type from being `Send`.
    immediate_exit: *const AtomicU8,
    shared: Arc<Shared>,
}

/// What one stay in the guest ended with.
enum Stay {
    /// A device access was served; KVM has to be entered to complete it.
    Access,
    /// Interrupted.
    Interrupted,
    /// For the machine to decide.
    Exit(Exit),
}

impl KvmVcpu {
    fn set_immediate_exit(&self, value: u8) {
        // SAFETY: points into the mapping that `self.fd` owns.
        unsafe { &*self.immediate_exit }.store(value, Ordering::SeqCst);
    }

    /// Enters the guest once.
    fn enter(&mut self, bus: &dyn Bus) -> Result<Stay, Error> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(Stay::Interrupted);
            }
            Err(error) => {
                return Err(Error::Os {
                    operation: "run a vCPU",
                    source: io::Error::from_raw_os_error(error.errno()),
                });
            }
        };
        let reason = match exit {
            VcpuExit::IoIn(port, data) => {
                data.fill(0xff);
                bus.pio_read(port, data);
                return Ok(Stay::Access);
            }
            VcpuExit::IoOut(port, data) => {
                bus.pio_write(port, data);
                return Ok(Stay::Access);
            }
            VcpuExit::MmioRead(address, data) => {
                data.fill(0xff);
                bus.mmio_read(address, data);
                return Ok(Stay::Access);
            }
            VcpuExit::MmioWrite(address, data) => {
                bus.mmio_write(address, data);
                return Ok(Stay::Access);
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => return Ok(Stay::Interrupted),
            VcpuExit::Hlt => return Ok(Stay::Exit(Exit::Halt)),
            VcpuExit::Shutdown => return Ok(Stay::Exit(Exit::TripleFault)),
            VcpuExit::SystemEvent(kind, _) => match kind {
                kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => {
                    return Ok(Stay::Exit(Exit::Shutdown));
                }
                kvm_bindings::KVM_SYSTEM_EVENT_RESET => return Ok(Stay::Exit(Exit::Reset)),
                kind => format!("system event {kind}"),
            },
            VcpuExit::FailEntry(reason, cpu) => {
                format!("hardware refused to enter the guest on CPU {cpu}: {reason:#x}")
            }
            VcpuExit::InternalError => self.internal_error(),
            other => format!("unexpected exit {other:?}"),
        };
        Ok(Stay::Exit(Exit::Fault(self.fault(reason))))
    }

    /// What KVM says of an instruction that it cannot emulate.
    fn internal_error(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills
        // this member of the union.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        match suberror {
            1 => "KVM cannot emulate an instruction".to_owned(),
            other => format!("KVM internal error {other}"),
        }
    }

    fn fault(&mut self, reason: String) -> FaultInfo {
        let program_counter = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let run = self.fd.get_kvm_run();
        // SAFETY: any bit pattern is a valid `emulation_failure`.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        let has_bytes = failure.suberror == 1 && failure.ndata > 1 && failure.flags & 1 != 0;
        // SAFETY: the flag says that KVM filled this member; it is plain bytes.
        let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        let len = usize::from(bytes.insn_size)
            .min(bytes.insn_bytes.len())
            .min(INSTRUCTION_LEN);
        FaultInfo {
            reason,
            program_counter,
            instruction: if has_bytes {
                bytes.insn_bytes[..len].to_vec()
            } else {
                Vec::new()
            },
        }
    }

    /// Lets KVM complete an access that was served, without running the guest:
    /// afterwards registers and instruction pointer are consistent.
    fn complete_access(&mut self, bus: &dyn Bus) -> Result<Option<Exit>, Error> {
        loop {
            self.set_immediate_exit(1);
            match self.enter(bus)? {
                // The next part of an access that is split.
                Stay::Access => {}
                Stay::Interrupted => return Ok(None),
                Stay::Exit(exit) => return Ok(Some(exit)),
            }
        }
    }

    fn put(&mut self, state: &VcpuState, fresh: bool) -> Result<RestoredVcpu, Error> {
        state::restore(&self.fd, state, fresh)?;
        // Tells a guest that uses kvmclock that it was paused; one that does not
        // makes KVM refuse, which is fine.
        let _ = self.fd.kvmclock_ctrl();
        #[cfg(debug_assertions)]
        self.compare(state)?;
        Ok(RestoredVcpu { index: self.index })
    }

    /// Reads everything back; what moves by itself is left out.
    #[cfg(debug_assertions)]
    fn compare(&self, wanted: &VcpuState) -> Result<(), Error> {
        let found = state::save(
            &self.fd,
            self.index,
            self.xsave_len,
            &wanted
                .msrs
                .iter()
                .map(|(index, _)| *index)
                .collect::<Vec<_>>(),
        )?;
        let checks = [
            ("general registers", found.general == wanted.general),
            ("system registers", found.system == wanted.system),
            ("debug registers", found.debug == wanted.debug),
            ("extended control registers", found.xcrs == wanted.xcrs),
            ("MP state", found.mp_state == wanted.mp_state),
        ];
        match checks.iter().find(|(_, same)| !same) {
            Some((what, _)) => Err(Error::State {
                reason: format!("{what} of vCPU {} read back differently", self.index),
            }),
            None => Ok(()),
        }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        *self.shared.target() = None;
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, Error> {
        let mut access = false;
        loop {
            if self.shared.kicked.swap(false, Ordering::SeqCst) {
                let exit = if access {
                    self.complete_access(bus)?
                } else {
                    None
                };
                self.set_immediate_exit(0);
                return Ok(exit.unwrap_or(Exit::Cancelled));
            }
            access = match self.enter(bus)? {
                Stay::Access => true,
                Stay::Interrupted => {
                    self.set_immediate_exit(0);
                    false
                }
                Stay::Exit(exit) => return Ok(exit),
            };
        }
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        state::save(
            &self.fd,
            self.index,
            self.xsave_len,
            self.kvm.msr_indices()?,
        )
    }

    fn reload(&mut self, state: &VcpuState) -> Result<RestoredVcpu, Error> {
        self.put(state, false)
    }

    fn notify_paused(&mut self) {
        // Refused when the guest does not use kvmclock: nothing to tell then.
        let _ = self.fd.kvmclock_ctrl();
    }
}
