//! PID 1 of the guest.
//!
//! | module | content |
//! |---|---|
//! | `boot` | the first program of the guest: mounts, listeners, power-off |
//! | `agent` | state and dispatch of events; handlers of the host's requests (`requests`) |
//! | `control`, `wire`, `sending`, `peer` | connections of the host and their frames |
//! | `identity`, `kernel_log` | identity of this guest or clone; detection of a new generation ID |
//! | `names`, `network` | `/etc/hosts` and `/etc/resolv.conf`; the network interface |
//! | `root`, `bind`, `device`, `node` | the workload's root file system, and files of the guest in it |
//! | `workload`, `init`, `cgroup`, `users` | the workload's namespaces, first process, cgroup and user |
//! | `exec` | commands: processes, streams, signals, terminals |
//! | `forward` | connections to TCP ports of the guest |
//! | `reactor`, `waiting` | the wait for events and deadlines |
//!
//! # Invariants
//!
//! - **One thread, one blocking call.** Everything runs on the main thread and blocks
//!   only in `reactor`'s wait, except that a refresh may wait for the link of the network
//!   device (`network`), for a second at most. Files of the image are accessed only by processes
//!   that are forked for one command or one request. Device nodes and files that the
//!   workload can replace are held as descriptors (`node`, `identity`). A single thread
//!   also makes it safe to fork without exec.
//! - **Only the host is served** (`peer`): a connection of any other peer is closed
//!   before a byte of it is read.
//! - **One reaper.** Only `Agent::reap` waits for children, after SIGCHLD arrived through
//!   a signalfd, and passes each status to the session that owns the process. No other
//!   code can reap a session's process, so its PID is valid as long as the session
//!   considers it alive.
//! - **Descriptors have one owner.** Each is an `OwnedFd` inside a `Watched`, which
//!   removes it from the event loop before closing. All are close-on-exec; a command gets exactly
//!   0, 1 and 2.
//! - **Events name their target with a generation** (`sm_event_loop::Slab`). A late event
//!   finds no target, and a deadline is cancelled when its owner is dropped.
//! - **Containers are isolated.** The processes of each are in one cgroup (created there,
//!   so that the freezer covers all of them), and in PID, mount and cgroup namespaces of
//!   their own. They share the network and the host name with each other and with the
//!   agent, which does not use either otherwise than to configure it.
//! - **Bounded memory.** All connections share one scratch buffer; a connection whose
//!   peer is slower is not read.
#![warn(missing_docs)]
// These macros panic if the stream is closed or full; `log` ignores such failures.
#![warn(clippy::print_stderr, clippy::print_stdout)]

mod agent;
mod bind;
pub mod boot;
mod cgroup;
mod container;
mod control;
mod device;
mod exec;
mod facts;
mod files;
mod forward;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod identity;
mod init;
mod kernel_log;
mod log;
mod mounts;
mod names;
mod network;
mod node;
mod part;
mod peer;
mod reactor;
mod root;
mod sending;
mod sys;
mod users;
mod waiting;
mod wire;
mod workload;
