//! Targets of doorbells: event handles.

use std::os::windows::io::BorrowedHandle;

/// Target of a doorbell: an event object.
pub type Wake<'a> = BorrowedHandle<'a>;

/// The fake backend signals no event objects: the writes of its vCPUs arrive on the bus.
#[cfg(any(feature = "testing", test))]
#[derive(Debug)]
pub(crate) enum Waker {}

#[cfg(any(feature = "testing", test))]
impl Waker {
    pub(crate) fn of(_: Wake<'_>) -> std::io::Result<Option<Self>> {
        Ok(None)
    }

    pub(crate) fn signal(&self) {
        match *self {}
    }
}
