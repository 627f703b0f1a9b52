//! The file table: what a cluster consists of.

use std::collections::BTreeSet;

use dr_core::BackupId;
use serde::{Deserialize, Serialize};

use super::map::{frame, put_frame};
use super::reader::put_sessions;
use super::{Decode, Digest, FrameRef, put_session, put_varint};
use crate::error::RepoError;

const VERSION: u8 = 1;

/// Content up to this many bytes lies in the table itself.
pub const INLINE_LEN: usize = 64;

/// A part of the table is closed with this many entries at the latest.
pub const MAX_SHARD_ENTRIES: usize = 16_384;

/// The longest path: PATH_MAX of Linux, every byte written as `%XX`, and room.
/// Entries share prefixes, so without a limit few bytes could become very many.
const MAX_PATH: usize = 16 << 10;

/// One file, directory or link of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    /// Path below the data directory, encoded by `dr_core::path::encode`.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Bytes of content.
    pub size: u64,
    /// The file's state when it was backed up.
    pub stat: Option<StatMark>,
    /// Where the content lies.
    pub content: Content,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link and its target.
    Link(String),
}

/// A file's state, to tell later that it did not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatMark {
    /// Nanoseconds since 1970 of the last change of content.
    pub mtime_ns: i64,
    /// Nanoseconds since 1970 of the last change of the inode.
    pub ctime_ns: i64,
    /// The inode.
    pub inode: u64,
    /// The device.
    pub device: u64,
}

/// Where content lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nowhere: an empty file, a directory, a link.
    None,
    /// Here.
    Inline(Vec<u8>),
    /// In a frame shared with other small files.
    Slice {
        /// The frame.
        frame: FrameRef,
        /// Where in the opened frame.
        offset: u32,
        /// How many bytes.
        len: u32,
        /// Their digest.
        digest: Digest,
    },
    /// In stretches, each with its map.
    Stretches {
        /// The maps, in order.
        maps: Vec<MapRef>,
        /// All sessions whose data packs the maps refer to.
        sessions: Vec<BackupId>,
    },
}

/// Where the map of a stretch lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRef {
    /// A frame in a meta pack.
    pub frame: FrameRef,
    /// The digest of the opened frame.
    pub digest: Digest,
}

/// Where a part of the file table lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRef {
    /// The path of its first entry.
    pub first_path: String,
    /// Its entries.
    pub count: u32,
    /// A frame in a meta pack.
    pub frame: FrameRef,
    /// The digest of the opened frame.
    pub digest: Digest,
}

/// A part of the file table: its bytes are a function of its entries, so an unchanged part is the
/// same bytes and need not be stored again.
#[derive(Debug)]
pub struct Shard;

impl Shard {
    /// All sessions that entries reach, directly or through maps.
    pub fn sessions(entries: &[FileEntry]) -> BTreeSet<BackupId> {
        let mut out = BTreeSet::new();
        for entry in entries {
            match &entry.content {
                Content::Slice { frame, .. } => {
                    out.insert(frame.session);
                }
                Content::Stretches { maps, sessions } => {
                    out.extend(sessions);
                    out.extend(maps.iter().map(|map| map.frame.session));
                }
                Content::None | Content::Inline(_) => {}
            }
        }
        out
    }

    /// The bytes to store.
    pub fn encode(entries: &[FileEntry]) -> Vec<u8> {
        let mut sessions = Vec::new();
        let mut body = Vec::with_capacity(entries.len() * 64);
        let mut previous = "";
        for entry in entries {
            encode_entry(&mut body, &mut sessions, previous, entry);
            previous = &entry.path;
        }
        let mut out = vec![VERSION];
        put_sessions(&mut out, &sessions);
        put_varint(&mut out, entries.len() as u64);
        out.extend_from_slice(&body);
        put_varint(&mut out, 0);
        out
    }

    /// Reads a part of the table.
    pub fn decode(bytes: &[u8]) -> Result<Vec<FileEntry>, RepoError> {
        let mut input = Decode::new(bytes, "a part of the file table");
        if input.u8()? != VERSION {
            return Err(input.bad("its version is unknown"));
        }
        let sessions = input.sessions()?;
        let count = input.count(5)?;
        if count > MAX_SHARD_ENTRIES {
            return Err(input.bad("it has too many entries"));
        }
        let mut entries: Vec<FileEntry> = Vec::with_capacity(count);
        for _ in 0..count {
            let previous = entries.last().map_or("", |entry| entry.path.as_str());
            let entry = decode_entry(&mut input, &sessions, previous)?;
            entries.push(entry);
        }
        input.extension()?;
        input.end()?;
        Ok(entries)
    }
}

fn encode_entry(out: &mut Vec<u8>, sessions: &mut Vec<BackupId>, previous: &str, entry: &FileEntry) {
    let shared = shared_prefix(previous, &entry.path);
    put_varint(out, shared as u64);
    put_text(out, &entry.path[shared..]);
    let kind = match &entry.kind {
        EntryKind::Regular => 0,
        EntryKind::Directory => 1,
        EntryKind::Link(_) => 2,
    };
    out.push(kind);
    if let EntryKind::Link(target) = &entry.kind {
        put_text(out, target);
    }
    put_varint(out, u64::from(entry.mode));
    put_varint(out, entry.size);
    match &entry.stat {
        None => out.push(0),
        Some(mark) => {
            out.push(1);
            out.extend_from_slice(&mark.mtime_ns.to_le_bytes());
            out.extend_from_slice(&mark.ctime_ns.to_le_bytes());
            put_varint(out, mark.inode);
            put_varint(out, mark.device);
        }
    }
    encode_content(out, sessions, &entry.content);
}

fn encode_content(out: &mut Vec<u8>, sessions: &mut Vec<BackupId>, content: &Content) {
    match content {
        Content::None => out.push(0),
        Content::Inline(bytes) => {
            out.push(1);
            put_varint(out, bytes.len() as u64);
            out.extend_from_slice(bytes);
        }
        Content::Slice { frame, offset, len, digest } => {
            out.push(2);
            put_frame(out, sessions, frame);
            put_varint(out, u64::from(*offset));
            put_varint(out, u64::from(*len));
            out.extend_from_slice(&digest.0);
        }
        Content::Stretches { maps, sessions: used } => {
            out.push(3);
            put_varint(out, used.len() as u64);
            for session in used {
                put_varint(out, put_session(sessions, *session));
            }
            put_varint(out, maps.len() as u64);
            for map in maps {
                put_frame(out, sessions, &map.frame);
                out.extend_from_slice(&map.digest.0);
            }
        }
    }
}

fn decode_entry(
    input: &mut Decode<'_>,
    sessions: &[BackupId],
    previous: &str,
) -> Result<FileEntry, RepoError> {
    let shared = input.varint()? as usize;
    let prefix = previous.get(..shared).ok_or_else(|| input.bad("a name continues one that is not there"))?;
    let rest = input.text()?;
    if prefix.len() + rest.len() > MAX_PATH {
        return Err(input.bad("a name is too long"));
    }
    let path = format!("{prefix}{rest}");
    let kind = match input.u8()? {
        0 => EntryKind::Regular,
        1 => EntryKind::Directory,
        2 => EntryKind::Link(input.text()?.to_owned()),
        _ => return Err(input.bad("an entry is of an unknown kind")),
    };
    let mode = input.varint32()?;
    let size = input.varint()?;
    let stat = match input.u8()? {
        0 => None,
        1 => Some(StatMark {
            mtime_ns: input.u64()? as i64,
            ctime_ns: input.u64()? as i64,
            inode: input.varint()?,
            device: input.varint()?,
        }),
        _ => return Err(input.bad("a file state is of an unknown kind")),
    };
    let content = decode_content(input, sessions)?;
    Ok(FileEntry { path, kind, mode, size, stat, content })
}

fn decode_content(input: &mut Decode<'_>, sessions: &[BackupId]) -> Result<Content, RepoError> {
    match input.u8()? {
        0 => Ok(Content::None),
        1 => {
            let len = input.count(1)?;
            if len > INLINE_LEN {
                return Err(input.bad("inline content is too long"));
            }
            Ok(Content::Inline(input.bytes(len)?.to_vec()))
        }
        2 => Ok(Content::Slice {
            frame: frame(input, sessions)?,
            offset: input.varint32()?,
            len: input.varint32()?,
            digest: Digest(input.array()?),
        }),
        3 => {
            let count = input.count(1)?;
            let used = (0..count).map(|_| input.session(sessions)).collect::<Result<_, _>>()?;
            let count = input.count(21)?;
            let maps = (0..count)
                .map(|_| Ok(MapRef { frame: frame(input, sessions)?, digest: Digest(input.array()?) }))
                .collect::<Result<_, RepoError>>()?;
            Ok(Content::Stretches { maps, sessions: used })
        }
        _ => Err(input.bad("content is of an unknown kind")),
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_varint(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

/// Bytes that two names share at their beginning, cut at a character's border.
fn shared_prefix(a: &str, b: &str) -> usize {
    let mut shared = a.bytes().zip(b.bytes()).take_while(|(x, y)| x == y).count();
    while !b.is_char_boundary(shared) || !a.is_char_boundary(shared) {
        shared -= 1;
    }
    shared
}
