//! A storage target that fails on purpose: did it happen, and were we told? And a disk that does.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use dr_core::port::{Capabilities, Key, ObjectInfo, Payload, StorageError, StorageTarget};
use dr_storage::target::{DiskProbe, DiskStep};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

/// What a disk, or the network before it, answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// An input/output error.
    Io,
    /// A network file system does not know the file any more.
    Stale,
    /// It is full.
    Full,
    /// The server did not answer in time.
    TimedOut,
}

impl DiskError {
    /// All of them, for sweeps.
    pub const ALL: [DiskError; 4] = [DiskError::Io, DiskError::Stale, DiskError::Full, DiskError::TimedOut];

    fn error(self) -> io::Error {
        io::Error::from_raw_os_error(match self {
            DiskError::Io => libc::EIO,
            DiskError::Stale => libc::ESTALE,
            DiskError::Full => libc::ENOSPC,
            DiskError::TimedOut => libc::ETIMEDOUT,
        })
    }
}

/// Lets one step on the disk fail, once, and counts all of them.
#[derive(Debug)]
pub struct FaultyDisk {
    steps: AtomicU64,
    at: u64,
    error: DiskError,
    hit: std::sync::Mutex<Option<DiskStep>>,
}

impl FaultyDisk {
    /// A disk that fails at the given step, counted from 0.
    pub fn new(at: u64, error: DiskError) -> Self {
        FaultyDisk { steps: AtomicU64::new(0), at, error, hit: std::sync::Mutex::default() }
    }

    /// A disk that only counts.
    pub fn counting() -> Self {
        Self::new(u64::MAX, DiskError::Io)
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::SeqCst)
    }

    /// What failed.
    pub fn hit(&self) -> Option<DiskStep> {
        *self.hit.lock().unwrap()
    }
}

impl DiskProbe for FaultyDisk {
    fn step(&self, step: DiskStep) -> io::Result<()> {
        if self.steps.fetch_add(1, Ordering::SeqCst) != self.at {
            return Ok(());
        }
        *self.hit.lock().unwrap() = Some(step);
        Err(self.error.error())
    }
}

/// What happens at one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is refused, for good: permissions.
    Denied,
    /// The store is full.
    Full,
    /// It did not happen, and we are told so.
    Unavailable,
    /// It happened, and we are not told.
    DoneButLost,
    /// It did not happen, and we are not told.
    LostBefore,
    /// A read gives back other bytes.
    WrongBytes,
    /// A read comes a moment before the object does: it is not found, and is there at the next call.
    /// No failure, so not among [`Fault::ALL`].
    NotYet,
}

impl Fault {
    /// All failures, for sweeps.
    pub const ALL: [Fault; 6] = [
        Fault::Denied,
        Fault::Full,
        Fault::Unavailable,
        Fault::DoneButLost,
        Fault::LostBefore,
        Fault::WrongBytes,
    ];
}

/// Wraps a target; from call number `at` on, `times` calls have the fault.
#[derive(Debug)]
pub struct FaultyTarget {
    inner: Arc<dyn StorageTarget>,
    calls: AtomicU64,
    at: u64,
    times: u64,
    fault: Fault,
}

impl FaultyTarget {
    /// A target that fails at the given call (counted from 0).
    pub fn new(inner: Arc<dyn StorageTarget>, at: u64, times: u64, fault: Fault) -> Self {
        FaultyTarget { inner, calls: AtomicU64::new(0), at, times, fault }
    }

    /// A target that only counts its calls.
    pub fn counting(inner: Arc<dyn StorageTarget>) -> Self {
        Self::new(inner, u64::MAX, 0, Fault::Denied)
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    fn fault_now(&self) -> Option<Fault> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        (call >= self.at && call - self.at < self.times).then_some(self.fault)
    }

    fn error(&self, fault: Fault, operation: &'static str, key: &str) -> StorageError {
        let (key, target) = (key.to_owned(), self.location());
        let source = format!("planted: {fault:?}").into();
        match fault {
            Fault::Denied => StorageError::Denied { operation, key, target, source },
            Fault::Full => StorageError::Full { operation, key, target, source },
            Fault::Unavailable | Fault::WrongBytes => {
                StorageError::Unavailable { operation, key, target, source }
            }
            Fault::DoneButLost | Fault::LostBefore => {
                StorageError::Indeterminate { operation, key, target, source }
            }
            Fault::NotYet => StorageError::NotFound { key, target },
        }
    }
}

#[async_trait]
impl StorageTarget for FaultyTarget {
    fn location(&self) -> String {
        format!("faulty {}", self.inner.location())
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn create(&self, key: &Key, payload: Payload) -> Result<(), StorageError> {
        match self.fault_now() {
            None | Some(Fault::WrongBytes | Fault::NotYet) => self.inner.create(key, payload).await,
            Some(Fault::DoneButLost) => {
                self.inner.create(key, payload).await?;
                Err(self.error(Fault::DoneButLost, "create", key.as_str()))
            }
            Some(fault) => Err(self.error(fault, "create", key.as_str())),
        }
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StorageError> {
        match self.fault_now() {
            None => self.inner.get(key, range).await,
            Some(Fault::WrongBytes) => {
                let mut bytes = self.inner.get(key, range).await?.to_vec();
                let middle = bytes.len() / 2;
                if let Some(byte) = bytes.get_mut(middle) {
                    *byte ^= 1;
                }
                Ok(bytes.into())
            }
            Some(fault) => Err(self.error(fault, "read", key.as_str())),
        }
    }

    async fn head(&self, key: &Key) -> Result<ObjectInfo, StorageError> {
        match self.fault_now() {
            None | Some(Fault::WrongBytes) => self.inner.head(key).await,
            Some(fault) => Err(self.error(fault, "look at", key.as_str())),
        }
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> BoxStream<'a, Result<ObjectInfo, StorageError>> {
        match self.fault_now() {
            None | Some(Fault::WrongBytes | Fault::NotYet) => self.inner.list(prefix, after),
            Some(fault) => {
                let error = self.error(fault, "list", prefix);
                futures_util::stream::once(std::future::ready(Err(error))).boxed()
            }
        }
    }

    async fn list_parts(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        match self.fault_now() {
            None | Some(Fault::WrongBytes | Fault::NotYet) => self.inner.list_parts(prefix).await,
            Some(fault) => Err(self.error(fault, "list", prefix)),
        }
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        match self.fault_now() {
            None | Some(Fault::WrongBytes | Fault::NotYet) => self.inner.delete(key).await,
            Some(fault) => Err(self.error(fault, "delete", key.as_str())),
        }
    }
}
