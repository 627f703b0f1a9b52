//! The jobs of `dr`: what happens, in what order.
//!
//! Each job is a plan and its execution. The top of each job's file is its checklist, with the
//! commit point marked and what a crash before it leaves. PostgreSQL is reached through the ports
//! of `dr-core` alone.
#![forbid(unsafe_code)]

pub mod backup;
pub mod catalogue;
mod context;
mod error;
mod failure;
mod meta;
mod pace;
pub mod restore;
pub mod standby;
mod tree;
pub mod wal;

pub use context::{Cancel, Context, JobLog, StageClock, chain};
pub use error::EngineError;
pub use tree::{TreeCounters, read_back};
