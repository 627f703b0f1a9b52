//! `dr check`: what is missing or wrong, and how to mend it.

use dr_core::port::{Finding, Verdict};

use super::Session;
use crate::error::CliError;
use crate::output;
use crate::paint::{self, Ink};

pub(super) async fn run(session: &Session) -> Result<u8, CliError> {
    let report = dr_agent::check::look(&session.settings).await;
    output::result(session.global.json, "check", &report, || findings(&report.findings));
    match report.verdict {
        Verdict::Bad => {
            let bad = report.findings.iter().filter(|f| f.verdict == Verdict::Bad).count();
            Err(CliError::NotReady { what: format!("{bad} of {} checks failed", report.findings.len()) })
        }
        _ => Ok(0),
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
