//! Writes a storage target of one's own and shows that it keeps the contract.
//!
//! The target here stands for any store with an API: it wraps one in memory and refuses objects
//! over a limit. Implement the trait, then let the conformance suite judge.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use dr_core::port::{Capabilities, Key, ObjectInfo, Payload, StorageError, StorageTarget};
use dr_examples::Result;
use dr_storage::target::MemoryTarget;
use dr_storage::{conformance, probe};
use futures_util::stream::BoxStream;

/// Refuses objects of more than `limit` bytes.
#[derive(Debug)]
struct Limited {
    inner: MemoryTarget,
    limit: u64,
}

#[async_trait]
impl StorageTarget for Limited {
    fn location(&self) -> String {
        format!("{}, at most {} bytes an object", self.inner.location(), self.limit)
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn create(&self, key: &Key, payload: Payload) -> std::result::Result<(), StorageError> {
        if payload.len() > self.limit {
            // The class of an error decides what the jobs do: this one is not tried again.
            let source = format!("{} bytes", payload.len()).into();
            let (key, target) = (key.to_string(), self.location());
            return Err(StorageError::Full { operation: "create", key, target, source });
        }
        self.inner.create(key, payload).await
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> std::result::Result<Bytes, StorageError> {
        self.inner.get(key, range).await
    }

    async fn head(&self, key: &Key) -> std::result::Result<ObjectInfo, StorageError> {
        self.inner.head(key).await
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> BoxStream<'a, std::result::Result<ObjectInfo, StorageError>> {
        self.inner.list(prefix, after)
    }

    async fn list_parts(&self, prefix: &str) -> std::result::Result<Vec<String>, StorageError> {
        self.inner.list_parts(prefix).await
    }

    async fn delete(&self, key: &Key) -> std::result::Result<(), StorageError> {
        self.inner.delete(key).await
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let target = Arc::new(Limited { inner: MemoryTarget::new(), limit: 64 << 20 });
    // What `dr init` and `dr check` try on every store before they trust it.
    for finding in probe(target.as_ref()).await? {
        println!("{finding:?}");
    }
    conformance::check(target).await?;
    println!("the contract is kept");
    Ok(())
}
