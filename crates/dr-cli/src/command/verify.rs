//! `dr verify`.

use dr_core::size;
use dr_verify::{Level, VerifyOptions, VerifyReport};

use super::Session;
use crate::args::Verify;
use crate::error::CliError;
use crate::output;
use crate::paint::{self, Ink};

pub(super) async fn run(session: &Session, args: Verify) -> Result<u8, CliError> {
    let repo = session.repository().await?;
    let cluster = session.cluster(&repo).await?;
    let context = session.context(&repo, &cluster);
    let mut backups = Vec::new();
    for text in &args.backups {
        backups.push(super::show::backup_id(&context.store, text).await?);
    }
    let level = match (args.metadata, args.packs, repo.can_read_data()) {
        (true, ..) => Level::Metadata,
        (_, true, _) | (_, _, false) => Level::Packs,
        _ => Level::Content,
    };
    let options =
        VerifyOptions { backups, all: args.all, level, workers: session.workers("restore.workers") };
    let report = dr_verify::verify(&context, &options).await?;
    output::result(session.global.json, "verify", &report, || show(&report));
    if report.is_whole() {
        return Ok(0);
    }
    let damaged = report.backups.iter().filter(|b| !b.problems.is_empty()).count();
    let what = match (damaged, report.wal_gaps.len()) {
        (0, gaps) => format!("{gaps} WAL segments are missing"),
        (n, 0) => format!("{n} of {} backups are damaged", report.backups.len()),
        (n, gaps) => format!(
            "{n} of {} backups are damaged, and {gaps} WAL segments are missing",
            report.backups.len()
        ),
    };
    Err(CliError::NotWhole { what })
}

fn show(report: &VerifyReport) -> String {
    let depth = match report.level {
        Level::Metadata => "presence and sizes only",
        Level::Packs => "stored bytes against their digests; content was not opened",
        Level::Content => "every byte of content read back and compared",
    };
    let mut text = format!("Verified {} backups: {depth}.\n", report.backups.len());
    for backup in &report.backups {
        let verdict = match backup.problems.is_empty() {
            true => paint::out(Ink::Good, "whole"),
            false => paint::out(Ink::Bad, "DAMAGED"),
        };
        text.push_str(&format!(
            "  {}  {verdict}: {} packs, {} of content, {} WAL files\n",
            backup.id,
            backup.packs,
            size::bytes(backup.content_bytes),
            backup.wal_files
        ));
        for problem in &backup.problems {
            text.push_str(&format!("    {}: {}\n", problem.place, problem.what));
        }
    }
    for gap in &report.wal_gaps {
        text.push_str(&format!("  WAL {gap} is missing from the archive\n"));
    }
    text
}
