//! Keys that wrap keys.

use std::fmt;

use async_trait::async_trait;
use thiserror::Error;

use crate::error::{Classified, ErrorClass};

/// Wraps and unwraps a repository's key material. Implementations: a key file, age recipients.
///
/// A provider that can only wrap (an age recipient without its identity) answers
/// [`KeyError::CannotUnwrap`].
#[async_trait]
pub trait KeyProvider: Send + Sync + fmt::Debug {
    /// The provider's kind and identity for people and for slots, as `file:1a2b3c4d`; no secret.
    fn id(&self) -> String;

    /// Seals key material, so that only the holder of the provider's key can open it.
    async fn wrap(&self, material: &[u8]) -> Result<Vec<u8>, KeyError>;

    /// Opens what `wrap` made. A wrong key is [`KeyError::WrongKey`], never garbage.
    async fn unwrap(&self, wrapped: &[u8]) -> Result<Vec<u8>, KeyError>;
}

/// Why key material could not be wrapped or unwrapped. No message ever holds a secret.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KeyError {
    /// This provider's key does not open it.
    #[error("the key {provider} does not open this repository's key slot")]
    WrongKey {
        /// The provider.
        provider: String,
    },
    /// The provider can wrap only.
    #[error("the key {provider} can seal but not open")]
    CannotUnwrap {
        /// The provider.
        provider: String,
    },
    /// A key file is not one.
    #[error("{path} is not a key of dr: {reason}")]
    BadKeyFile {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A key file cannot be read.
    #[error("the key file {path} cannot be read")]
    Unreadable {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The operation needs a key that was not given.
    #[error("{operation} needs {needed}, which was not given")]
    Absent {
        /// The operation.
        operation: &'static str,
        /// Which key it needs.
        needed: &'static str,
    },
}

impl Classified for KeyError {
    fn class(&self) -> ErrorClass {
        match self {
            KeyError::BadKeyFile { .. } => ErrorClass::Invalid,
            KeyError::Unreadable { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                ErrorClass::Missing
            }
            _ => ErrorClass::Denied,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            KeyError::WrongKey { .. } => "key-wrong",
            KeyError::CannotUnwrap { .. } => "key-cannot-unwrap",
            KeyError::BadKeyFile { .. } => "key-bad-file",
            KeyError::Unreadable { .. } => "key-unreadable",
            KeyError::Absent { .. } => "key-absent",
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            KeyError::WrongKey { .. } => {
                "Use the key file that `dr init` wrote for this repository, or another slot's key.".into()
            }
            KeyError::CannotUnwrap { .. } => {
                "Give the age identity file that belongs to the recipient.".into()
            }
            KeyError::BadKeyFile { .. } => {
                "A key file is one line that begins with DR-KEY-1 or DR-HOST-KEY-1.".into()
            }
            KeyError::Unreadable { .. } => "Check the path and that this user may read it.".into(),
            KeyError::Absent { .. } => "Set [encryption] key_file in dr.toml, or pass --key-file.".into(),
        })
    }
}
