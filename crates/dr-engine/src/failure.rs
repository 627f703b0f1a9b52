//! The first error among parts that run side by side.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::EngineError;

/// The first error of any part, and the sign for all to stop.
#[derive(Debug, Default)]
pub(crate) struct Failure {
    failed: AtomicBool,
    first: Mutex<Option<EngineError>>,
}

impl Failure {
    /// Records an error; the first one is kept.
    pub fn set(&self, error: EngineError) {
        if let Ok(mut first) = self.first.lock() {
            first.get_or_insert(error);
        }
        self.failed.store(true, Ordering::Release);
    }

    /// Whether some part failed.
    pub fn is_set(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// The first error, once all parts have stopped.
    pub fn take(&self) -> Option<EngineError> {
        self.first.lock().ok().and_then(|mut first| first.take())
    }
}
