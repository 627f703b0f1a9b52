//! How `dr` speaks with PostgreSQL: files, pages, WAL, SQL, servers.
//!
//! Format facts come from PostgreSQL's own headers, named where they are used. Versions 15 to 18.

mod conn;
pub mod control;
pub mod history_files;
mod inspect;
mod instance;
mod local;
mod page;
mod primary;
mod process;
pub mod replication;
mod sql;
mod streamed;
mod wal;
mod walk;

pub use conn::{ChannelBindingMode, ConnInfo, Endpoint, Host, Negotiation, SessionKind, TlsMode, TlsOptions};
pub use inspect::{ServerFacts, find_servers, inspect};
pub use instance::{InstanceOptions, LocalInstance};
pub use local::{LocalSource, LocalSourceOptions, StandbyPolicy};
pub use page::PgPages;
pub use primary::PrimaryServer;
pub use process::find_bin_dir;
pub use streamed::{StreamSource, StreamSourceOptions};
pub use wal::PgWal;
pub use walk::TreeWalk;

/// The oldest major version that `dr` supports.
pub const OLDEST_MAJOR: u32 = 15;
/// The newest.
pub const NEWEST_MAJOR: u32 = 18;
