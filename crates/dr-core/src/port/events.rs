//! Where a job's events go.

use std::fmt;

use crate::event::Event;

/// Takes events from a job. It never blocks and never fails: a slow listener drops, not delays.
pub trait EventSink: Send + Sync + fmt::Debug {
    /// Takes one event.
    fn emit(&self, event: Event);
}

/// A sink that drops everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoEvents;

impl EventSink for NoEvents {
    fn emit(&self, _event: Event) {}
}
