//! `dr jobs`: the receipts.

use std::time::Duration;

use dr_core::event::{Outcome, Receipt};
use dr_core::size;
use dr_engine::EngineError;

use super::Session;
use crate::args::Jobs;
use crate::error::CliError;
use crate::output;
use crate::table::{table, when};

pub(super) async fn run(session: &Session, args: Jobs) -> Result<u8, CliError> {
    let repo = session.repository().await?;
    let cluster = session.cluster(&repo).await?;
    let journal = repo.cluster(cluster.system_id).journal();
    let records = journal.tail(args.last).await.map_err(EngineError::repo("cannot read the job journal"))?;
    let all = records.len();
    let receipts: Vec<Receipt> =
        records.into_iter().filter_map(|record| serde_json::from_value(record.body).ok()).collect();
    let unknown = all - receipts.len();
    output::result(session.global.json, "jobs", &receipts, || {
        let mut text = show(&receipts);
        if unknown > 0 {
            text.push_str(&format!("{unknown} records are of a newer dr and not shown.\n"));
        }
        text
    });
    Ok(0)
}

fn show(receipts: &[Receipt]) -> String {
    if receipts.is_empty() {
        return "No jobs ran yet.\n".to_owned();
    }
    let rows: Vec<Vec<String>> = receipts
        .iter()
        .map(|receipt| {
            let took: u64 = receipt.stages.iter().map(|s| s.elapsed_ms).sum();
            let outcome = match &receipt.outcome {
                Outcome::Done => "done".to_owned(),
                Outcome::Degraded => "DEGRADED".to_owned(),
                Outcome::Failed { code, .. } => format!("FAILED ({code})"),
            };
            let subject = receipt.facts.get("backup_id").and_then(|v| v.as_str()).unwrap_or("").to_owned();
            let took = size::duration(Duration::from_millis(took));
            vec![when(receipt.began), receipt.job.clone(), outcome, took, receipt.host.clone(), subject]
        })
        .collect();
    table(&["began", "job", "outcome", "took", "host", "backup"], &[3], &rows)
}
