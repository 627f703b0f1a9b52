//! `dr restore`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dr_agent::wire;
use dr_core::moment::{self, MomentError};
use dr_core::port::{RecoveryTarget, TargetAction, Verdict};
use dr_core::{Timeline, size};
use dr_engine::restore::{self, RestoreOptions, RestorePlan, RestoreReport, TimelineChoice};
use dr_storage::ClusterIdentity;
use jiff::tz::TimeZone;

use super::Session;
use crate::args::{Action, Archiving, Restore};
use crate::error::CliError;
use crate::output;
use crate::table::{facts, instant};

pub(super) async fn run(session: &Session, args: Restore) -> Result<u8, CliError> {
    let repo = session.repository().await?;
    let cluster = session.cluster(&repo).await?;
    let context = session.context(&repo, &cluster);
    let instance = wire::instance(&session.settings);
    let options = options(session, &args, &cluster, context.clock.now())?;
    let plan = restore::plan(&context, &instance, &options).await?;
    if args.plan {
        output::result(session.global.json, "restore --plan", &plan, || show_plan(&plan));
        return Ok(0);
    }
    if !session.global.quiet && !session.global.json {
        let serious = plan.findings.iter().filter(|f| f.verdict == Verdict::Warning);
        let text = super::check::findings(&serious.cloned().collect::<Vec<_>>());
        output::print(&format!("Restoring backup {} to {}.\n{text}", plan.backup.id, options.to.display()));
        if let RecoveryTarget::Time { time } = &options.target {
            output::print(&format!("Recovering to {}.\n", instant(*time)));
        }
    }
    let report = restore::apply(&context, &instance, &plan).await?;
    output::result(session.global.json, "restore", &report, || show_report(&report, &options));
    Ok(0)
}

fn options(
    session: &Session,
    args: &Restore,
    cluster: &ClusterIdentity,
    now: dr_core::Timestamp,
) -> Result<RestoreOptions, CliError> {
    let backup = match args.backup.as_deref() {
        None | Some("latest") => None,
        Some(text) => Some(text.parse().map_err(|error: dr_core::guard::InvalidText| {
            CliError::usage(error.to_string(), "`dr list` shows the ids.")
        })?),
    };
    Ok(RestoreOptions {
        to: std::path::absolute(&args.to).unwrap_or_else(|_| args.to.clone()),
        backup,
        target: target(args, now)?,
        inclusive: !args.exclusive,
        timeline: timeline(&args.timeline)?,
        action: match args.action {
            Action::Promote => TargetAction::Promote,
            Action::Pause => TargetAction::Pause,
            Action::Shutdown => TargetAction::Shutdown,
        },
        tablespaces: args.tablespace.iter().map(|pair| tablespace(pair)).collect::<Result<_, _>>()?,
        delta: args.delta,
        start: args.start,
        keep_archiving: args.archive_mode == Archiving::Keep,
        sync: !args.no_sync,
        workers: session.workers("restore.workers"),
        restore_command: restore_command(session, cluster),
        host_files: args.host_files.as_deref().map(|p| std::path::absolute(p).unwrap_or(p.to_owned())),
        stall_limit: session.settings.duration("restore.stall_limit"),
    })
}

fn target(args: &Restore, now: dr_core::Timestamp) -> Result<RecoveryTarget, CliError> {
    if let Some(text) = &args.time {
        // The zone of this host is the default; the instant that results is shown.
        let hint = "Times need a zone: --time '2026-11-22 11:08:50 Europe/Berlin'.";
        let time = moment(text, now, hint)?;
        if time > now {
            let what = format!("{} lies in the future", instant(time));
            return Err(CliError::usage(what, "Recovery goes to a moment that has passed."));
        }
        return Ok(RecoveryTarget::Time { time });
    }
    if let Some(text) = &args.lsn {
        let hint = "Write it as PostgreSQL does: --lsn 0/3000028.";
        let lsn =
            text.parse().map_err(|e: dr_core::guard::InvalidText| CliError::usage(e.to_string(), hint))?;
        return Ok(RecoveryTarget::Lsn { lsn });
    }
    Ok(match (args.xid, &args.name, args.immediate) {
        (Some(xid), ..) => RecoveryTarget::Xid { xid },
        (_, Some(name), _) => RecoveryTarget::Name { name: name.clone() },
        (_, _, true) => RecoveryTarget::Immediate,
        _ => RecoveryTarget::Latest,
    })
}

/// The instant that was written. The zone of `TZ` is asked for only where none is written.
fn moment(text: &str, now: dr_core::Timestamp, hint: &str) -> Result<dr_core::Timestamp, CliError> {
    let read = match moment::parse(text, now, None) {
        Err(MomentError::NoZone { .. }) => moment::parse(text, now, default_zone(hint)?.as_ref()),
        read => read,
    };
    read.map_err(|error| CliError::usage(error.to_string(), hint))
}

/// The zone that `TZ` names, if it is set. A name that is not known must not pass for UTC.
fn default_zone(hint: &str) -> Result<Option<TimeZone>, CliError> {
    let Some(name) = std::env::var_os("TZ").filter(|name| !name.is_empty()) else { return Ok(None) };
    TimeZone::try_system().map(Some).map_err(|_| {
        let what = format!("the environment's TZ is {name:?}, which is no time zone that is known here");
        CliError::usage(what, format!("Set TZ right, or write the zone. {hint}"))
    })
}

fn timeline(text: &str) -> Result<TimelineChoice, CliError> {
    match (text, text.parse::<u32>()) {
        ("latest", _) => Ok(TimelineChoice::Latest),
        ("current", _) => Ok(TimelineChoice::Current),
        (_, Ok(number)) if number > 0 => Ok(TimelineChoice::Number(Timeline(number))),
        _ => Err(CliError::usage(
            format!("{text:?} is not a timeline"),
            "Write --timeline latest, --timeline current or a number.",
        )),
    }
}

pub(super) fn tablespace(pair: &str) -> Result<(String, PathBuf), CliError> {
    match pair.split_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() => Ok((old.to_owned(), PathBuf::from(new))),
        _ => Err(CliError::usage(
            format!("{pair:?} does not map a tablespace"),
            "Write --tablespace OLD=NEW with the old oid, name or path and the new absolute path.",
        )),
    }
}

/// A `restore_command` that needs nothing but this program: every setting that is not a default is
/// in it, secrets as references.
pub(super) fn restore_command(session: &Session, cluster: &ClusterIdentity) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| Path::new("dr").to_owned());
    let mut command = quote(&program.display().to_string());
    for (name, written) in session.settings.values() {
        let of_server =
            name.starts_with("cluster.") || name.starts_with("backup.") || name.starts_with("restore.");
        if written.origin != "default" && !of_server && !written.value.is_empty() {
            command.push_str(&format!(" --set {}", quote(&format!("{name}={}", written.value))));
        }
    }
    // Files of the system must not add to what is written here.
    format!("{command} --config /dev/null --cluster {} wal fetch %f %p", cluster.system_id)
}

/// Quotes for the shell; `%` is doubled for PostgreSQL.
pub(super) fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-=:,@+".contains(c);
    let escaped = text.replace('%', "%%");
    if text.chars().all(plain) { escaped } else { format!("'{}'", escaped.replace('\'', r"'\''")) }
}

fn show_plan(plan: &RestorePlan) -> String {
    let options = &plan.options;
    let target = match &options.target {
        RecoveryTarget::Latest => "the end of the archived WAL".to_owned(),
        RecoveryTarget::Immediate => "the first consistent state".to_owned(),
        RecoveryTarget::Time { time } => instant(*time),
        RecoveryTarget::Lsn { lsn } => format!("LSN {lsn}"),
        RecoveryTarget::Xid { xid } => format!("transaction {xid}"),
        RecoveryTarget::Name { name } => format!("restore point {name:?}"),
    };
    let wal =
        format!("{} segments from {}, archived up to {}", plan.wal.segments, plan.wal.first, plan.wal.end);
    let mut rows = vec![
        ("to", options.to.display().to_string()),
        ("backup", format!("{} (consistent {})", plan.backup.id, instant(plan.backup.stop_time))),
        ("content", format!("{} in {} files", size::bytes(plan.backup.bytes), plan.backup.files)),
        ("target", target),
        ("timeline", plan.timeline.to_string()),
        ("WAL", wal),
        (
            "archiving",
            if options.keep_archiving { "as configured" } else { "switched off in the result" }.to_owned(),
        ),
        (
            "server",
            if options.start { "started and followed to the target" } else { "not started" }.to_owned(),
        ),
        (
            "if interrupted",
            "no server can start on the directory; the same command with --delta continues".to_owned(),
        ),
    ];
    for (oid, path) in &plan.tablespaces {
        rows.push(("tablespace", format!("{oid} at {}", path.display())));
    }
    format!(
        "A restore would run. Nothing was changed.\n{}{}",
        facts(&rows),
        super::check::findings(&plan.findings)
    )
}

fn show_report(report: &RestoreReport, options: &RestoreOptions) -> String {
    let took: u64 = report.receipt.stages.iter().map(|s| s.elapsed_ms).sum();
    let stages: Vec<String> = report
        .receipt
        .stages
        .iter()
        .map(|s| format!("{} {}", s.stage, size::duration(Duration::from_millis(s.elapsed_ms))))
        .collect();
    let mut rows = vec![
        ("files", format!("{}, {} checked", report.files, size::bytes(report.bytes))),
        ("fetched", size::bytes(report.bytes_fetched)),
    ];
    if options.delta {
        rows.push(("kept", size::bytes(report.bytes_kept)));
    }
    let mut text = format!("Backup {} is restored to {}.\n", report.backup, report.to.display());
    if let Some(reached) = &report.reached {
        let commit = reached.last_commit.map_or("none was replayed".into(), instant);
        rows.push(("reached", format!("{} on timeline {}", reached.lsn, reached.timeline)));
        rows.push(("last commit", commit));
        rows.push((
            "server",
            match (reached.running, reached.promoted) {
                (false, _) => "stopped at the target".to_owned(),
                (true, true) => "runs as a primary".to_owned(),
                (true, false) => "waits at the target".to_owned(),
            },
        ));
        rows.extend(
            reached.connection.iter().map(|connection| ("connect", format!("psql \"{connection}\""))),
        );
    }
    rows.push(("took", format!("{} ({})", size::duration(Duration::from_millis(took)), stages.join(", "))));
    text.push_str(&facts(&rows));
    if report.reached.is_none() {
        text.push_str("Start the server on it to recover: recovery.signal and the settings are in place.\n");
    }
    if report.reached.as_ref().is_some_and(|reached| reached.running && !reached.promoted) {
        text.push_str(
            "The server is read-only and holds its replay. A query can wait without end for a lock that the replay \
             holds: set lock_timeout first. `SELECT pg_wal_replay_resume()` ends the pause and promotes it.\n",
        );
    }
    if !options.keep_archiving {
        text.push_str(
            "Archiving is off in postgresql.auto.conf: switch it on when this server takes over.\n",
        );
    }
    if options.host_files.is_none() && !report.host_files.is_empty() {
        let files = report.host_files.join(", ");
        text.push_str(&format!(
            "Files from outside the data directory were kept too (--host-files DIR): {files}\n"
        ));
    }
    text
}
