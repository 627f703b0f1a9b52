//! Time, passed in so that tests and simulations choose it.

use std::fmt;

use jiff::Timestamp;

/// The wall clock of this host. It may step; nothing is ordered by it.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The time now.
    fn now(&self) -> Timestamp;
}
