//! Places that keep objects, and wrappers around them.

mod directory;
mod memory;
mod retry;

#[cfg(feature = "s3")]
pub mod s3;

pub use directory::{DirectoryOptions, DirectoryTarget, DiskProbe, DiskStep};
pub use memory::MemoryTarget;
pub use retry::{RetryPolicy, Retrying};
