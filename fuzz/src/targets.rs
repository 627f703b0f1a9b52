//! The readers.

mod agent;
mod postgres;
mod repository;
mod text;

use crate::Target;

/// Every reader of bytes that come from a disk, a store or a person.
pub fn all() -> Vec<Target> {
    [agent::targets(), postgres::targets(), repository::targets(), text::targets()]
        .into_iter()
        .flatten()
        .collect()
}
