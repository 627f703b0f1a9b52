//! Where objects are kept.

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use thiserror::Error;

use crate::error::{Classified, ErrorClass};
use crate::guard::InvalidText;

/// The name of an object: `/`-separated parts of `A–Z a–z 0–9 . _ -`, at most 512 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// Most bytes that a key may have (S3 allows 1,024, and prefixes are put before it).
    pub const MAX_LEN: usize = 512;

    /// Checks and takes a name.
    pub fn new(name: impl Into<String>) -> Result<Self, InvalidText> {
        let name = name.into();
        let part = |p: &str| {
            !p.is_empty()
                && p != "."
                && p != ".."
                && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if name.len() <= Self::MAX_LEN && name.split('/').all(part) {
            Ok(Key(name))
        } else {
            Err(InvalidText::new("an object name of parts of A-Z a-z 0-9 . _ - joined by /", &name))
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// The bytes of an object to create, in pieces; at most 64 MiB in all. Cloning copies no bytes.
#[derive(Clone, Debug, Default)]
pub struct Payload {
    pieces: Vec<Bytes>,
}

impl Payload {
    /// A payload of these pieces, in order.
    pub fn new(pieces: Vec<Bytes>) -> Self {
        Payload { pieces }
    }

    /// The pieces, in order.
    pub fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> u64 {
        self.pieces.iter().map(|p| p.len() as u64).sum()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        Payload { pieces: vec![bytes.into()] }
    }
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        Payload { pieces: vec![bytes] }
    }
}

/// What a listing tells of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its name.
    pub key: Key,
    /// Its bytes.
    pub size: u64,
    /// When the store says it was written (by the store's clock).
    pub modified: Timestamp,
}

/// What a target can do, as far as the type of the target alone can tell.
///
/// A job asks while it plans, so that it never stops half way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// `create` is refused by the store itself when the name exists.
    pub create_only: bool,
    /// Objects live on a file system of this host: reads are cheap and latency is low.
    pub local: bool,
}

/// A place that keeps immutable objects.
///
/// There is no call that overwrites: [`create`](Self::create) is create-only, and that is all.
///
/// *Durability*: when `create` answers `Ok`, the whole object survives a crash of the host and of
/// the store. *Atomicity*: an object is visible whole or not at all. *Cancel safety*: a dropped
/// `create` may or may not have happened; the object is then whole or absent. Reads can be
/// dropped. *Errors* are [`StorageError`], by class.
#[async_trait]
pub trait StorageTarget: Send + Sync + fmt::Debug {
    /// Where this is, for messages; holds no secret.
    fn location(&self) -> String;

    /// What the target can do.
    fn capabilities(&self) -> Capabilities;

    /// Creates an object, durably.
    ///
    /// [`StorageError::AlreadyExists`] when the name is taken, whatever its content, and what has
    /// it is durable: the caller compares, and equal content is stored.
    /// [`StorageError::Indeterminate`] when it may or may not have happened, and what can be read is
    /// durable; a target of which that is not true answers so only with *poisoned*.
    async fn create(&self, key: &Key, payload: Payload) -> Result<(), StorageError>;

    /// Reads a range of an object, or all of it. The answer has exactly the bytes asked for;
    /// a range beyond the object's end is [`StorageError::Truncated`].
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StorageError>;

    /// Size and time of an object.
    async fn head(&self, key: &Key) -> Result<ObjectInfo, StorageError>;

    /// Objects whose name begins with `prefix` (whole parts: it is empty or ends with `/`), in
    /// bytewise order of their names, after `after` when it is given. Strong: it shows each object
    /// whose `create` answered before the call.
    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> BoxStream<'a, Result<ObjectInfo, StorageError>>;

    /// The parts that directly follow `prefix`, sorted: what `ls` would show.
    async fn list_parts(&self, prefix: &str) -> Result<Vec<String>, StorageError>;

    /// Deletes an object; `Ok` when it is not there.
    async fn delete(&self, key: &Key) -> Result<(), StorageError>;
}

type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why a target did not do what it was asked. `key` names the object, `target` the place.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StorageError {
    /// There is no such object.
    #[error("{target} has no object {key}")]
    NotFound {
        /// The object.
        key: String,
        /// The place.
        target: String,
    },
    /// The name is taken.
    #[error("{target} already has an object {key}")]
    AlreadyExists {
        /// The object.
        key: String,
        /// The place.
        target: String,
    },
    /// The object is shorter than the range asked for.
    #[error("object {key} in {target} has {size} bytes, fewer than the {needed} needed")]
    Truncated {
        /// The object.
        key: String,
        /// The place.
        target: String,
        /// Its size.
        size: u64,
        /// The end of the range.
        needed: u64,
    },
    /// The store refuses this identity.
    #[error("{target} refused to {operation} {key}")]
    Denied {
        /// What was asked.
        operation: &'static str,
        /// The object.
        key: String,
        /// The place.
        target: String,
        /// The store's answer.
        source: Source,
    },
    /// No space or quota left.
    #[error("{target} has no space left to {operation} {key}")]
    Full {
        /// What was asked.
        operation: &'static str,
        /// The object.
        key: String,
        /// The place.
        target: String,
        /// The store's answer.
        source: Source,
    },
    /// The store is busy or cannot be reached; nothing happened.
    #[error("{target} could not {operation} {key}")]
    Unavailable {
        /// What was asked.
        operation: &'static str,
        /// The object.
        key: String,
        /// The place.
        target: String,
        /// The store's answer.
        source: Source,
    },
    /// No answer came: it may or may not have happened.
    #[error("{target} gave no answer to {operation} {key}: it may or may not have happened")]
    Indeterminate {
        /// What was asked.
        operation: &'static str,
        /// The object.
        key: String,
        /// The place.
        target: String,
        /// What broke.
        source: Source,
    },
    /// A sync failed earlier, so nothing that this target says can be trusted any more.
    #[error("{target} failed to sync to disk earlier; no success is reported until it is opened anew")]
    Poisoned {
        /// The place.
        target: String,
    },
    /// The target cannot do what is needed.
    #[error("{target} cannot be used: {reason}")]
    Unsupported {
        /// The place.
        target: String,
        /// What it lacks.
        reason: String,
    },
    /// The address or the settings of the target are wrong.
    #[error("{target} is not a usable storage address: {reason}")]
    Invalid {
        /// The place.
        target: String,
        /// What is wrong.
        reason: String,
    },
}

impl Classified for StorageError {
    fn class(&self) -> ErrorClass {
        match self {
            StorageError::NotFound { .. } => ErrorClass::Missing,
            StorageError::AlreadyExists { .. } => ErrorClass::Fenced,
            StorageError::Truncated { .. } => ErrorClass::Corrupt,
            StorageError::Denied { .. } => ErrorClass::Denied,
            StorageError::Full { .. } => ErrorClass::Exhausted,
            StorageError::Unavailable { .. } => ErrorClass::Transient,
            StorageError::Indeterminate { .. } | StorageError::Poisoned { .. } => ErrorClass::Indeterminate,
            StorageError::Unsupported { .. } => ErrorClass::Unsupported,
            StorageError::Invalid { .. } => ErrorClass::Invalid,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            StorageError::NotFound { .. } => "storage-not-found",
            StorageError::AlreadyExists { .. } => "storage-already-exists",
            StorageError::Truncated { .. } => "storage-truncated",
            StorageError::Denied { .. } => "storage-denied",
            StorageError::Full { .. } => "storage-full",
            StorageError::Unavailable { .. } => "storage-unavailable",
            StorageError::Indeterminate { .. } => "storage-indeterminate",
            StorageError::Poisoned { .. } => "storage-poisoned",
            StorageError::Unsupported { .. } => "storage-unsupported",
            StorageError::Invalid { .. } => "storage-invalid",
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            StorageError::NotFound { .. } => {
                "If it was there before, run `dr verify` to see what else is missing.".into()
            }
            StorageError::AlreadyExists { .. } => return None,
            StorageError::Truncated { .. } => {
                "The object is damaged: run `dr verify`, and restore from another backup.".into()
            }
            StorageError::Denied { .. } => {
                "Check the credentials and that they allow to read, list and create objects here.".into()
            }
            StorageError::Full { .. } => {
                "Free space there; nothing half-written is listed, and the job can be run again.".into()
            }
            StorageError::Unavailable { .. } => {
                "Check that the storage can be reached, then run the command again.".into()
            }
            StorageError::Indeterminate { .. } => {
                "Run the command again: what was stored is found and not stored twice.".into()
            }
            StorageError::Poisoned { .. } => {
                "Check the disk (kernel log), then run the command again.".into()
            }
            StorageError::Unsupported { .. } | StorageError::Invalid { .. } => {
                "See [repository] in `dr config check`.".into()
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn object_names_cannot_leave_their_place() {
        for name in ["", "/a", "a/", "a//b", "a/../b", ".", "a b", "ä", "a\0", &"a".repeat(513)] {
            assert!(Key::new(name).is_err(), "{name:?} was accepted");
        }
        assert!(Key::new("cluster/7/wal/00000001/x.partial-0a").is_ok());
    }
}
