//! `dr backup`.

use std::time::Duration;

use dr_agent::wire;
use dr_core::size;
use dr_engine::EngineError;
use dr_engine::backup::{self, BackupOptions, BackupPlan, BackupReport};
use serde_json::json;

use super::Session;
use crate::args::Backup;
use crate::error::CliError;
use crate::output;
use crate::table::facts;

pub(super) async fn run(session: &Session, args: Backup) -> Result<u8, CliError> {
    let settings = &session.settings;
    let repo = session.repository().await?;
    let source = wire::source(settings);
    let described =
        async { source.describe().await.map_err(EngineError::source("cannot look at the cluster")) };
    let cluster = session.cancel.or(described).await?;
    let label = settings.text("cluster.label").unwrap_or("main");
    let context = wire::context(&repo, cluster.system_id, label, session.events(), session.cancel.clone());
    let options = BackupOptions {
        note: args.note,
        fast_checkpoint: settings.flag("backup.fast_checkpoint"),
        workers: session.workers("backup.workers"),
        wal_timeout: settings.duration("backup.wal_timeout"),
        point_every: settings.duration("backup.point_every"),
        point_every_bytes: settings.bytes("backup.point_bytes"),
        read_all: args.read_all,
        full: args.full,
        max_rate: settings.optional_bytes("backup.max_rate"),
    };
    let plan = backup::plan(&context, source.as_ref(), &options).await?;
    if args.plan {
        let way = settings.text("backup.source").unwrap_or("files");
        let mut document = json!(plan);
        document["source"] = json!(way);
        output::result(session.global.json, "backup --plan", &document, || show_plan(&plan, way));
        return Ok(0);
    }
    let report = backup::apply(&context, source.as_ref(), &plan).await?;
    output::result(session.global.json, "backup", &report, || show_report(&report));
    Ok(0)
}

fn show_plan(plan: &BackupPlan, way: &str) -> String {
    let cluster = &plan.cluster;
    let from = match (plan.continues, plan.parent) {
        (Some(id), _) => format!("continues the interrupted backup {id}"),
        (None, Some(id)) => format!("stores what changed since {id}; the result is a full description"),
        (None, None) => "stores everything (first backup, or --full)".to_owned(),
    };
    let mut text = format!("A backup of cluster {} would run.\n", cluster.system_id);
    text.push_str(&facts(&[
        ("data directory", cluster.data_directory.clone()),
        ("server", format!("PostgreSQL {}, timeline {}", cluster.version_num / 10_000, cluster.timeline)),
        (
            "source",
            match way {
                "stream" => "the replication connection".to_owned(),
                _ => "the files of the data directory".to_owned(),
            },
        ),
        ("content", from),
        (
            "rate",
            plan.options
                .max_rate
                .map_or("not limited".into(), |rate| format!("at most {}/s", size::bytes(rate))),
        ),
        ("workers", plan.options.workers.to_string()),
        ("if interrupted", "nothing is listed; the next backup continues from the last point".to_owned()),
    ]));
    text.push_str(&super::check::findings(
        &plan
            .findings
            .iter()
            .filter(|f| f.verdict != dr_core::port::Verdict::Good)
            .cloned()
            .collect::<Vec<_>>(),
    ));
    text
}

fn show_report(report: &BackupReport) -> String {
    let backup = &report.backup;
    let took: u64 = report.receipt.stages.iter().map(|s| s.elapsed_ms).sum();
    let status = match report.bad_pages.len() {
        0 => "complete".to_owned(),
        n => format!("DEGRADED: {n} pages were bad in the cluster already"),
    };
    let mut text = format!("Backup {} is durable.\n", backup.id);
    text.push_str(&facts(&[
        ("status", status),
        ("cluster", format!("{} in {} files", size::bytes(backup.bytes), backup.files)),
        ("read", size::bytes(backup.read_bytes)),
        ("stored", size::bytes(backup.stored_bytes)),
        ("WAL", format!("{} to {}, archived", backup.start.lsn, backup.stop_lsn)),
        ("took", size::duration(Duration::from_millis(took))),
    ]));
    for bad in &report.bad_pages {
        let relation = bad.relation.as_deref().unwrap_or("unknown relation");
        text.push_str(&format!("  bad page: block {} of {relation}, file {}\n", bad.block, bad.path));
    }
    text
}
