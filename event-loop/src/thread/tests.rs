//! Calls of a loop from other threads.

use super::*;
use crate::Registry;

struct Silent;

impl EventHandler for Silent {
    fn start(&mut self, _: &mut dyn Registry) -> io::Result<()> {
        Ok(())
    }
    fn ready(&mut self, _: u64, _: Readiness, _: &mut dyn Registry) {}
}

fn silent() -> Arc<Mutex<Silent>> {
    Arc::new(Mutex::new(Silent))
}

#[test]
fn calls_return_values_and_never_wait_for_themselves() {
    let event_loop = EventLoop::spawn("test").unwrap();
    let handle = event_loop.handle();
    let id = handle.add_handler(silent()).unwrap();
    assert_eq!(handle.call(id, |_| 42).unwrap(), 42);
    let inner = handle.clone();
    let nested = handle
        .call(id, move |_| inner.call(id, |_| ()).unwrap_err().kind())
        .unwrap();
    assert_eq!(nested, io::ErrorKind::Deadlock);
    drop(event_loop);
    assert!(handle.call(id, |_| ()).is_err());
}

#[test]
fn handlers_are_removed_from_the_loop_itself() {
    let event_loop = EventLoop::spawn("test").unwrap();
    let handle = event_loop.handle();
    let id = handle.add_handler(silent()).unwrap();
    let inner = handle.clone();
    handle
        .call(id, move |_| inner.remove_handler(id).unwrap())
        .unwrap();
    // Tasks run in the order they came in, and this one comes after.
    assert!(handle.call(id, |_| ()).is_err());
}
