//! Archived WAL: one object a file, with a key of its own.

use dr_core::guard::Guard;
use dr_core::{Lsn, SystemId, Timeline};

use super::Decode;
use super::pack::check_features;
use crate::crypto::{SEALED_DEK_LEN, Secret, derive};
use crate::error::RepoError;

const MAGIC: &[u8; 8] = b"DRWAL\x01\n\0";
const END: &[u8; 8] = b"DRWLEND\n";

/// Bytes of the header, before the index of frames.
pub(crate) const WAL_HEADER_LEN: usize = FIELDS_LEN + CHECK_LEN;
/// Bytes of the header's fields.
const FIELDS_LEN: usize = 200;
/// Bytes of the keyed digest of the fields that follows them.
const CHECK_LEN: usize = 16;
/// Bytes after the last frame.
pub(crate) const WAL_TRAILER_LEN: usize = END.len();
/// The part of the header that every frame is bound to.
const BOUND_LEN: usize = 72;
/// Most bytes of a WAL file: PostgreSQL's largest segment.
const MAX_RAW: u64 = 1 << 30;

/// Most bytes of a frame's content: bounds what a reader allocates for one.
const MAX_FRAME: u32 = 1 << 20;

/// The header of an archived WAL file, in clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalHeader {
    /// 1 segment, 2 partial segment, 3 history, 4 backup label.
    pub kind: u8,
    /// The suite's number.
    pub suite: u8,
    /// The repository.
    pub repository: [u8; 16],
    /// The cluster.
    pub system_id: SystemId,
    /// The timeline in the name.
    pub timeline: Timeline,
    /// The epoch of the key that the data key is sealed to.
    pub key_epoch: u32,
    /// The segment's number; for a label also its offset in the upper bits is in the name only.
    pub number: u64,
    /// Bytes of the file.
    pub raw: u64,
    /// Bytes of a frame's content; the last may have fewer.
    pub frame: u32,
    /// Frames.
    pub frames: u32,
    /// The LSN up to which pages are filled.
    pub filled_to: Lsn,
    /// The keyed BLAKE3 of the whole file.
    pub digest: [u8; 32],
    /// The sealed data key.
    pub sealed_dek: [u8; SEALED_DEK_LEN],
}

impl WalHeader {
    /// The bytes of the header: the fields, then the first 16 bytes of their keyed BLAKE3.
    pub fn encode(&self, digest_key: &[u8; 32]) -> Vec<u8> {
        let mut out = self.bound().to_vec();
        out.extend_from_slice(&self.frames.to_le_bytes());
        out.extend_from_slice(&0u32.to_le_bytes());
        out.extend_from_slice(&self.filled_to.0.to_le_bytes());
        out.extend_from_slice(&self.digest);
        out.extend_from_slice(&self.sealed_dek);
        debug_assert_eq!(out.len(), FIELDS_LEN);
        let check = blake3::keyed_hash(digest_key, &out);
        out.extend_from_slice(&check.as_bytes()[..CHECK_LEN]);
        out
    }

    /// The part that is known before the file is read.
    fn bound(&self) -> [u8; BOUND_LEN] {
        let mut out = [0; BOUND_LEN];
        out[..8].copy_from_slice(MAGIC);
        out[8] = self.kind;
        out[9] = self.suite;
        out[16..32].copy_from_slice(&self.repository);
        out[32..40].copy_from_slice(&self.system_id.0.to_le_bytes());
        out[40..44].copy_from_slice(&self.timeline.0.to_le_bytes());
        out[44..48].copy_from_slice(&self.key_epoch.to_le_bytes());
        out[48..56].copy_from_slice(&self.number.to_le_bytes());
        out[56..64].copy_from_slice(&self.raw.to_le_bytes());
        out[64..68].copy_from_slice(&self.frame.to_le_bytes());
        out
    }

    /// Reads a header and checks its digest.
    pub fn decode(bytes: &[u8], digest_key: &[u8; 32]) -> Result<Self, RepoError> {
        let mut input = Decode::new(bytes, "an archived WAL file");
        if &input.array::<8>()? != MAGIC {
            return Err(input.bad("it does not begin as archived WAL does"));
        }
        let (kind, suite) = (input.u8()?, input.u8()?);
        check_features(input.u16()?, "an archived WAL file")?;
        input.bytes(4)?;
        let repository = input.array()?;
        let system_id = SystemId(input.u64()?);
        let timeline = Timeline(input.u32()?);
        let key_epoch = input.u32()?;
        let number = input.u64()?;
        let raw = input.u64()?;
        let frame = input.u32()?;
        input.u32()?;
        let frames = input.u32()?;
        input.u32()?;
        let filled_to = Lsn(input.u64()?);
        if raw > MAX_RAW
            || !(1..=MAX_FRAME).contains(&frame)
            || raw.div_ceil(u64::from(frame)) != u64::from(frames)
        {
            return Err(input.bad("its sizes do not fit each other"));
        }
        let (digest, sealed_dek) = (input.array()?, input.array()?);
        let check: [u8; CHECK_LEN] = input.array()?;
        let own = blake3::keyed_hash(digest_key, &bytes[..FIELDS_LEN]);
        if own.as_bytes()[..CHECK_LEN] != check && Guard::MetadataDigest.holds() {
            return Err(RepoError::damaged("an archived WAL file", "the digest of its header is wrong"));
        }
        Ok(WalHeader {
            kind,
            suite,
            repository,
            system_id,
            timeline,
            key_epoch,
            number,
            raw,
            frame,
            frames,
            filled_to,
            digest,
            sealed_dek,
        })
    }
}

/// The key of one archived file.
pub(crate) fn wal_key(dek: &Secret, header: &WalHeader) -> Secret {
    derive(dek, &[b"dr wal 1", &header.bound()])
}

/// What a frame is bound to.
pub(crate) fn wal_aad(header: &WalHeader, index: u32) -> [u8; BOUND_LEN + 4] {
    let mut aad = [0; BOUND_LEN + 4];
    aad[..BOUND_LEN].copy_from_slice(&header.bound());
    aad[BOUND_LEN..].copy_from_slice(&index.to_le_bytes());
    aad
}

/// The stored lengths of the frames, and the end mark.
pub(crate) struct WalIndex;

impl WalIndex {
    pub fn encode(lens: &[u32]) -> Vec<u8> {
        lens.iter().flat_map(|len| len.to_le_bytes()).collect()
    }

    /// The end mark.
    pub fn end() -> &'static [u8] {
        END
    }

    /// Splits a whole object into its frames.
    pub fn frames<'a>(header: &WalHeader, bytes: &'a [u8]) -> Result<Vec<&'a [u8]>, RepoError> {
        let mut input = Decode::new(bytes, "an archived WAL file");
        input.bytes(WAL_HEADER_LEN)?;
        let index = input.bytes(header.frames as usize * 4)?;
        let mut frames = Vec::with_capacity(header.frames as usize);
        for len in index.chunks_exact(4) {
            let len = u32::from_le_bytes([len[0], len[1], len[2], len[3]]);
            frames.push(input.bytes(len as usize)?);
        }
        if input.bytes(END.len())? != END {
            return Err(input.bad("it has no end"));
        }
        input.end()?;
        Ok(frames)
    }
}
