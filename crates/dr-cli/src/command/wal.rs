//! `dr wal push` and `dr wal fetch`: what PostgreSQL runs.

use std::path::Path;

use dr_agent::wire;
use dr_engine::wal::FetchOutcome;

use super::Session;
use crate::error::CliError;
use crate::output;

/// Exit of `fetch` when a listing proves that the archive does not have the file.
const ABSENT: u8 = 1;

pub(super) async fn push(session: &Session, path: &Path) -> Result<u8, CliError> {
    let repo = session.repository().await?;
    let archive = wire::archive(&session.settings, &repo, session.global.cluster.as_deref()).await?;
    let report = archive.push(path).await?;
    if session.global.json {
        output::result(true, "wal push", &report, String::new);
    }
    Ok(0)
}

pub(super) async fn fetch(session: &Session, name: &str, destination: &Path) -> Result<u8, CliError> {
    let repo = session.repository().await?;
    let archive = wire::archive(&session.settings, &repo, session.global.cluster.as_deref()).await?;
    let outcome = archive.fetch(name, destination).await?;
    if session.global.json {
        output::result(true, "wal fetch", &outcome, String::new);
    }
    Ok(if outcome == FetchOutcome::Absent { ABSENT } else { 0 })
}
