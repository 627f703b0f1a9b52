//! Errors of the replication connection.

use std::time::Duration;

use dr_core::error::{Classified, ErrorClass};
use dr_core::port::SourceError;
use thiserror::Error;

/// Why a replication command did not succeed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReplicationError {
    /// The server cannot be reached, or the connection was lost.
    #[error("the server at {server} cannot be reached: {reason}")]
    Unreachable {
        /// Where it was looked for.
        server: String,
        /// What happened.
        reason: String,
    },
    /// The server does not let this role in, or TLS cannot be had as asked.
    #[error("the server at {server} refused the connection: {reason}")]
    Refused {
        /// The server.
        server: String,
        /// SQLSTATE; empty when this side refuses.
        code: String,
        /// Its words.
        reason: String,
    },
    /// The server answered with an error; the connection stays usable unless the severity is FATAL.
    #[error("the server at {server} could not {doing}: {message} ({code})")]
    Server {
        /// The server.
        server: String,
        /// What was asked.
        doing: String,
        /// SQLSTATE: what to decide by, never the text, which is in the server's language.
        code: String,
        /// The server's words.
        message: String,
    },
    /// No answer came in time.
    #[error("the server at {server} did not {doing} within {} s", limit.as_secs_f32())]
    Late {
        /// The server.
        server: String,
        /// What was waited for.
        doing: String,
        /// How long.
        limit: Duration,
    },
    /// The server said something that the protocol does not allow here.
    #[error("the server at {server} does not keep to the protocol: {reason}")]
    Protocol {
        /// The server.
        server: String,
        /// What it said.
        reason: String,
    },
    /// The server is too old for this.
    #[error("PostgreSQL {major} at {server} has no {what}")]
    Unsupported {
        /// The server.
        server: String,
        /// Its major version.
        major: u32,
        /// What is missing.
        what: String,
    },
}

impl ReplicationError {
    /// The SQLSTATE of an error of the server.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            ReplicationError::Server { code, .. } => Some(code),
            _ => None,
        }
    }
}

impl Classified for ReplicationError {
    fn class(&self) -> ErrorClass {
        match self {
            ReplicationError::Unreachable { .. } | ReplicationError::Late { .. } => ErrorClass::Transient,
            ReplicationError::Refused { .. } => ErrorClass::Denied,
            ReplicationError::Server { code, .. } => match code.as_str() {
                // insufficient_privilege
                "42501" => ErrorClass::Denied,
                // undefined_file: a WAL segment or a timeline history that is gone; undefined_object: no slot
                "58P01" | "42704" => ErrorClass::Missing,
                // object_in_use, duplicate_object
                "55006" | "42710" => ErrorClass::Fenced,
                _ => ErrorClass::Transient,
            },
            ReplicationError::Protocol { .. } => ErrorClass::Corrupt,
            ReplicationError::Unsupported { .. } => ErrorClass::Unsupported,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            ReplicationError::Unreachable { .. } => "replication-unreachable",
            ReplicationError::Refused { .. } => "replication-refused",
            ReplicationError::Server { .. } => "replication-server",
            ReplicationError::Late { .. } => "replication-late",
            ReplicationError::Protocol { .. } => "replication-protocol",
            ReplicationError::Unsupported { .. } => "replication-unsupported",
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            ReplicationError::Unreachable { .. } => {
                "Is PostgreSQL running, and do host, port and network in the connection string fit?".into()
            }
            ReplicationError::Refused { .. } => {
                "The role needs the REPLICATION attribute, and pg_hba.conf a line for database \"replication\" \
                 and this host; max_wal_senders must have room."
                    .into()
            }
            ReplicationError::Server { code, .. } if code == "58P01" => {
                "The server has removed that WAL. Use a slot, or fetch it from the archive.".into()
            }
            ReplicationError::Server { code, .. } if code == "42704" => {
                "There is no slot of that name; pg_replication_slots lists them.".into()
            }
            ReplicationError::Server { code, .. } if code == "55006" => {
                "Another client uses the slot: pg_stat_replication shows it.".into()
            }
            ReplicationError::Server { .. } => "See the server's log, then run the command again.".into(),
            ReplicationError::Late { .. } => {
                "The network or the server stands still; look at its load and its log, then try again.".into()
            }
            ReplicationError::Protocol { .. } => {
                "Is a proxy or a pooler in between? Replication needs a direct connection.".into()
            }
            ReplicationError::Unsupported { .. } => "Use the ordinary way, or upgrade the server.".into(),
        })
    }
}

impl From<ReplicationError> for SourceError {
    fn from(error: ReplicationError) -> Self {
        let reason = error.to_string();
        match error {
            ReplicationError::Unreachable { server, reason } => {
                SourceError::Unreachable { server, source: reason.into() }
            }
            ReplicationError::Refused { server, reason, .. } => SourceError::Denied {
                server,
                operation: "the replication connection".into(),
                source: reason.into(),
            },
            ReplicationError::Server { server, doing, code, message } if code == "42501" => {
                SourceError::Denied { server, operation: doing, source: message.into() }
            }
            ReplicationError::Server { server, doing, code, message } => {
                SourceError::Query { server, operation: doing, source: format!("{message} ({code})").into() }
            }
            ReplicationError::Late { server, doing, .. } => {
                SourceError::Query { server, operation: doing, source: reason.into() }
            }
            ReplicationError::Protocol { server, .. } => {
                SourceError::Query { server, operation: "keep to the protocol".into(), source: reason.into() }
            }
            ReplicationError::Unsupported { what, .. } => SourceError::Unsupported { what, reason },
        }
    }
}
