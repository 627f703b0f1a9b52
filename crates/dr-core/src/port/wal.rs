//! Checks of WAL segments, for jobs that know nothing of PostgreSQL's bytes.

use std::fmt;

use thiserror::Error;

use crate::error::{Classified, ErrorClass};
use crate::id::SystemId;
use crate::lsn::{Lsn, SegmentSize, Timeline, WalName};

/// What an inspected segment says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentFacts {
    /// The cluster that wrote it.
    pub system_id: SystemId,
    /// The timeline of its first page; lower than the name's just after a promotion.
    pub timeline: Timeline,
    /// Its size.
    pub size: SegmentSize,
    /// The LSN up to which pages are filled; the segment's end, or less after a forced switch.
    pub filled_to: Lsn,
}

/// Why bytes are not the segment that they are said to be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WalFault {
    /// The name is not one of PostgreSQL's.
    #[error("{name:?} is not the name of a WAL file")]
    BadName {
        /// The name.
        name: String,
    },
    /// Wrong length.
    #[error("WAL file {name} has {found} bytes instead of {expected}")]
    BadLength {
        /// The file.
        name: String,
        /// Its bytes.
        found: u64,
        /// The bytes that it should have.
        expected: u64,
    },
    /// A page or its header is wrong.
    #[error("WAL file {name} is damaged at byte {offset}: {reason}")]
    BadPage {
        /// The file.
        name: String,
        /// Where the page begins.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// Another cluster wrote it.
    #[error("WAL file {name} was written by cluster {found}, but this archive is of cluster {expected}")]
    WrongCluster {
        /// The file.
        name: String,
        /// The cluster in the file.
        found: SystemId,
        /// The cluster expected.
        expected: SystemId,
    },
    /// Another position or timeline than its name says.
    #[error("WAL file {name} holds other WAL than its name says: {reason}")]
    WrongPlace {
        /// The file.
        name: String,
        /// What differs.
        reason: String,
    },
}

impl Classified for WalFault {
    fn class(&self) -> ErrorClass {
        match self {
            WalFault::BadName { .. } => ErrorClass::Invalid,
            WalFault::WrongCluster { .. } => ErrorClass::Fenced,
            _ => ErrorClass::Corrupt,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            WalFault::BadName { .. } => "wal-bad-name",
            WalFault::BadLength { .. } => "wal-bad-length",
            WalFault::BadPage { .. } => "wal-bad-page",
            WalFault::WrongCluster { .. } => "wal-wrong-cluster",
            WalFault::WrongPlace { .. } => "wal-wrong-place",
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            WalFault::BadName { .. } => "archive_command passes the path as %p: `dr wal push %p`.".into(),
            WalFault::WrongCluster { .. } => "This server archives into another cluster's archive: check the configuration file that it uses.".into(),
            _ => "Nothing was stored. PostgreSQL keeps the file and tries again; check the disk that holds pg_wal.".into(),
        })
    }
}

/// Knows the WAL format. Pure: no I/O.
pub trait WalFormat: Send + Sync + fmt::Debug {
    /// Begins the inspection of the file `name` of the cluster `expected`.
    ///
    /// A segment is fed whole pages in order; the answer of
    /// [`finish`](SegmentInspector::finish) is the verdict.
    fn inspect(
        &self,
        name: &WalName,
        size: SegmentSize,
        expected: SystemId,
    ) -> Result<Box<dyn SegmentInspector>, WalFault>;
}

/// The inspection of one segment, piece by piece.
pub trait SegmentInspector: Send {
    /// Takes the next bytes: a multiple of the WAL page size (8 KiB) except for the last piece.
    fn feed(&mut self, bytes: &[u8]) -> Result<(), WalFault>;

    /// Ends the inspection after all bytes.
    fn finish(self: Box<Self>) -> Result<SegmentFacts, WalFault>;
}
