//! The relation catalogue: which file belongs to which relation.
//!
//! It is listed when a backup begins and again when it ends, since a relation that is rewritten
//! meanwhile has two files. Rows come sorted and are cut into parts where a name says so; a part
//! that is stored already, by the backup before or by the first listing, is stored once. So memory
//! holds a part and the references, whatever the number of relations.

use std::collections::{HashMap, HashSet};

use dr_core::port::{RelationEntry, SourceError};
use dr_storage::format::{CataloguePart, Digest, EXTENT_LEN, Manifest};
use dr_storage::{ClusterStore, PackKind, PackWriter, RepoError, Repository, SessionWriter};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use tokio::sync::mpsc;

use crate::context::Cancel;
use crate::error::EngineError;

/// Parts between the listing and the thread that stores them.
const QUEUE: usize = 2;

/// What a row may take: three names of at most 63 bytes of any encoding, escaped, and numbers.
const MAX_ROW: usize = 8 << 10;

/// Collects the parts of a backup's catalogue.
#[derive(Debug)]
pub(crate) struct CatalogueWriter {
    known: HashMap<Digest, CataloguePart>,
    listed: HashSet<Digest>,
    parts: Vec<CataloguePart>,
}

impl CatalogueWriter {
    /// A catalogue that may refer to parts that are stored already.
    pub fn new(known: impl Iterator<Item = CataloguePart>) -> Self {
        let known = known.map(|part| (part.digest, part)).collect();
        CatalogueWriter { known, listed: HashSet::new(), parts: Vec::new() }
    }

    /// Adds a listing, sorted.
    pub async fn add(
        self,
        repo: &Repository,
        session: &SessionWriter,
        cancel: &Cancel,
        mut rows: BoxStream<'_, Result<RelationEntry, SourceError>>,
    ) -> Result<Self, EngineError> {
        let (parts, queue) = mpsc::channel(QUEUE);
        let (writer, hasher) = (session.pack_writer(PackKind::Meta), repo.clone());
        let storing = tokio::task::spawn_blocking(move || self.store(writer, &hasher, queue));
        let cut = async {
            let mut part = Vec::with_capacity(EXTENT_LEN);
            while let Some(row) = rows.next().await {
                let row = row.map_err(EngineError::source("cannot list the relations"))?;
                let ends = repo.ends_catalogue_part(&row);
                serde_json::to_writer(&mut part, &row).map_err(|_| unwritable())?;
                part.push(b'\n');
                if ends || part.len() + MAX_ROW > EXTENT_LEN {
                    cancel.check()?;
                    // Nobody takes it any more: the thread's own error says why.
                    if parts.send(std::mem::take(&mut part)).await.is_err() {
                        return Ok(());
                    }
                }
            }
            if !part.is_empty() {
                let _ = parts.send(part).await;
            }
            Ok(())
        };
        let listed: Result<(), EngineError> = cut.await;
        drop(parts);
        let stored = storing.await.map_err(|_| panicked())?;
        listed?;
        stored.map_err(EngineError::repo("cannot store the relation catalogue"))
    }

    fn store(
        mut self,
        mut writer: PackWriter,
        repo: &Repository,
        mut queue: mpsc::Receiver<Vec<u8>>,
    ) -> Result<Self, RepoError> {
        while let Some(raw) = queue.blocking_recv() {
            let digest = repo.digest(&raw);
            if !self.listed.insert(digest) {
                continue;
            }
            let part = match self.known.get(&digest) {
                Some(part) => *part,
                None => CataloguePart { digest, frame: writer.append(&raw)? },
            };
            self.parts.push(part);
        }
        writer.flush()?;
        Ok(self)
    }

    /// All parts.
    pub fn into_parts(self) -> Vec<CataloguePart> {
        self.parts
    }
}

fn panicked() -> EngineError {
    EngineError::Bug { what: "storing the catalogue panicked".into() }
}

fn unwritable() -> EngineError {
    EngineError::repo("cannot write a row of the relation catalogue")(RepoError::Bug {
        what: "a row does not become JSON".into(),
    })
}

/// Shows every row of a backup's catalogue to `look`, part by part. A row of a part that changed
/// while the backup ran comes twice.
pub async fn visit(
    store: &ClusterStore,
    manifest: &Manifest,
    mut look: impl FnMut(RelationEntry),
) -> Result<(), EngineError> {
    let doing = "cannot read the relation catalogue";
    let damaged = || EngineError::repo(doing)(RepoError::unreadable_part("the relation catalogue"));
    let reader = store.reader().await.map_err(EngineError::repo(doing))?;
    for part in &manifest.body.catalogue {
        let raw = reader.frame(PackKind::Meta, &part.frame).await.map_err(EngineError::repo(doing))?;
        if store.repository().digest(&raw) != part.digest {
            return Err(damaged());
        }
        for line in raw.split_inclusive(|byte| *byte == b'\n') {
            look(serde_json::from_slice(line).map_err(|_| damaged())?);
        }
    }
    let mut early = Vec::new();
    for frame in &manifest.body.relations {
        early.extend(reader.frame(PackKind::Meta, frame).await.map_err(EngineError::repo(doing))?);
    }
    if !early.is_empty() {
        let rows: Vec<RelationEntry> = serde_json::from_slice(&early).map_err(|_| damaged())?;
        rows.into_iter().for_each(look);
    }
    Ok(())
}

/// The whole catalogue, sorted, each row once.
pub async fn read(store: &ClusterStore, manifest: &Manifest) -> Result<Vec<RelationEntry>, EngineError> {
    let mut rows = Vec::new();
    visit(store, manifest, |row| rows.push(row)).await?;
    rows.sort_unstable();
    rows.dedup();
    Ok(rows)
}
