//! How bytes are kept so that they are there, and true, tomorrow.
//!
//! [`target`] has the places (a directory, memory, S3), [`format`](mod@format) the bytes, [`Repository`] the whole:
//! keys, packs, manifests, WAL. The contract of a place is `dr_core::port::StorageTarget`.

pub mod conformance;
mod crypto;
mod error;
pub mod format;
pub mod journal;
pub mod keys;
pub mod os;
mod probe;
mod repo;
pub mod target;

pub use crypto::random_u32;
pub use error::RepoError;

/// The digest in an object's name: the first 16 bytes of the BLAKE3 of all its bytes, unkeyed.
pub fn object_digest(bytes: &[u8]) -> format::Digest {
    repo::cut(&blake3::hash(bytes))
}

pub use format::PackKind;
pub use probe::probe;
pub use repo::{
    Access, Catalogue, ClusterIdentity, ClusterStore, Fetched, FrameOpener, FrameReader, InitSpec,
    PackWriter, Repository, SessionInfo, SessionView, SessionWriter, Stored, StoredSegment, WalEncoder,
    WalObject, WalStore,
};
