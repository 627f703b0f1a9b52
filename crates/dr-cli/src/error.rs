//! Errors at the edge: shown with their cause, their way out and their page.

use dr_agent::AgentError;
use dr_agent::resident::ResidentError;
use dr_core::{Classified, ErrorClass};
use dr_engine::EngineError;
use thiserror::Error;

/// Why a command failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CliError {
    /// The parts could not be put together.
    #[error(transparent)]
    Agent(AgentError),
    /// A job stopped.
    #[error(transparent)]
    Engine(EngineError),
    /// The command line is wrong.
    #[error("{what}")]
    Usage {
        /// What is wrong.
        what: String,
        /// What to write instead.
        hint: String,
    },
    /// Checks found something bad.
    #[error("{what}")]
    NotReady {
        /// What was found, in short.
        what: String,
    },
    /// Stored backups are damaged.
    #[error("{what}")]
    NotWhole {
        /// What was found, in short.
        what: String,
    },
    /// Output cannot be written.
    #[error("cannot write {path}")]
    Output {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// What a command had to say could not be written, after it had done its work.
    #[error("standard output cannot be written")]
    Stdout {
        /// Why.
        source: std::io::Error,
    },
}

impl From<AgentError> for CliError {
    fn from(error: AgentError) -> Self {
        CliError::Agent(error)
    }
}

impl From<ResidentError> for CliError {
    fn from(error: ResidentError) -> Self {
        CliError::Agent(error.into())
    }
}

impl From<EngineError> for CliError {
    fn from(error: EngineError) -> Self {
        CliError::Engine(error)
    }
}

impl CliError {
    pub(crate) fn usage(what: impl Into<String>, hint: impl Into<String>) -> Self {
        CliError::Usage { what: what.into(), hint: hint.into() }
    }
}

impl Classified for CliError {
    fn class(&self) -> ErrorClass {
        match self {
            CliError::Agent(error) => error.class(),
            CliError::Engine(error) => error.class(),
            CliError::Usage { .. } | CliError::NotReady { .. } => ErrorClass::Invalid,
            CliError::NotWhole { .. } => ErrorClass::Corrupt,
            CliError::Output { source, .. } | CliError::Stdout { source } => match source.kind() {
                std::io::ErrorKind::StorageFull => ErrorClass::Exhausted,
                std::io::ErrorKind::PermissionDenied => ErrorClass::Denied,
                _ => ErrorClass::Invalid,
            },
        }
    }

    fn code(&self) -> &'static str {
        match self {
            CliError::Agent(AgentError::Resident(ResidentError::Refused { code, .. })) => {
                // The page of what the agent met, if this version has it.
                CODES.iter().find(|known| *known == code).copied().unwrap_or("agent-refused")
            }
            CliError::Agent(error) => error.code(),
            CliError::Engine(error) => error.code(),
            CliError::Usage { .. } => "cli-usage",
            CliError::NotReady { .. } => "cli-not-ready",
            CliError::NotWhole { .. } => "cli-not-whole",
            CliError::Output { .. } | CliError::Stdout { .. } => "cli-output",
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            CliError::Agent(error) => error.hint(),
            CliError::Engine(error) => error.hint(),
            CliError::Usage { hint, .. } => Some(hint.clone()),
            CliError::NotReady { .. } => Some("Each finding above says what to do.".into()),
            CliError::NotWhole { .. } => Some(
                "Take a new backup now (`dr backup --full`); restore from a backup that is whole.".into(),
            ),
            CliError::Output { .. } => {
                Some("Choose another place; an existing file is never replaced.".into())
            }
            CliError::Stdout { .. } => Some(
                "The command itself ended without an error: only what it printed is lost. Look where its output goes."
                    .into(),
            ),
        }
    }
}

/// Every code that a command can end with; each has a page in `docs/errors/`.
pub const CODES: &[&str] = &[
    "storage-not-found",
    "storage-already-exists",
    "storage-truncated",
    "storage-denied",
    "storage-full",
    "storage-unavailable",
    "storage-indeterminate",
    "storage-poisoned",
    "storage-unsupported",
    "storage-invalid",
    "key-wrong",
    "key-cannot-unwrap",
    "key-bad-file",
    "key-unreadable",
    "key-absent",
    "source-unreachable",
    "source-denied",
    "source-busy",
    "source-query",
    "source-file",
    "source-damaged",
    "source-other-cluster",
    "source-invalid",
    "source-unsupported",
    "replication-unreachable",
    "replication-refused",
    "replication-server",
    "replication-late",
    "replication-protocol",
    "replication-unsupported",
    "cluster-file",
    "cluster-damaged",
    "cluster-no-programs",
    "cluster-program",
    "cluster-unsupported",
    "wal-bad-name",
    "wal-bad-length",
    "wal-bad-page",
    "wal-wrong-cluster",
    "wal-wrong-place",
    "repo-none",
    "repo-exists",
    "repo-malformed",
    "repo-damaged",
    "repo-too-new",
    "repo-other-owner",
    "repo-fenced",
    "repo-other-cluster",
    "repo-no-backup",
    "repo-no-wal",
    "repo-journal",
    "repo-output",
    "repo-bug",
    "job-file",
    "job-no-backup",
    "job-target-before-backup",
    "job-unknown-cluster",
    "job-content-mismatch",
    "job-wal-not-archived",
    "job-wal-gap",
    "job-not-empty",
    "job-not-ours",
    "job-preflight",
    "job-target-not-reached",
    "job-replay-stalled",
    "job-standby-not-proven",
    "job-invalid",
    "job-cancelled",
    "job-bug",
    "config-unreadable",
    "config-syntax",
    "config-unknown-key",
    "config-bad-value",
    "config-missing",
    "config-which-cluster",
    "agent-running",
    "agent-socket",
    "agent-listen",
    "agent-unreachable",
    "agent-late",
    "agent-protocol",
    "agent-version",
    "agent-unsupported",
    "agent-request",
    "agent-busy",
    "agent-refused",
    "agent-stopping",
    "agent-still-runs",
    "agent-stop-cut",
    "agent-bug",
    "cli-usage",
    "cli-not-ready",
    "cli-not-whole",
    "cli-output",
];
