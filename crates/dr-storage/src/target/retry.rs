//! Tries again what may work, and asks before it decides.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use dr_core::guard::Guard;
use dr_core::port::{Capabilities, Key, ObjectInfo, Payload, StorageError, StorageTarget};
use dr_core::{Classified, ErrorClass};
use futures_util::stream::BoxStream;

/// How often and how patiently.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Attempts in all.
    pub attempts: u32,
    /// The wait before the second attempt; it doubles each time.
    pub first_wait: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        RetryPolicy { attempts: 5, first_wait: Duration::from_millis(200) }
    }
}

/// A target that repeats transient failures, and resolves creates without an answer by reading
/// back what is there.
#[derive(Debug)]
pub struct Retrying {
    inner: Arc<dyn StorageTarget>,
    policy: RetryPolicy,
}

impl Retrying {
    /// Wraps a target.
    pub fn new(inner: Arc<dyn StorageTarget>, policy: RetryPolicy) -> Self {
        Retrying { inner, policy }
    }

    async fn wait(&self, attempt: u32) {
        // A quarter of chance keeps many clients from coming back at the same moment.
        let base = self.policy.first_wait * 2u32.saturating_pow(attempt);
        let jitter = base.mul_f64(f64::from(crate::random_u32() % 256) / 1024.0);
        tokio::time::sleep(base + jitter).await;
    }

    /// Whether the object holds exactly these bytes.
    async fn holds(&self, key: &Key, payload: &Payload) -> Result<bool, StorageError> {
        let found = self.inner.get(key, None).await?;
        if found.len() as u64 != payload.len() {
            return Ok(false);
        }
        let mut rest = &found[..];
        for piece in payload.pieces() {
            let (head, tail) = rest.split_at(piece.len());
            if head != &piece[..] {
                return Ok(false);
            }
            rest = tail;
        }
        Ok(true)
    }

    async fn retry<T, F>(&self, mut call: impl FnMut() -> F) -> Result<T, StorageError>
    where
        F: Future<Output = Result<T, StorageError>>,
    {
        let mut attempt = 0;
        loop {
            match call().await {
                Err(error) if error.class().is_retryable() && attempt + 1 < self.policy.attempts => {
                    told(&error, attempt);
                    self.wait(attempt).await;
                    attempt += 1;
                }
                other => return other,
            }
        }
    }
}

/// A failure that is tried again, for whoever wonders why it takes so long.
fn told(error: &StorageError, attempt: u32) {
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    tracing::info!(attempt = attempt + 1, %cause, "trying again: {error}");
}

#[async_trait]
impl StorageTarget for Retrying {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn create(&self, key: &Key, payload: Payload) -> Result<(), StorageError> {
        tracing::debug!(%key, bytes = payload.len(), "create");
        // Whether an earlier attempt of ours may have happened.
        let mut unsure = false;
        let mut attempt = 0;
        loop {
            let error = match self.inner.create(key, payload.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            match error.class() {
                ErrorClass::Fenced if unsure && Guard::AskAfterTimeout.holds() => {
                    let ours = self.holds(key, &payload).await? || !Guard::SameNameOtherContent.holds();
                    return if ours { Ok(()) } else { Err(error) };
                }
                ErrorClass::Indeterminate if !matches!(error, StorageError::Poisoned { .. }) => {
                    unsure = true;
                    if Guard::AskAfterTimeout.holds() {
                        match self.holds(key, &payload).await {
                            Ok(true) => return Ok(()),
                            Ok(false) if !Guard::SameNameOtherContent.holds() => return Ok(()),
                            Ok(false) => {
                                let (key, target) = (key.to_string(), self.location());
                                return Err(StorageError::AlreadyExists { key, target });
                            }
                            // Not there (yet), or not to be known now: try again.
                            Err(_) => {}
                        }
                    }
                }
                ErrorClass::Transient => {}
                _ => return Err(error),
            }
            if attempt + 1 >= self.policy.attempts {
                return Err(error);
            }
            told(&error, attempt);
            self.wait(attempt).await;
            attempt += 1;
        }
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StorageError> {
        tracing::debug!(%key, ?range, "get");
        self.retry(|| self.inner.get(key, range.clone())).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectInfo, StorageError> {
        tracing::debug!(%key, "head");
        self.retry(|| self.inner.head(key)).await
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> BoxStream<'a, Result<ObjectInfo, StorageError>> {
        tracing::debug!(%prefix, "list");
        // A listing is repeated by its caller: half of one cannot be continued here.
        self.inner.list(prefix, after)
    }

    async fn list_parts(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        tracing::debug!(%prefix, "list parts");
        self.retry(|| self.inner.list_parts(prefix)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        tracing::debug!(%key, "delete");
        self.retry(|| self.inner.delete(key)).await
    }
}
