//! Keys on disk: the key file, the host key, age recipients.

mod age_key;
mod file;
mod host;

pub use age_key::AgeKey;
pub use file::FileKey;
pub use host::HostKey;

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use dr_core::port::KeyError;

use crate::crypto::Secret;

/// What a key slot holds: the private key, the metadata key, the digest key.
#[derive(Clone, Debug)]
pub(crate) struct KeyBundle {
    pub private: Secret,
    pub metadata: Secret,
    pub digest: Secret,
}

impl KeyBundle {
    pub const LEN: usize = 96;

    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..32].copy_from_slice(&self.private.0);
        out[32..64].copy_from_slice(&self.metadata.0);
        out[64..].copy_from_slice(&self.digest.0);
        out
    }

    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let key = |at: usize| bytes.get(at..at + 32)?.try_into().ok().map(Secret);
        (bytes.len() == Self::LEN).then_some(())?;
        Some(KeyBundle { private: key(0)?, metadata: key(32)?, digest: key(64)? })
    }
}

/// Reads a key file of one line.
fn read_line(path: &Path) -> Result<String, KeyError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| KeyError::Unreadable { path: path.display().to_string(), source })?;
    Ok(text.trim().to_owned())
}

/// Writes a new key file of one line that only its owner may read; refuses to replace one.
fn write_line(path: &Path, line: &str) -> Result<(), KeyError> {
    let unreadable = |source| KeyError::Unreadable { path: path.display().to_string(), source };
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(unreadable)?;
    writeln!(file, "{line}").and_then(|()| file.sync_all()).map_err(unreadable)
}

fn bad(path: &Path, reason: &str) -> KeyError {
    KeyError::BadKeyFile { path: path.display().to_string(), reason: reason.to_owned() }
}
