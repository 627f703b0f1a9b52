//! A key file: 32 random bytes that wrap the repository's keys.

use std::path::Path;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dr_core::port::{KeyError, KeyProvider};

use super::{bad, read_line, write_line};
use crate::crypto::{Aead, Secret, derive, random};

const PREFIX: &str = "DR-KEY-1:";
const NONCE_LEN: usize = 12;

/// A key file: one line, `DR-KEY-1:` and 32 bytes in base64. Who has it can read everything.
#[derive(Clone, Debug)]
pub struct FileKey {
    secret: Secret,
    id: String,
}

impl FileKey {
    /// A new random key.
    pub fn generate() -> Self {
        Self::from_secret(Secret(random()))
    }

    fn from_secret(secret: Secret) -> Self {
        // The identity tells keys apart in listings and gives nothing away.
        let mark = derive(&secret, &[b"dr key id 1"]);
        let id = format!("file-{}", hex::encode(&mark.0[..6]));
        FileKey { secret, id }
    }

    /// Reads a key file.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let line = read_line(path)?;
        let text = line.strip_prefix(PREFIX).ok_or_else(|| bad(path, "it does not begin with DR-KEY-1"))?;
        let bytes = STANDARD.decode(text).map_err(|_| bad(path, "it is not base64"))?;
        let secret = bytes.try_into().map_err(|_| bad(path, "it does not hold 32 bytes"))?;
        Ok(Self::from_secret(Secret(secret)))
    }

    /// Writes the key to a new file that only its owner may read.
    pub fn write(&self, path: &Path) -> Result<(), KeyError> {
        write_line(path, &format!("{PREFIX}{}", STANDARD.encode(self.secret.0)))
    }
}

#[async_trait]
impl KeyProvider for FileKey {
    fn id(&self) -> String {
        self.id.clone()
    }

    async fn wrap(&self, material: &[u8]) -> Result<Vec<u8>, KeyError> {
        let nonce: [u8; NONCE_LEN] = random();
        let mut sealed = material.to_vec();
        let wrong = |_| KeyError::WrongKey { provider: self.id() };
        Aead::new(&self.secret).seal(nonce, b"dr key slot 1", &mut sealed).map_err(wrong)?;
        Ok([&nonce[..], &sealed].concat())
    }

    async fn unwrap(&self, wrapped: &[u8]) -> Result<Vec<u8>, KeyError> {
        let wrong = || KeyError::WrongKey { provider: self.id() };
        let (nonce, sealed) = wrapped.split_first_chunk::<NONCE_LEN>().ok_or_else(wrong)?;
        let mut sealed = sealed.to_vec();
        let opened = Aead::new(&self.secret).open(*nonce, b"dr key slot 1", &mut sealed).ok_or_else(wrong)?;
        Ok(opened.to_vec())
    }
}
