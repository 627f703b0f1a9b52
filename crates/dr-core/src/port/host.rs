//! What a host offers and what a cluster needs of it.

use serde::{Deserialize, Serialize};

/// A file outside the data directory that the server needs, as a copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFile {
    /// Its absolute path on the host where it was found.
    pub path: String,
    /// Why it is needed, as `config_file` or `ssl_cert_file`.
    pub role: String,
    /// Permission bits.
    pub mode: u32,
    /// Its bytes; `None` when it could not be read.
    pub content: Option<Vec<u8>>,
}

/// What a cluster needs of the host that runs it, recorded with each backup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNeeds {
    /// PostgreSQL's major version.
    pub major: u32,
    /// `uname -m` of the host: the architecture decides byte order and alignment.
    pub architecture: String,
    /// Libraries that must be loadable, as `pg_stat_statements` (preloaded or of extensions).
    pub libraries: Vec<String>,
    /// Collation providers in use: `(provider and locale, version recorded in the cluster)`.
    pub collations: Vec<(String, String)>,
}

/// What a host offers, looked at before a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The directory of the server's programs that would run the cluster, when one was found.
    pub bin_dir: Option<String>,
    /// Major version of those programs.
    pub major: Option<u32>,
    /// `uname -m`.
    pub architecture: String,
    /// Of the needed libraries, those that are missing.
    pub missing_libraries: Vec<String>,
    /// Of the needed collations, those whose version here differs or that are missing:
    /// `(name, version recorded, version here or empty)`.
    pub differing_collations: Vec<(String, String, String)>,
}
