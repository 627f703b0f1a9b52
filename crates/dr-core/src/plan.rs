//! Pure planners: values in, a plan out; no clock, no I/O, no chance.

mod choice;
mod slots;
mod walpath;

pub use choice::{BackupChoice, Candidate, ChoiceError, choose_backup};
pub use slots::{WalRoom, judge_slots};
pub use walpath::{StoredWal, WalGap, WalPlan, plan_wal};
