//! `dr list`: backups, and how far each cluster can be recovered.

use dr_core::size;
use dr_engine::EngineError;
use dr_storage::format::{BackupStatus, ManifestHead};
use dr_storage::{ClusterIdentity, Repository};
use serde::Serialize;

use super::Session;
use crate::error::CliError;
use crate::output;
use crate::paint::{self, Ink};
use crate::table::{table, when};

#[derive(Serialize)]
struct Listed {
    cluster: ClusterIdentity,
    backups: Vec<ManifestHead>,
    wal: Vec<ListedTimeline>,
    interrupted: Vec<dr_core::BackupId>,
    unreadable: Vec<Unreadable>,
}

#[derive(Serialize)]
struct Unreadable {
    id: dr_core::BackupId,
    reason: String,
}

#[derive(Serialize)]
struct ListedTimeline {
    timeline: dr_core::Timeline,
    first: String,
    last: String,
    segments: u64,
    stored_bytes: u64,
    missing: Vec<String>,
    last_archived: dr_core::Timestamp,
}

pub(super) async fn run(session: &Session) -> Result<u8, CliError> {
    let repo = session.repository().await?;
    let mut all = Vec::new();
    let wanted = session.global.cluster.as_deref();
    for cluster in repo.clusters().await.map_err(EngineError::repo("cannot list the clusters"))? {
        if wanted.is_none_or(|w| w == cluster.label || w == cluster.system_id.to_string()) {
            all.push(listed(&repo, cluster).await?);
        }
    }
    if wanted.is_some() && all.is_empty() {
        // A name that nothing has is an error, not an empty list.
        session.cluster(&repo).await?;
    }
    output::result(session.global.json, "list", &all, || all.iter().map(show).collect::<Vec<_>>().join("\n"));
    if all.is_empty() && !session.global.json {
        output::print("No backups yet. `dr backup` takes the first.\n");
    }
    Ok(0)
}

async fn listed(repo: &Repository, cluster: ClusterIdentity) -> Result<Listed, CliError> {
    let store = repo.cluster(cluster.system_id);
    let catalogue = store.catalogue().await.map_err(EngineError::repo("cannot list the backups"))?;
    let unreadable = |(id, error): &(dr_core::BackupId, dr_storage::RepoError)| Unreadable {
        id: *id,
        reason: dr_engine::chain(error),
    };
    let unreadable = catalogue.unreadable.iter().map(unreadable).collect();
    let backups = catalogue.heads;
    let sessions = store.sessions().await.map_err(EngineError::repo("cannot list the sessions"))?;
    let wal_store = store.wal(cluster.segment_size);
    let mut wal = Vec::new();
    for timeline in wal_store.timelines().await.map_err(EngineError::repo("cannot list the timelines"))? {
        let segments =
            wal_store.segments(timeline).await.map_err(EngineError::repo("cannot list the WAL"))?;
        let (Some(first), Some(last)) = (segments.first(), segments.last()) else { continue };
        let numbers: std::collections::BTreeSet<u64> = segments.iter().map(|s| s.segment.number).collect();
        let missing = (first.segment.number..=last.segment.number).filter(|n| !numbers.contains(n));
        let name = |number| dr_core::WalSegment { timeline, number }.file_name(cluster.segment_size);
        wal.push(ListedTimeline {
            timeline,
            first: name(first.segment.number),
            last: name(last.segment.number),
            segments: segments.len() as u64,
            stored_bytes: segments.iter().map(|s| s.stored_bytes).sum(),
            missing: missing.map(name).collect(),
            last_archived: last.modified,
        });
    }
    let interrupted =
        sessions.iter().filter(|s| !s.committed && s.last_point.is_some()).map(|s| s.id).collect();
    Ok(Listed { cluster, backups, wal, interrupted, unreadable })
}

fn show(listed: &Listed) -> String {
    let cluster = &listed.cluster;
    let mut text = format!(
        "Cluster {} ({}), PostgreSQL {}\n",
        cluster.label,
        cluster.system_id,
        cluster.version_num / 10_000
    );
    let rows: Vec<Vec<String>> = listed
        .backups
        .iter()
        .map(|b| {
            let status = match b.status {
                BackupStatus::Complete => "complete".to_owned(),
                _ => paint::out(Ink::Bad, "DEGRADED"),
            };
            vec![
                b.id.to_string(),
                when(b.stop_time),
                status,
                size::bytes(b.bytes),
                size::bytes(b.stored_bytes),
                b.stop_timeline.to_string(),
                b.stop_lsn.to_string(),
                b.note.clone(),
            ]
        })
        .collect();
    if rows.is_empty() && listed.unreadable.is_empty() {
        text.push_str("no backups yet\n");
    } else if !rows.is_empty() {
        let header = ["backup", "consistent at", "status", "cluster", "stored", "tli", "LSN", "note"];
        text.push_str(&table(&header, &[3, 4, 5], &rows));
    }
    for wal in &listed.wal {
        text.push_str(&format!(
            "WAL of timeline {}: {} to {}, {} segments, {} stored, last archived {}\n",
            wal.timeline,
            wal.first,
            wal.last,
            wal.segments,
            size::bytes(wal.stored_bytes),
            when(wal.last_archived)
        ));
        if !wal.missing.is_empty() {
            text.push_str(&format!(
                "  {} {} missing, first {}\n",
                paint::out(Ink::Bad, "GAP:"),
                wal.missing.len(),
                wal.missing[0]
            ));
        }
    }
    for backup in &listed.unreadable {
        let mark = paint::out(Ink::Bad, "UNREADABLE:");
        text.push_str(&format!("{mark} backup {}: {}\n", backup.id, backup.reason));
    }
    for id in &listed.interrupted {
        text.push_str(&format!("interrupted backup {id}: the next backup continues from it\n"));
    }
    text
}
