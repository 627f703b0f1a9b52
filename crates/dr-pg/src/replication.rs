//! A client of the streaming replication protocol (manual, chapters 55.2 to 55.4).
//!
//! One [`ReplicationClient`] is one walsender of the server. Commands are simple queries; base
//! backups and WAL arrive as a copy stream. Every wait has a limit, and memory is bounded by one
//! message (at most [`MAX_MESSAGE`] bytes) and one read buffer.
//!
//! Cancel safety: receiving can be dropped at any await and called again, as all state is in the
//! client. Sending cannot: a message that was cut off ends the connection.

mod backup;
mod cancel;
mod client;
mod error;
mod messages;
mod patience;
mod stream;
mod tar;
mod wire;

pub use backup::{ArchiveStart, BackupEnd, BackupEvent, BaseBackup, BaseBackupOptions, BaseBackupStart};
pub use cancel::Canceller;
pub use client::{Identity, ReplicationClient, ReplicationMode, SlotFacts};
pub use error::ReplicationError;
pub use patience::Patience;
pub use stream::{StreamEnd, StreamEvent, WalStream};
pub use tar::{TarEntry, TarError, TarEvent, TarKind, TarReader};
pub use wire::MAX_MESSAGE;
