//! `dr check`, once or again and again: what is missing or wrong, and how to mend it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dr_core::Classified;
use dr_core::port::{Clock, Finding, StorageTarget, Verdict};
use dr_engine::chain;
use dr_verify::CheckReport;
use serde_json::json;

use crate::config::Settings;
use crate::error::AgentError;
use crate::metrics::Family;
use crate::supervise::{Report, Task, TaskContext, TaskError};
use crate::wire;

/// How long a check in the background may take.
pub const CHECK_LIMIT: Duration = Duration::from_secs(300);

/// The finding of a store that keeps what the probe wrote.
const CANNOT_DELETE: &str = "storage-delete";

/// Looks at the server, the storage and the keys, as `dr check` does.
pub async fn look(settings: &Settings) -> CheckReport {
    let (target, error) = match wire::target(settings, false) {
        Ok(target) => (Some(target), None),
        Err(error) => (None, Some(error)),
    };
    look_at(settings, target.as_deref(), error).await
}

async fn look_at(
    settings: &Settings,
    target: Option<&dyn StorageTarget>,
    error: Option<AgentError>,
) -> CheckReport {
    let source = wire::source(settings);
    let mut report = dr_verify::check(Some(source.as_ref()), target).await;
    match error {
        Some(error) => report.findings.push(bad("storage", &error)),
        None => report.findings.push(keys(settings).await),
    }
    judged(report.findings)
}

fn judged(findings: Vec<Finding>) -> CheckReport {
    let verdict = findings.iter().map(|f| f.verdict).max().unwrap_or(Verdict::Good);
    CheckReport { findings, verdict }
}

fn bad(check: &str, error: &AgentError) -> Finding {
    Finding::bad(check, chain(error), error.hint().unwrap_or_default())
}

async fn keys(settings: &Settings) -> Finding {
    match wire::repository(settings).await {
        Ok(repo) if repo.can_read_data() => Finding::good("keys", "this host can write and read backups"),
        Ok(repo) if repo.can_write() => {
            Finding::good("keys", "this host can write backups; it cannot read them")
        }
        Ok(_) => Finding::bad(
            "keys",
            "no key is configured: backups can only be listed",
            "Set [encryption] key_file or host_key_file.",
        ),
        Err(error) => bad("keys", &error),
    }
}

async fn round(settings: &Settings, probes: bool) -> CheckReport {
    if probes {
        return look(settings).await;
    }
    let mut report = look_at(settings, None, None).await;
    let kept = "it was probed once; probes cannot be removed, so that no more are written";
    report.findings.push(Finding::warning(CANNOT_DELETE, kept, "`dr check` probes it again."));
    judged(report.findings)
}

/// The task `check`: looks again and again, and reports what it found.
pub struct Check {
    settings: Settings,
    every: Duration,
    clock: Arc<dyn Clock>,
    /// Whether the storage is written to. Not again where a probe's object cannot be removed: each
    /// round would leave one more.
    probes: AtomicBool,
}

impl Check {
    /// Looks with these settings, so often.
    pub fn new(settings: Settings, every: Duration, clock: Arc<dyn Clock>) -> Self {
        Check { settings, every, clock, probes: AtomicBool::new(true) }
    }

    async fn round(&self) -> Result<CheckReport, TaskError> {
        let (settings, probes) = (self.settings.clone(), self.probes.load(Ordering::Relaxed));
        let runtime = tokio::runtime::Handle::current();
        // On a thread of its own: a secret may come from a command, which is waited for.
        let round = tokio::task::spawn_blocking(move || {
            runtime.block_on(async { tokio::time::timeout(CHECK_LIMIT, round(&settings, probes)).await })
        });
        let report = match round.await {
            Ok(Ok(report)) => report,
            Ok(Err(_)) => {
                let late = format!("the check did not end within {} s", CHECK_LIMIT.as_secs());
                judged(vec![Finding::bad("check", late, "See what is slow: `dr check -vv`.")])
            }
            Err(error) => return Err(TaskError::bug(format!("the check: {error}"))),
        };
        self.learn(&report);
        Ok(report)
    }

    fn learn(&self, report: &CheckReport) {
        if report.findings.iter().any(|finding| finding.check == CANNOT_DELETE) {
            self.probes.store(false, Ordering::Relaxed);
        }
    }

    fn report(&self, report: &CheckReport, took: Duration) -> Report {
        let now = self.clock.now();
        let mut findings =
            Family::gauge("dr_check_findings", "What the last check in the background found, by verdict.");
        for (verdict, word) in [(Verdict::Good, "good"), (Verdict::Warning, "warning"), (Verdict::Bad, "bad")]
        {
            let count = report.findings.iter().filter(|finding| finding.verdict == verdict).count();
            findings = findings.with(&[("verdict", word)], count as f64);
        }
        let (ended, lasted) = (now.as_millisecond() as f64 / 1000.0, took.as_secs_f64());
        let metrics = vec![
            findings,
            Family::gauge(
                "dr_check_last_run_time_seconds",
                "When the last check in the background ended, in seconds since 1970.",
            )
            .with(&[], ended),
            Family::gauge("dr_check_duration_seconds", "How long the last check in the background took.")
                .with(&[], lasted),
        ];
        let detail = json!({
            "verdict": report.verdict, "findings": report.findings, "ended": now,
            "took_seconds": (lasted * 1000.0).round() / 1000.0,
        });
        Report { detail, metrics }
    }
}

#[async_trait]
impl Task for Check {
    fn name(&self) -> &str {
        "check"
    }

    async fn run(&self, context: TaskContext) -> Result<(), TaskError> {
        let mut last = None;
        loop {
            let began = Instant::now();
            // A round is not cut short: its end, when the probe is removed, is its safe point.
            let report = self.round().await?;
            for finding in report.findings.iter().filter(|f| f.verdict == Verdict::Bad) {
                tracing::debug!("check {}: {}", finding.check, finding.detail);
            }
            if last != Some(report.verdict) {
                tracing::info!("the check's verdict is {}", json!(report.verdict));
                last = Some(report.verdict);
            }
            context.report(self.report(&report, began.elapsed()));
            if !context.pause(self.every).await {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sources;
    use crate::wire::HostClock;

    fn check(repository: &std::path::Path) -> Check {
        let flag = |name: &str, value: String| (name.to_owned(), value, "--set".to_owned());
        let sources = Sources {
            file: Some("/dev/null".into()),
            flags: vec![
                flag("repository.url", repository.display().to_string()),
                flag("cluster.connection", format!("host={}", repository.display())),
            ],
            ..Sources::default()
        };
        let settings = Settings::load(&sources).expect("settings");
        Check::new(settings, Duration::from_secs(60), Arc::new(HostClock))
    }

    #[tokio::test]
    async fn a_store_that_keeps_what_a_probe_wrote_is_probed_once_a_start() {
        let dir = tempfile::tempdir().expect("a directory");
        let check = check(dir.path());
        check.round().await.expect("a round");
        // The probe's object is removed, its folder stays: so one sees that it was there.
        let probed = dir.path().join("dr-probe");
        std::fs::remove_dir(&probed).expect("it was probed, and nothing is left in it");
        check.round().await.expect("a round");
        std::fs::remove_dir(&probed).expect("it is probed in each round");
        let kept = Finding::warning(CANNOT_DELETE, "it does not let this identity delete", "");
        check.learn(&judged(vec![kept]));
        let report = check.round().await.expect("a round");
        assert!(!probed.exists(), "nothing more is written");
        assert!(report.findings.iter().any(|finding| finding.check == CANNOT_DELETE), "and that is told");
    }
}
