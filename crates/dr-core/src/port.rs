//! The seams: every trait that an adapter implements, one a file.
//!
//! Each port's documentation is its contract: durability, atomicity, cancel safety, errors by
//! class. `dr-storage::conformance` holds the suite that every storage target runs.

mod clock;
mod cluster;
mod events;
mod finding;
mod host;
mod keys;
mod pages;
mod primary;
mod source;
mod storage;
mod wal;

pub use clock::Clock;
pub use cluster::{
    ClusterError, ControlFacts, Instance, InstanceStatus, RecoveryEnd, RecoverySpec, RecoveryTarget,
    RunState, StandbySpec, TargetAction,
};
pub use events::{EventSink, NoEvents};
pub use finding::{Finding, Verdict};
pub use host::{HostFacts, HostFile, HostNeeds};
pub use keys::{KeyError, KeyProvider};
pub use pages::{BadPage, PageChecker};
pub use primary::{Canary, Follower, Primary, PrimaryState, SlotState};
pub use source::{
    BackupSession, BackupStart, BackupStop, ClusterDescription, DatabaseSource, FileKind, FileOpener,
    FileReader, FileStat, FileStream, RelationEntry, SourceError, SourceFile, TablespaceFacts,
};
pub use storage::{Capabilities, Key, ObjectInfo, Payload, StorageError, StorageTarget};
pub use wal::{SegmentFacts, SegmentInspector, WalFault, WalFormat};
