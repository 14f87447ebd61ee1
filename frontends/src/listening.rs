//! The frontend whose connections all go to one place as they are.

use std::io;

use sm_devices_vsock::{Permit, Stage};
use sm_vmm_core::event_loop::{EventHandler, Readiness, Registry};

use crate::Target;
use crate::gate::{Gate, Listener};
use crate::handle::Frontend;
use crate::service::{Bell, Service};

/// Descriptors of a connection.
pub(crate) const COST: usize = 1;

pub(crate) struct Listening<L> {
    gate: Gate<L>,
    target: Target,
    service: Service,
    bell: Option<Bell>,
}

impl<L: Listener> Listening<L> {
    pub(crate) fn new(listener: L, target: Target, service: Service) -> Self {
        Self {
            gate: Gate::new(listener, COST, service.limit.clone()),
            target,
            service,
            bell: None,
        }
    }

    /// Accepts some connections; whether there were any.
    fn accept(&mut self, registry: &mut Registry<'_>) -> bool {
        let Some(bell) = &self.bell else {
            return false;
        };
        let profiler = self.service.muxer.profiler();
        let mut begun = profiler.begin();
        let connections = self.gate.accept(usize::MAX, bell, &self.service, registry);
        let some = !connections.is_empty();
        for (stream, permit) in connections {
            self.lead(stream, permit);
            profiler.end(Stage::Accept, begun);
            begun = profiler.begin();
        }
        some
    }

    fn lead(&self, stream: L::Stream, permit: Permit) {
        let member = self.service.group.join(Some(permit));
        self.service
            .connect(self.target.open(), stream.into(), Some(member));
    }
}

impl<L: Listener> EventHandler for Listening<L> {
    fn start(&mut self, _registry: &mut Registry<'_>) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, _token: u64, _readiness: Readiness, registry: &mut Registry<'_>) {
        self.accept(registry);
    }
}

impl<L: Listener> Frontend for Listening<L> {
    fn begin(&mut self, bell: Bell, registry: &mut Registry<'_>) -> io::Result<()> {
        self.bell = Some(bell);
        self.gate.begin(registry)
    }

    fn close(&mut self, registry: &mut Registry<'_>) {
        while self.accept(registry) {}
        self.gate.close(registry);
    }
}
