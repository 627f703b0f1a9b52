//! How we know that it works: checks that can fail.
#![forbid(unsafe_code)]

mod check;
mod verify;

pub use check::{CheckReport, check};
pub use verify::{BackupVerdict, Level, Problem, VerifyOptions, VerifyReport, verify};
