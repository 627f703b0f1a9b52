//! Manifests and the other sealed documents of a session.

use dr_core::guard::Guard;
use dr_core::port::{BackupStart, ClusterDescription, HostNeeds, SlotState, TablespaceFacts};
use dr_core::{BackupId, Lsn, SystemId, Timeline, Timestamp};
use serde::{Deserialize, Serialize};

use super::pack::check_features;
use super::{Decode, Digest, FrameRef, PackInfo, ShardRef};
use crate::crypto::{Aead, Secret, derive, random};
use crate::error::RepoError;

const MAGIC: &[u8; 8] = b"DRDOC\x01\n\0";
const FIXED_LEN: usize = 8 + 8 + 16 + 8 + 12 + 4 + 16;
/// Most bytes of a clear head.
const MAX_HEAD: usize = 16 << 10;
/// So many bytes at the start of a document hold its whole head.
pub(crate) const MAX_DOCUMENT_HEAD: u64 = (FIXED_LEN + 4 + MAX_HEAD) as u64;
/// Most bytes of an opened document: 6 million files have a table of contents of 1 MB.
const MAX_BODY: usize = 1 << 30;

/// How a backup came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupStatus {
    /// Everything is as it should be.
    Complete,
    /// Some pages were bad in the cluster already.
    Degraded,
}

/// The clear part of a manifest: what a listing shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestHead {
    /// The backup.
    pub id: BackupId,
    /// The cluster's label.
    pub label: String,
    /// A word for people.
    pub note: String,
    /// The host that took it.
    pub host: String,
    /// The cluster.
    pub cluster: ClusterDescription,
    /// Where it began.
    pub start: BackupStart,
    /// Where it is consistent.
    pub stop_lsn: Lsn,
    /// The timeline there.
    pub stop_timeline: Timeline,
    /// The server's clock there.
    pub stop_time: Timestamp,
    /// The backup that unchanged content was taken from.
    pub parent: Option<BackupId>,
    /// How it came out.
    pub status: BackupStatus,
    /// Pages whose checksum is wrong.
    pub bad_pages: u64,
    /// Pages that were torn while read; replay writes them whole.
    pub torn_pages: u64,
    /// Regular files.
    pub files: u64,
    /// Bytes of the cluster.
    pub bytes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes stored by this backup.
    pub stored_bytes: u64,
    /// The manifest before this one in this cluster, and the digest of its object.
    pub previous: Option<(BackupId, Digest)>,
    /// The session's data key, sealed to the epoch's public key, in hexadecimal.
    pub sealed_key: String,
    /// The epoch of that key.
    pub key_epoch: u32,
}

/// The sealed part of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestBody {
    /// The file table.
    pub shards: Vec<ShardRef>,
    /// All sessions that the backup reaches.
    pub sessions: Vec<SessionRef>,
    /// `backup_label`, byte for byte.
    pub backup_label: String,
    /// `tablespace_map`, byte for byte.
    pub tablespace_map: String,
    /// `global/pg_control`, in hexadecimal.
    #[serde(with = "hex_bytes")]
    pub pg_control: Vec<u8>,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<TablespaceFacts>,
    /// What the cluster needs of a host.
    pub host_needs: HostNeeds,
    /// The relation catalogue of an early manifest: JSON, in pieces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub relations: Vec<FrameRef>,
    /// The relation catalogue.
    #[serde(default)]
    pub catalogue: Vec<CataloguePart>,
    /// Files outside the data directory: JSON, in pieces.
    pub host_files: Vec<FrameRef>,
    /// Bad pages, all of them.
    pub bad_pages: Vec<BadPageRecord>,
    /// Whose file states the table has.
    pub walk: WalkMark,
    /// Replication slots of the server, for people: no backup holds them. Absent from manifests
    /// written before it was known.
    #[serde(default)]
    pub slots: Vec<SlotState>,
}

/// A part of the relation catalogue: rows in JSON, a line each, sorted within a listing. Parts of
/// several listings may have rows in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CataloguePart {
    /// The digest of the opened frame.
    pub digest: Digest,
    /// A frame in a meta pack.
    pub frame: FrameRef,
}

mod hex_bytes {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        hex::decode(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A session that a backup reaches, and the digest of its list of packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRef {
    /// The session.
    pub id: BackupId,
    /// The digest of the object that lists its packs.
    pub packs: Digest,
}

/// A page whose checksum was wrong when it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadPageRecord {
    /// The file.
    pub path: String,
    /// The block number within the relation's fork.
    pub block: u32,
    /// The checksum in the page.
    pub found: u16,
    /// The checksum of its bytes.
    pub expected: u16,
}

/// Whose file states a table has, and since when they hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalkMark {
    /// Identity of the host.
    pub host: String,
    /// When the walk began, by that host's clock, in nanoseconds since 1970.
    pub began_ns: i64,
}

/// A whole manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The clear part.
    pub head: ManifestHead,
    /// The sealed part.
    pub body: ManifestBody,
}

/// The first object of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionBegin {
    /// The host.
    pub host: String,
    /// A word for people.
    pub note: String,
    /// The backup that unchanged content is taken from.
    pub parent: Option<BackupId>,
}

/// How far an interrupted backup came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// Where it began.
    pub start: BackupStart,
    /// Whose file states its table has.
    pub walk: WalkMark,
    /// The file table so far.
    pub shards: Vec<ShardRef>,
    /// All sessions that it reaches, its own left out.
    pub sessions: Vec<BackupId>,
    /// Bad pages so far.
    pub bad_pages: Vec<BadPageRecord>,
    /// The last path in the table.
    pub last_path: String,
    /// The session's packs so far.
    #[serde(default)]
    pub packs: Vec<PackInfo>,
}

/// A document: a fixed header, a clear head and a sealed body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SealedDocument {
    /// 1 manifest, 2 packs, 3 point.
    pub kind: u8,
    pub suite: u8,
    pub repository: [u8; 16],
    pub system_id: SystemId,
    pub session: BackupId,
    pub number: u32,
}

/// The key of one document. The salt makes it unique, whatever is sealed again.
pub(crate) fn document_key(metadata_key: &Secret, document: &SealedDocument, salt: &[u8; 16]) -> Secret {
    let numbers = document.number.to_le_bytes();
    derive(metadata_key, &[b"dr doc 1", salt, &[document.kind], &document.session.pack(), &numbers])
}

impl SealedDocument {
    fn what(&self) -> String {
        let kind = match self.kind {
            1 => "the manifest",
            2 => "the list of packs",
            _ => "the point",
        };
        format!("{kind} of backup {}", self.session)
    }

    /// The bytes to store.
    pub fn encode(&self, key: Option<&Secret>, head: &[u8], body: &[u8]) -> Result<Vec<u8>, RepoError> {
        if head.len() > MAX_HEAD {
            return Err(RepoError::Bug { what: "a document's head is too long".into() });
        }
        let salt: [u8; 16] = random();
        let mut out = Vec::with_capacity(FIXED_LEN + head.len() + body.len() / 4 + 64);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&[self.kind, self.suite, 0, 0, 0, 0, 0, 0]);
        out.extend_from_slice(&self.repository);
        out.extend_from_slice(&self.system_id.0.to_le_bytes());
        out.extend_from_slice(&self.session.pack());
        out.extend_from_slice(&self.number.to_le_bytes());
        out.extend_from_slice(&salt);
        out.extend_from_slice(&(head.len() as u32).to_le_bytes());
        out.extend_from_slice(head);
        let mut sealed = zstd::bulk::compress(body, 3)
            .map_err(|error| RepoError::Bug { what: format!("compression failed: {error}") })?;
        if let Some(key) = key {
            Aead::new(&document_key(key, self, &salt)).seal([0; 12], &out, &mut sealed)?;
        }
        out.extend_from_slice(&sealed);
        Ok(out)
    }

    /// The clear head of a document of this identity.
    pub fn head<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], RepoError> {
        self.split(bytes).map(|(_, head, _)| head)
    }

    /// Checks identity and seal, and answers head and body.
    pub fn open<'a>(&self, key: Option<&Secret>, bytes: &'a [u8]) -> Result<(&'a [u8], Vec<u8>), RepoError> {
        let (salt, head, sealed) = self.split(bytes)?;
        let mut sealed = sealed.to_vec();
        let plain = match key {
            None => &sealed[..],
            Some(key) => {
                let aad = &bytes[..bytes.len() - sealed.len()];
                let len = sealed.len().saturating_sub(crate::crypto::TAG_LEN);
                match Aead::new(&document_key(key, self, &salt)).open([0; 12], aad, &mut sealed) {
                    Some(plain) => plain,
                    None if Guard::FrameTag.holds() => {
                        return Err(RepoError::damaged(self.what(), "its seal does not verify"));
                    }
                    None => &mut sealed[..len],
                }
            }
        };
        let body = decompress_bounded(plain)
            .ok_or_else(|| RepoError::damaged(self.what(), "its body cannot be decompressed"))?;
        Ok((head, body))
    }

    fn split<'a>(&self, bytes: &'a [u8]) -> Result<([u8; 16], &'a [u8], &'a [u8]), RepoError> {
        let mut input = Decode::new(bytes, "a document");
        if &input.array::<8>()? != MAGIC {
            return Err(input.bad("it does not begin as a document does"));
        }
        let (kind, suite) = (input.u8()?, input.u8()?);
        check_features(input.u16()?, &self.what())?;
        input.bytes(4)?;
        let found = SealedDocument {
            kind,
            suite,
            repository: input.array()?,
            system_id: SystemId(input.u64()?),
            session: BackupId::unpack(input.array()?),
            number: input.u32()?,
        };
        if found != *self && Guard::ClusterOfObject.holds() {
            return Err(RepoError::OtherOwner {
                what: self.what(),
                found: found.owner(),
                expected: self.owner(),
            });
        }
        let salt = input.array()?;
        let len = input.u32()? as usize;
        if len > MAX_HEAD {
            return Err(input.bad("its head is too long"));
        }
        let head = input.bytes(len)?;
        let sealed = &bytes[FIXED_LEN + 4 + len..];
        Ok((salt, head, sealed))
    }

    fn owner(&self) -> String {
        let SealedDocument { repository, system_id, session, .. } = self;
        format!("backup {session} of cluster {system_id} in repository {}", hex::encode(repository))
    }
}

/// Decompresses a frame whose size it tells itself, up to a bound.
fn decompress_bounded(bytes: &[u8]) -> Option<Vec<u8>> {
    let size = zstd::zstd_safe::get_frame_content_size(bytes).ok()??;
    let size = usize::try_from(size).ok().filter(|size| *size <= MAX_BODY)?;
    // A frame cannot expand more than about a thousandfold per block; refuse the absurd early.
    if size / 40_000 > bytes.len() + 1 {
        return None;
    }
    zstd::bulk::decompress(bytes, size).ok().filter(|body| body.len() == size)
}
