//! Obligations of every backend, checked with tiny hand-written guests.
//!
//! The checks are generic over [`sm_hypervisor::Hypervisor`]; `conformance!` at the end of
//! the file runs each on the backend of this host, and on one that wraps it from outside
//! the crate. They work on any `/dev/kvm`, also one that cannot run Linux; without any they
//! are left out, unless [`sm_hypervisor::testing::REQUIRED`] has `kvm`. `cargo xtask test`
//! also runs them in the lab.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![expect(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "helpers of tests"
)]

mod access;
mod bench;
mod guests;
mod interrupts;
mod kick;
mod memory;
mod outside;
mod smp;
mod state;

use sm_hypervisor::testing::native;

/// Runs each check on this host's backend, and on one that is defined outside the crate.
macro_rules! conformance {
    ($($check:path as $name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                if let Some(hypervisor) = native() {
                    $check(&hypervisor);
                }
            }
        )*

        mod outside_the_crate {
            use super::*;

            $(
                #[test]
                fn $name() {
                    if let Some(hypervisor) = native() {
                        $check(&outside::Outside(hypervisor));
                    }
                }
            )*
        }
    };
}

conformance! {
    access::ports_of_each_width as ports_of_each_width,
    access::memory_mapped_access_of_each_width as memory_mapped_access_of_each_width,
    access::string_operations_are_split as string_operations_are_split,
    access::a_triple_fault_is_reported as a_triple_fault_is_reported,
    access::a_prepared_vm_is_like_any_other as a_prepared_vm_is_like_any_other,
    kick::a_kick_before_running_takes_effect as a_kick_before_running_takes_effect,
    kick::a_kick_ends_a_spin as a_kick_ends_a_spin,
    kick::a_kick_in_an_access_leaves_it_complete as a_kick_in_an_access_leaves_it_complete,
    kick::a_kick_of_a_dead_vcpu_is_harmless as a_kick_of_a_dead_vcpu_is_harmless,
    interrupts::a_line_wakes_a_halted_guest as a_line_wakes_a_halted_guest,
    interrupts::doorbells_match_their_value as doorbells_match_their_value,
    smp::secondary_processors_start as secondary_processors_start,
    memory::memory_is_where_it_was_mapped as memory_is_where_it_was_mapped,
    memory::accesses_to_an_unmapped_region_reach_the_bus as accesses_to_an_unmapped_region_reach_the_bus,
    state::a_restored_guest_finds_everything as a_restored_guest_finds_everything,
    state::a_guest_reset_in_place_finds_everything as a_guest_reset_in_place_finds_everything,
    state::time_does_not_go_backwards as time_does_not_go_backwards,
    state::a_pending_page_fault_keeps_its_address as a_pending_page_fault_keeps_its_address,
    state::damaged_state_is_refused as damaged_state_is_refused,
    state::all_vcpus_must_be_restored as all_vcpus_must_be_restored,
    state::tokens_of_another_vm_are_refused as tokens_of_another_vm_are_refused,
}
