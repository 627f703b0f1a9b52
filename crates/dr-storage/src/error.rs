//! Why the repository did not do what was asked.

use dr_core::journal::JournalFault;
use dr_core::port::{KeyError, StorageError};
use dr_core::{BackupId, Classified, ErrorClass, SystemId};
use thiserror::Error;

/// Why the repository did not do what was asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RepoError {
    /// The storage below did not do it.
    #[error("storage failed")]
    Storage {
        /// Why.
        source: StorageError,
    },
    /// A key is missing or wrong.
    #[error("a key is missing or wrong")]
    Key {
        /// Why.
        source: KeyError,
    },
    /// There is no repository here.
    #[error("{location} holds no repository of dr")]
    NoRepository {
        /// The place.
        location: String,
    },
    /// There is a repository here already.
    #[error("{location} holds a repository already")]
    RepositoryExists {
        /// The place.
        location: String,
    },
    /// An object cannot be understood.
    #[error("{what} cannot be read: {reason}")]
    Malformed {
        /// The object.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// An object's bytes are not those that were written.
    #[error("{what} is damaged: {reason}")]
    Damaged {
        /// The object.
        what: String,
        /// How it is known.
        reason: String,
    },
    /// The format is newer than this program.
    #[error("{what} needs {needed}, which this version of dr does not know")]
    TooNew {
        /// The object.
        what: String,
        /// What it needs.
        needed: String,
    },
    /// An object belongs to another repository or cluster.
    #[error("{what} belongs to {found}, not to {expected}")]
    OtherOwner {
        /// The object.
        what: String,
        /// Whose it is.
        found: String,
        /// Whose it should be.
        expected: String,
    },
    /// The same name exists with other content.
    #[error("{what} exists already with other content: another writer uses this name")]
    Fenced {
        /// The object.
        what: String,
    },
    /// A cluster's identity differs from the one registered.
    #[error("cluster {system_id} is registered with other properties: {difference}")]
    OtherCluster {
        /// The cluster.
        system_id: SystemId,
        /// What differs.
        difference: String,
    },
    /// The backup does not exist.
    #[error("there is no backup {id}")]
    NoBackup {
        /// The backup.
        id: BackupId,
    },
    /// An archived WAL file does not exist.
    #[error("WAL file {name} is not in the archive")]
    NoWal {
        /// The file.
        name: String,
    },
    /// The journal is not the chain that it should be.
    #[error("the job journal is damaged")]
    Journal {
        /// What is wrong.
        source: JournalFault,
    },
    /// A file that receives content cannot be written.
    #[error("the fetched bytes cannot be written")]
    Output {
        /// Why.
        source: std::io::Error,
    },
    /// A defect in dr.
    #[error("a defect in dr: {what}")]
    Bug {
        /// What went wrong.
        what: String,
    },
}

impl RepoError {
    /// Wraps an error of the storage below.
    pub fn from_storage(source: StorageError) -> Self {
        RepoError::Storage { source }
    }

    /// Wraps a missing or wrong key.
    pub fn from_key(source: KeyError) -> Self {
        RepoError::Key { source }
    }

    /// A part of a backup that is what was stored and cannot be understood.
    pub fn unreadable_part(of: &str) -> Self {
        RepoError::Damaged { what: of.to_owned(), reason: "it cannot be read".into() }
    }

    /// Metadata whose digest is not the one that its parent has of it.
    pub fn metadata_mismatch(of: &str) -> Self {
        RepoError::Damaged {
            what: format!("the metadata of {of}"),
            reason: "its digest differs from the one recorded with the backup".into(),
        }
    }

    pub(crate) fn damaged(what: impl Into<String>, reason: impl Into<String>) -> Self {
        RepoError::Damaged { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn absent(operation: &'static str, needed: &'static str) -> Self {
        RepoError::Key { source: KeyError::Absent { operation, needed } }
    }
}

impl Classified for RepoError {
    fn class(&self) -> ErrorClass {
        match self {
            RepoError::Storage { source } => source.class(),
            RepoError::Key { source } => source.class(),
            RepoError::NoRepository { .. } | RepoError::NoBackup { .. } | RepoError::NoWal { .. } => {
                ErrorClass::Missing
            }
            RepoError::RepositoryExists { .. } | RepoError::OtherCluster { .. } => ErrorClass::Invalid,
            RepoError::Malformed { .. } | RepoError::Damaged { .. } | RepoError::Journal { .. } => {
                ErrorClass::Corrupt
            }
            RepoError::TooNew { .. } => ErrorClass::Unsupported,
            RepoError::OtherOwner { .. } | RepoError::Fenced { .. } => ErrorClass::Fenced,
            RepoError::Output { source } => match source.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorClass::Exhausted,
                std::io::ErrorKind::PermissionDenied => ErrorClass::Denied,
                _ => ErrorClass::Transient,
            },
            RepoError::Bug { .. } => ErrorClass::Bug,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            RepoError::Storage { source } => source.code(),
            RepoError::Key { source } => source.code(),
            RepoError::NoRepository { .. } => "repo-none",
            RepoError::RepositoryExists { .. } => "repo-exists",
            RepoError::Malformed { .. } => "repo-malformed",
            RepoError::Damaged { .. } => "repo-damaged",
            RepoError::TooNew { .. } => "repo-too-new",
            RepoError::OtherOwner { .. } => "repo-other-owner",
            RepoError::Fenced { .. } => "repo-fenced",
            RepoError::OtherCluster { .. } => "repo-other-cluster",
            RepoError::NoBackup { .. } => "repo-no-backup",
            RepoError::NoWal { .. } => "repo-no-wal",
            RepoError::Journal { .. } => "repo-journal",
            RepoError::Output { .. } => "repo-output",
            RepoError::Bug { .. } => "repo-bug",
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            RepoError::Storage { source } => return source.hint(),
            RepoError::Key { source } => return source.hint(),
            RepoError::NoRepository { .. } => "Check the address; `dr init` makes a repository.".into(),
            RepoError::RepositoryExists { .. } => "Nothing was changed. Choose another place, or use this repository with its key.".into(),
            RepoError::Malformed { .. } | RepoError::Damaged { .. } => {
                "Run `dr verify --all` to see what else is affected; other backups may be whole.".into()
            }
            RepoError::TooNew { .. } => "Use the version of dr that wrote it, or a later one.".into(),
            RepoError::OtherOwner { .. } => "An object was moved or copied between repositories. Put the right one back.".into(),
            RepoError::Fenced { .. } => {
                "Two servers write into one archive, as after a clone or a failover: stop one, or give it a repository of its own.".into()
            }
            RepoError::OtherCluster { .. } => "Check [cluster] in dr.toml: is it the server that you mean?".into(),
            RepoError::NoBackup { .. } => "`dr list` shows the backups.".into(),
            RepoError::NoWal { .. } => "`dr list` shows what can be recovered.".into(),
            RepoError::Journal { .. } => "Backups are not affected; receipts may be. Look at the objects under job/.".into(),
            RepoError::Output { .. } => "Check the free space and the owner of the place.".into(),
            RepoError::Bug { .. } => "Please report it, with the command and this message.".into(),
        })
    }
}
