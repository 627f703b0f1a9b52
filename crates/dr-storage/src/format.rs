//! The bytes of a repository, as `docs/formats/repository-v1.md` has them.
//!
//! Every decoder checks bounds before it reads and before it allocates; none panics on any input.

mod descriptor;
mod entry;
mod manifest;
mod map;
mod pack;
mod reader;
mod walobject;

pub use descriptor::{Descriptor, Suite};
pub use entry::{
    Content, EntryKind, FileEntry, INLINE_LEN, MAX_SHARD_ENTRIES, MapRef, Shard, ShardRef, StatMark,
};
pub use manifest::{
    BackupStatus, BadPageRecord, CataloguePart, Manifest, ManifestBody, ManifestHead, Point, SessionBegin,
    SessionRef, WalkMark,
};
pub(crate) use manifest::{MAX_DOCUMENT_HEAD, SealedDocument};
pub use map::{BadMark, ExtentEntry, PatchedPage, PrintsRef, StretchMap};
pub(crate) use pack::{FRAME_OVERHEAD, PACK_END, PACK_HEADER_LEN, frame_aad, frame_nonce, pack_key};
pub use pack::{PackHeader, PackInfo, PackKind, PackList};
pub(crate) use reader::{Decode, put_session, put_varint};
pub use walobject::WalHeader;
pub(crate) use walobject::{WAL_HEADER_LEN, WAL_TRAILER_LEN, WalIndex, wal_aad, wal_key};

use dr_core::BackupId;
use serde::{Deserialize, Serialize};

/// Raw bytes of an extent: what one frame holds and one digest covers.
pub const EXTENT_LEN: usize = 256 << 10;

/// Raw bytes of a stretch: what one map describes.
pub const STRETCH_LEN: usize = 16 << 20;

/// A pack is closed when it has this many bytes.
pub const PACK_TARGET: usize = 32 << 20;

/// The major version of the format that this code writes and reads.
pub const FORMAT_MAJOR: u32 = 1;

/// A keyed content digest, cut to 16 bytes: compared at one place, never used as an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 16]);

impl Digest {
    /// The digest in hexadecimal.
    pub fn to_hex(self) -> String {
        hex::encode(self.0)
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut bytes = [0; 16];
        hex::decode_to_slice(&text, &mut bytes).map_err(serde::de::Error::custom)?;
        Ok(Digest(bytes))
    }
}

/// Where a frame lies. Which kind of pack is known from who refers to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FrameRef {
    /// The session that wrote the pack.
    pub session: BackupId,
    /// The pack's number within its session and kind.
    pub seq: u32,
    /// Where the frame begins in the pack.
    pub offset: u32,
    /// Its bytes in the pack.
    pub stored: u32,
    /// Its bytes when opened and decompressed.
    pub raw: u32,
}
