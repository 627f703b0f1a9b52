//! The words and rules of `dr`: vocabulary, ports and pure planners.
//!
//! Nothing in this crate performs I/O, starts a runtime, or reads a clock; each function is a
//! function of its arguments. Adapters (`dr-storage`, `dr-pg`) implement the traits in [`port`],
//! jobs (`dr-engine`) call them, and the planners in [`plan`] decide.
#![forbid(unsafe_code)]

pub mod error;
pub mod event;
pub mod guard;
pub mod history;
pub mod id;
pub mod journal;
pub mod lsn;
pub mod moment;
pub mod objective;
pub mod path;
pub mod plan;
pub mod port;
pub mod size;

pub use error::{Classified, ErrorClass};
pub use history::TimelineHistory;
pub use id::{BackupId, SystemId};
pub use lsn::{Lsn, SegmentSize, Timeline, WalName, WalSegment};

/// A point on the UTC time line (nanosecond resolution).
pub use jiff::Timestamp;
