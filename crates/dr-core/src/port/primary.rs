//! The server that standbys follow.

use std::fmt;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::SystemId;
use crate::lsn::{Lsn, Timeline};
use crate::port::finding::Finding;
use crate::port::source::SourceError;

/// A mark in the primary's WAL: a standby that has replayed it has everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// The position after the mark.
    pub lsn: Lsn,
    /// The timeline that it is on.
    pub timeline: Timeline,
    /// When it was made, by the primary's clock.
    pub time: Timestamp,
}

/// Where a primary is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrimaryState {
    /// The cluster.
    pub system_id: SystemId,
    /// Its timeline.
    pub timeline: Timeline,
    /// The end of its WAL.
    pub lsn: Lsn,
    /// Its clock.
    pub time: Timestamp,
    /// The next transaction that writes; the difference to a standby's counts the transactions
    /// that the standby has not seen.
    pub next_xid: u64,
}

/// A standby, as its primary sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Follower {
    /// Its `application_name`.
    pub name: String,
    /// `streaming`, `catchup`, …
    pub state: String,
    /// Whether commits wait for it: `async`, `sync`, `potential`, `quorum`.
    pub sync: String,
    /// Up to where it has replayed.
    pub replayed: Option<Lsn>,
    /// Bytes of WAL that it has not replayed.
    pub lag_bytes: Option<u64>,
    /// How long the last commits took to be replayed, in milliseconds; `None` when nothing moves.
    pub lag_ms: Option<u64>,
}

/// A replication slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotState {
    /// Its name.
    pub name: String,
    /// `physical` or `logical`.
    pub kind: String,
    /// The database of a logical one.
    #[serde(default)]
    pub database: Option<String>,
    /// Whether standbys keep a copy of it (17 and later).
    #[serde(default)]
    pub failover: bool,
    /// Whether somebody uses it.
    pub active: bool,
    /// From where WAL is kept for it.
    pub restart: Option<Lsn>,
    /// Bytes of WAL kept for it.
    pub retained_bytes: Option<u64>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Bytes of WAL until it is lost; `None`: without limit.
    pub safe_bytes: Option<u64>,
}

/// The server that standbys follow. Every call has a limit in time.
#[async_trait]
pub trait Primary: Send + Sync + fmt::Debug {
    /// What a standby needs of it, and the fix for what is missing. `streams`: the standby
    /// streams, which needs more than an archive.
    async fn check_for_standby(&self, streams: bool) -> Result<Vec<Finding>, SourceError>;

    /// Where it is.
    async fn state(&self) -> Result<PrimaryState, SourceError>;

    /// Writes a mark into its WAL. `archived`: and closes the segment, so that the mark reaches the
    /// archive.
    async fn canary(&self, note: &str, archived: bool) -> Result<Canary, SourceError>;

    /// Makes a physical slot that keeps WAL from now on; `false`: it was there.
    async fn ensure_slot(&self, name: &str) -> Result<bool, SourceError>;

    /// Removes a slot that nobody uses; one that is not there is fine.
    async fn drop_slot(&self, name: &str) -> Result<(), SourceError>;

    /// The standbys that are connected.
    async fn followers(&self) -> Result<Vec<Follower>, SourceError>;

    /// All slots, logical ones too.
    async fn slots(&self) -> Result<Vec<SlotState>, SourceError>;

    /// The connection string for a standby's `primary_conninfo`, with its name as the application's.
    fn conninfo_for(&self, standby: &str) -> Result<String, SourceError>;
}
