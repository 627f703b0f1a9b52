//! The collector: puts results back into file order and writes maps and tables.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use dr_core::BackupId;
use dr_core::port::SourceFile;
use dr_storage::format::{
    BadPageRecord, Content, Digest, EntryKind, FileEntry, MAX_SHARD_ENTRIES, MapRef, PrintsRef, STRETCH_LEN,
    Shard, ShardRef,
};
use dr_storage::{PackWriter, Repository};

use super::stretch::StretchOutput;
use super::task::{Counters, News};
use super::worker::entry_of;
use crate::error::EngineError;
use crate::failure::Failure;

/// A file whose stretches are still arriving.
struct Arriving {
    file: Arc<SourceFile>,
    units: Vec<Option<ArrivedUnit>>,
    missing: u32,
    vanished: bool,
}

struct ArrivedUnit {
    output: Box<StretchOutput>,
    reference: Option<MapRef>,
    first_block: Option<u32>,
}

enum Done {
    Entry(FileEntry, Vec<BadPageRecord>),
    Gone,
}

/// What a walk came to.
#[derive(Debug, Default)]
pub(super) struct Collected {
    /// The file table.
    pub shards: Vec<ShardRef>,
    /// All sessions that the table reaches.
    pub sessions: BTreeSet<BackupId>,
    /// Pages whose checksum is wrong.
    pub bad: Vec<BadPageRecord>,
    /// Regular files.
    pub files: u64,
    /// Bytes of regular files.
    pub bytes: u64,
    /// The path of the last entry.
    pub last_path: Option<String>,
}

/// In which order files are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// In the order of the table, whose parts are then written as they fill.
    Table,
    /// In the order of arrival: the whole table is kept in memory, some 200 bytes a file, and
    /// written when it is complete, or as far as it is when a point is recorded.
    Arrival,
}

/// Writes maps and tables in file order, whatever the order of the news.
pub(super) struct Collector {
    order: Order,
    repo: Repository,
    maps: PackWriter,
    prints: PackWriter,
    known: HashMap<Digest, ShardRef>,
    next: u64,
    arriving: BTreeMap<u64, Arriving>,
    done: BTreeMap<u64, Done>,
    entries: Vec<FileEntry>,
    collected: Collected,
    counters: Arc<Counters>,
}

/// What a point needs to be put: how far the walk is.
pub(super) type PointSink<'a> = &'a mut dyn FnMut(&Collected) -> Result<(), EngineError>;

impl Collector {
    pub fn new(
        repo: Repository,
        maps: PackWriter,
        prints: PackWriter,
        known: HashMap<Digest, ShardRef>,
        counters: Arc<Counters>,
        order: Order,
    ) -> Self {
        Collector {
            order,
            repo,
            maps,
            prints,
            known,
            next: 0,
            arriving: BTreeMap::new(),
            done: BTreeMap::new(),
            entries: Vec::new(),
            collected: Collected::default(),
            counters,
        }
    }

    /// Takes news until all senders are gone, and closes the table.
    pub fn run(
        mut self,
        news: &Receiver<News>,
        failure: &Failure,
        put_point: PointSink<'_>,
    ) -> Result<Collected, EngineError> {
        for message in news {
            // After a failure news are only drained.
            if failure.is_set() {
                continue;
            }
            if let Err(error) = self.take(message, put_point) {
                failure.set(error);
            }
        }
        if failure.is_set() {
            return Err(EngineError::Cancelled);
        }
        if !self.arriving.is_empty() || !self.done.is_empty() {
            return Err(EngineError::Bug { what: "the walk ended with files under way".into() });
        }
        self.close()?;
        Ok(self.collected)
    }

    fn take(&mut self, message: News, put_point: PointSink<'_>) -> Result<(), EngineError> {
        match message {
            News::Ready { number, entry, bad } => {
                self.done.insert(number, Done::Entry(entry, bad));
            }
            News::Vanished { number } => match self.arriving.get_mut(&number) {
                Some(arriving) => {
                    arriving.vanished = true;
                    self.arrived(number)?;
                }
                None => {
                    self.done.insert(number, Done::Gone);
                }
            },
            News::Begin { number, file, units } => {
                let slots = (0..units).map(|_| None).collect();
                self.arriving
                    .insert(number, Arriving { file, units: slots, missing: units, vanished: false });
            }
            News::Unit { number, unit, output, reference, first_block } => {
                let slot = self.arriving.get_mut(&number).and_then(|a| a.units.get_mut(unit as usize));
                let slot =
                    slot.ok_or_else(|| EngineError::Bug { what: "a stretch of an unknown file".into() })?;
                *slot = Some(ArrivedUnit { output, reference, first_block });
                self.arrived(number)?;
            }
            News::Point(answer) => {
                self.close()?;
                put_point(&self.collected)?;
                let _ = answer.send(());
            }
        }
        self.write_ready()
    }

    /// Counts a stretch of `number` as arrived, and finishes the file with its last one.
    fn arrived(&mut self, number: u64) -> Result<(), EngineError> {
        let Some(arriving) = self.arriving.get_mut(&number) else { return Ok(()) };
        arriving.missing -= 1;
        if arriving.missing > 0 {
            return Ok(());
        }
        let Some(arriving) = self.arriving.remove(&number) else { return Ok(()) };
        let done = if arriving.vanished { Done::Gone } else { self.finish_large(arriving)? };
        self.done.insert(number, done);
        Ok(())
    }

    /// Writes the maps of a large file and makes its entry.
    fn finish_large(&mut self, arriving: Arriving) -> Result<Done, EngineError> {
        let path = &arriving.file.path;
        let mut maps = Vec::with_capacity(arriving.units.len());
        let mut sessions: Vec<BackupId> = Vec::new();
        let mut bad = Vec::new();
        let mut size = 0u64;
        for unit in arriving.units.into_iter().flatten() {
            let len = unit.output.len;
            size += len as u64;
            bad.extend(unit.output.map.bad.iter().map(|mark| BadPageRecord {
                path: path.clone(),
                block: unit.first_block.unwrap_or(0) + u32::from(mark.page),
                found: mark.found,
                expected: mark.expected,
            }));
            for frame in &unit.output.map.frames {
                if !sessions.contains(&frame.session) {
                    sessions.push(frame.session);
                }
            }
            maps.push(self.write_map(*unit.output, unit.reference, path)?);
            // The file shrank while it was read: replay does the rest.
            if len < STRETCH_LEN {
                break;
            }
        }
        let mut entry = entry_of(&arriving.file, size);
        entry.content = Content::Stretches { maps, sessions };
        Ok(Done::Entry(entry, bad))
    }

    fn write_map(
        &mut self,
        output: StretchOutput,
        reference: Option<MapRef>,
        path: &str,
    ) -> Result<MapRef, EngineError> {
        if let Some(reference) = reference {
            return Ok(reference);
        }
        let doing = || format!("cannot store the map of {path}");
        let mut map = output.map;
        if let Some(prints) = output.prints {
            let bytes: Vec<u8> = prints.iter().flat_map(|print| print.to_le_bytes()).collect();
            map.prints = None;
            if !bytes.is_empty() {
                let frame = self.prints.append(&bytes).map_err(EngineError::repo(doing()))?;
                map.prints = Some(PrintsRef { frame, overrides: Vec::new() });
            }
        }
        let bytes = map.encode();
        let frame = self.maps.append(&bytes).map_err(EngineError::repo(doing()))?;
        Ok(MapRef { frame, digest: self.repo.digest(&bytes) })
    }

    /// Moves finished entries into the table, in order.
    fn write_ready(&mut self) -> Result<(), EngineError> {
        while let Some(done) = self.done.remove(&self.next) {
            self.next += 1;
            Counters::add(&self.counters.collected, 1);
            let Done::Entry(entry, bad) = done else { continue };
            self.collected.bad.extend(bad);
            if entry.kind == EntryKind::Regular {
                self.collected.files += 1;
                self.collected.bytes += entry.size;
            }
            if self.order == Order::Arrival {
                self.entries.push(entry);
                continue;
            }
            let ends = self.repo.ends_shard(&entry.path) || self.entries.len() + 1 >= MAX_SHARD_ENTRIES;
            self.collected.last_path = Some(entry.path.clone());
            self.entries.push(entry);
            if ends {
                self.write_shard()?;
            }
        }
        Ok(())
    }

    fn write_shard(&mut self) -> Result<(), EngineError> {
        let entries = std::mem::take(&mut self.entries);
        self.write_part(&entries)?;
        self.entries = entries;
        self.entries.clear();
        Ok(())
    }

    fn write_part(&mut self, entries: &[FileEntry]) -> Result<(), EngineError> {
        let Some(first) = entries.first() else { return Ok(()) };
        let first_path = first.path.clone();
        self.collected.sessions.extend(Shard::sessions(entries));
        let bytes = Shard::encode(entries);
        let digest = self.repo.digest(&bytes);
        let shard = match self.known.get(&digest) {
            Some(known) => known.clone(),
            None => {
                let doing = "cannot store the file table";
                let frame = self.maps.append(&bytes).map_err(EngineError::repo(doing))?;
                ShardRef { first_path, count: entries.len() as u32, frame, digest }
            }
        };
        // The frame that holds the table is in a session too.
        self.collected.sessions.insert(shard.frame.session);
        self.collected.shards.push(shard);
        Ok(())
    }

    /// Writes the table of all files that have arrived. Parts that are as they were at the last
    /// point are not stored again.
    fn write_table(&mut self) -> Result<(), EngineError> {
        let mut entries = std::mem::take(&mut self.entries);
        entries.sort_unstable_by(|a, b| dr_core::path::compare(&a.path, &b.path));
        if let Some(pair) = entries.windows(2).find(|pair| pair[0].path == pair[1].path) {
            let what = format!("{:?} arrived twice", pair[0].path);
            return Err(EngineError::Invalid { what, hint: "Run the backup again.".into() });
        }
        let before = std::mem::take(&mut self.collected.shards);
        self.known.extend(before.into_iter().map(|shard| (shard.digest, shard)));
        self.collected.last_path = entries.last().map(|entry| entry.path.clone());
        let mut from = 0;
        for at in 0..entries.len() {
            let ends = self.repo.ends_shard(&entries[at].path) || at + 1 - from >= MAX_SHARD_ENTRIES;
            if ends || at + 1 == entries.len() {
                self.write_part(&entries[from..=at])?;
                from = at + 1;
            }
        }
        self.entries = entries;
        Ok(())
    }

    /// Ends the open shard and hands all packs over.
    fn close(&mut self) -> Result<(), EngineError> {
        match self.order {
            Order::Table => self.write_shard()?,
            Order::Arrival => self.write_table()?,
        }
        let doing = "cannot store the file table";
        self.maps.flush().map_err(EngineError::repo(doing))?;
        self.prints.flush().map_err(EngineError::repo(doing))
    }
}
