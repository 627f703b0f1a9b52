//! Frames: fetched by range, opened alone.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use dr_core::BackupId;
use dr_core::guard::Guard;

use super::{ClusterStore, key};
use crate::crypto::{Aead, SEALED_DEK_LEN, Secret, TAG_LEN, open_dek};
use crate::error::RepoError;
use crate::format::{
    FRAME_OVERHEAD, FrameRef, PackHeader, PackInfo, PackKind, frame_aad, frame_nonce, pack_key,
};
use crate::os::PageBuffer;

/// The largest frame: a part of a file table with 16,384 entries of large files.
pub(super) const MAX_RAW: u32 = 64 << 20;

/// Keys of packs that an opener keeps.
const KEPT_KEYS: usize = 32;

/// Reads frames of one cluster. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct FrameReader {
    store: ClusterStore,
    sessions: Arc<Mutex<HashMap<BackupId, Arc<SessionView>>>>,
}

/// What is known of a session: its packs and its data key.
#[derive(Debug)]
pub struct SessionView {
    id: BackupId,
    store: ClusterStore,
    packs: HashMap<(PackKind, u32), PackInfo>,
    /// `None`: the private key is not at hand, or nothing is sealed.
    dek: Option<Secret>,
}

impl FrameReader {
    pub(super) fn new(store: ClusterStore) -> Self {
        FrameReader { store, sessions: Arc::default() }
    }

    /// The packs and the key of a session; kept after the first call.
    pub async fn session(&self, id: BackupId) -> Result<Arc<SessionView>, RepoError> {
        if let Some(view) = self.sessions.lock().ok().and_then(|s| s.get(&id).cloned()) {
            return Ok(view);
        }
        let list = self.store.packs(id).await?;
        let packs = list.packs.into_iter().map(|pack| ((pack.kind, pack.seq), pack)).collect();
        let dek = self.data_key(id).await?;
        let view = Arc::new(SessionView { id, store: self.store.clone(), packs, dek });
        if let Ok(mut sessions) = self.sessions.lock() {
            sessions.insert(id, view.clone());
        }
        Ok(view)
    }

    async fn data_key(&self, id: BackupId) -> Result<Option<Secret>, RepoError> {
        let Some(private) = &self.store.repo.keys().private else { return Ok(None) };
        let epoch = self.store.repo.descriptor().key_epoch;
        let name = self.store.name(&format!("session/{id}/dek-{epoch}"));
        let bytes = self.store.repo.get(&name).await?;
        let sealed: &[u8; SEALED_DEK_LEN] =
            bytes[..].try_into().map_err(|_| RepoError::damaged(&name, "it has a wrong length"))?;
        let opened = open_dek(private, &dek_info(&self.store, id), sealed);
        opened.map(Some).ok_or_else(|| RepoError::damaged(&name, "its seal does not verify"))
    }

    /// Sealed bytes of a pack.
    pub async fn range(
        &self,
        kind: PackKind,
        session: BackupId,
        seq: u32,
        range: Range<u64>,
    ) -> Result<Bytes, RepoError> {
        let view = self.session(session).await?;
        let name = self.store.name(&view.pack(kind, seq)?.name(session));
        self.store.repo.target().get(&key(&name)?, Some(range)).await.map_err(RepoError::from_storage)
    }

    /// One frame, fetched and opened.
    pub async fn frame(&self, kind: PackKind, frame: &FrameRef) -> Result<Vec<u8>, RepoError> {
        let view = self.session(frame.session).await?;
        let start = u64::from(frame.offset);
        let sealed =
            self.range(kind, frame.session, frame.seq, start..start + u64::from(frame.stored)).await?;
        let mut out = Vec::new();
        FrameOpener::new().open(&view, kind, frame, &sealed, &mut out)?;
        Ok(out)
    }
}

/// What a session's data key is bound to.
pub(super) fn dek_info(store: &ClusterStore, session: BackupId) -> Vec<u8> {
    [&b"dr session key 1"[..], &store.repo.id(), &store.system_id.0.to_le_bytes(), &session.pack()].concat()
}

impl SessionView {
    fn pack(&self, kind: PackKind, seq: u32) -> Result<&PackInfo, RepoError> {
        self.packs.get(&(kind, seq)).ok_or_else(|| {
            RepoError::damaged(
                format!("backup {}", self.id),
                format!("{kind:?} pack {seq} is not in its list"),
            )
        })
    }

    /// Bytes of a pack.
    pub fn pack_len(&self, kind: PackKind, seq: u32) -> Result<u64, RepoError> {
        self.pack(kind, seq).map(|pack| pack.len)
    }

    /// All packs of the session.
    pub fn packs(&self) -> impl Iterator<Item = &PackInfo> {
        self.packs.values()
    }

    fn header(&self, kind: PackKind, seq: u32) -> PackHeader {
        PackHeader {
            kind,
            suite: self.store.repo.descriptor().suite.code(),
            repository: self.store.repo.id(),
            system_id: self.store.system_id,
            session: self.id,
            seq,
        }
    }

    fn secret(&self, kind: PackKind) -> Result<&Secret, RepoError> {
        match kind {
            PackKind::Data => self
                .dek
                .as_ref()
                .ok_or_else(|| RepoError::absent("reading stored content", "the repository's key")),
            PackKind::Meta | PackKind::Page => self
                .store
                .repo
                .keys()
                .metadata
                .as_ref()
                .ok_or_else(|| RepoError::absent("reading metadata", "the repository's key or host key")),
        }
    }
}

/// Opens frames: one a worker, its contexts and buffers reused.
pub struct FrameOpener {
    zstd: zstd::bulk::Decompressor<'static>,
    scratch: Vec<u8>,
    keys: Vec<(PackHeader, Aead)>,
}

impl std::fmt::Debug for FrameOpener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FrameOpener")
    }
}

impl Default for FrameOpener {
    fn default() -> Self {
        Self::new()
    }
}

impl FrameOpener {
    /// An opener without keys yet.
    ///
    /// # Panics
    /// When zstd cannot allocate its context.
    pub fn new() -> Self {
        let zstd = zstd::bulk::Decompressor::new().expect("zstd allocates its context");
        FrameOpener { zstd, scratch: Vec::new(), keys: Vec::new() }
    }

    /// Opens and decompresses a frame into `out`, replacing its content. CPU only.
    pub fn open(
        &mut self,
        session: &SessionView,
        kind: PackKind,
        frame: &FrameRef,
        sealed: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), RepoError> {
        if frame.raw > MAX_RAW {
            return Err(RepoError::damaged(place(kind, frame), "its size cannot be right"));
        }
        out.resize(frame.raw as usize, 0);
        self.open_into(session, kind, frame, sealed, out)
    }

    /// The same into memory that can be written directly to a file.
    pub fn open_aligned(
        &mut self,
        session: &SessionView,
        kind: PackKind,
        frame: &FrameRef,
        sealed: &[u8],
        out: &mut PageBuffer,
    ) -> Result<(), RepoError> {
        if frame.raw > MAX_RAW {
            return Err(RepoError::damaged(place(kind, frame), "its size cannot be right"));
        }
        self.open_into(session, kind, frame, sealed, out.set_len(frame.raw as usize))
    }

    /// Opens and decompresses a frame into `out`, which is as long as the frame's content.
    fn open_into(
        &mut self,
        session: &SessionView,
        kind: PackKind,
        frame: &FrameRef,
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<(), RepoError> {
        let place = || place(kind, frame);
        if out.len() != frame.raw as usize || sealed.len() != frame.stored as usize || sealed.is_empty() {
            return Err(RepoError::damaged(place(), "its size cannot be right"));
        }
        self.scratch.clear();
        self.scratch.extend_from_slice(sealed);
        let header = session.header(kind, frame.seq);
        let encrypted = session.store.repo.descriptor().is_encrypted();
        let mut plain_len = self.scratch.len();
        if encrypted {
            let index = self.key(session, header)?;
            let offset = u64::from(frame.offset);
            let aad = frame_aad(&header, offset, frame.raw);
            let opened = self.keys[index].1.open(frame_nonce(offset), &aad, &mut self.scratch);
            if opened.is_none() && Guard::FrameTag.holds() {
                return Err(RepoError::damaged(place(), "its seal does not verify"));
            }
            plain_len = plain_len.saturating_sub(TAG_LEN);
        }
        let overhead = if encrypted { FRAME_OVERHEAD } else { 1 };
        if sealed.len() < overhead {
            return Err(RepoError::damaged(place(), "it is too short"));
        }
        let payload = &self.scratch[1..plain_len];
        let len = match self.scratch[0] {
            0 if payload.len() == out.len() => {
                out.copy_from_slice(payload);
                out.len()
            }
            0 => payload.len(),
            1 => self
                .zstd
                .decompress_to_buffer(payload, out)
                .map_err(|_| RepoError::damaged(place(), "it cannot be decompressed"))?,
            _ => return Err(RepoError::damaged(place(), "its codec is unknown")),
        };
        if len != frame.raw as usize {
            return Err(RepoError::damaged(place(), "it has a wrong length"));
        }
        Ok(())
    }

    fn key(&mut self, session: &SessionView, header: PackHeader) -> Result<usize, RepoError> {
        if let Some(index) = self.keys.iter().position(|(known, _)| *known == header) {
            return Ok(index);
        }
        let key = pack_key(session.secret(header.kind)?, &header);
        if self.keys.len() >= KEPT_KEYS {
            self.keys.remove(0);
        }
        self.keys.push((header, Aead::new(&key)));
        Ok(self.keys.len() - 1)
    }
}

/// Where a frame lies, for errors.
fn place(kind: PackKind, frame: &FrameRef) -> String {
    format!("frame at {} of {kind:?} pack {} of backup {}", frame.offset, frame.seq, frame.session)
}
