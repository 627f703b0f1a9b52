//! `repo.json`: what a repository is.

use dr_core::guard::Guard;
use serde::{Deserialize, Serialize};

use super::{EXTENT_LEN, FORMAT_MAJOR};
use crate::error::RepoError;

/// How frames are sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Suite {
    /// AES-256-GCM under HKDF-SHA256 keys; data keys sealed by HPKE.
    Aes256Gcm,
    /// Not sealed: only digests protect.
    None,
}

impl Suite {
    /// The number in object headers.
    pub fn code(self) -> u8 {
        match self {
            Suite::Aes256Gcm => 1,
            Suite::None => 2,
        }
    }
}

/// The repository's descriptor, in clear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Format major version.
    pub format: u32,
    /// Features without which the repository must not be read or written.
    pub features_required: Vec<String>,
    /// The repository's identity, 16 bytes in hexadecimal.
    pub id: String,
    /// Bytes of an extent.
    pub extent: u64,
    /// How frames are sealed.
    pub suite: Suite,
    /// zstd level of new frames.
    pub compression_level: i32,
    /// The epoch of the key to which data keys are sealed now.
    pub key_epoch: u32,
    /// That key, 32 bytes in hexadecimal; empty without encryption.
    pub public_key: String,
    /// When it was made, for people.
    pub created: dr_core::Timestamp,
    /// A keyed digest of all other fields, in hexadecimal; empty without encryption.
    ///
    /// The file is in clear where the storage can change it. Without this, who controls the
    /// storage could put a public key of his own here, or say that nothing is sealed, and the
    /// next backup would be his to read.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub check: String,
}

impl Descriptor {
    /// Reads `repo.json`, and refuses what this version does not know.
    pub fn parse(bytes: &[u8]) -> Result<Self, RepoError> {
        // Only the version is read first: a later format may have other fields.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let malformed = |error: serde_json::Error| RepoError::Malformed {
            what: "repo.json".into(),
            reason: error.to_string(),
        };
        let version: Version = serde_json::from_slice(bytes).map_err(malformed)?;
        if version.format != FORMAT_MAJOR && Guard::UnknownFeature.holds() {
            let needed = format!("repository format {}", version.format);
            return Err(RepoError::TooNew { what: "this repository".into(), needed });
        }
        let descriptor: Descriptor = serde_json::from_slice(bytes).map_err(malformed)?;
        if let Some(feature) = descriptor.features_required.first()
            && Guard::UnknownFeature.holds()
        {
            let needed = format!("the feature {feature:?}");
            return Err(RepoError::TooNew { what: "this repository".into(), needed });
        }
        if descriptor.extent != EXTENT_LEN as u64 {
            let needed = format!("extents of {} bytes", descriptor.extent);
            return Err(RepoError::TooNew { what: "this repository".into(), needed });
        }
        descriptor.id_bytes()?;
        Ok(descriptor)
    }

    /// Whether content is sealed.
    pub fn is_encrypted(&self) -> bool {
        self.suite == Suite::Aes256Gcm
    }

    /// The keyed digest of all other fields.
    pub(crate) fn keyed_check(&self, digest_key: &[u8; 32]) -> Result<String, RepoError> {
        let mut hasher = blake3::Hasher::new_keyed(digest_key);
        hasher.update(b"dr repo 1").update(&self.id_bytes()?);
        hasher.update(&self.format.to_le_bytes()).update(&self.extent.to_le_bytes());
        hasher.update(&[self.suite.code()]).update(&self.key_epoch.to_le_bytes());
        hasher.update(&self.public_key_bytes()?).update(&self.compression_level.to_le_bytes());
        let words = format!("{},{}", self.created, self.features_required.join(","));
        hasher.update(words.as_bytes());
        Ok(hex::encode(&hasher.finalize().as_bytes()[..16]))
    }

    /// Checks that the holders of the digest key wrote this descriptor.
    pub(crate) fn verify(&self, digest_key: &[u8; 32]) -> Result<(), RepoError> {
        let ours = match self.suite {
            // A key that is not all zero was made with a sealed repository.
            Suite::None => *digest_key == [0; 32],
            Suite::Aes256Gcm => self.keyed_check(digest_key)? == self.check,
        };
        if ours { Ok(()) } else { Err(self.not_ours()) }
    }

    /// The error for a descriptor that was changed where it is stored.
    pub(crate) fn not_ours(&self) -> RepoError {
        let reason = match self.suite {
            Suite::None => "it says that nothing is sealed, but a key is configured",
            Suite::Aes256Gcm => "its keyed digest is wrong: it may name a key that is not yours",
        };
        RepoError::damaged("repo.json", reason)
    }

    pub(crate) fn id_bytes(&self) -> Result<[u8; 16], RepoError> {
        let mut id = [0; 16];
        hex::decode_to_slice(&self.id, &mut id).map_err(|_| RepoError::Malformed {
            what: "repo.json".into(),
            reason: "its id is not 16 bytes in hexadecimal".into(),
        })?;
        Ok(id)
    }

    pub(crate) fn public_key_bytes(&self) -> Result<[u8; 32], RepoError> {
        let mut key = [0; 32];
        hex::decode_to_slice(&self.public_key, &mut key).map_err(|_| RepoError::Malformed {
            what: "repo.json".into(),
            reason: "its public key is not 32 bytes in hexadecimal".into(),
        })?;
        Ok(key)
    }
}
