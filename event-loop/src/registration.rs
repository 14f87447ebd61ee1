//! Names of registered descriptors, and their events.

use crate::Readiness;
use crate::slab::Key;

/// Names a registered descriptor of a [`Reactor`](crate::Reactor) or a loop; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Registration(pub(crate) Key);

impl Registration {
    /// The registration that a loop keeps in `slot`. `generation` differs from those of
    /// earlier occupants of the slot.
    #[must_use]
    pub const fn new(slot: u32, generation: u32) -> Self {
        Self(Key::new(slot, generation))
    }

    /// The slot's number.
    #[must_use]
    pub const fn slot(self) -> u32 {
        self.0.slot()
    }

    /// The generation of the slot.
    #[must_use]
    pub const fn generation(self) -> u32 {
        self.0.generation()
    }
}

/// An event that [`wait`](crate::Reactor::wait) fetched. Its
/// [`target`](crate::Reactor::target) is looked up when it is processed, because an
/// earlier event may have removed it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Ready {
    /// The registration that the event belongs to.
    pub registration: Registration,
    /// The events.
    pub readiness: Readiness,
}
