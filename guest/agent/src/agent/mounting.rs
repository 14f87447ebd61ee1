//! Mounts in a container's root, by a child: it accesses files of the image, and copies as
//! many as that has.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::time::Duration;

use rustix::process::Pid;
use sm_event_loop::Key;
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::{ControlReply, GuestMount};

use super::Agent;
use super::requests::failed;
use crate::mounts;
use crate::part;
use crate::sys::{self, Fork};
use crate::workload;

/// Timeout for mounting and copying. The host has its own, for the start.
const DEADLINE: Duration = Duration::from_secs(3600);

/// Most bytes of a message of the child.
const MAX_MESSAGE: u64 = 4096;

impl Agent {
    /// Performs a request for mounts. Returns `None` if the answer is sent later.
    pub(super) fn mount(
        &mut self,
        key: Key,
        container: &ContainerId,
        mounts: &[GuestMount],
    ) -> Option<ControlReply> {
        if self.mounting.is_some() {
            return Some(failed("file systems are already being mounted"));
        }
        match self.start_mounting(container, mounts) {
            Ok((pid, file)) => {
                let waiting = self.await_containers(part::MOUNT, key, DEADLINE);
                self.mounting = Some((waiting, pid, file));
                None
            }
            Err(failure) => Some(failed(format_args!("mount file systems: {failure}"))),
        }
    }

    fn start_mounting(
        &mut self,
        id: &ContainerId,
        requested: &[GuestMount],
    ) -> io::Result<(Pid, File)> {
        let (_, container) = self.containers.named(id).map_err(io::Error::other)?;
        let namespaces = container.workload.namespaces();
        let (namespaces, directory) = namespaces.map_err(io::Error::other)?;
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::memfd_create("mounts", flags)?);
        match workload::fork_agent(0, None)? {
            Fork::Child => {
                let keep = namespaces.descriptors().into_iter().chain([file.as_fd()]);
                // The child must not hold open connections that the parent closes.
                sys::close_all_but(&keep.collect::<Vec<_>>());
                let status = match mounts::perform(requested, namespaces, directory) {
                    Ok(()) => 0,
                    Err(message) => {
                        let _ = file.write_all(message.as_bytes());
                        1
                    }
                };
                sys::exit_now(status)
            }
            Fork::Parent(pid) => Ok((pid, file)),
        }
    }

    /// Answers the request when the child has exited.
    pub(crate) fn check_mounted(&mut self, reaped: &sys::Reaped) {
        if let Some((waiting, _, file)) = self.mounting.take_if(|(_, pid, _)| *pid == reaped.pid) {
            let reply = match reaped.status {
                0 => ControlReply::Done,
                status => {
                    let message = message(file).unwrap_or_default();
                    match message.is_empty() {
                        true => failed(format_args!("mounting ended with status {status}")),
                        false => failed(message),
                    }
                }
            };
            self.answer(Some(waiting.key), &reply);
        }
    }
}

fn message(mut file: File) -> io::Result<String> {
    file.rewind()?;
    let mut text = String::new();
    file.take(MAX_MESSAGE).read_to_string(&mut text)?;
    Ok(text)
}
