//! Packs: immutable objects full of frames.

use dr_core::guard::Guard;
use dr_core::{BackupId, SystemId};
use serde::{Deserialize, Serialize};

use super::{Decode, Digest};
use crate::crypto::{Secret, TAG_LEN, derive};
use crate::error::RepoError;

const MAGIC: &[u8; 8] = b"DRPACK\x01\n";
/// Ends a pack: tells a whole object from a cut one without a key.
pub(crate) const PACK_END: &[u8; 8] = b"DRPKEND\n";

/// Bytes before the first frame.
pub(crate) const PACK_HEADER_LEN: usize = 64;

/// Bytes that a frame has more than its payload: codec and tag.
pub(crate) const FRAME_OVERHEAD: usize = 1 + TAG_LEN;

/// What a pack's frames hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum PackKind {
    /// Content of files.
    Data = 1,
    /// File tables, maps, catalogues.
    Meta = 2,
    /// Page fingerprints.
    Page = 3,
}

impl PackKind {
    /// The directory of such packs.
    pub fn directory(self) -> &'static str {
        match self {
            PackKind::Data => "pack",
            PackKind::Meta => "meta",
            PackKind::Page => "page",
        }
    }
}

/// The header of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackHeader {
    /// What it holds.
    pub kind: PackKind,
    /// The suite's number.
    pub suite: u8,
    /// The repository.
    pub repository: [u8; 16],
    /// The cluster.
    pub system_id: SystemId,
    /// The session that wrote it.
    pub session: BackupId,
    /// Its number within session and kind.
    pub seq: u32,
}

impl PackHeader {
    /// The bytes at the start of a pack.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PACK_HEADER_LEN);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&[self.kind as u8, self.suite, 0, 0, 0, 0, 0, 0]);
        out.extend_from_slice(&self.repository);
        out.extend_from_slice(&self.system_id.0.to_le_bytes());
        out.extend_from_slice(&self.session.pack());
        out.extend_from_slice(&self.seq.to_le_bytes());
        out.resize(PACK_HEADER_LEN, 0);
        out
    }

    /// Reads the header of a pack.
    pub fn decode(bytes: &[u8]) -> Result<Self, RepoError> {
        let mut input = Decode::new(bytes, "a pack");
        if &input.array::<8>()? != MAGIC {
            return Err(input.bad("it does not begin as a pack does"));
        }
        let kind = match input.u8()? {
            1 => PackKind::Data,
            2 => PackKind::Meta,
            3 => PackKind::Page,
            _ => return Err(input.bad("it is of an unknown kind")),
        };
        let suite = input.u8()?;
        check_features(input.u16()?, "a pack")?;
        input.bytes(4)?;
        Ok(PackHeader {
            kind,
            suite,
            repository: input.array()?,
            system_id: SystemId(input.u64()?),
            session: BackupId::unpack(input.array()?),
            seq: input.u32()?,
        })
    }
}

/// Refuses an object that needs what this version does not know.
pub(super) fn check_features(required: u16, what: &str) -> Result<(), RepoError> {
    if required != 0 && Guard::UnknownFeature.holds() {
        let needed = format!("the features {required:#06x}");
        return Err(RepoError::TooNew { what: what.to_owned(), needed });
    }
    Ok(())
}

/// The key of one pack, for it alone.
pub(crate) fn pack_key(secret: &Secret, header: &PackHeader) -> Secret {
    derive(
        secret,
        &[
            b"dr pack 1",
            &header.repository,
            &header.system_id.0.to_le_bytes(),
            &header.session.pack(),
            &header.seq.to_le_bytes(),
            &[header.kind as u8],
        ],
    )
}

/// The nonce of a frame: its place. A pack is written once, front to back, under a key of its own.
pub(crate) fn frame_nonce(offset: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&offset.to_le_bytes());
    nonce
}

/// What a frame is bound to: it cannot be moved to another place, pack, cluster or repository.
pub(crate) fn frame_aad(header: &PackHeader, offset: u64, raw: u32) -> [u8; 60] {
    let mut aad = [0; 60];
    aad[..4].copy_from_slice(b"DRF1");
    aad[4] = header.kind as u8;
    aad[5] = header.suite;
    aad[8..24].copy_from_slice(&header.repository);
    aad[24..32].copy_from_slice(&header.system_id.0.to_le_bytes());
    aad[32..44].copy_from_slice(&header.session.pack());
    aad[44..48].copy_from_slice(&header.seq.to_le_bytes());
    aad[48..56].copy_from_slice(&offset.to_le_bytes());
    aad[56..60].copy_from_slice(&raw.to_le_bytes());
    aad
}

/// One stored pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackInfo {
    /// What it holds.
    pub kind: PackKind,
    /// Its number within session and kind.
    pub seq: u32,
    /// Its bytes.
    pub len: u64,
    /// The first 16 bytes of the BLAKE3 of all its bytes, unkeyed.
    pub digest: Digest,
}

impl PackInfo {
    /// The pack's key below the cluster.
    pub fn name(&self, session: BackupId) -> String {
        let (dir, seq) = (self.kind.directory(), self.seq);
        match self.kind {
            // No directory holds more than a thousand packs.
            PackKind::Data => format!("{dir}/{session}/{:03}/{seq:06}-{}", seq / 1000, self.digest.to_hex()),
            _ => format!("{dir}/{session}/{seq:06}-{}", self.digest.to_hex()),
        }
    }
}

/// All packs of a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackList {
    /// The packs, by kind and number.
    pub packs: Vec<PackInfo>,
}
