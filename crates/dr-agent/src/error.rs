//! Why the parts could not be put together.

use std::path::PathBuf;

use dr_core::port::{ClusterError, KeyError, StorageError};
use dr_core::{Classified, ErrorClass};
use dr_storage::RepoError;
use thiserror::Error;

use crate::resident::ResidentError;

/// Why the configuration cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AgentError {
    /// A configuration file cannot be read.
    #[error("the configuration file {path} cannot be read")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A configuration file is not TOML.
    #[error("{path}: {reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        reason: String,
    },
    /// A key that does not exist.
    #[error("{origin}: there is no setting {key:?}")]
    UnknownKey {
        /// Where it was written.
        origin: String,
        /// The key.
        key: String,
        /// The nearest key that exists.
        suggestion: Option<&'static str>,
    },
    /// A value that cannot be used.
    #[error("{origin}: {key} cannot be {value:?}: {reason}")]
    BadValue {
        /// Where it was written.
        origin: String,
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A setting that is needed and not given.
    #[error("{key} is not set, and {needed_for} needs it")]
    Missing {
        /// The key.
        key: &'static str,
        /// What needs it.
        needed_for: &'static str,
    },
    /// No cluster, or more than one, fits.
    #[error("{what}")]
    WhichCluster {
        /// What is wrong.
        what: String,
    },
    /// The repository cannot be opened.
    #[error("the repository cannot be opened")]
    Repo {
        /// Why.
        source: RepoError,
    },
    /// A key cannot be used.
    #[error("the key cannot be used")]
    Key {
        /// Why.
        source: KeyError,
    },
    /// The storage cannot be used.
    #[error("the storage cannot be used")]
    Storage {
        /// Why.
        source: StorageError,
    },
    /// The data directory cannot be looked at.
    #[error("the data directory cannot be looked at")]
    Cluster {
        /// Why.
        source: ClusterError,
    },
    /// The resident agent does not run, or does not do what it is asked.
    #[error(transparent)]
    Resident(ResidentError),
}

impl From<ResidentError> for AgentError {
    fn from(error: ResidentError) -> Self {
        AgentError::Resident(error)
    }
}

impl AgentError {
    fn inner(&self) -> Option<&dyn Classified> {
        match self {
            AgentError::Repo { source } => Some(source),
            AgentError::Key { source } => Some(source),
            AgentError::Storage { source } => Some(source),
            AgentError::Cluster { source } => Some(source),
            AgentError::Resident(error) => Some(error),
            _ => None,
        }
    }
}

impl Classified for AgentError {
    fn class(&self) -> ErrorClass {
        match (self.inner(), self) {
            (Some(inner), _) => inner.class(),
            (None, AgentError::Unreadable { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                ErrorClass::Missing
            }
            (None, AgentError::Unreadable { .. }) => ErrorClass::Denied,
            _ => ErrorClass::Invalid,
        }
    }

    fn code(&self) -> &'static str {
        if let Some(inner) = self.inner() {
            return inner.code();
        }
        match self {
            AgentError::Unreadable { .. } => "config-unreadable",
            AgentError::Syntax { .. } => "config-syntax",
            AgentError::UnknownKey { .. } => "config-unknown-key",
            AgentError::BadValue { .. } => "config-bad-value",
            AgentError::Missing { .. } => "config-missing",
            _ => "config-which-cluster",
        }
    }

    fn hint(&self) -> Option<String> {
        if let Some(inner) = self.inner() {
            return inner.hint();
        }
        Some(match self {
            AgentError::Unreadable { .. } => {
                "Check the path and that this user may read it; `dr init` writes one.".into()
            }
            AgentError::Syntax { .. } => {
                "The file is TOML; docs/reference/config.md shows each setting.".into()
            }
            AgentError::UnknownKey { suggestion: Some(key), .. } => format!("Did you mean {key}?"),
            AgentError::UnknownKey { .. } => "docs/reference/config.md lists the settings.".into(),
            AgentError::BadValue { .. } => "docs/reference/config.md says what each setting takes.".into(),
            AgentError::Missing { key, .. } => format!(
                "Set {key} in dr.toml (--config FILE, or /etc/dr/dr.toml), as {}, or with --set {key}=…",
                crate::config::variable(key)
            ),
            AgentError::WhichCluster { .. } => {
                "Name one with --cluster LABEL or --cluster SYSTEM-ID; `dr list` shows them.".into()
            }
            _ => return None,
        })
    }
}
