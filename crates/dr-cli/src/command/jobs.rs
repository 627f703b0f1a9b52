//! `dr jobs`: the receipts.

use std::time::Duration;

use dr_core::event::{Outcome, Receipt};
use dr_core::journal::JournalRecord;
use dr_core::size;
use dr_engine::EngineError;

use super::Session;
use crate::args::Jobs;
use crate::error::CliError;
use crate::output;
use crate::paint::{self, Ink};
use crate::table::{table, when};

pub(super) async fn run(session: &Session, args: Jobs) -> Result<u8, CliError> {
    let repo = session.repository().await?;
    let cluster = session.cluster(&repo).await?;
    let journal = repo.cluster(cluster.system_id).journal();
    let records = journal.tail(args.last).await.map_err(EngineError::repo("cannot read the job journal"))?;
    let (receipts, unknown) = receipts(records);
    output::result(session.global.json, "jobs", &receipts, || show(&receipts, unknown.len()));
    if !unknown.is_empty() {
        let numbers: Vec<String> = unknown.iter().map(u64::to_string).collect();
        output::warn(&format!(
            "not shown: records of the job journal that this version of dr cannot read, number {}",
            numbers.join(", ")
        ));
    }
    Ok(0)
}

/// The records that are receipts, and the numbers of the others: those of a newer version.
fn receipts(records: Vec<JournalRecord>) -> (Vec<Receipt>, Vec<u64>) {
    let mut unknown = Vec::new();
    let mut receipts = Vec::new();
    for record in records {
        match serde_json::from_value(record.body) {
            Ok(receipt) => receipts.push(receipt),
            Err(_) => unknown.push(record.number),
        }
    }
    (receipts, unknown)
}

fn show(receipts: &[Receipt], unknown: usize) -> String {
    if receipts.is_empty() && unknown > 0 {
        return String::new();
    }
    if receipts.is_empty() {
        return "No jobs ran yet.\n".to_owned();
    }
    let rows: Vec<Vec<String>> = receipts
        .iter()
        .map(|receipt| {
            let took: u64 = receipt.stages.iter().map(|s| s.elapsed_ms).sum();
            let outcome = match &receipt.outcome {
                Outcome::Done => "done".to_owned(),
                Outcome::Degraded => paint::out(Ink::Warning, "DEGRADED"),
                Outcome::Failed { code, .. } => paint::out(Ink::Bad, &format!("FAILED ({code})")),
            };
            let subject = receipt.facts.get("backup_id").and_then(|v| v.as_str()).unwrap_or("").to_owned();
            let took = size::duration(Duration::from_millis(took));
            vec![when(receipt.began), receipt.job.clone(), outcome, took, receipt.host.clone(), subject]
        })
        .collect();
    table(&["began", "job", "outcome", "took", "host", "backup"], &[3], &rows)
}
