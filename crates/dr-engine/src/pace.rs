//! A limit on the rate of reading.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::context::Cancel;
use crate::error::EngineError;

/// How often a wait looks whether the job is cancelled.
const SLICE: Duration = Duration::from_millis(100);

/// Holds all threads of a job together to a rate, on the average since it began.
#[derive(Debug)]
pub(crate) struct Pace {
    rate: Option<u64>,
    began: Instant,
    bytes: AtomicU64,
}

impl Pace {
    /// At most `rate` bytes a second; `None`: no limit.
    pub fn new(rate: Option<u64>) -> Self {
        Pace { rate: rate.map(|rate| rate.max(1)), began: Instant::now(), bytes: AtomicU64::new(0) }
    }

    /// Accounts for bytes that were read, and waits until they are due.
    pub fn account(&self, bytes: u64, cancel: &Cancel) -> Result<(), EngineError> {
        let Some(rate) = self.rate else { return Ok(()) };
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let due = Duration::from_secs_f64(bytes as f64 / rate as f64);
        while let Some(left) = due.checked_sub(self.began.elapsed()).filter(|left| !left.is_zero()) {
            cancel.check()?;
            std::thread::sleep(left.min(SLICE));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_due_at_their_rate_and_a_cancelled_job_does_not_wait() {
        let pace = Pace::new(Some(1 << 20));
        let began = Instant::now();
        pace.account(256 << 10, &Cancel::default()).expect("not cancelled");
        assert!(began.elapsed() >= Duration::from_millis(250));
        let cancel = Cancel::default();
        cancel.cancel();
        assert!(pace.account(1 << 40, &cancel).is_err());
        Pace::new(None).account(1 << 60, &cancel).expect("there is no limit");
    }
}
