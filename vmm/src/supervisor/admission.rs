//! Admission of clients, and eviction of idle ones.

use std::fs::File;
use std::io;
use std::time::Duration;

use rustix::io::Errno;
use sm_frontends::is_trusted_peer;

use super::clients::{ClientRole, ConnectedClient};
use super::{Supervisor, SupervisorTimer};
use crate::guest::GuestMachine;

/// Most concurrent connections that may make control calls; more wait in the socket's
/// backlog. They have a limit of their own, so that a stop is served however many clients
/// are attached or wait for the VM's end.
const CONTROL_CLIENTS: usize = 64;
/// Idle time after which a client without a call makes room for others that wait.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Delay after a connection could not be accepted.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(200);

impl<G: GuestMachine> Supervisor<G> {
    /// Returns true if connections are accepted now.
    pub(super) fn accepts(&self) -> bool {
        !self.is_set(SupervisorTimer::Accept) && !self.is_at_call_limit()
    }

    /// Returns true if a client counts as one that makes calls.
    pub(super) fn is_calling(&self, id: u64, client: &ConnectedClient) -> bool {
        client.role == ClientRole::Control
            && !client.closing
            && client.snapshot_guard.is_none()
            && self.stage.awaited_by() != Some(id)
    }

    /// Returns true if the maximum of clients that make calls is reached.
    pub(super) fn is_at_call_limit(&self) -> bool {
        self.calling_clients() >= CONTROL_CLIENTS
    }

    fn calling_clients(&self) -> usize {
        let clients = self.clients.iter();
        clients.filter(|(id, c)| self.is_calling(**id, c)).count()
    }

    /// Accepts one connection; the poll loop calls again for the next.
    pub(super) fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let mut accepted = listener.accept();
        let mut on_spare = false;
        if accepted.as_ref().is_err_and(out_of_descriptors) && self.spare.take().is_some() {
            accepted = listener.accept();
            on_spare = accepted.is_ok();
        }
        match accepted {
            // The check protects a directory whose permissions were widened.
            Ok((stream, _)) if !is_trusted_peer(&stream).unwrap_or(false) => {
                tracing::warn!("refused a client of another user");
            }
            Ok((stream, _)) => match ConnectedClient::new(stream, ClientRole::Control) {
                Ok(client) => self.add_client(ConnectedClient { on_spare, ..client }),
                Err(error) => tracing::warn!(%error, "cannot serve a client"),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The connection stays in the backlog, and the socket readable.
            Err(error) => {
                if !std::mem::replace(&mut self.accept_fails, true) {
                    tracing::warn!(%error, "cannot accept clients");
                }
                self.set_timer(SupervisorTimer::Accept, ACCEPT_BACKOFF);
            }
        }
        self.reopen_spare();
    }

    /// Reopens the spare descriptor as soon as one is free.
    pub(super) fn reopen_spare(&mut self) {
        if self.spare.is_none() {
            self.spare = File::open("/dev/null").ok();
        }
        if self.spare.is_some() && std::mem::take(&mut self.accept_fails) {
            tracing::info!("clients are accepted again");
        }
    }

    /// Drops idle clients if the maximum of clients that make calls is reached.
    pub(super) fn drop_idle_clients(&mut self) {
        if !self.is_at_call_limit() {
            return;
        }
        let mut idle = Vec::new();
        let mut next = self.idle_timeout;
        for (&id, client) in &self.clients {
            if self.is_calling(id, client) {
                match self.idle_timeout.checked_sub(client.active.elapsed()) {
                    None | Some(Duration::ZERO) => idle.push(id),
                    Some(left) => next = next.min(left),
                }
            }
        }
        if idle.is_empty() {
            return self.set_timer(SupervisorTimer::Idle, next);
        }
        for id in idle {
            self.drop_client(id);
        }
    }

    /// Returns an error if no further client may attach or wait.
    pub(super) fn check_persistent_limit(&self, id: u64) -> Result<(), String> {
        if self.clients.get(&id).is_some_and(|client| client.on_spare) {
            return Err("the VM's process has no descriptors left".to_owned());
        }
        let persistent = self.clients.iter();
        let persistent = persistent
            .filter(|(id, c)| !self.is_calling(**id, c))
            .count();
        if persistent >= self.max_persistent_clients {
            return Err(format!(
                "{persistent} clients are attached or wait for this VM already, and there can be no more"
            ));
        }
        Ok(())
    }
}

fn out_of_descriptors(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE)
    )
}
