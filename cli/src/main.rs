//! The program `sm`; see the library.

use std::process::ExitCode;

/// musl's own gives memory back to the system at every turn: starting takes half as
/// long again with it.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    sm_cli::main()
}
