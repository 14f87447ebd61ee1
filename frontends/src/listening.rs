//! A frontend that forwards all connections unchanged to one target.

use std::io;

use sm_devices_vsock::{Permit, ProfileStage};
use sm_event_loop::{EventHandler, Readiness, Registry};

use crate::ForwardTarget;
use crate::acceptor::{CLOSING_ROUNDS, Listener, ListenerAcceptor};
use crate::handle::Frontend;
use crate::service::{FrontendService, HandlerWaker};

/// Descriptors per connection.
pub(crate) const COST: usize = 1;

pub(crate) struct FrontendListener<L: Listener> {
    acceptor: ListenerAcceptor<L>,
    target: ForwardTarget,
    service: FrontendService,
    waker: Option<HandlerWaker>,
}

impl<L: Listener> FrontendListener<L> {
    pub(crate) fn new(listener: L, target: ForwardTarget, service: FrontendService) -> Self {
        Self {
            acceptor: ListenerAcceptor::new(listener, COST, service.limit.clone()),
            target,
            service,
            waker: None,
        }
    }

    /// Accepts some connections. Returns true if there may be more.
    fn accept(&mut self, registry: &mut dyn Registry) -> bool {
        let Some(waker) = &self.waker else {
            return false;
        };
        let profiler = self.service.muxer.profiler();
        let mut since = profiler.begin();
        let connections = self
            .acceptor
            .accept(usize::MAX, waker, &self.service, registry);
        for (stream, permit) in connections {
            self.forward(stream, permit);
            profiler.end(ProfileStage::Accept, since);
            since = profiler.begin();
        }
        self.acceptor.has_more()
    }

    fn forward(&self, stream: L::Stream, permit: Permit) {
        let member = self.service.group.join(Some(permit));
        self.service
            .connect(self.target.connect_arguments(), stream.into(), Some(member));
    }
}

impl<L: Listener> EventHandler for FrontendListener<L> {
    fn start(&mut self, _registry: &mut dyn Registry) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, _token: u64, _readiness: Readiness, registry: &mut dyn Registry) {
        self.accept(registry);
    }
}

impl<L: Listener> Frontend for FrontendListener<L> {
    fn register(&mut self, waker: HandlerWaker, registry: &mut dyn Registry) -> io::Result<()> {
        self.waker = Some(waker);
        self.acceptor.register(registry)
    }

    fn close(&mut self, registry: &mut dyn Registry) {
        let mut rounds = 0..CLOSING_ROUNDS;
        while rounds.next().is_some() && self.accept(registry) {}
        self.acceptor.close(registry);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use sm_devices_vsock::testing::Guest;
    use sm_devices_vsock::{Limit, VsockConfig};
    use sm_event_loop::{EventLoop, new_eventfd};

    use super::*;
    use crate::acceptor::BACKLOG;
    use crate::{FrontendHandle, LocalAddress};

    /// A listener whose backlog is never empty.
    struct Flood(OwnedFd);

    impl AsFd for Flood {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    impl Listener for Flood {
        type Stream = File;

        fn accept(&self) -> io::Result<File> {
            File::open("/dev/null")
        }
    }

    #[test]
    fn closing_ends_although_clients_never_do() {
        let guest = Guest::new(VsockConfig::default());
        let event_loop = EventLoop::spawn("test").unwrap();
        let service = FrontendService::new("flood".to_owned(), guest.muxer.clone(), Limit::none());
        // No connection is accepted before the listener is closed: this descriptor has no
        // events.
        let listener = Flood(new_eventfd().unwrap());
        let listening = FrontendListener::new(listener, ForwardTarget::Vsock(7), service);
        let address = LocalAddress::Unix("flood".into());
        let service = listening.service.clone();
        let handle =
            FrontendHandle::start(listening, address, None, service, &event_loop.handle()).unwrap();
        let (send, closed) = channel();
        std::thread::spawn(move || {
            handle.close();
            send.send(handle.stats().accepted).unwrap();
        });
        let accepted = closed.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(accepted >= u64::try_from(BACKLOG).unwrap(), "{accepted}");
    }
}
