//! What passes between the walk, the workers and the collector.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

use dr_core::port::SourceFile;
use dr_storage::format::{BadPageRecord, FileEntry, MapRef};

use super::arrival::Lent;
use super::parent::Origin;
use super::stretch::StretchOutput;

/// An entry of the parent and where it is from.
pub(super) type Before = Option<(FileEntry, Arc<Origin>)>;

/// A small file to copy.
pub(super) struct Small {
    pub number: u64,
    pub file: SourceFile,
    pub before: Before,
    /// What arrived with it; `None`: it is opened.
    pub content: Option<Lent>,
}

/// Work for one worker.
pub(super) enum Task {
    /// Small files, stored side by side in frames.
    Bundle(Vec<Small>),
    /// One stretch of a large file, with its content if that arrived with it.
    Stretch { number: u64, unit: u32, file: Arc<SourceFile>, before: Arc<Before>, content: Option<Lent> },
    /// Close the open pack and meet the others at the barrier.
    Flush(Arc<Barrier>),
}

/// News for the collector. `number` counts the entries in file order.
pub(super) enum News {
    /// An entry that is complete.
    Ready { number: u64, entry: FileEntry, bad: Vec<BadPageRecord> },
    /// The file has vanished; replay deletes it too.
    Vanished { number: u64 },
    /// A large file of `units` stretches follows.
    Begin { number: u64, file: Arc<SourceFile>, units: u32 },
    /// One stretch of it.
    Unit {
        number: u64,
        unit: u32,
        output: Box<StretchOutput>,
        reference: Option<MapRef>,
        first_block: Option<u32>,
    },
    /// Close what is open and record how far the backup is; answered on the channel.
    Point(std::sync::mpsc::SyncSender<()>),
}

/// Counters that all parts add to.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Entries numbered by the walk.
    pub numbered: AtomicU64,
    /// Entries that the collector has put into the table.
    pub collected: AtomicU64,
    /// Bytes of files done, read or taken over.
    pub bytes_done: AtomicU64,
    /// Bytes read from the cluster.
    pub bytes_read: AtomicU64,
    /// Pages that were torn while read.
    pub torn: AtomicU64,
}

impl Counters {
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}
