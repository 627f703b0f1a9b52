//! Classes of error: the one thing that retries, exit codes and severity look at.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of failure an error is, whatever its wording.
///
/// Decisions (retry, exit code, severity) are taken on the class alone, never on text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorClass {
    /// It may work when repeated: a busy store, a dropped connection.
    Transient,
    /// It may or may not have happened; ask before deciding.
    Indeterminate,
    /// Somebody else owns this name or this epoch; nothing was changed.
    Fenced,
    /// The thing asked for does not exist.
    Missing,
    /// Bytes are not what was written.
    Corrupt,
    /// Credentials or keys do not allow it.
    Denied,
    /// The request or the configuration is wrong.
    Invalid,
    /// This version, store or server cannot do it.
    Unsupported,
    /// No space, quota or other bound left.
    Exhausted,
    /// A person or a signal stopped it.
    Cancelled,
    /// A defect in `dr`.
    Bug,
}

impl ErrorClass {
    /// Every class, in the order of the exit codes.
    pub const ALL: [ErrorClass; 11] = [
        ErrorClass::Transient,
        ErrorClass::Indeterminate,
        ErrorClass::Fenced,
        ErrorClass::Missing,
        ErrorClass::Corrupt,
        ErrorClass::Denied,
        ErrorClass::Invalid,
        ErrorClass::Unsupported,
        ErrorClass::Exhausted,
        ErrorClass::Cancelled,
        ErrorClass::Bug,
    ];

    /// The exit code of a command that ends with an error of this class.
    ///
    /// `dr wal fetch` is the exception: PostgreSQL gives its exit codes a meaning of their own.
    pub fn exit_code(self) -> u8 {
        match self {
            ErrorClass::Transient => 10,
            ErrorClass::Indeterminate => 11,
            ErrorClass::Fenced => 12,
            ErrorClass::Missing => 13,
            ErrorClass::Corrupt => 14,
            ErrorClass::Denied => 15,
            ErrorClass::Invalid => 16,
            ErrorClass::Unsupported => 17,
            ErrorClass::Exhausted => 18,
            ErrorClass::Cancelled => 19,
            ErrorClass::Bug => 70,
        }
    }

    /// Whether repeating the same call may succeed.
    pub fn is_retryable(self) -> bool {
        matches!(self, ErrorClass::Transient | ErrorClass::Indeterminate)
    }
}

impl fmt::Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorClass::Transient => "transient",
            ErrorClass::Indeterminate => "indeterminate",
            ErrorClass::Fenced => "fenced",
            ErrorClass::Missing => "missing",
            ErrorClass::Corrupt => "corrupt",
            ErrorClass::Denied => "denied",
            ErrorClass::Invalid => "invalid",
            ErrorClass::Unsupported => "unsupported",
            ErrorClass::Exhausted => "exhausted",
            ErrorClass::Cancelled => "cancelled",
            ErrorClass::Bug => "bug",
        })
    }
}

/// An error that can be acted on by its class.
pub trait Classified: std::error::Error {
    /// The class that decides retries, exit code and severity.
    fn class(&self) -> ErrorClass;

    /// The stable name of the error's page in `docs/errors/`, as `storage-not-found`.
    fn code(&self) -> &'static str;

    /// What a person can do next, when it is not plain from the message.
    fn hint(&self) -> Option<String>;
}
