//! Which clients are taken, and how long one that makes no calls keeps its place.

use std::fs::File;
use std::io;
use std::time::Duration;

use rustix::io::Errno;
use sm_frontends::is_trusted_peer;

use super::clients::{Client, Role};
use super::{Supervisor, Timer};
use crate::guest::Guest;

/// Connections served at once that may make control calls; more wait in the socket's
/// backlog. Places of their own, as calls such as a stop must be heard however many
/// clients wait for the VM's end or are attached.
const CONTROL_CLIENTS: usize = 64;
/// The time for which one that makes no call keeps its place when others wait for one.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause after a connection that could not be accepted.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(200);

impl<G: Guest> Supervisor<G> {
    /// Whether connections are taken from the backlog now.
    pub(super) fn accepts(&self) -> bool {
        !self.is_set(Timer::Accept) && !self.places_are_taken()
    }

    /// Whether a client has one of the places for those that make calls.
    pub(super) fn is_calling(&self, id: u64, client: &Client) -> bool {
        client.role == Role::Control
            && !client.closing
            && client.kept.is_none()
            && self.awaits_snapshot() != Some(id)
            && self.resetting != Some(id)
    }

    /// Whether there are as many clients that make calls as there may be.
    pub(super) fn places_are_taken(&self) -> bool {
        self.calling_clients() >= CONTROL_CLIENTS
    }

    fn calling_clients(&self) -> usize {
        let clients = self.clients.iter();
        clients.filter(|(id, c)| self.is_calling(**id, c)).count()
    }

    /// Takes one connection; the poll loop comes back for the next.
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
            // The directory is private; should it have been opened up, this holds.
            Ok((stream, _)) if !is_trusted_peer(&stream).unwrap_or(false) => {
                tracing::warn!("refused a client of another user");
            }
            Ok((stream, _)) => match Client::new(stream, Role::Control) {
                Ok(client) => self.add_client(Client { on_spare, ..client }),
                Err(error) => tracing::warn!(%error, "cannot serve a client"),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // It stays in the backlog, and the socket readable.
            Err(error) => {
                if !std::mem::replace(&mut self.accept_fails, true) {
                    tracing::warn!(%error, "cannot accept clients");
                }
                self.set_timer(Timer::Accept, ACCEPT_BACKOFF);
            }
        }
        self.keep_spare();
    }

    /// Opens the spare descriptor again once there is one to be had.
    pub(super) fn keep_spare(&mut self) {
        if self.spare.is_none() {
            self.spare = File::open("/dev/null").ok();
        }
        if self.spare.is_some() && std::mem::take(&mut self.accept_fails) {
            tracing::info!("clients are accepted again");
        }
    }

    /// All places for calls are taken: those that make none are given to others.
    pub(super) fn drop_idle_clients(&mut self) {
        if !self.places_are_taken() {
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
            return self.set_timer(Timer::Idle, next);
        }
        for id in idle {
            self.drop_client(id);
        }
    }

    /// Whether one more client may stay for long.
    pub(super) fn may_stay(&self, id: u64) -> Result<(), String> {
        if self.clients.get(&id).is_some_and(|client| client.on_spare) {
            return Err("the VM's process has no descriptors left".to_owned());
        }
        let staying = self.clients.iter();
        let staying = staying.filter(|(id, c)| !self.is_calling(**id, c)).count();
        if staying >= self.most_staying {
            return Err(format!(
                "{staying} clients are attached or wait for this VM already, and there can be no more"
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
