//! Pure planners: values in, a plan out; no clock, no I/O, no chance.

mod choice;
mod walpath;

pub use choice::{BackupChoice, Candidate, ChoiceError, choose_backup};
pub use walpath::{StoredWal, WalGap, WalPlan, plan_wal};
