//! Events of a user's VMs, images and snapshots.
//!
//! ```no_run
//! use sm_runtime::Sm;
//! use sm_runtime::events::{EventAction, EventQuery};
//!
//! # fn main() -> Result<(), sm_runtime::Error> {
//! let sm = Sm::new()?;
//! let query = EventQuery::new().action(EventAction::Die).follow(true);
//! let mut events = sm.events(query)?;
//! while let Some(event) = events.wait_event()? {
//!     println!("{} has ended: {:?}", event.name, event.attributes.get("exit_code"));
//! }
//! # Ok(())
//! # }
//! ```

mod log;
mod stream;
#[cfg(test)]
mod tests;

pub use sm_control::event::{EventAction, EventRecord, EventSubject};

pub(crate) use self::log::EventLog;
pub use self::stream::EventStream;

/// The events that a caller asks for. Conditions of one kind are alternatives; all kinds
/// apply.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct EventQuery {
    since_ns: Option<u64>,
    until_ns: Option<u64>,
    follow: bool,
    subjects: Vec<EventSubject>,
    actions: Vec<EventAction>,
    /// Names, or beginnings of identifiers.
    objects: Vec<String>,
}

impl EventQuery {
    /// Returns a query for all events from now on.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the time of the first event, in nanoseconds since the Unix epoch; without it,
    /// only events after the call of [`crate::Sm::events`] are returned.
    #[must_use]
    pub fn since(mut self, time_ns: u64) -> Self {
        self.since_ns = Some(time_ns);
        self
    }

    /// Sets the time of the last event, in nanoseconds since the Unix epoch, at which the
    /// stream ends.
    #[must_use]
    pub fn until(mut self, time_ns: u64) -> Self {
        self.until_ns = Some(time_ns);
        self
    }

    /// Sets whether [`EventStream::wait_event`] waits for events that are still to come.
    #[must_use]
    pub fn follow(mut self, yes: bool) -> Self {
        self.follow = yes;
        self
    }

    /// Asks for events about objects of this kind.
    #[must_use]
    pub fn subject(mut self, subject: EventSubject) -> Self {
        self.subjects.push(subject);
        self
    }

    /// Asks for events with this action.
    #[must_use]
    pub fn action(mut self, action: EventAction) -> Self {
        self.actions.push(action);
        self
    }

    /// Asks for events about the object with this name, or whose identifier begins with
    /// it.
    #[must_use]
    pub fn object(mut self, query: impl Into<String>) -> Self {
        self.objects.push(query.into());
        self
    }

    fn asks_for(&self, event: &EventRecord) -> bool {
        let is_object = |query: &String| event.name == *query || event.id.starts_with(query);
        self.since_ns.is_none_or(|since| event.time_ns >= since)
            && self.until_ns.is_none_or(|until| event.time_ns <= until)
            && (self.subjects.is_empty() || self.subjects.contains(&event.subject))
            && (self.actions.is_empty() || self.actions.contains(&event.action))
            && (self.objects.is_empty() || self.objects.iter().any(is_object))
    }
}
