//! The host key: what a database host needs to write backups that it cannot read.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dr_core::port::KeyError;

use super::{bad, read_line, write_line};
use crate::crypto::Secret;

const PREFIX: &str = "DR-HOST-KEY-1:";

/// The metadata key and the digest key of one repository. With it a host can back up, list, show
/// and push WAL; it cannot open one byte of stored content.
#[derive(Clone, Debug)]
pub struct HostKey {
    pub(crate) repository: [u8; 16],
    pub(crate) metadata: Secret,
    pub(crate) digest: Secret,
}

impl HostKey {
    /// Reads a host key file.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let line = read_line(path)?;
        let text =
            line.strip_prefix(PREFIX).ok_or_else(|| bad(path, "it does not begin with DR-HOST-KEY-1"))?;
        let bytes = STANDARD.decode(text).map_err(|_| bad(path, "it is not base64"))?;
        let parts = bytes.split_first_chunk::<16>().filter(|(_, keys)| keys.len() == 64);
        let (repository, keys) = parts.ok_or_else(|| bad(path, "it does not hold 80 bytes"))?;
        let key =
            |at: usize| keys[at..at + 32].try_into().map(Secret).map_err(|_| bad(path, "a key is short"));
        Ok(HostKey { repository: *repository, metadata: key(0)?, digest: key(32)? })
    }

    /// Writes the key to a new file that only its owner may read.
    pub fn write(&self, path: &Path) -> Result<(), KeyError> {
        let bytes = [&self.repository[..], &self.metadata.0, &self.digest.0].concat();
        write_line(path, &format!("{PREFIX}{}", STANDARD.encode(bytes)))
    }
}
