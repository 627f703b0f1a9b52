//! A backup's writing side: packs that fill, and the commit.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use dr_core::BackupId;
use dr_core::guard::Guard;
use dr_core::port::Payload;
use dr_core::port::StorageError;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::frames::dek_info;
use super::{ClusterStore, cut, key};
use crate::crypto::{Aead, Secret, random, seal_dek};
use crate::error::RepoError;
use crate::format::{
    FrameRef, Manifest, ManifestBody, ManifestHead, PACK_HEADER_LEN, PACK_TARGET, PackHeader, PackInfo,
    PackKind, PackList, Point, SessionBegin, SessionRef, frame_aad, frame_nonce, pack_key,
};

/// Packs that are being stored at a time: with one open pack a worker this bounds the memory.
const UPLOADS: usize = 2;

/// A pack is built from chunks of this size: a vector of 32 MiB would be mapped and unmapped by
/// the allocator for each pack.
const CHUNK: usize = 4 << 20;

/// A frame is stored raw when compression saves less than one part in this many.
const WORTH: usize = 32;

/// A session that writes one backup. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct SessionWriter {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: ClusterStore,
    id: BackupId,
    dek: Secret,
    sealed_dek: Vec<u8>,
    handle: Handle,
    slots: Arc<Semaphore>,
    seqs: [AtomicU32; 3],
    uploads: Mutex<JoinSet<Result<PackInfo, RepoError>>>,
    settled: Mutex<Vec<PackInfo>>,
    stored: Arc<AtomicU64>,
}

impl SessionWriter {
    pub(super) async fn begin(
        store: ClusterStore,
        id: BackupId,
        begin: SessionBegin,
    ) -> Result<Self, RepoError> {
        // Without the digest key nothing that is written could be compared later.
        store.repo.digest_key("taking a backup")?;
        let text = serde_json::to_vec(&begin).unwrap_or_default();
        store.repo.create(&store.name(&format!("session/{id}/begin")), text.into()).await?;
        let dek = Secret(random());
        let descriptor = store.repo.descriptor();
        let mut sealed_dek = Vec::new();
        if descriptor.is_encrypted() {
            let public = descriptor.public_key_bytes()?;
            sealed_dek = seal_dek(&public, &dek_info(&store, id), &dek)?.to_vec();
            let name = store.name(&format!("session/{id}/dek-{}", descriptor.key_epoch));
            store.repo.create(&name, sealed_dek.clone().into()).await?;
        }
        let inner = Inner {
            store,
            id,
            dek,
            sealed_dek,
            handle: Handle::current(),
            slots: Arc::new(Semaphore::new(UPLOADS)),
            seqs: Default::default(),
            uploads: Mutex::default(),
            settled: Mutex::default(),
            stored: Arc::default(),
        };
        Ok(SessionWriter { inner: Arc::new(inner) })
    }

    /// The backup that it writes.
    pub fn id(&self) -> BackupId {
        self.inner.id
    }

    /// A writer of packs of one kind, for one worker thread.
    pub fn pack_writer(&self, kind: PackKind) -> PackWriter {
        PackWriter::new(self.clone(), kind)
    }

    /// Bytes stored so far.
    pub fn stored(&self) -> u64 {
        self.inner.stored.load(Ordering::Relaxed)
    }

    /// Waits until every pack handed over so far is durable, and lists all of them.
    pub async fn settle(&self) -> Result<Vec<PackInfo>, RepoError> {
        let bug = || RepoError::Bug { what: "an upload panicked".into() };
        let mut uploads = std::mem::take(&mut *self.inner.uploads.lock().map_err(|_| bug())?);
        while let Some(done) = uploads.join_next().await {
            let info = done.map_err(|_| bug())??;
            self.inner.settled.lock().map_err(|_| bug())?.push(info);
        }
        let mut packs = self.inner.settled.lock().map_err(|_| bug())?.clone();
        packs.sort_unstable_by_key(|pack| (pack.kind, pack.seq));
        Ok(packs)
    }

    /// Records how far the backup is. What it names is durable before it is put.
    pub async fn put_point(&self, number: u32, point: &Point) -> Result<(), RepoError> {
        let packs = self.settle().await?;
        let body = serde_json::to_vec(&Point { packs, ..point.clone() }).unwrap_or_default();
        let store = &self.inner.store;
        let key = store.repo.metadata_key("taking a backup")?;
        let bytes = store.document(3, self.inner.id, number).encode(key, &[], &body)?;
        store.repo.create(&store.point_name(self.inner.id, number), bytes.into()).await
    }

    /// Commits the backup: everything durable, the list of packs, then the manifest, create-only.
    ///
    /// An unclear answer is resolved by reading back. After an error nothing is listed.
    pub async fn commit(
        &self,
        mut head: ManifestHead,
        mut body: ManifestBody,
    ) -> Result<Manifest, RepoError> {
        let store = &self.inner.store;
        let id = self.inner.id;
        if !Guard::ManifestLast.holds() {
            self.put_manifest(&head, &body).await?;
        }
        let packs = self.settle().await?;
        let key = store.repo.metadata_key("taking a backup")?;
        let list = serde_json::to_vec(&PackList { packs }).unwrap_or_default();
        let list = store.document(2, id, 0).encode(key, &[], &list)?;
        let own = cut(&blake3::hash(&list));
        self.put_or_compare(&store.name(&format!("session/{id}/packs")), list).await?;
        for session in &mut body.sessions {
            session.packs = if session.id == id { own } else { self.list_digest(session.id).await? };
        }
        head.sealed_key = hex::encode(&self.inner.sealed_dek);
        head.key_epoch = store.repo.descriptor().key_epoch;
        head.previous = self.previous().await?;
        if Guard::ManifestLast.holds() {
            self.put_manifest(&head, &body).await?;
        }
        Ok(Manifest { head, body })
    }

    async fn put_manifest(&self, head: &ManifestHead, body: &ManifestBody) -> Result<(), RepoError> {
        let store = &self.inner.store;
        let key = store.repo.metadata_key("taking a backup")?;
        let (head, body) =
            (serde_json::to_vec(head).unwrap_or_default(), serde_json::to_vec(body).unwrap_or_default());
        let bytes = store.document(1, self.inner.id, 0).encode(key, &head, &body)?;
        let name = store.name(&format!("manifest/{}", self.inner.id));
        self.put_or_compare(&name, bytes).await
    }

    async fn put_or_compare(&self, name: &str, bytes: Vec<u8>) -> Result<(), RepoError> {
        let repo = &self.inner.store.repo;
        match repo.create(name, bytes.clone().into()).await {
            // It may have happened: what is there decides.
            Err(RepoError::Storage {
                source: StorageError::Indeterminate { .. } | StorageError::AlreadyExists { .. },
            }) => {
                let found = repo.get(name).await?;
                if found == bytes { Ok(()) } else { Err(RepoError::Fenced { what: name.to_owned() }) }
            }
            other => other,
        }
    }

    /// The digest of an older session's list of packs.
    async fn list_digest(&self, id: BackupId) -> Result<crate::format::Digest, RepoError> {
        let store = &self.inner.store;
        match store.repo.get(&store.name(&format!("session/{id}/packs"))).await {
            Ok(bytes) => Ok(cut(&blake3::hash(&bytes))),
            // An interrupted session has no list yet: its last point becomes it, unchangeable.
            Err(RepoError::Storage { source: StorageError::NotFound { .. } }) => self.close_session(id).await,
            Err(error) => Err(error),
        }
    }

    async fn close_session(&self, id: BackupId) -> Result<crate::format::Digest, RepoError> {
        let store = &self.inner.store;
        let packs = store.packs(id).await?;
        let key = store.repo.metadata_key("taking a backup")?;
        let list =
            store.document(2, id, 0).encode(key, &[], &serde_json::to_vec(&packs).unwrap_or_default())?;
        let name = store.name(&format!("session/{id}/packs"));
        match self.put_or_compare(&name, list.clone()).await {
            Ok(()) => Ok(cut(&blake3::hash(&list))),
            // Another backup closed the same session: sealed again, the same list has other bytes.
            Err(RepoError::Fenced { .. }) if store.packs(id).await? == packs => store.list_digest(id).await,
            Err(error) => Err(error),
        }
    }

    /// The newest manifest before this one, and the digest of its object.
    async fn previous(&self) -> Result<Option<(BackupId, crate::format::Digest)>, RepoError> {
        let store = &self.inner.store;
        let Some(last) = store.catalogue().await?.heads.pop() else { return Ok(None) };
        let bytes = store.repo.get(&store.name(&format!("manifest/{}", last.id))).await?;
        Ok(Some((last.id, cut(&blake3::hash(&bytes)))))
    }
}

impl SessionRef {
    /// A session whose list of packs is looked up at the commit.
    pub fn unresolved(id: BackupId) -> Self {
        SessionRef { id, packs: crate::format::Digest([0; 16]) }
    }
}

/// Fills packs of one kind; for one thread, which may block.
pub struct PackWriter {
    session: SessionWriter,
    kind: PackKind,
    zstd: zstd::bulk::Compressor<'static>,
    frame: Vec<u8>,
    open: Option<OpenPack>,
}

impl std::fmt::Debug for PackWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackWriter({:?})", self.kind)
    }
}

struct OpenPack {
    header: PackHeader,
    aead: Option<Aead>,
    full: Vec<Bytes>,
    chunk: Vec<u8>,
    len: u64,
    hasher: blake3::Hasher,
}

impl PackWriter {
    fn new(session: SessionWriter, kind: PackKind) -> Self {
        let level = session.inner.store.repo.descriptor().compression_level;
        let zstd = zstd::bulk::Compressor::new(level).expect("zstd allocates its context");
        PackWriter { session, kind, zstd, frame: Vec::new(), open: None }
    }

    /// Compresses, seals and appends a frame. Blocks while too many packs are being stored.
    pub fn append(&mut self, raw: &[u8]) -> Result<FrameRef, RepoError> {
        if raw.len() > super::frames::MAX_RAW as usize {
            return Err(RepoError::Bug { what: "a frame is larger than a reader accepts".into() });
        }
        self.compress(raw)?;
        if self.open.is_none() {
            self.open = Some(self.begin_pack());
        }
        let Some(pack) = &mut self.open else {
            return Err(RepoError::Bug { what: "no pack is open".into() });
        };
        let offset = pack.len;
        if let Some(aead) = &pack.aead {
            aead.seal(
                frame_nonce(offset),
                &frame_aad(&pack.header, offset, raw.len() as u32),
                &mut self.frame,
            )?;
        }
        pack.push(&self.frame);
        let frame = FrameRef {
            session: self.session.id(),
            seq: pack.header.seq,
            offset: offset as u32,
            stored: self.frame.len() as u32,
            raw: raw.len() as u32,
        };
        if pack.len >= PACK_TARGET as u64 {
            self.flush()?;
        }
        Ok(frame)
    }

    /// Appends content of any length as frames of at most one extent.
    pub fn append_long(&mut self, raw: &[u8]) -> Result<Vec<FrameRef>, RepoError> {
        raw.chunks(crate::format::EXTENT_LEN).map(|chunk| self.append(chunk)).collect()
    }

    /// The frame's plaintext: codec byte and payload.
    fn compress(&mut self, raw: &[u8]) -> Result<(), RepoError> {
        let bound = zstd::zstd_safe::compress_bound(raw.len()) + 1;
        self.frame.resize(bound, 0);
        let failed = |error: std::io::Error| RepoError::Bug { what: format!("compression failed: {error}") };
        let len = self.zstd.compress_to_buffer(raw, &mut self.frame[1..]).map_err(failed)?;
        if len + raw.len() / WORTH < raw.len() {
            self.frame[0] = 1;
            self.frame.truncate(len + 1);
        } else {
            self.frame.truncate(1);
            self.frame[0] = 0;
            self.frame.extend_from_slice(raw);
        }
        Ok(())
    }

    fn begin_pack(&self) -> OpenPack {
        let inner = &self.session.inner;
        let seq = inner.seqs[self.kind as usize - 1].fetch_add(1, Ordering::Relaxed);
        let repo = &inner.store.repo;
        let header = PackHeader {
            kind: self.kind,
            suite: repo.descriptor().suite.code(),
            repository: repo.id(),
            system_id: inner.store.system_id,
            session: inner.id,
            seq,
        };
        let secret = match self.kind {
            PackKind::Data => Some(&inner.dek),
            PackKind::Meta | PackKind::Page => repo.keys().metadata.as_ref(),
        };
        let secret = secret.filter(|_| repo.descriptor().is_encrypted());
        let aead = secret.map(|secret| Aead::new(&pack_key(secret, &header)));
        let mut pack = OpenPack {
            header,
            aead,
            full: Vec::new(),
            chunk: Vec::new(),
            len: 0,
            hasher: blake3::Hasher::new(),
        };
        pack.push(&header.encode());
        debug_assert_eq!(pack.len, PACK_HEADER_LEN as u64);
        pack
    }

    /// Closes the open pack and hands it over to be stored.
    pub fn flush(&mut self) -> Result<(), RepoError> {
        let Some(mut pack) = self.open.take() else { return Ok(()) };
        pack.push(crate::format::PACK_END);
        let inner = self.session.inner.clone();
        let digest = cut(&pack.hasher.finalize());
        let info = PackInfo { kind: self.kind, seq: pack.header.seq, len: pack.len, digest };
        pack.full.push(std::mem::take(&mut pack.chunk).into());
        let payload = Payload::new(pack.full);
        let name = key(&inner.store.name(&info.name(inner.id)))?;
        let bug = || RepoError::Bug { what: "the uploads are gone".into() };
        let permit = inner.handle.block_on(inner.slots.clone().acquire_owned()).map_err(|_| bug())?;
        let target = inner.store.repo.target().clone();
        let stored = inner.stored.clone();
        let upload = async move {
            let _permit = permit;
            target.create(&name, payload).await.map_err(RepoError::from_storage)?;
            stored.fetch_add(info.len, Ordering::Relaxed);
            Ok(info)
        };
        let mut uploads = inner.uploads.lock().map_err(|_| bug())?;
        uploads.spawn_on(upload, &inner.handle);
        // An upload that failed is told as early as possible.
        while let Some(done) = uploads.try_join_next() {
            let info = done.map_err(|_| bug())??;
            inner.settled.lock().map_err(|_| bug())?.push(info);
        }
        Ok(())
    }
}

impl OpenPack {
    fn push(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        if self.chunk.len() + bytes.len() > self.chunk.capacity() {
            let capacity = CHUNK.max(bytes.len());
            let full = std::mem::replace(&mut self.chunk, Vec::with_capacity(capacity));
            if !full.is_empty() {
                self.full.push(full.into());
            }
        }
        self.chunk.extend_from_slice(bytes);
        self.len += bytes.len() as u64;
    }
}
