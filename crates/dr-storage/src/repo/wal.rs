//! The archive of WAL.

use std::io::Write;

use bytes::Bytes;
use dr_core::guard::Guard;
use dr_core::port::{Key, Payload, StorageError};
use dr_core::{Lsn, SegmentSize, Timeline, TimelineHistory, Timestamp, WalName, WalSegment};

use super::{ClusterStore, key};
use crate::crypto::{Aead, SEALED_DEK_LEN, Secret, open_dek, random, seal_dek};
use crate::error::RepoError;
use crate::format::{WAL_HEADER_LEN, WAL_TRAILER_LEN, WalHeader, WalIndex, wal_aad, wal_key};

/// Raw bytes of one frame of archived WAL.
const WAL_FRAME: u32 = 256 << 10;

/// The largest `.history` or `.backup` file.
const MAX_SMALL: u64 = 1 << 20;

/// What a store did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It was not there; now it is durable.
    New,
    /// It was there with the same content.
    Already,
}

/// What a fetch delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Bytes written.
    pub bytes: u64,
    /// Whether it is the incomplete last segment of a timeline.
    pub partial: bool,
}

/// A segment in the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredSegment {
    /// The segment.
    pub segment: WalSegment,
    /// Whether it is incomplete.
    pub partial: bool,
    /// Bytes of the object.
    pub stored_bytes: u64,
    /// When it was stored, by the store's clock.
    pub modified: Timestamp,
}

/// An encoded WAL file, ready to be stored.
#[derive(Debug)]
pub struct WalObject {
    name: String,
    digest: [u8; 32],
    payload: Payload,
}

/// The archive of WAL of one cluster. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct WalStore {
    store: ClusterStore,
    size: SegmentSize,
}

impl WalStore {
    pub(super) fn new(store: ClusterStore, size: SegmentSize) -> Self {
        WalStore { store, size }
    }

    /// Begins to encode a segment, fed in pieces of 256 KiB.
    pub fn encoder(&self, name: &WalName) -> Result<WalEncoder, RepoError> {
        WalEncoder::new(self, name, self.size.bytes())
    }

    /// Stores a segment, durably. The same content again is fine; other content is refused.
    pub async fn store(&self, object: WalObject) -> Result<Stored, RepoError> {
        match self.store.repo.create(&object.name, object.payload.clone()).await {
            Ok(()) => Ok(Stored::New),
            Err(RepoError::Storage {
                source: StorageError::AlreadyExists { .. } | StorageError::Indeterminate { .. },
            }) => self.compare(&object).await,
            Err(error) => Err(error),
        }
    }

    /// What is there decides: the keyed digest of the content, not the sealed bytes.
    async fn compare(&self, object: &WalObject) -> Result<Stored, RepoError> {
        let name = key(&object.name)?;
        let range = Some(0..WAL_HEADER_LEN as u64);
        let bytes = self.store.repo.target().get(&name, range).await.map_err(RepoError::from_storage)?;
        let header = WalHeader::decode(&bytes, &self.store.repo.digest_key("archiving WAL")?)?;
        if header.digest == object.digest || !Guard::WalFence.holds() {
            return Ok(Stored::Already);
        }
        Err(RepoError::Fenced { what: object.name.clone() })
    }

    /// Stores a `.history` or `.backup` file.
    pub async fn store_small(&self, name: &WalName, bytes: &[u8]) -> Result<Stored, RepoError> {
        let mut encoder = WalEncoder::new(self, name, bytes.len() as u64)?;
        for chunk in bytes.chunks(WAL_FRAME as usize) {
            encoder.feed(chunk)?;
        }
        self.store(encoder.finish(Lsn(0))?).await
    }

    /// Writes an archived file to `out`, every byte verified before the call answers `Ok`.
    ///
    /// [`RepoError::NoWal`] when the object is not there; the caller proves absence by a listing.
    /// For a segment of which only the incomplete one is there, that is delivered.
    pub async fn fetch(&self, name: &WalName, out: &mut (dyn Write + Send)) -> Result<Fetched, RepoError> {
        let file_name = name.file_name(self.size);
        match self.store.repo.get(&self.object_name(name, None)).await {
            Ok(bytes) => self.open(name, &file_name, &bytes, out),
            Err(RepoError::Storage { source: StorageError::NotFound { .. } }) => {
                let partial = match name {
                    WalName::Segment(segment) => self.partial_of(*segment).await?,
                    _ => None,
                };
                let Some(object) = partial else { return Err(RepoError::NoWal { name: file_name }) };
                let WalName::Segment(segment) = name else {
                    return Err(RepoError::NoWal { name: file_name });
                };
                let bytes = self.store.repo.get(&object).await?;
                let fetched = self.open(&WalName::Partial(*segment), &file_name, &bytes, out)?;
                Ok(Fetched { partial: true, ..fetched })
            }
            Err(error) => Err(error),
        }
    }

    async fn partial_of(&self, segment: WalSegment) -> Result<Option<String>, RepoError> {
        let prefix = self.log_prefix(segment);
        let wanted = format!("{prefix}{}.partial-", segment.file_name(self.size));
        let listed = self.store.repo.list(&prefix).await?;
        let partials: Vec<_> =
            listed.into_iter().filter(|o| o.key.as_str().starts_with(&wanted)).map(|o| o.key).collect();
        match &partials[..] {
            [] => Ok(None),
            [one] => Ok(Some(one.as_str().to_owned())),
            _ => self.fullest(partials).await.map(Some),
        }
    }

    /// Of several incomplete segments the one that goes furthest. Times do not tell: a copied
    /// archive has new ones.
    async fn fullest(&self, partials: Vec<Key>) -> Result<String, RepoError> {
        let digest_key = self.store.repo.digest_key("fetching WAL")?;
        let mut best: Option<(Lsn, String)> = None;
        for name in partials {
            let range = Some(0..WAL_HEADER_LEN as u64);
            let head = self.store.repo.target().get(&name, range).await.map_err(RepoError::from_storage)?;
            let filled_to = WalHeader::decode(&head, &digest_key)?.filled_to;
            if best.as_ref().is_none_or(|(most, _)| filled_to > *most) {
                best = Some((filled_to, name.as_str().to_owned()));
            }
        }
        best.map(|(_, name)| name).ok_or_else(|| RepoError::Bug { what: "no partial segment".into() })
    }

    fn open(
        &self,
        name: &WalName,
        file_name: &str,
        bytes: &Bytes,
        out: &mut (dyn Write + Send),
    ) -> Result<Fetched, RepoError> {
        let damaged = |reason: &str| RepoError::damaged(format!("archived WAL {file_name}"), reason);
        let digest_key = self.store.repo.digest_key("fetching WAL")?;
        let head = bytes.get(..WAL_HEADER_LEN).ok_or_else(|| damaged("it is cut"))?;
        let header = WalHeader::decode(head, &digest_key)?;
        self.check_owner(name, file_name, &header)?;
        let frames = WalIndex::frames(&header, bytes)?;
        let aead = self.aead(file_name, &header)?;
        let mut hasher = blake3::Hasher::new_keyed(&digest_key);
        let mut zstd = zstd::bulk::Decompressor::new().map_err(|source| RepoError::Output { source })?;
        let mut sealed = Vec::new();
        let mut raw = Vec::with_capacity(header.frame.min(WAL_FRAME) as usize);
        let mut written = 0;
        for (index, frame) in frames.iter().enumerate() {
            sealed.clear();
            sealed.extend_from_slice(frame);
            let mut len = sealed.len();
            if let Some(aead) = &aead {
                let aad = wal_aad(&header, index as u32);
                if aead.open(frame_nonce(index), &aad, &mut sealed).is_none() && Guard::FrameTag.holds() {
                    return Err(damaged("a seal does not verify"));
                }
                len = len.saturating_sub(crate::crypto::TAG_LEN);
            }
            let plain =
                sealed.get(..len).filter(|p| !p.is_empty()).ok_or_else(|| damaged("a frame is cut"))?;
            let expected = (header.raw - written).min(u64::from(header.frame)) as usize;
            raw.clear();
            match plain[0] {
                0 => raw.extend_from_slice(&plain[1..]),
                1 => {
                    raw.reserve(expected);
                    zstd.decompress_to_buffer(&plain[1..], &mut raw)
                        .map_err(|_| damaged("a frame cannot be decompressed"))?;
                }
                _ => return Err(damaged("the codec of a frame is unknown")),
            }
            if raw.len() != expected {
                return Err(damaged("a frame has a wrong length"));
            }
            hasher.update(&raw);
            out.write_all(&raw).map_err(|source| RepoError::Output { source })?;
            written += raw.len() as u64;
        }
        if *hasher.finalize().as_bytes() != header.digest && Guard::ContentDigest.holds() {
            return Err(damaged("its digest differs from the one recorded"));
        }
        Ok(Fetched { bytes: written, partial: false })
    }

    fn check_owner(&self, name: &WalName, file_name: &str, header: &WalHeader) -> Result<(), RepoError> {
        let (kind, timeline, number) = identity_of(name);
        let same = (header.repository, header.system_id) == (self.store.repo.id(), self.store.system_id)
            && (header.kind, header.timeline, header.number) == (kind, timeline, number)
            && header.suite == self.store.repo.descriptor().suite.code();
        if same || !Guard::ClusterOfObject.holds() {
            return Ok(());
        }
        Err(RepoError::OtherOwner {
            what: format!("archived WAL {file_name}"),
            found: format!(
                "file {} of timeline {} of cluster {}",
                header.number, header.timeline, header.system_id
            ),
            expected: format!("cluster {}", self.store.system_id),
        })
    }

    fn aead(&self, file_name: &str, header: &WalHeader) -> Result<Option<Aead>, RepoError> {
        if !self.store.repo.descriptor().is_encrypted() {
            return Ok(None);
        }
        let private = &self.store.repo.keys().private;
        let private =
            private.as_ref().ok_or_else(|| RepoError::absent("fetching WAL", "the repository's key"))?;
        let dek = open_dek(private, b"dr wal key 1", &header.sealed_dek).ok_or_else(|| {
            RepoError::damaged(format!("archived WAL {file_name}"), "its key's seal does not verify")
        })?;
        Ok(Some(Aead::new(&wal_key(&dek, header))))
    }

    fn log_prefix(&self, segment: WalSegment) -> String {
        let name = segment.file_name(self.size);
        self.store.name(&format!("wal/{}/{}/", &name[..8], &name[8..16]))
    }

    fn object_name(&self, name: &WalName, digest: Option<&[u8; 32]>) -> String {
        let file_name = name.file_name(self.size);
        match name {
            WalName::History(_) => self.store.name(&format!("history/{file_name}")),
            WalName::Segment(segment) | WalName::Label(segment, _) => {
                format!("{}{file_name}", self.log_prefix(*segment))
            }
            WalName::Partial(segment) => {
                let mark = digest.map(|d| hex::encode(&d[..8])).unwrap_or_default();
                format!("{}{file_name}-{mark}", self.log_prefix(*segment))
            }
        }
    }

    /// The timelines of which segments or a history are archived.
    pub async fn timelines(&self) -> Result<Vec<Timeline>, RepoError> {
        let target = self.store.repo.target();
        let wal = target.list_parts(&self.store.name("wal/")).await.map_err(RepoError::from_storage)?;
        let history =
            target.list_parts(&self.store.name("history/")).await.map_err(RepoError::from_storage)?;
        let names =
            wal.iter().map(String::as_str).chain(history.iter().filter_map(|n| n.strip_suffix(".history")));
        let mut timelines: Vec<Timeline> =
            names.filter_map(|name| u32::from_str_radix(name, 16).ok().map(Timeline)).collect();
        timelines.sort_unstable();
        timelines.dedup();
        Ok(timelines)
    }

    /// The archived segments of a timeline, by number.
    pub async fn segments(&self, timeline: Timeline) -> Result<Vec<StoredSegment>, RepoError> {
        let prefix = self.store.name(&format!("wal/{:08X}/", timeline.0));
        let mut segments = Vec::new();
        for object in self.store.repo.list(&prefix).await? {
            let name = object.key.as_str().rsplit('/').next().unwrap_or_default();
            let (stem, partial) = match name.split_once(".partial-") {
                Some((stem, _)) => (stem, true),
                None => (name, false),
            };
            if let Some(segment) = WalSegment::parse(stem, self.size) {
                let (stored_bytes, modified) = (object.size, object.modified);
                segments.push(StoredSegment { segment, partial, stored_bytes, modified });
            }
        }
        segments.sort_by_key(|s| (s.segment, s.partial));
        Ok(segments)
    }

    /// The history of a timeline; `None` when it is not archived (timeline 1 has none).
    pub async fn history(&self, timeline: Timeline) -> Result<Option<TimelineHistory>, RepoError> {
        let name = WalName::History(timeline);
        let mut text = Vec::new();
        match self.fetch(&name, &mut text).await {
            Err(RepoError::NoWal { .. }) => return Ok(None),
            other => other?,
        };
        let malformed = |reason: String| RepoError::Malformed {
            what: format!("the history of timeline {timeline}"),
            reason,
        };
        let text = String::from_utf8(text).map_err(|error| malformed(error.to_string()))?;
        TimelineHistory::parse(timeline, &text).map(Some).map_err(|error| malformed(error.to_string()))
    }
}

fn identity_of(name: &WalName) -> (u8, Timeline, u64) {
    match name {
        WalName::Segment(segment) => (1, segment.timeline, segment.number),
        WalName::Partial(segment) => (2, segment.timeline, segment.number),
        WalName::History(timeline) => (3, *timeline, 0),
        WalName::Label(segment, _) => (4, segment.timeline, segment.number),
    }
}

fn frame_nonce(index: usize) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&(index as u64).to_le_bytes());
    nonce
}

/// Encodes a WAL file in one pass: digest, compress, seal, piece by piece.
pub struct WalEncoder {
    store: WalStore,
    name: WalName,
    header: WalHeader,
    aead: Option<Aead>,
    digest_key: [u8; 32],
    hasher: blake3::Hasher,
    zstd: zstd::bulk::Compressor<'static>,
    frame: Vec<u8>,
    lens: Vec<u32>,
    body: Vec<u8>,
    fed: u64,
}

impl std::fmt::Debug for WalEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WalEncoder({:?})", self.name)
    }
}

impl WalEncoder {
    fn new(wal: &WalStore, name: &WalName, raw: u64) -> Result<Self, RepoError> {
        let repo = &wal.store.repo;
        let digest_key = repo.digest_key("archiving WAL")?;
        let descriptor = repo.descriptor();
        let dek = Secret(random());
        let mut sealed_dek = [0; SEALED_DEK_LEN];
        if descriptor.is_encrypted() {
            sealed_dek = seal_dek(&descriptor.public_key_bytes()?, b"dr wal key 1", &dek)?;
        }
        if raw > MAX_SMALL && !matches!(name, WalName::Segment(_) | WalName::Partial(_)) {
            return Err(RepoError::Bug { what: "a small WAL file is large".into() });
        }
        let (kind, timeline, number) = identity_of(name);
        let header = WalHeader {
            kind,
            suite: descriptor.suite.code(),
            repository: repo.id(),
            system_id: wal.store.system_id,
            timeline,
            key_epoch: descriptor.key_epoch,
            number,
            raw,
            frame: WAL_FRAME,
            frames: raw.div_ceil(u64::from(WAL_FRAME)) as u32,
            filled_to: Lsn(0),
            digest: [0; 32],
            sealed_dek,
        };
        let aead = descriptor.is_encrypted().then(|| Aead::new(&wal_key(&dek, &header)));
        let zstd = zstd::bulk::Compressor::new(descriptor.compression_level)
            .map_err(|error| RepoError::Bug { what: error.to_string() })?;
        Ok(WalEncoder {
            store: wal.clone(),
            name: name.clone(),
            header,
            aead,
            digest_key,
            hasher: blake3::Hasher::new_keyed(&digest_key),
            zstd,
            frame: Vec::new(),
            lens: Vec::with_capacity(header.frames as usize),
            body: Vec::with_capacity(raw as usize / 2),
            fed: 0,
        })
    }

    /// Takes the next piece: 256 KiB, or the last and shorter one.
    pub fn feed(&mut self, piece: &[u8]) -> Result<(), RepoError> {
        let left = self.header.raw - self.fed;
        if piece.len() as u64 != left.min(u64::from(WAL_FRAME)) {
            return Err(RepoError::Bug { what: "a piece of WAL has a wrong length".into() });
        }
        self.hasher.update(piece);
        self.frame.resize(zstd::zstd_safe::compress_bound(piece.len()) + 1, 0);
        let failed = |error: std::io::Error| RepoError::Bug { what: format!("compression failed: {error}") };
        let len = self.zstd.compress_to_buffer(piece, &mut self.frame[1..]).map_err(failed)?;
        if len < piece.len() {
            self.frame[0] = 1;
            self.frame.truncate(len + 1);
        } else {
            self.frame.truncate(1);
            self.frame[0] = 0;
            self.frame.extend_from_slice(piece);
        }
        let index = self.lens.len();
        if let Some(aead) = &self.aead {
            aead.seal(frame_nonce(index), &wal_aad(&self.header, index as u32), &mut self.frame)?;
        }
        self.lens.push(self.frame.len() as u32);
        self.body.extend_from_slice(&self.frame);
        self.fed += piece.len() as u64;
        Ok(())
    }

    /// Ends the object.
    pub fn finish(mut self, filled_to: Lsn) -> Result<WalObject, RepoError> {
        if self.fed != self.header.raw {
            return Err(RepoError::Bug { what: "WAL was not fed to its end".into() });
        }
        self.header.filled_to = filled_to;
        self.header.digest = *self.hasher.finalize().as_bytes();
        let mut head = self.header.encode(&self.digest_key);
        head.extend_from_slice(&WalIndex::encode(&self.lens));
        let end = WalIndex::end();
        debug_assert_eq!(end.len(), WAL_TRAILER_LEN);
        self.body.extend_from_slice(end);
        let name = self.store.object_name(&self.name, Some(&self.header.digest));
        let payload = Payload::new(vec![head.into(), self.body.into()]);
        Ok(WalObject { name, digest: self.header.digest, payload })
    }
}
