//! Architectures of guests, as types.
//!
//! A backend names the architecture of its guests ([`Hypervisor::Arch`]), and the
//! architecture names the types of registers, saved state and processor features. The
//! traits of the hypervisor interface mention none of them directly.
//!
//! [`Hypervisor::Arch`]: crate::Hypervisor::Arch

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::state::{aarch64, x86_64};

/// Data without behaviour: it can be copied, compared, encoded, and sent to other threads.
///
/// Implemented for every type with these properties.
pub trait PlainData:
    Clone + Debug + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static
{
}

impl<T> PlainData for T where
    T: Clone + Debug + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static
{
}

/// An architecture of guests.
pub trait Arch: Copy + Debug + Eq + Send + Sync + 'static {
    /// The architecture's name, as in Rust's `target_arch`.
    const NAME: &'static str;
    /// Registers that a boot protocol sets on the boot processor.
    type Boot: PlainData;
    /// Saved state of one vCPU.
    type Vcpu: PlainData;
    /// Processor features that a guest can have.
    type Features: PlainData;
}

/// x86 with 64-bit long mode (AMD64, Intel 64).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum X86_64 {}

impl Arch for X86_64 {
    const NAME: &'static str = "x86_64";
    type Boot = x86_64::BootRegisters;
    type Vcpu = x86_64::VcpuState;
    type Features = x86_64::Features;
}

/// Armv8-A and later with AArch64 at EL1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aarch64 {}

impl Arch for Aarch64 {
    const NAME: &'static str = "aarch64";
    type Boot = aarch64::BootRegisters;
    type Vcpu = aarch64::VcpuState;
    type Features = aarch64::Features;
}
