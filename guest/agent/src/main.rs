//! `/init` of the initramfs.
//!
//! `main` is the C entry point: the standard library's start-up code aborts if the
//! standard descriptors are closed and `/dev/null` does not exist, which is the state in
//! which a kernel without a console starts init.
#![no_main]

/// Entry point, called by the C library's start-up code.
#[expect(
    unsafe_code,
    reason = "exports the symbol that the C start-up code calls"
)]
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    sm_guest_agent::boot::run()
}
