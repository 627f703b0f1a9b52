//! The journal: numbered, create-only records, each with the digest of the one before.
//!
//! This is the one coordination primitive of `dr`. A record's number is its key, and a key can be
//! created once; so of two writers that append the same number one wins and the other learns it.
//! The chain of digests shows a record that was removed, replaced or reordered. This module has
//! the record's bytes and the check of the chain; `dr-storage` keeps them in a target.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// One record of a journal, as stored: JSON, UTF-8.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JournalRecord {
    /// The record's number; the first is 1.
    pub number: u64,
    /// The digest (BLAKE3, hex) of the stored bytes of the record before; empty for the first.
    pub previous: String,
    /// What kind of record it is, as `receipt`.
    pub kind: String,
    /// The content, in the shape that the kind documents.
    pub body: serde_json::Value,
}

/// A journal that is not the chain it should be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum JournalFault {
    /// The bytes are not a record.
    #[error("journal record {number} cannot be read: {reason}")]
    Unreadable {
        /// The number by its key.
        number: u64,
        /// What is wrong.
        reason: String,
    },
    /// The record under this key names another number.
    #[error("journal record {expected} says that it is record {found}")]
    WrongNumber {
        /// The number by its key.
        expected: u64,
        /// The number in the record.
        found: u64,
    },
    /// The record does not follow from the one before.
    #[error("journal record {number} does not follow the record before it: one was replaced or removed")]
    BrokenChain {
        /// The number of the record that does not fit.
        number: u64,
    },
}

impl JournalRecord {
    /// The record after one whose stored bytes were `previous` (`None`: the first record).
    pub fn after(previous: Option<(u64, &[u8])>, kind: &str, body: serde_json::Value) -> Self {
        JournalRecord {
            number: previous.map_or(1, |(number, _)| number + 1),
            previous: previous.map_or(String::new(), |(_, bytes)| digest(bytes)),
            kind: kind.to_owned(),
            body,
        }
    }

    /// The bytes to store.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads a record from its stored bytes, and checks that its number is `number`.
    pub fn parse(number: u64, bytes: &[u8]) -> Result<Self, JournalFault> {
        let record: JournalRecord = serde_json::from_slice(bytes)
            .map_err(|error| JournalFault::Unreadable { number, reason: error.to_string() })?;
        if record.number != number {
            return Err(JournalFault::WrongNumber { expected: number, found: record.number });
        }
        Ok(record)
    }

    /// Checks that this record follows the one whose stored bytes are given.
    pub fn check_follows(&self, previous: &[u8]) -> Result<(), JournalFault> {
        if self.previous == digest(previous) {
            Ok(())
        } else {
            Err(JournalFault::BrokenChain { number: self.number })
        }
    }
}

fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_record_breaks_the_chain() {
        let first = JournalRecord::after(None, "receipt", serde_json::json!({"a": 1}));
        let second = JournalRecord::after(Some((1, &first.to_bytes())), "receipt", serde_json::json!({}));
        assert!(second.check_follows(&first.to_bytes()).is_ok());
        let other = JournalRecord { body: serde_json::json!({"a": 2}), ..first };
        assert_eq!(second.check_follows(&other.to_bytes()), Err(JournalFault::BrokenChain { number: 2 }));
        assert_eq!(
            JournalRecord::parse(7, &second.to_bytes()),
            Err(JournalFault::WrongNumber { expected: 7, found: 2 })
        );
        assert!(matches!(JournalRecord::parse(1, b"{"), Err(JournalFault::Unreadable { number: 1, .. })));
    }
}
