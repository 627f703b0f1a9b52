//! What a restore will do, and whether it can: before a byte moves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dr_core::guard::Guard;
use dr_core::plan::{Candidate, StoredWal, choose_backup, plan_wal};
use dr_core::port::{Finding, HostFacts, Instance, RecoveryTarget, RunState, SlotState, Verdict};
use dr_core::{Classified, ErrorClass, Lsn, SegmentSize, Timeline, TimelineHistory};
use dr_storage::format::{BackupStatus, Manifest, ManifestHead};
use dr_storage::{RepoError, WalStore};

use super::place::{self, Occupied};
use super::{RestoreOptions, RestorePlan, TimelineChoice};
use crate::context::Context;
use crate::error::EngineError;

/// Free space beyond the backup's size: recovery fetches and writes WAL.
const HEADROOM: u64 = 64 << 20;

/// Looks at repository, host and target and says what a restore would do. Changes nothing.
pub async fn plan(
    context: &Context,
    instance: &dyn Instance,
    options: &RestoreOptions,
) -> Result<RestorePlan, EngineError> {
    if !context.repo.can_read_data() {
        let needed =
            dr_core::port::KeyError::Absent { operation: "a restore", needed: "the repository's key" };
        return Err(EngineError::key("cannot restore")(needed));
    }
    let mut catalogue =
        context.store.catalogue().await.map_err(EngineError::repo("cannot list the backups"))?;
    let size = catalogue.heads.first().map_or(SegmentSize::DEFAULT, |head| head.cluster.segment_size);
    let wal = context.store.wal(size);
    let Histories { good: histories, damaged } = load_histories(&wal).await?;
    let candidates: Vec<Candidate> = catalogue.heads.iter().map(candidate).collect();
    let history = choose_history(&candidates, &histories, options);
    let passed_over = pass_over(damaged, history.as_ref().ok(), options)?;
    let history = history?;
    if !catalogue.unreadable.is_empty()
        && (candidates.is_empty() || could_decide(&history, &histories, options))
    {
        let (id, error) = catalogue.unreadable.swap_remove(0);
        let doing =
            format!("backup {id} cannot be read, and the choice may depend on it: name one with --backup");
        return Err(EngineError::repo(doing)(error));
    }
    let choice = choose_backup(&candidates, &history, &options.target, options.backup)
        .map_err(|source| EngineError::NoBackup { source })?;
    let doing = format!("cannot read backup {}", choice.id);
    let manifest = context.store.manifest(choice.id).await.map_err(EngineError::repo(doing))?;
    let wal_plan = check_wal(&wal, &history, &manifest.head, &options.target).await?;

    let tablespaces = place::map_tablespaces(&manifest, &options.tablespaces)?;
    check_target(instance, options, &manifest, &tablespaces).await?;
    let mut findings = crate::context::unreadable(&catalogue);
    findings.extend(passed_over);
    if let Some(newer) = choice.passed_over {
        let detail = format!("the newer backup {newer} is degraded (bad pages) and was passed over");
        findings.push(Finding::warning("backup-degraded", detail, format!("Use it with --backup {newer}.")));
    }
    if manifest.head.status == BackupStatus::Degraded {
        let detail = format!("backup {} holds {} bad pages", manifest.head.id, manifest.head.bad_pages);
        findings.push(Finding::warning(
            "backup-degraded",
            detail,
            "Check the relations that `dr show` names.",
        ));
    }
    findings.extend(lost_slots(&manifest.body.slots));
    findings.extend(check_space(manifest.head.bytes, options, &tablespaces)?);
    findings.extend(check_host(instance, options, &manifest));
    if findings.iter().any(stops) {
        let findings = findings.into_iter().filter(stops).collect();
        return Err(EngineError::Preflight { findings });
    }
    Ok(RestorePlan {
        backup: manifest.head.clone(),
        timeline: history.timeline,
        wal: wal_plan,
        tablespaces,
        findings,
        options: options.clone(),
        manifest,
        history,
    })
}

/// Slots are never part of a backup (`pg_replslot` is left out): what read them must be told.
fn lost_slots(slots: &[SlotState]) -> Option<Finding> {
    let describe = |slot: &SlotState| match &slot.database {
        Some(database) => format!("{} ({} in {database})", slot.name, slot.kind),
        None => format!("{} ({})", slot.name, slot.kind),
    };
    let names = slots.iter().map(describe).collect::<Vec<_>>().join(", ");
    (!slots.is_empty()).then(|| {
        let detail = format!("replication slots that the server had and the restored one will not have: {names}");
        let fix = "After the restore: make them again, rebuild the standbys, refresh the subscriptions with a new copy of the data.";
        Finding::warning("slots", detail, fix)
    })
}

/// Whether a finding stops a restore before a byte moves.
pub fn stops(finding: &Finding) -> bool {
    let guard = if finding.check == "disk-space" { Guard::DiskSpace } else { Guard::HostCompatible };
    finding.verdict == Verdict::Bad && guard.holds()
}

fn candidate(head: &ManifestHead) -> Candidate {
    Candidate {
        id: head.id,
        timeline: head.stop_timeline,
        stop: head.stop_lsn,
        stop_time: head.stop_time,
        degraded: head.status == BackupStatus::Degraded,
    }
}

/// The archived histories, and those that are damaged.
#[derive(Default)]
struct Histories {
    good: BTreeMap<Timeline, TimelineHistory>,
    damaged: BTreeMap<Timeline, RepoError>,
}

async fn load_histories(wal: &WalStore) -> Result<Histories, EngineError> {
    let doing = "cannot read the archived timelines";
    let mut histories = Histories::default();
    for timeline in wal.timelines().await.map_err(EngineError::repo(doing))? {
        match wal.history(timeline).await {
            Ok(history) => {
                let history = history.unwrap_or_else(|| TimelineHistory::root(timeline));
                histories.good.insert(timeline, history);
            }
            Err(error) if error.class() == ErrorClass::Corrupt => {
                histories.damaged.insert(timeline, error);
            }
            Err(error) => return Err(EngineError::repo(doing)(error)),
        }
    }
    Ok(histories)
}

/// Damaged histories that the chosen path does not need, as findings. A history names all of its
/// ancestors, so the path needs its own alone; *latest* needs all newer ones too, to know that they
/// do not descend from a backup.
fn pass_over(
    damaged: BTreeMap<Timeline, RepoError>,
    chosen: Option<&TimelineHistory>,
    options: &RestoreOptions,
) -> Result<Vec<Finding>, EngineError> {
    let asked = match (options.timeline, chosen) {
        (TimelineChoice::Number(timeline), _) => timeline,
        (_, Some(history)) => history.timeline,
        (_, None) => return Ok(Vec::new()),
    };
    let mut findings = Vec::new();
    for (timeline, error) in damaged {
        let newest = options.timeline == TimelineChoice::Latest && timeline > asked;
        if timeline == asked || newest {
            let doing = format!(
                "the history of timeline {timeline} cannot be read, and the path depends on it: name another \
                 one with --timeline"
            );
            return Err(EngineError::repo(doing)(error));
        }
        let detail = format!("the history of timeline {timeline} is damaged: {error}");
        findings.push(Finding::warning("timeline-history", detail, "This restore does not need it."));
    }
    Ok(findings)
}

/// Whether a backup that cannot be read could lead to another end than the chosen ones.
///
/// Along one history, replay leads to the same end from any backup.
fn could_decide(
    chosen: &TimelineHistory,
    histories: &BTreeMap<Timeline, TimelineHistory>,
    options: &RestoreOptions,
) -> bool {
    let by_timeline = match options.timeline {
        TimelineChoice::Number(_) => false,
        TimelineChoice::Current => true,
        TimelineChoice::Latest => histories.keys().next_back().is_some_and(|last| *last != chosen.timeline),
    };
    options.backup.is_none() && (by_timeline || options.target == RecoveryTarget::Immediate)
}

/// The path to follow.
fn choose_history(
    candidates: &[Candidate],
    histories: &BTreeMap<Timeline, TimelineHistory>,
    options: &RestoreOptions,
) -> Result<TimelineHistory, EngineError> {
    let of = |timeline| histories.get(&timeline).cloned().unwrap_or_else(|| TimelineHistory::root(timeline));
    let pool = candidates.iter().filter(|c| options.backup.is_none_or(|id| id == c.id));
    match options.timeline {
        TimelineChoice::Number(timeline) if timeline.0 > 1 && !histories.contains_key(&timeline) => {
            Err(EngineError::Invalid {
                what: format!("timeline {timeline} is not in the archive"),
                hint: "`dr list` shows the timelines; --timeline latest takes the newest.".into(),
            })
        }
        TimelineChoice::Number(timeline) => Ok(of(timeline)),
        TimelineChoice::Current => {
            let newest = pool.max_by_key(|c| (c.timeline, c.stop)).map_or(Timeline(1), |c| c.timeline);
            Ok(of(newest))
        }
        // As PostgreSQL's "latest": the highest timeline that descends from a backup.
        TimelineChoice::Latest => {
            let pool: Vec<&Candidate> = pool.collect();
            let descends = |h: &&TimelineHistory| pool.iter().any(|c| h.contains(c.timeline, c.stop));
            let newest = histories.values().rev().find(descends).cloned();
            Ok(newest.unwrap_or_else(|| of(pool.iter().map(|c| c.timeline).max().unwrap_or(Timeline(1)))))
        }
    }
}

/// Sees that the WAL on the way is all there.
async fn check_wal(
    wal: &WalStore,
    history: &TimelineHistory,
    head: &ManifestHead,
    target: &RecoveryTarget,
) -> Result<dr_core::plan::WalPlan, EngineError> {
    let mut stored = StoredWal::default();
    let timelines = history.ancestors.iter().map(|(t, _)| *t).chain([history.timeline]);
    for timeline in timelines {
        let doing = format!("cannot list the archived WAL of timeline {timeline}");
        for segment in wal.segments(timeline).await.map_err(EngineError::repo(doing))? {
            if segment.partial { stored.add_partial(segment.segment) } else { stored.add(segment.segment) }
        }
    }
    let (needed, to_end) = match target {
        RecoveryTarget::Immediate => (head.stop_lsn, false),
        RecoveryTarget::Lsn { lsn } => (Lsn(lsn.0.max(head.stop_lsn.0)), false),
        _ => (head.stop_lsn, true),
    };
    let plan = plan_wal(history, head.start.lsn, needed, to_end, head.cluster.segment_size, &stored);
    match &plan.gap {
        Some(gap) if Guard::WalGap.holds() => Err(EngineError::WalGap { gap: gap.clone() }),
        _ => Ok(plan),
    }
}

/// Sees that the target directory and the tablespaces' places may be written.
async fn check_target(
    instance: &dyn Instance,
    options: &RestoreOptions,
    manifest: &Manifest,
    tablespaces: &[(u32, PathBuf)],
) -> Result<(), EngineError> {
    if !options.to.is_absolute() {
        let what = format!("{} is not an absolute path", options.to.display());
        return Err(EngineError::Invalid { what, hint: "Give --to an absolute path.".into() });
    }
    match place::occupied(instance, &options.to)? {
        Occupied::Empty => {}
        _ if !options.delta && Guard::RestoreIntoEmpty.holds() => {
            return Err(EngineError::NotEmpty { path: options.to.display().to_string() });
        }
        Occupied::Cluster(found) if found == manifest.head.cluster.system_id => {}
        Occupied::Cluster(found) if Guard::DeltaSameCluster.holds() => {
            let reason = format!(
                "belongs to cluster {found}, but the backup is of cluster {}",
                manifest.head.cluster.system_id
            );
            return Err(EngineError::NotOurs { path: options.to.display().to_string(), reason });
        }
        Occupied::Foreign if Guard::DeltaSameCluster.holds() => {
            let reason = "is not empty and holds no PostgreSQL cluster".to_owned();
            return Err(EngineError::NotOurs { path: options.to.display().to_string(), reason });
        }
        _ => {}
    }
    if options.delta && Guard::DeltaSameCluster.holds() {
        let doing = "cannot tell whether a server runs on the directory";
        let status = instance.status(&options.to).await.map_err(EngineError::cluster(doing))?;
        if status.state != RunState::Stopped {
            let reason = "has a running server".to_owned();
            return Err(EngineError::NotOurs { path: options.to.display().to_string(), reason });
        }
    }
    for (_, path) in tablespaces {
        if Guard::RestoreIntoEmpty.holds() && !options.delta && !place::is_empty(path)? {
            return Err(EngineError::NotEmpty { path: path.display().to_string() });
        }
    }
    Ok(())
}

/// Whether so many bytes fit where they are to go.
pub fn check_space(
    bytes: u64,
    options: &RestoreOptions,
    tablespaces: &[(u32, PathBuf)],
) -> Result<Vec<Finding>, EngineError> {
    let needed = bytes.saturating_add(HEADROOM);
    let mut free: BTreeMap<u64, u64> = BTreeMap::new();
    for place in std::iter::once(&options.to).chain(tablespaces.iter().map(|(_, path)| path)) {
        let existing = nearest_existing(place);
        let space = dr_storage::os::free_space(existing).map_err(EngineError::file("look at", existing))?;
        let device = dr_storage::os::device(existing).map_err(EngineError::file("look at", existing))?;
        free.insert(device, space);
    }
    let free: u64 = free.values().sum();
    let show = dr_core::size::bytes;
    let detail = format!("{} needed at {}, {} free", show(needed), options.to.display(), show(free));
    if free >= needed {
        return Ok(vec![Finding::good("disk-space", detail)]);
    }
    if options.delta {
        let fix = "A delta restore reuses what is there; watch the free space.";
        return Ok(vec![Finding::warning("disk-space", detail, fix)]);
    }
    Ok(vec![Finding::bad("disk-space", detail, "Free space there, or restore to another place.")])
}

fn nearest_existing(path: &Path) -> &Path {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"))
}

/// Compares what the cluster needs with what this host offers.
fn check_host(instance: &dyn Instance, options: &RestoreOptions, manifest: &Manifest) -> Vec<Finding> {
    let needs = &manifest.body.host_needs;
    let facts: HostFacts = instance.host_facts(needs);
    let mut findings = Vec::new();
    if !needs.architecture.is_empty() && facts.architecture != needs.architecture {
        let detail = format!("the cluster is of {}, this host is {}", needs.architecture, facts.architecture);
        findings.push(Finding::bad("architecture", detail, "Restore on a host of the same architecture."));
    }
    // Files may be restored where no server runs; a server that is to be started must be able to.
    let serious = |check, detail: String, fix: String| {
        if options.start { Finding::bad(check, detail, fix) } else { Finding::warning(check, detail, fix) }
    };
    if facts.major != Some(needs.major) {
        let detail = format!("PostgreSQL {} is needed and was not found on this host", needs.major);
        let fix = format!("Install PostgreSQL {}, or set [cluster] bin_dir.", needs.major);
        findings.push(serious("postgresql", detail, fix));
    } else {
        findings.push(Finding::good("postgresql", format!("PostgreSQL {} is installed", needs.major)));
    }
    if !facts.missing_libraries.is_empty() {
        let names = facts.missing_libraries.join(", ");
        let detail = format!("libraries that the cluster loads are missing here: {names}");
        findings.push(serious("libraries", detail, "Install the packages of these extensions.".into()));
    }
    for (name, then, now) in &facts.differing_collations {
        let now = if now.is_empty() { "not available" } else { now.as_str() };
        let detail =
            format!("collation {name} was of version {then}, here it is {now}: indexes on text may be wrong");
        let fix = "After the restore: REINDEX, then ALTER DATABASE … REFRESH COLLATION VERSION.";
        findings.push(Finding::warning("collation", detail, fix));
    }
    if rustix::process::geteuid().is_root() {
        let detail =
            "PostgreSQL does not run as root, and the restored files would belong to root".to_owned();
        let fix = "Run dr as the user that owns the data directory, as: runuser -u postgres -- dr restore …";
        findings.push(serious("user", detail, fix.into()));
    }
    findings
}
