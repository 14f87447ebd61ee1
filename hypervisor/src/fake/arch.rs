//! The fake's vCPU in the state of each architecture: its index, and its position in the
//! script instead of the program counter.

use super::BACKEND;
use crate::state::{Blob, aarch64, x86_64};
use crate::{Aarch64, Arch, X86_64};

/// An architecture that the fake backend supports.
pub trait FakeArch: Arch<Features: Default> {
    /// State of vCPU `index` at a position of its script.
    fn state(index: u32, position: u64) -> Self::Vcpu;
    /// Name of the backend that saved the state, index and position.
    fn read(state: &Self::Vcpu) -> (&str, u32, u64);
}

/// Returns a blob that only names the backend.
fn mark() -> Blob {
    Blob {
        backend: BACKEND.to_owned(),
        ..Blob::default()
    }
}

impl FakeArch for X86_64 {
    fn state(index: u32, position: u64) -> x86_64::VcpuState {
        let mut state = x86_64::VcpuState {
            index,
            events: mark(),
            ..x86_64::VcpuState::default()
        };
        state.general.rip = position;
        state
    }

    fn read(state: &x86_64::VcpuState) -> (&str, u32, u64) {
        (&state.events.backend, state.index, state.general.rip)
    }
}

impl FakeArch for Aarch64 {
    fn state(index: u32, position: u64) -> aarch64::VcpuState {
        let mut state = aarch64::VcpuState {
            index,
            events: mark(),
            ..aarch64::VcpuState::default()
        };
        state.general.pc = position;
        state
    }

    fn read(state: &aarch64::VcpuState) -> (&str, u32, u64) {
        (&state.events.backend, state.index, state.general.pc)
    }
}
