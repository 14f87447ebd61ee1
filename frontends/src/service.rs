//! State that all frontends share, independent of their protocols.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use sm_devices_vsock::{ConnectError, ConnectOptions, Group, Limit, Member, MuxerHandle};
use sm_event_loop::{EventLoopHandle, HandlerId};

use crate::stats::Counters;

/// The muxer, limit and counters of one frontend.
#[derive(Clone, Debug)]
pub(crate) struct FrontendService {
    pub(crate) muxer: MuxerHandle,
    /// All connections of this frontend.
    pub(crate) group: Group,
    /// Limit of descriptors for them.
    pub(crate) limit: Limit,
    pub(crate) counters: Arc<Counters>,
}

impl FrontendService {
    pub(crate) fn new(name: String, muxer: MuxerHandle, limit: Limit) -> Self {
        Self {
            muxer,
            group: Group::new(),
            limit,
            counters: Arc::new(Counters::new(name)),
        }
    }

    /// Connects a stream to the guest.
    pub(crate) fn connect(
        &self,
        (port, mut options): (u32, ConnectOptions),
        stream: OwnedFd,
        member: Option<Member>,
    ) {
        self.counters.accept();
        let counters = Arc::clone(&self.counters);
        let then = options.on_result.take();
        let options = options
            .on_result(move |result| {
                match result {
                    Ok(_) | Err(ConnectError::Reset | ConnectError::HungUp) => {}
                    Err(error @ (ConnectError::Limit | ConnectError::Unusable)) => {
                        counters.refuse(error);
                    }
                    Err(error) => counters.count_unanswered(error),
                }
                if let Some(then) = then {
                    then(result);
                }
            })
            .member(member);
        self.muxer.connect(port, stream, options);
    }
}

/// Calls a handler on its event loop, from any thread.
#[derive(Clone, Debug)]
pub(crate) struct HandlerWaker {
    event_loop: EventLoopHandle,
    id: HandlerId,
}

impl HandlerWaker {
    pub(crate) fn new(event_loop: EventLoopHandle, id: HandlerId) -> Self {
        Self { event_loop, id }
    }

    /// Calls the handler with `token` on the loop's thread, asynchronously.
    pub(crate) fn wake(&self, token: u64) {
        self.event_loop
            .post(self.id, move |registry| registry.call_again(token));
    }

    /// Removes the handler; asynchronously if called on the loop's own thread.
    pub(crate) fn remove(&self) {
        // An error means that the loop has stopped and dropped the handler.
        let _ = self.event_loop.remove_handler(self.id);
    }
}
