//! The map of a stretch: for each extent its digest and where its pages lie.

use super::reader::put_sessions;
use super::{Decode, Digest, EXTENT_LEN, FrameRef, STRETCH_LEN, put_session, put_varint};
use crate::error::RepoError;

const VERSION: u8 = 1;

/// The smallest page: bounds how many pages a stretch can have.
const MIN_PAGE: usize = 1024;

/// The map of one stretch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StretchMap {
    /// Bytes of the stretch, at most [`STRETCH_LEN`].
    pub raw_len: u32,
    /// All frames that the stretch is made of.
    pub frames: Vec<FrameRef>,
    /// The extents, in order.
    pub extents: Vec<ExtentEntry>,
    /// Pages that lie in patch frames, sorted by page.
    pub patched: Vec<PatchedPage>,
    /// Pages whose checksum was wrong when they were read.
    pub bad: Vec<BadMark>,
    /// Page fingerprints, for the next backup; a restore does not look at them.
    pub prints: Option<PrintsRef>,
}

/// One extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentEntry {
    /// The keyed digest of its bytes, all patches laid over.
    pub digest: Digest,
    /// Its base frame, by index; `None`: all zeros.
    pub base: Option<u32>,
}

/// One page that lies in a patch frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatchedPage {
    /// The page's index in the stretch.
    pub page: u16,
    /// The frame, by index.
    pub frame: u32,
    /// Which page of that frame.
    pub index: u16,
}

/// A page whose checksum was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMark {
    /// The page's index in the stretch.
    pub page: u16,
    /// The checksum in the page.
    pub found: u16,
    /// The checksum of its bytes.
    pub expected: u16,
}

/// Where the page fingerprints lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrintsRef {
    /// A frame in a page pack: 8 bytes a page.
    pub frame: FrameRef,
    /// Fingerprints that differ from it, sorted by page.
    pub overrides: Vec<(u16, u64)>,
}

impl StretchMap {
    /// Bytes of one extent: all have [`EXTENT_LEN`] but the last.
    pub fn extent_len(&self, index: usize) -> usize {
        (self.raw_len as usize).saturating_sub(index * EXTENT_LEN).min(EXTENT_LEN)
    }

    /// The bytes to store.
    pub fn encode(&self) -> Vec<u8> {
        let mut sessions = Vec::new();
        let mut body = Vec::with_capacity(64 + self.extents.len() * 18 + self.frames.len() * 12);
        put_varint(&mut body, self.frames.len() as u64);
        let mut previous_end = 0;
        for frame in &self.frames {
            put_varint(&mut body, put_session(&mut sessions, frame.session));
            put_varint(&mut body, u64::from(frame.seq));
            // Frames written one after the other have a difference of zero.
            put_varint(&mut body, zigzag(i64::from(frame.offset) - previous_end));
            put_varint(&mut body, u64::from(frame.stored));
            put_varint(&mut body, u64::from(frame.raw));
            previous_end = i64::from(frame.offset) + i64::from(frame.stored);
        }
        for extent in &self.extents {
            body.extend_from_slice(&extent.digest.0);
            put_varint(&mut body, extent.base.map_or(0, |base| u64::from(base) + 1));
        }
        put_varint(&mut body, self.patched.len() as u64);
        for patch in &self.patched {
            put_varint(&mut body, u64::from(patch.page));
            put_varint(&mut body, u64::from(patch.frame));
            put_varint(&mut body, u64::from(patch.index));
        }
        put_varint(&mut body, self.bad.len() as u64);
        for bad in &self.bad {
            put_varint(&mut body, u64::from(bad.page));
            body.extend_from_slice(&bad.found.to_le_bytes());
            body.extend_from_slice(&bad.expected.to_le_bytes());
        }
        self.encode_prints(&mut body, &mut sessions);
        put_varint(&mut body, 0);
        let mut out = vec![VERSION];
        put_varint(&mut out, u64::from(self.raw_len));
        put_sessions(&mut out, &sessions);
        out.extend_from_slice(&body);
        out
    }

    fn encode_prints(&self, body: &mut Vec<u8>, sessions: &mut Vec<dr_core::BackupId>) {
        let Some(prints) = &self.prints else { return body.push(0) };
        body.push(1);
        put_frame(body, sessions, &prints.frame);
        put_varint(body, prints.overrides.len() as u64);
        for (page, print) in &prints.overrides {
            put_varint(body, u64::from(*page));
            body.extend_from_slice(&print.to_le_bytes());
        }
    }

    /// Reads a map and checks that everything it refers to is in it.
    pub fn decode(bytes: &[u8]) -> Result<Self, RepoError> {
        let mut input = Decode::new(bytes, "a stretch map");
        if input.u8()? != VERSION {
            return Err(input.bad("its version is unknown"));
        }
        let raw_len = input.varint32()?;
        if raw_len as usize > STRETCH_LEN {
            return Err(input.bad("it is longer than a stretch"));
        }
        let sessions = input.sessions()?;
        let frames = decode_frames(&mut input, &sessions)?;
        let mut extents = Vec::with_capacity((raw_len as usize).div_ceil(EXTENT_LEN));
        for _ in 0..(raw_len as usize).div_ceil(EXTENT_LEN) {
            let digest = Digest(input.array()?);
            let base = input.varint32()?.checked_sub(1);
            if base.is_some_and(|base| base as usize >= frames.len()) {
                return Err(input.bad("an extent names a frame that is not there"));
            }
            extents.push(ExtentEntry { digest, base });
        }
        let patched = decode_patched(&mut input, frames.len())?;
        let mut bad = Vec::new();
        for _ in 0..input.count(5)? {
            bad.push(BadMark { page: page(&mut input)?, found: input.u16()?, expected: input.u16()? });
        }
        let prints = decode_prints(&mut input, &sessions)?;
        input.extension()?;
        input.end()?;
        Ok(StretchMap { raw_len, frames, extents, patched, bad, prints })
    }
}

fn decode_frames(input: &mut Decode<'_>, sessions: &[dr_core::BackupId]) -> Result<Vec<FrameRef>, RepoError> {
    let count = input.count(5)?;
    let mut frames = Vec::with_capacity(count);
    let mut previous_end = 0i64;
    for _ in 0..count {
        let session = input.session(sessions)?;
        let seq = input.varint32()?;
        let offset = previous_end.wrapping_add(unzigzag(input.varint()?));
        let offset = u32::try_from(offset).map_err(|_| input.bad("a frame lies outside its pack"))?;
        let (stored, raw) = (input.varint32()?, input.varint32()?);
        previous_end = i64::from(offset) + i64::from(stored);
        frames.push(FrameRef { session, seq, offset, stored, raw });
    }
    Ok(frames)
}

fn decode_patched(input: &mut Decode<'_>, frames: usize) -> Result<Vec<PatchedPage>, RepoError> {
    let mut patched: Vec<PatchedPage> = Vec::new();
    for _ in 0..input.count(3)? {
        let patch = PatchedPage { page: page(input)?, frame: input.varint32()?, index: page(input)? };
        if patch.frame as usize >= frames || patched.last().is_some_and(|last| last.page >= patch.page) {
            return Err(input.bad("its patches are out of order"));
        }
        patched.push(patch);
    }
    Ok(patched)
}

fn decode_prints(
    input: &mut Decode<'_>,
    sessions: &[dr_core::BackupId],
) -> Result<Option<PrintsRef>, RepoError> {
    match input.u8()? {
        0 => Ok(None),
        1 => {
            let frame = frame(input, sessions)?;
            let mut overrides = Vec::new();
            for _ in 0..input.count(9)? {
                overrides.push((page(input)?, input.u64()?));
            }
            Ok(Some(PrintsRef { frame, overrides }))
        }
        _ => Err(input.bad("its fingerprints are of an unknown kind")),
    }
}

fn page(input: &mut Decode<'_>) -> Result<u16, RepoError> {
    let page = input.varint()?;
    if page >= (STRETCH_LEN / MIN_PAGE) as u64 {
        return Err(input.bad("a page lies outside the stretch"));
    }
    Ok(page as u16)
}

/// Appends a frame reference.
pub(super) fn put_frame(out: &mut Vec<u8>, sessions: &mut Vec<dr_core::BackupId>, frame: &FrameRef) {
    put_varint(out, put_session(sessions, frame.session));
    for number in [frame.seq, frame.offset, frame.stored, frame.raw] {
        put_varint(out, u64::from(number));
    }
}

/// Reads a frame reference.
pub(super) fn frame(input: &mut Decode<'_>, sessions: &[dr_core::BackupId]) -> Result<FrameRef, RepoError> {
    Ok(FrameRef {
        session: input.session(sessions)?,
        seq: input.varint32()?,
        offset: input.varint32()?,
        stored: input.varint32()?,
        raw: input.varint32()?,
    })
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}
