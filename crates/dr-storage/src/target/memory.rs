//! A target in memory, for tests and simulations.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use dr_core::Timestamp;
use dr_core::port::{Capabilities, Key, ObjectInfo, Payload, StorageError, StorageTarget};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};

/// Objects in memory. "Durable" here means: until the process ends.
#[derive(Debug, Default)]
pub struct MemoryTarget {
    objects: Mutex<BTreeMap<Key, Bytes>>,
    lies: bool,
}

impl MemoryTarget {
    /// An empty target.
    pub fn new() -> Self {
        Self::default()
    }

    /// A target that ignores create-only, as some real stores do.
    pub fn lying() -> Self {
        MemoryTarget { lies: true, ..Self::default() }
    }

    fn objects(&self) -> std::sync::MutexGuard<'_, BTreeMap<Key, Bytes>> {
        self.objects.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Replaces the bytes of an object: the damage that tests plant.
    pub fn tamper(&self, key: &Key, change: impl FnOnce(&mut Vec<u8>)) {
        let mut objects = self.objects();
        if let Some(bytes) = objects.get(key) {
            let mut changed = bytes.to_vec();
            change(&mut changed);
            objects.insert(key.clone(), changed.into());
        }
    }

    /// A copy of everything, as it is now.
    pub fn snapshot(&self) -> BTreeMap<Key, Bytes> {
        self.objects().clone()
    }

    /// A target with these objects.
    pub fn from_snapshot(objects: BTreeMap<Key, Bytes>) -> Self {
        MemoryTarget { objects: Mutex::new(objects), lies: false }
    }

    fn not_found(&self, key: &Key) -> StorageError {
        StorageError::NotFound { key: key.to_string(), target: self.location() }
    }
}

#[async_trait]
impl StorageTarget for MemoryTarget {
    fn location(&self) -> String {
        "memory".into()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { create_only: !self.lies, local: true }
    }

    async fn create(&self, key: &Key, payload: Payload) -> Result<(), StorageError> {
        let mut objects = self.objects();
        if objects.contains_key(key) && !self.lies {
            return Err(StorageError::AlreadyExists { key: key.to_string(), target: self.location() });
        }
        let mut bytes = BytesMut::with_capacity(payload.len() as usize);
        payload.pieces().iter().for_each(|piece| bytes.extend_from_slice(piece));
        objects.insert(key.clone(), bytes.freeze());
        Ok(())
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StorageError> {
        let bytes = self.objects().get(key).cloned().ok_or_else(|| self.not_found(key))?;
        let Some(range) = range else { return Ok(bytes) };
        if range.end > bytes.len() as u64 || range.start > range.end {
            return Err(StorageError::Truncated {
                key: key.to_string(),
                target: self.location(),
                size: bytes.len() as u64,
                needed: range.end,
            });
        }
        Ok(bytes.slice(range.start as usize..range.end as usize))
    }

    async fn head(&self, key: &Key) -> Result<ObjectInfo, StorageError> {
        let size = self.objects().get(key).map(|b| b.len() as u64).ok_or_else(|| self.not_found(key))?;
        Ok(ObjectInfo { key: key.clone(), size, modified: Timestamp::UNIX_EPOCH })
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> BoxStream<'a, Result<ObjectInfo, StorageError>> {
        let listed: Vec<_> = self
            .objects()
            .iter()
            .filter(|(key, _)| key.as_str().starts_with(prefix) && after.is_none_or(|a| *key > a))
            .map(|(key, bytes)| {
                let size = bytes.len() as u64;
                Ok(ObjectInfo { key: key.clone(), size, modified: Timestamp::UNIX_EPOCH })
            })
            .collect();
        stream::iter(listed).boxed()
    }

    async fn list_parts(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        let objects = self.objects();
        let part = |key: &Key| Some(key.as_str().strip_prefix(prefix)?.split('/').next()?.to_owned());
        let mut parts: Vec<String> = objects.keys().filter_map(part).collect();
        parts.sort_unstable();
        parts.dedup();
        Ok(parts)
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        self.objects().remove(key);
        Ok(())
    }
}
