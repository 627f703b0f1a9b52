//! `dr check`: what is missing or wrong, and how to mend it.

use dr_agent::wire;
use dr_core::port::{Finding, Verdict};
use dr_engine::chain;

use super::Session;
use crate::error::CliError;
use crate::output;
use crate::paint::{self, Ink};

pub(super) async fn run(session: &Session) -> Result<u8, CliError> {
    let source = wire::source(&session.settings);
    let (target, storage_error) = match wire::target(&session.settings, false) {
        Ok(target) => (Some(target), None),
        Err(error) => (None, Some(error)),
    };
    let mut report = dr_verify::check(Some(source.as_ref()), target.as_deref()).await;
    if let Some(error) = &storage_error {
        report.findings.push(Finding::bad(
            "storage",
            chain(error),
            dr_core::Classified::hint(error).unwrap_or_default(),
        ));
    } else {
        report.findings.push(repository(session).await);
    }
    report.verdict = report.findings.iter().map(|f| f.verdict).max().unwrap_or(Verdict::Good);
    output::result(session.global.json, "check", &report, || findings(&report.findings));
    match report.verdict {
        Verdict::Bad => {
            let bad = report.findings.iter().filter(|f| f.verdict == Verdict::Bad).count();
            Err(CliError::NotReady { what: format!("{bad} of {} checks failed", report.findings.len()) })
        }
        _ => Ok(0),
    }
}

async fn repository(session: &Session) -> Finding {
    match session.repository().await {
        Ok(repo) if repo.can_read_data() => Finding::good("keys", "this host can write and read backups"),
        Ok(repo) if repo.can_write() => {
            Finding::good("keys", "this host can write backups; it cannot read them")
        }
        Ok(_) => Finding::bad(
            "keys",
            "no key is configured: backups can only be listed",
            "Set [encryption] key_file or host_key_file.",
        ),
        Err(error) => {
            Finding::bad("keys", chain(&error), dr_core::Classified::hint(&error).unwrap_or_default())
        }
    }
}

/// Findings as lines, each bad one with its fix.
pub(super) fn findings(list: &[Finding]) -> String {
    let mut text = String::new();
    for finding in list {
        let mark = match finding.verdict {
            Verdict::Good => paint::out(Ink::Good, "ok  "),
            Verdict::Warning => paint::out(Ink::Warning, "warn"),
            Verdict::Bad => paint::out(Ink::Bad, "BAD "),
        };
        text.push_str(&format!("{mark}  {:<20} {}\n", finding.check, finding.detail));
        if finding.verdict != Verdict::Good && !finding.fix.is_empty() {
            text.push_str(&format!("      {:<20} -> {}\n", "", finding.fix));
        }
    }
    text
}
