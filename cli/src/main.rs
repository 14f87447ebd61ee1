//! The program `sm`; see the library.

use std::process::ExitCode;

/// musl's allocator returns memory to the system too eagerly: with it, a start takes 1.5
/// times as long.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    sm_cli::main()
}
