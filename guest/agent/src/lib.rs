//! PID 1 of the guest.
//!
//! # Invariants
//!
//! - **One thread, one place to wait.** Everything runs on the main thread and
//!   waits only in `reactor`'s `epoll_wait`. Nothing else blocks: files of the
//!   image are touched only by processes forked for one command or one question,
//!   and device nodes and files that the workload can replace are held by descriptor
//!   (`node`, `identity`). This is also what makes forking safe without exec.
//! - **Only the host gives orders** (`peer`): a connection of anybody else is closed
//!   before a byte of it is read.
//! - **One reaper.** Only `Agent::reap` waits for children, after SIGCHLD
//!   arrives by signalfd, and hands each status to the session that owns the
//!   process. A session's process cannot be reaped behind its back, so its PID
//!   is valid as long as the session says that it lives.
//! - **Descriptors have one owner.** Each is an `OwnedFd` inside a `Watched`,
//!   which removes it from epoll before closing. All are close-on-exec; a command
//!   gets exactly 0, 1 and 2.
//! - **Events name their target with a generation** (`slab`). A late event or
//!   an old deadline finds nothing.
//! - **The workload is apart.** Its processes live in one cgroup (born there, so
//!   the freezer holds all of them), in PID, mount and cgroup namespaces of their
//!   own. They share the network and the host name with the agent, which has
//!   nothing else to use them for.
//! - **Bounded memory.** One scratch buffer for all; a connection that is ahead
//!   of its peer is not read.
#![warn(missing_docs)]

mod agent;
mod bind;
pub mod boot;
mod cgroup;
mod control;
mod device;
mod exec;
mod facts;
mod forward;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod identity;
mod init;
mod kernel_log;
mod log;
mod node;
mod part;
mod peer;
mod reactor;
mod root;
mod sending;
mod slab;
mod sys;
mod users;
mod waiting;
mod wire;
mod workload;
