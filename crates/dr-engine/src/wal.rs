//! WAL into the archive and out of it.
//!
//! **push**: check → encode → create-only → durable → report. A crash before the object is created
//! leaves nothing; PostgreSQL keeps the segment and asks again. A crash after it is answered, at
//! the next try, by the same content under the same name.
//!
//! **fetch**: read whole and verified into a temporary name → rename. A crash leaves a temporary
//! file that PostgreSQL never asks for.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use dr_core::guard::Guard;
use dr_core::port::WalFault;
use dr_core::port::WalFormat;
use dr_core::{SegmentSize, SystemId, Timeline, WalName, WalSegment};
use dr_storage::{Stored, WalObject, WalStore};
use serde::Serialize;

use crate::error::EngineError;

/// Bytes read, checked and encoded at a time; a frame of a WAL object.
const PIECE: usize = 256 << 10;

/// The largest `.history` or `.backup` file that is taken; real ones have a few hundred bytes.
const SMALL_FILE_LIMIT: u64 = 1 << 20;

/// The archive of one cluster, and what its WAL looks like.
#[derive(Debug)]
pub struct Archive<'a> {
    /// Where WAL is kept.
    pub store: WalStore,
    /// The format of segments.
    pub format: &'a dyn WalFormat,
    /// The cluster whose WAL is taken.
    pub system_id: SystemId,
    /// Its segment size.
    pub segment_size: SegmentSize,
}

/// What a push did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PushReport {
    /// The file.
    pub name: String,
    /// Bytes read.
    pub bytes: u64,
    /// Whether it was there before, with the same content.
    pub was_stored: bool,
}

/// What a fetch did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum FetchOutcome {
    /// The file is in place, whole and verified.
    Delivered {
        /// Bytes written.
        bytes: u64,
        /// Whether the incomplete last segment of its timeline was delivered.
        partial: bool,
    },
    /// A listing proves that the archive does not have it, nor anything after it.
    Absent,
}

impl Archive<'_> {
    /// Archives the file at `path`. `Ok` means that it is durable.
    pub async fn push(&self, path: &Path) -> Result<PushReport, EngineError> {
        let file_name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let name = WalName::parse(&file_name, self.segment_size)
            .map_err(|_| EngineError::Wal { source: WalFault::BadName { name: file_name.clone() } })?;
        let (stored, bytes) = match name {
            WalName::Segment(_) | WalName::Partial(_) => {
                let object = self.encode(path, &name)?;
                let doing = format!("cannot archive {file_name}");
                (self.store.store(object).await.map_err(EngineError::repo(doing))?, self.segment_size.bytes())
            }
            WalName::History(_) | WalName::Label(..) => {
                let content = read_small(path)?;
                let doing = format!("cannot archive {file_name}");
                let stored =
                    self.store.store_small(&name, &content).await.map_err(EngineError::repo(doing))?;
                (stored, content.len() as u64)
            }
        };
        Ok(PushReport { name: file_name, bytes, was_stored: stored == Stored::Already })
    }

    /// Reads a segment once: each piece is checked, digested, compressed and sealed while it is in
    /// the cache.
    fn encode(&self, path: &Path, name: &WalName) -> Result<WalObject, EngineError> {
        let file_name = name.file_name(self.segment_size);
        let mut file = File::open(path).map_err(EngineError::file("open", path))?;
        let found = file.metadata().map_err(EngineError::file("look at", path))?.len();
        if found != self.segment_size.bytes() {
            let expected = self.segment_size.bytes();
            return Err(EngineError::Wal {
                source: WalFault::BadLength { name: file_name, found, expected },
            });
        }
        let wal = |source| EngineError::Wal { source };
        let mut inspector = self.format.inspect(name, self.segment_size, self.system_id).map_err(wal)?;
        let doing = || format!("cannot encode {file_name}");
        let mut encoder = self.store.encoder(name).map_err(EngineError::repo(doing()))?;
        let mut piece = vec![0; PIECE];
        for _ in 0..self.segment_size.bytes() / PIECE as u64 {
            file.read_exact(&mut piece).map_err(EngineError::file("read", path))?;
            inspector.feed(&piece).map_err(wal)?;
            encoder.feed(&piece).map_err(EngineError::repo(doing()))?;
        }
        let facts = inspector.finish().map_err(wal)?;
        encoder.finish(facts.filled_to).map_err(EngineError::repo(doing()))
    }

    /// Fetches the file that PostgreSQL asks for into `destination`.
    ///
    /// [`FetchOutcome::Absent`] is a proof; every doubt is an error.
    pub async fn fetch(&self, file_name: &str, destination: &Path) -> Result<FetchOutcome, EngineError> {
        let name = WalName::parse(file_name, self.segment_size)
            .map_err(|_| EngineError::Wal { source: WalFault::BadName { name: file_name.to_owned() } })?;
        match self.fetch_once(&name, destination).await {
            Err(error) if is_missing(&error) => {
                if !Guard::FetchProvesAbsence.holds() || self.is_beyond_frontier(&name).await? {
                    return Ok(FetchOutcome::Absent);
                }
                // It may have been archived since it was asked for, which is the usual case of a
                // standby that polls. What is still missing now, after a later file was listed, is
                // a hole.
                self.fetch_once(&name, destination).await
            }
            other => other,
        }
    }

    async fn fetch_once(&self, name: &WalName, destination: &Path) -> Result<FetchOutcome, EngineError> {
        let place =
            if Guard::FetchWholeFile.holds() { temporary(destination) } else { destination.to_owned() };
        let mut out = File::create(&place).map_err(EngineError::file("create", &place))?;
        let fetched = self.store.fetch(name, &mut out).await;
        match fetched {
            Ok(fetched) => {
                out.flush().map_err(EngineError::file("write", &place))?;
                drop(out);
                put_in_place(&place, destination)?;
                Ok(FetchOutcome::Delivered { bytes: fetched.bytes, partial: fetched.partial })
            }
            Err(error) => {
                let _ = fs::remove_file(&place);
                let doing = format!("cannot deliver {}", name.file_name(self.segment_size));
                Err(EngineError::Repo { doing, source: error })
            }
        }
    }

    /// Whether a listing proves that neither this file nor anything after it on its timeline is
    /// archived. A segment that is missing while a later one is there is a hole, not the end.
    async fn is_beyond_frontier(&self, name: &WalName) -> Result<bool, EngineError> {
        let list = |timeline: Timeline| {
            let doing = format!("cannot list the archived WAL of timeline {timeline}");
            async move { self.store.segments(timeline).await.map_err(EngineError::repo(doing)) }
        };
        match name {
            WalName::Segment(wanted) | WalName::Partial(wanted) => {
                let listed = list(wanted.timeline).await?;
                Ok(listed.iter().all(|s| s.segment.number < wanted.number))
            }
            WalName::History(timeline) => {
                let doing = "cannot list the archived timelines";
                let listed = self.store.timelines().await.map_err(EngineError::repo(doing))?;
                Ok(!listed.contains(timeline) || self.has_no_history(*timeline).await?)
            }
            // PostgreSQL asks for labels only by name; they have no frontier.
            WalName::Label(WalSegment { .. }, _) => Ok(true),
        }
    }

    async fn has_no_history(&self, timeline: Timeline) -> Result<bool, EngineError> {
        let doing = format!("cannot read the history of timeline {timeline}");
        Ok(self.store.history(timeline).await.map_err(EngineError::repo(doing))?.is_none())
    }
}

fn is_missing(error: &EngineError) -> bool {
    dr_core::Classified::class(error) == dr_core::ErrorClass::Missing
}

fn read_small(path: &Path) -> Result<Vec<u8>, EngineError> {
    let file = File::open(path).map_err(EngineError::file("open", path))?;
    let mut content = Vec::new();
    file.take(SMALL_FILE_LIMIT + 1).read_to_end(&mut content).map_err(EngineError::file("read", path))?;
    if content.len() as u64 > SMALL_FILE_LIMIT {
        let name = path.display().to_string();
        let found = content.len() as u64;
        return Err(EngineError::Wal {
            source: WalFault::BadLength { name, found, expected: SMALL_FILE_LIMIT },
        });
    }
    Ok(content)
}

fn temporary(destination: &Path) -> PathBuf {
    let mut name = destination.as_os_str().to_owned();
    name.push(format!(".dr-{}", std::process::id()));
    PathBuf::from(name)
}

/// Renames a verified file to the name that PostgreSQL reads. It is not synced: PostgreSQL copies
/// what it needs, and asks again after a crash.
fn put_in_place(place: &Path, destination: &Path) -> Result<(), EngineError> {
    if place == destination {
        return Ok(());
    }
    // The destination is PostgreSQL's own scratch name (pg_wal/RECOVERYXLOG), made to be replaced.
    // tidy: allow(rename): PostgreSQL asks again after a crash
    rustix::fs::rename(place, destination)
        .map_err(|errno| EngineError::file("rename", place)(std::io::Error::from(errno)))
}
