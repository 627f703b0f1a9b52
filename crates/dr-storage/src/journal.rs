//! The journal kept in a storage target; see `dr_core::journal` for its records.

use std::sync::Arc;

use dr_core::journal::JournalRecord;
use dr_core::port::{Key, StorageError, StorageTarget};
use futures_util::TryStreamExt;

use crate::error::RepoError;

/// Writers that may pass an append before it gives up.
const ATTEMPTS: usize = 32;

/// A chain of numbered, create-only records below one prefix.
#[derive(Clone, Debug)]
pub struct Journal {
    target: Arc<dyn StorageTarget>,
    prefix: String,
}

impl Journal {
    /// The journal below `prefix` (which ends with `/`).
    pub fn new(target: Arc<dyn StorageTarget>, prefix: impl Into<String>) -> Self {
        Journal { target, prefix: prefix.into() }
    }

    fn key(&self, number: u64) -> Result<Key, RepoError> {
        Key::new(format!("{}{number:010}.json", self.prefix))
            .map_err(|error| RepoError::Bug { what: error.to_string() })
    }

    /// Appends a record, durably, after all others; answers its number.
    ///
    /// Of two writers that append at the same time, one takes the number and the other the next.
    pub async fn append(&self, kind: &str, body: serde_json::Value) -> Result<u64, RepoError> {
        let mut last = self.last().await?;
        for _ in 0..ATTEMPTS {
            let previous = last.as_ref().map(|(number, bytes)| (*number, &bytes[..]));
            let record = JournalRecord::after(previous, kind, body.clone());
            let bytes = record.to_bytes();
            let key = self.key(record.number)?;
            match self.target.create(&key, bytes.clone().into()).await {
                Ok(()) => return Ok(record.number),
                Err(StorageError::AlreadyExists { .. } | StorageError::Indeterminate { .. }) => {
                    let found = self.target.get(&key, None).await.map_err(RepoError::from_storage)?;
                    // An earlier try of this very append may have happened.
                    if found[..] == bytes[..] {
                        return Ok(record.number);
                    }
                    last = Some((record.number, found.to_vec()));
                }
                Err(error) => return Err(RepoError::from_storage(error)),
            }
        }
        Err(RepoError::Fenced { what: format!("the journal {}", self.prefix) })
    }

    async fn last(&self) -> Result<Option<(u64, Vec<u8>)>, RepoError> {
        let Some(number) = self.numbers().await?.pop() else { return Ok(None) };
        let bytes = self.target.get(&self.key(number)?, None).await.map_err(RepoError::from_storage)?;
        Ok(Some((number, bytes.to_vec())))
    }

    async fn numbers(&self) -> Result<Vec<u64>, RepoError> {
        let listed: Vec<_> =
            self.target.list(&self.prefix, None).try_collect().await.map_err(RepoError::from_storage)?;
        let number = |key: &Key| key.as_str().strip_prefix(&self.prefix)?.strip_suffix(".json")?.parse().ok();
        Ok(listed.iter().filter_map(|object| number(&object.key)).collect())
    }

    /// The last `count` records, oldest first, the chain between them checked.
    pub async fn tail(&self, count: usize) -> Result<Vec<JournalRecord>, RepoError> {
        let numbers = self.numbers().await?;
        let from = numbers.len().saturating_sub(count);
        let mut records: Vec<JournalRecord> = Vec::new();
        let mut before: Option<(u64, Vec<u8>)> = None;
        for number in &numbers[from..] {
            let bytes = self.target.get(&self.key(*number)?, None).await.map_err(RepoError::from_storage)?;
            let fault = |source| RepoError::Journal { source };
            let record = JournalRecord::parse(*number, &bytes).map_err(fault)?;
            match &before {
                Some((last, bytes)) if last + 1 == *number => record.check_follows(bytes).map_err(fault)?,
                Some(_) => {
                    return Err(fault(dr_core::journal::JournalFault::BrokenChain { number: *number }));
                }
                None => {}
            }
            before = Some((*number, bytes.to_vec()));
            records.push(record);
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::MemoryTarget;

    #[tokio::test]
    async fn writers_side_by_side_share_one_chain() {
        let target = Arc::new(MemoryTarget::new());
        let journal = Journal::new(target.clone(), "job/");
        let appends = (0..8).map(|n| {
            let journal = journal.clone();
            async move { journal.append("receipt", serde_json::json!({ "n": n })).await }
        });
        let mut numbers = futures_util::future::try_join_all(appends).await.expect("appends");
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=8).collect::<Vec<_>>());
        assert_eq!(journal.tail(100).await.expect("a whole chain").len(), 8);
    }

    #[tokio::test]
    async fn a_missing_or_replaced_record_is_seen() {
        let target = Arc::new(MemoryTarget::new());
        let journal = Journal::new(target.clone(), "job/");
        for n in 0..3 {
            journal.append("receipt", serde_json::json!({ "n": n })).await.expect("an append");
        }
        let second = Key::new("job/0000000002.json").expect("a key");
        target.delete(&second).await.expect("a delete");
        assert!(matches!(journal.tail(10).await, Err(RepoError::Journal { .. })));
        let other = JournalRecord::after(Some((1, b"x")), "receipt", serde_json::json!({}));
        target.create(&second, other.to_bytes().into()).await.expect("a create");
        assert!(matches!(journal.tail(10).await, Err(RepoError::Journal { .. })));
    }
}
