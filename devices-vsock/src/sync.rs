//! Synchronisation primitives in one module, which a model checker can replace.

pub(crate) use std::sync::Mutex;
pub(crate) use std::sync::atomic::{AtomicBool, Ordering};
