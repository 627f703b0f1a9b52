//! `dr standby`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dr_agent::wire;
use dr_core::port::{Follower, Instance, InstanceStatus, Primary, PrimaryState, SlotState, Verdict};
use dr_core::size;
use dr_engine::EngineError;
use dr_engine::restore::RestoreOptions;
use dr_engine::standby::{self, StandbyOptions, StandbyPlan, StandbyReport, Temperature};
use dr_storage::ClusterIdentity;
use serde::Serialize;

use super::Session;
use crate::args::{Standby, StandbyCreate, Warmth};
use crate::error::CliError;
use crate::output;
use crate::table::{facts, instant, table};

/// What `dr standby status` shows.
#[derive(Serialize)]
struct Status {
    primary: PrimaryState,
    standbys: Vec<Follower>,
    slots: Vec<SlotState>,
    local: Option<Local>,
}

/// The standby on a directory of this host.
#[derive(Serialize)]
struct Local {
    to: PathBuf,
    status: InstanceStatus,
    lag_bytes: Option<u64>,
    /// Since the last commit that it replayed, when it has not all of them.
    lag_seconds: Option<f64>,
    /// Transactions that wrote on the primary and are not here; only a server that answers tells.
    lag_commits: Option<u64>,
}

pub(super) async fn run(session: &Session, command: Standby) -> Result<u8, CliError> {
    match command {
        Standby::Create(args) => create(session, &args).await,
        Standby::Refresh { to, timeout } => refresh(session, &absolute(&to), &timeout).await,
        Standby::Status { to } => status(session, to.as_deref()).await,
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

async fn create(session: &Session, args: &StandbyCreate) -> Result<u8, CliError> {
    let repo = session.repository().await?;
    let cluster = session.cluster(&repo).await?;
    let context = session.context(&repo, &cluster);
    let (instance, primary) = (wire::instance(&session.settings), wire::primary(&session.settings));
    let options = options(session, args, &cluster)?;
    let plan = standby::plan(&context, &instance, &primary, &options).await?;
    if args.plan {
        output::result(session.global.json, "standby create --plan", &plan, || show_plan(&plan));
        return Ok(0);
    }
    if !session.global.quiet && !session.global.json {
        let all = plan.findings.iter().chain(&plan.restore.findings);
        let serious: Vec<_> = all.filter(|f| f.verdict == Verdict::Warning).cloned().collect();
        output::print(&super::check::findings(&serious));
    }
    let report = standby::apply(&context, &instance, &primary, &plan).await?;
    output::result(session.global.json, "standby create", &report, || show_report(&report));
    Ok(0)
}

async fn refresh(session: &Session, to: &Path, timeout: &str) -> Result<u8, CliError> {
    let repo = session.repository().await?;
    let cluster = session.cluster(&repo).await?;
    let context = session.context(&repo, &cluster);
    let (instance, primary) = (wire::instance(&session.settings), wire::primary(&session.settings));
    let report = standby::refresh(&context, &instance, &primary, to, duration(timeout)?).await?;
    output::result(session.global.json, "standby refresh", &report, || show_report(&report));
    Ok(0)
}

fn duration(text: &str) -> Result<Duration, CliError> {
    size::parse_duration(text).map_err(|error| CliError::usage(error.to_string(), "Write --timeout 10min."))
}

fn options(
    session: &Session,
    args: &StandbyCreate,
    cluster: &ClusterIdentity,
) -> Result<StandbyOptions, CliError> {
    let backup = match args.backup.as_deref() {
        None | Some("latest") => None,
        Some(text) => Some(text.parse().map_err(|error: dr_core::guard::InvalidText| {
            CliError::usage(error.to_string(), "`dr list` shows the ids.")
        })?),
    };
    let name = args.name.clone().unwrap_or_else(|| format!("dr_{}", slot_name(&wire::host_name())));
    let slot = if args.no_slot { None } else { Some(args.slot.clone().unwrap_or_else(|| slot_name(&name))) };
    if let Some(slot) = slot.as_ref().filter(|slot| **slot != slot_name(slot)) {
        let hint = "A slot's name has lower-case letters, digits and _, at most 63.";
        return Err(CliError::usage(format!("{slot:?} cannot be the name of a slot"), hint));
    }
    let setting = |pair: &String| match pair.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => {
            Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
        }
        _ => Err(CliError::usage(format!("{pair:?} is no setting"), "Write --server-setting port=5433.")),
    };
    Ok(StandbyOptions {
        temperature: match args.temperature {
            Warmth::Hot => Temperature::Hot,
            Warmth::Warm => Temperature::Warm,
            Warmth::Cold => Temperature::Cold,
        },
        name,
        slot,
        settings: args.server_setting.iter().map(setting).collect::<Result<_, _>>()?,
        start: !args.no_start,
        canary_limit: duration(&args.timeout)?,
        restore: RestoreOptions {
            backup,
            tablespaces: args
                .tablespace
                .iter()
                .map(|pair| super::restore::tablespace(pair))
                .collect::<Result<_, _>>()?,
            delta: args.delta,
            start: !args.no_start,
            keep_archiving: true,
            workers: session.workers("restore.workers"),
            stall_limit: session.settings.duration("restore.stall_limit"),
            ..RestoreOptions::new(absolute(&args.to), super::restore::restore_command(session, cluster))
        },
    })
}

/// A name as slots may have it.
fn slot_name(name: &str) -> String {
    let fits = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c.to_ascii_lowercase() } else { '_' };
    name.chars().map(fits).take(63).collect()
}

fn show_plan(plan: &StandbyPlan) -> String {
    let options = &plan.options;
    let backup = &plan.restore.backup;
    let hot = options.temperature == Temperature::Hot;
    let mut rows = vec![
        ("to", options.restore.to.display().to_string()),
        ("temperature", word(options.temperature).to_owned()),
        ("backup", format!("{} (consistent {})", backup.id, instant(backup.stop_time))),
        ("content", format!("{} in {} files", size::bytes(backup.bytes), backup.files)),
        ("follows", if hot { "the primary's stream, and the archive" } else { "the archive" }.to_owned()),
    ];
    if hot {
        rows.push(("name", options.name.clone()));
        rows.push(("slot", options.slot.clone().unwrap_or_else(|| "none".into())));
    }
    rows.extend(options.settings.iter().map(|(name, value)| ("setting", format!("{name} = {value}"))));
    let proof =
        if options.start { "a mark in the primary's WAL must arrive" } else { "none: it is not started" };
    rows.push(("proof", proof.to_owned()));
    let left = "no server can start on the directory; the same command with --delta continues";
    rows.push(("if interrupted", left.to_owned()));
    let all: Vec<_> = plan.findings.iter().chain(&plan.restore.findings).cloned().collect();
    format!("A standby would be made. Nothing was changed.\n{}{}", facts(&rows), super::check::findings(&all))
}

fn word(temperature: Temperature) -> &'static str {
    match temperature {
        Temperature::Hot => "hot",
        Temperature::Warm => "warm",
        Temperature::Cold => "cold",
    }
}

fn show_report(report: &StandbyReport) -> String {
    let took: u64 = report.receipt.stages.iter().map(|s| s.elapsed_ms).sum();
    let kind = word(report.temperature);
    let mut rows = Vec::new();
    if let Some(backup) = report.backup {
        rows.push(("made from", format!("backup {backup} and the archive")));
        let content = format!("{}, {} fetched", size::bytes(report.bytes), size::bytes(report.bytes_fetched));
        let kept = if report.bytes_kept > 0 {
            format!(", {} kept", size::bytes(report.bytes_kept))
        } else {
            String::new()
        };
        rows.push(("content", content + &kept));
    }
    match &report.proof {
        Some(proof) => rows.push((
            "proven",
            format!(
                "it replayed the mark at {} {} after it was written",
                proof.canary.lsn,
                size::duration(Duration::from_millis(proof.took_ms))
            ),
        )),
        None => rows.push(("proven", "no: it was not started".to_owned())),
    }
    let server = match (report.temperature, &report.proof) {
        (_, None) | (Temperature::Cold, _) => "stopped",
        (Temperature::Warm, _) => "runs, and takes no connections before it is promoted",
        (Temperature::Hot, _) => "runs, and answers queries",
    };
    rows.push(("server", server.to_owned()));
    rows.extend(report.connection.iter().map(|connection| ("connect", format!("psql \"{connection}\""))));
    rows.push(("took", size::duration(Duration::from_millis(took))));
    let mut text = format!("The {kind} standby is in {}.\n{}", report.to.display(), facts(&rows));
    if report.temperature == Temperature::Cold {
        text.push_str(&format!(
            "Bring it forward from time to time: dr standby refresh --to {}\n",
            report.to.display()
        ));
    }
    text
}

async fn status(session: &Session, to: Option<&Path>) -> Result<u8, CliError> {
    let primary = wire::primary(&session.settings);
    let doing = EngineError::source("cannot look at the primary");
    let state = primary.state().await.map_err(doing)?;
    let standbys = primary.followers().await.map_err(EngineError::source("cannot list the standbys"))?;
    let slots = primary.slots().await.map_err(EngineError::source("cannot list the slots"))?;
    let local = match to {
        Some(to) => Some(local(session, &absolute(to), &state).await?),
        None => None,
    };
    let status = Status { primary: state, standbys, slots, local };
    output::result(session.global.json, "standby status", &status, || show_status(&status));
    Ok(0)
}

async fn local(session: &Session, to: &Path, primary: &PrimaryState) -> Result<Local, CliError> {
    let instance = wire::instance(&session.settings);
    let doing = "cannot look at the standby";
    let mut status = instance.status(to).await.map_err(EngineError::cluster(doing))?;
    if status.lsn.is_none() {
        // It does not run: pg_control has how far it certainly is.
        let control = instance.control(to).map_err(EngineError::cluster(doing))?;
        status.lsn = Some(control.min_recovery_end.max(control.redo));
    }
    let lag_bytes = status.lsn.map(|lsn| primary.lsn.0.saturating_sub(lsn.0));
    let behind =
        |at: dr_core::Timestamp| (primary.time.as_millisecond() - at.as_millisecond()).max(0) as f64 / 1000.0;
    let lag_seconds = match lag_bytes {
        Some(0) => Some(0.0),
        _ => status.last_commit.map(behind),
    };
    let lag_commits = match instance.connection(to) {
        Some(connection) => {
            let own = wire::primary_at(&connection).state().await.ok();
            own.map(|own| primary.next_xid.saturating_sub(own.next_xid))
        }
        None => None,
    };
    Ok(Local { to: to.to_owned(), status, lag_bytes, lag_seconds, lag_commits })
}

fn show_status(status: &Status) -> String {
    let primary = &status.primary;
    let mut text = format!(
        "Primary: cluster {} at {} on timeline {}, {}.\n",
        primary.system_id,
        primary.lsn,
        primary.timeline,
        instant(primary.time)
    );
    let bytes = |value: Option<u64>| value.map_or("–".into(), size::bytes);
    if status.standbys.is_empty() {
        text.push_str("No standby is connected.\n");
    } else {
        let row = |f: &Follower| {
            let lag = f.lag_ms.map_or("–".into(), |ms| size::duration(Duration::from_millis(ms)));
            vec![f.name.clone(), f.state.clone(), f.sync.clone(), bytes(f.lag_bytes), lag]
        };
        let rows: Vec<Vec<String>> = status.standbys.iter().map(row).collect();
        text.push_str(&table(&["standby", "state", "commits", "behind", "replay lag"], &[3, 4], &rows));
    }
    if !status.slots.is_empty() {
        let row = |s: &SlotState| {
            let used = if s.active { "in use" } else { "NOT USED" }.to_owned();
            let wal = s.wal_status.clone().unwrap_or_default();
            let safe = s.safe_bytes.map_or("without limit".into(), size::bytes);
            vec![s.name.clone(), s.kind.clone(), used, bytes(s.retained_bytes), wal, safe]
        };
        let rows: Vec<Vec<String>> = status.slots.iter().map(row).collect();
        text.push_str(&table(&["slot", "kind", "", "keeps", "WAL", "until lost"], &[3, 5], &rows));
    }
    if let Some(local) = &status.local {
        let seconds =
            local.lag_seconds.map_or("not known".into(), |s| size::duration(Duration::from_secs_f64(s)));
        text.push_str(&format!("Standby in {}:\n", local.to.display()));
        text.push_str(&facts(&[
            ("state", format!("{:?}", local.status.state).to_lowercase()),
            ("at", local.status.lsn.map_or("not known".into(), |lsn| lsn.to_string())),
            ("behind", bytes(local.lag_bytes)),
            ("last commit replayed", local.status.last_commit.map_or("not known".into(), instant)),
            ("behind in time", seconds),
            ("transactions to come", local.lag_commits.map_or("not known".into(), |n| n.to_string())),
        ]));
    }
    text
}
