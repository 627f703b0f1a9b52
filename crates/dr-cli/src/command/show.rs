//! `dr show`: one backup.

use dr_core::port::RelationEntry;
use dr_core::{BackupId, size};
use dr_engine::{EngineError, catalogue};
use dr_storage::ClusterStore;
use dr_storage::format::Manifest;
use serde_json::json;

use super::Session;
use crate::args::Show;
use crate::error::CliError;
use crate::output;
use crate::table::{facts, instant, table};

pub(super) async fn run(session: &Session, args: Show) -> Result<u8, CliError> {
    let repo = session.repository().await?;
    let cluster = session.cluster(&repo).await?;
    let store = repo.cluster(cluster.system_id);
    let id = backup_id(&store, &args.backup).await?;
    let manifest = store.manifest(id).await.map_err(EngineError::repo(format!("cannot read backup {id}")))?;
    let relations = if args.relations { catalogue::read(&store, &manifest).await? } else { Vec::new() };
    let body = &manifest.body;
    let document = json!({
        "backup": manifest.head,
        "tablespaces": body.tablespaces,
        "host_needs": body.host_needs,
        "slots": body.slots,
        "bad_pages": body.bad_pages,
        "sessions": body.sessions.iter().map(|s| s.id).collect::<Vec<_>>(),
        "relations": relations,
    });
    output::result(session.global.json, "show", &document, || show(&manifest, &relations));
    Ok(0)
}

/// A backup by id, or the newest.
pub(super) async fn backup_id(store: &ClusterStore, text: &str) -> Result<BackupId, CliError> {
    if text != "latest" {
        let hint = "`dr list` shows the ids; \"latest\" is the newest.";
        return text
            .parse()
            .map_err(|error: dr_core::guard::InvalidText| CliError::usage(error.to_string(), hint));
    }
    let heads = store.catalogue().await.map_err(EngineError::repo("cannot list the backups"))?.heads;
    let none = EngineError::NoBackup { source: dr_core::plan::ChoiceError::NoBackup };
    Ok(heads.last().ok_or(none)?.id)
}

fn show(manifest: &Manifest, relations: &[RelationEntry]) -> String {
    let head = &manifest.head;
    let mut text = format!("Backup {}\n", head.id);
    let mut rows = vec![
        ("status", format!("{:?}, {} bad pages", head.status, head.bad_pages).to_lowercase()),
        ("cluster", format!("{} ({})", head.label, head.cluster.system_id)),
        ("server", format!("PostgreSQL {}", head.cluster.version_num / 10_000)),
        ("taken on", head.host.clone()),
        (
            "began",
            format!("{} at {} (timeline {})", instant(head.start.time), head.start.lsn, head.start.timeline),
        ),
        (
            "consistent",
            format!("{} at {} (timeline {})", instant(head.stop_time), head.stop_lsn, head.stop_timeline),
        ),
        ("content", format!("{} in {} files", size::bytes(head.bytes), head.files)),
        ("read, stored", format!("{}, {}", size::bytes(head.read_bytes), size::bytes(head.stored_bytes))),
        ("parent", head.parent.map_or("none".into(), |id| id.to_string())),
        ("reaches", format!("packs of {} sessions", manifest.body.sessions.len())),
    ];
    if !head.note.is_empty() {
        rows.push(("note", head.note.clone()));
    }
    for tablespace in &manifest.body.tablespaces {
        rows.push(("tablespace", format!("{} at {}", tablespace.name, tablespace.location)));
    }
    for slot in &manifest.body.slots {
        let database = slot.database.as_ref().map(|name| format!(" of {name}")).unwrap_or_default();
        let failover = if slot.failover { ", failover" } else { "" };
        rows.push(("slot", format!("{} ({}{database}{failover}), not in the backup", slot.name, slot.kind)));
    }
    text.push_str(&facts(&rows));
    for bad in &manifest.body.bad_pages {
        text.push_str(&format!("  bad page  block {} of {}\n", bad.block, bad.path));
    }
    if !relations.is_empty() {
        let rows: Vec<Vec<String>> = relations
            .iter()
            .map(|r| {
                vec![
                    r.database.clone(),
                    r.schema.clone(),
                    r.name.clone(),
                    r.kind.to_string(),
                    r.filenode.to_string(),
                ]
            })
            .collect();
        text.push_str(&table(&["database", "schema", "relation", "kind", "file"], &[4], &rows));
    }
    text
}
