//! Whether everything is ready: server, storage, archive.

use dr_core::port::{DatabaseSource, Finding, StorageTarget, Verdict};
use dr_engine::chain;
use serde::Serialize;

/// What `dr check` found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Each thing looked at.
    pub findings: Vec<Finding>,
    /// The worst of them.
    pub verdict: Verdict,
}

/// Checks the server and the storage. A part that cannot be looked at is a finding, not an error:
/// the other part is still worth knowing.
pub async fn check(source: Option<&dyn DatabaseSource>, target: Option<&dyn StorageTarget>) -> CheckReport {
    let mut findings = Vec::new();
    if let Some(source) = source {
        match source.check().await {
            Ok(found) => findings.extend(found),
            Err(error) => findings.push(Finding::bad("server", chain(&error), hint(&error))),
        }
    }
    if let Some(target) = target {
        match dr_storage::probe(target).await {
            Ok(found) => findings.extend(found),
            Err(error) => findings.push(Finding::bad("storage", chain(&error), hint(&error))),
        }
    }
    let verdict = findings.iter().map(|f| f.verdict).max().unwrap_or(Verdict::Good);
    CheckReport { findings, verdict }
}

fn hint(error: &dyn dr_core::Classified) -> String {
    error.hint().unwrap_or_default()
}
