//! A function that is called when a command has exited.

use std::fmt;

type Call = Box<dyn FnOnce(u32) + Send + Sync>;

/// A function to call once with a command's status, if there is one.
#[derive(Default)]
pub(super) struct ExitCallback(Option<Call>);

impl ExitCallback {
    pub(super) fn new(call: impl FnOnce(u32) + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(call)))
    }

    pub(super) fn call(&mut self, status: u32) {
        if let Some(call) = self.0.take() {
            call(status);
        }
    }
}

impl fmt::Debug for ExitCallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ExitCallback")
            .field(&self.0.is_some())
            .finish()
    }
}
