//! A store that is far away: each call waits for its answer, and for its bytes.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use dr_core::port::{Capabilities, Key, ObjectInfo, Payload, StorageError, StorageTarget};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

/// A target behind a network.
#[derive(Debug)]
pub struct FarTarget {
    inner: Arc<dyn StorageTarget>,
    latency: Duration,
    /// Bytes a second of one call; calls do not slow each other down.
    rate: u64,
    calls: AtomicU64,
}

impl FarTarget {
    /// A target whose every call takes `latency`, and a second for `rate` bytes.
    pub fn new(inner: Arc<dyn StorageTarget>, latency: Duration, rate: u64) -> Self {
        FarTarget { inner, latency, rate, calls: AtomicU64::new(0) }
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    async fn wait(&self, bytes: u64) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(self.latency + Duration::from_secs_f64(bytes as f64 / self.rate as f64)).await;
    }
}

#[async_trait]
impl StorageTarget for FarTarget {
    fn location(&self) -> String {
        format!("far {}", self.inner.location())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { local: false, ..self.inner.capabilities() }
    }

    async fn create(&self, key: &Key, payload: Payload) -> Result<(), StorageError> {
        self.wait(payload.len()).await;
        self.inner.create(key, payload).await
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StorageError> {
        let bytes = self.inner.get(key, range).await?;
        self.wait(bytes.len() as u64).await;
        Ok(bytes)
    }

    async fn head(&self, key: &Key) -> Result<ObjectInfo, StorageError> {
        self.wait(0).await;
        self.inner.head(key).await
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> BoxStream<'a, Result<ObjectInfo, StorageError>> {
        let waited = futures_util::stream::once(self.wait(0)).filter_map(|()| std::future::ready(None));
        waited.chain(self.inner.list(prefix, after)).boxed()
    }

    async fn list_parts(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        self.wait(0).await;
        self.inner.list_parts(prefix).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        self.wait(0).await;
        self.inner.delete(key).await
    }
}
