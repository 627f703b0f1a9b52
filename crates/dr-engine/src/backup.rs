//! The backup job.
//!
//! 1. Put the session's beginning; choose the parent. – *A crash leaves an empty session.*
//! 2. PostgreSQL starts the backup. – *PostgreSQL ends its side with the connection.*
//! 3. Walk the files beside the parent's table; store what differs; record points.
//!    – *Orphan packs under the session's prefix; the next backup continues from the last point.*
//! 4. List the relations again; PostgreSQL ends the backup; `pg_control` is read last.
//! 5. Wait until the WAL of the backup's range is in the archive. – *As after 3.*
//! 6. Put the manifest, create-only. **Commit.** – *After it everything is there.*
//! 7. Put the receipt.

mod arrival;
mod collect;
mod copy;
mod parent;
mod plan;
mod stretch;
mod task;
mod walk;
mod worker;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dr_core::event::{Event, Outcome, Unit};
use dr_core::guard::Guard;
use dr_core::port::{BackupSession, BackupStop, DatabaseSource};
use dr_core::{BackupId, Lsn, WalSegment};
use dr_storage::format::{
    BackupStatus, BadPageRecord, CataloguePart, Manifest, ManifestBody, ManifestHead, SessionBegin,
    SessionRef, WalkMark,
};
use dr_storage::{ClusterIdentity, PackKind, SessionWriter};

use crate::catalogue::{self, CatalogueWriter};
use crate::context::{Context, JobLog};
use crate::error::EngineError;
pub use plan::{BackupOptions, BackupPlan, BackupReport, BadPageReport, plan};

use collect::Collected;
use copy::{Copy, panicked};
use parent::Origin;
use task::Counters;

/// The stage that copies files.
pub(crate) const COPY: &str = "copy";

/// How soon the archive is looked at again while waiting for WAL: the wait grows from the first to
/// the second.
const WAL_POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Takes the backup. `Ok` means that it is committed and durable.
///
/// Cancel safety: a dropped or cancelled backup leaves a session without a manifest, which is not
/// listed; the next backup continues from its last point.
pub async fn apply(
    context: &Context,
    source: &dyn DatabaseSource,
    plan: &BackupPlan,
) -> Result<BackupReport, EngineError> {
    let mut log = JobLog::begin(context, "backup");
    match run(context, source, plan, &mut log).await {
        Ok((head, bad_pages)) => {
            let outcome =
                if head.status == BackupStatus::Complete { Outcome::Done } else { Outcome::Degraded };
            let receipt = log.close(Ok(outcome)).await;
            Ok(BackupReport { backup: head, bad_pages, receipt })
        }
        Err(error) => {
            log.close(Err(&error)).await;
            Err(error)
        }
    }
}

async fn run(
    context: &Context,
    source: &dyn DatabaseSource,
    plan: &BackupPlan,
    log: &mut JobLog,
) -> Result<(ManifestHead, Vec<BadPageReport>), EngineError> {
    context.cancel.check()?;
    context
        .store
        .register(&identity(plan, context))
        .await
        .map_err(EngineError::repo("cannot register the cluster"))?;
    let id = BackupId::new(context.clock.now(), dr_storage::random_u32());
    log.fact("backup_id", id.to_string());
    let begin =
        SessionBegin { host: context.host.clone(), note: plan.options.note.clone(), parent: plan.parent };
    let session = context
        .store
        .begin_session(id, begin)
        .await
        .map_err(EngineError::repo("cannot begin a backup session"))?;
    let origins = load_origins(context, plan).await?;

    let stage = log.stage("start", None, Unit::Steps);
    let doing = "cannot start the backup";
    let mut pg = source
        .begin(&format!("dr {id}"), plan.options.fast_checkpoint)
        .await
        .map_err(EngineError::source(doing))?;
    let known = origins.iter().flat_map(|origin| origin.catalogue.clone());
    let catalogue = CatalogueWriter::new(known);
    let catalogue = catalogue.add(&context.repo, &session, &context.cancel, pg.relations()).await?;
    let total = pg.size_estimate().await.map_err(EngineError::source("cannot tell the cluster's size"))?;
    log.end(stage);

    let stage = log.stage(COPY, total, Unit::Bytes);
    let walk = WalkMark { host: pg.host(), began_ns: context.clock.now().as_nanosecond() as i64 };
    let counters = Arc::new(Counters::default());
    let copy = Copy { context, plan, session: &session, origins, walk: &walk, counters: &counters, total };
    let stream = pg.stream();
    let collected = copy.run(pg.as_ref(), stream).await?;
    log.end(stage);

    let stage = log.stage("stop", None, Unit::Steps);
    let start = pg.start().clone();
    let catalogue = catalogue.add(&context.repo, &session, &context.cancel, pg.relations()).await?;
    let extras = Extras::collect(context, pg.as_mut(), catalogue.into_parts()).await?;
    let (stop, control) = pg.finish().await.map_err(EngineError::source("cannot end the backup"))?;
    log.end(stage);

    let stage = log.stage("store", None, Unit::Steps);
    let done = Done { id, plan, start, stop, control, walk, collected, counters: &counters };
    let (mut head, mut body) = done.describe(context, &extras);
    extras.store(&session, &mut body).await?;
    let packs = session.settle().await.map_err(EngineError::repo("cannot store the last packs"))?;
    head.stored_bytes = packs.iter().map(|p| p.len).sum();
    log.end(stage);

    let stage = log.stage("wal", None, Unit::Segments);
    wait_for_wal(context, plan, &head).await?;
    log.end(stage);

    let stage = log.stage("commit", None, Unit::Steps);
    let manifest = session.commit(head, body).await.map_err(EngineError::repo("cannot commit the backup"))?;
    log.end(stage);
    let bad_pages = bad_page_reports(context, &manifest, log).await;
    record(log, &manifest.head, &bad_pages);
    Ok((manifest.head, bad_pages))
}

fn identity(plan: &BackupPlan, context: &Context) -> ClusterIdentity {
    let cluster = &plan.cluster;
    ClusterIdentity {
        system_id: cluster.system_id,
        label: context.label.clone(),
        first_seen: context.clock.now(),
        version_num: cluster.version_num,
        page_size: cluster.page_size,
        segment_size: cluster.segment_size,
        relation_segment_pages: cluster.relation_segment_pages,
    }
}

/// Reads the tables that unchanged content is taken from: an interrupted backup's first.
async fn load_origins(context: &Context, plan: &BackupPlan) -> Result<Vec<Arc<Origin>>, EngineError> {
    let mut origins = Vec::new();
    if let Some(id) = plan.continues {
        let doing = "cannot read how far the interrupted backup came";
        if let Some(point) = context.store.point(id).await.map_err(EngineError::repo(doing))? {
            origins.push(Arc::new(Origin {
                start: point.start.lsn,
                host: point.walk.host,
                walk_began_ns: point.walk.began_ns,
                bad: by_file(point.bad_pages),
                shards: point.shards,
                catalogue: Vec::new(),
                up_to: Some(point.last_path),
            }));
        }
    }
    if let Some(id) = plan.parent {
        let manifest = context
            .store
            .manifest(id)
            .await
            .map_err(EngineError::repo(format!("cannot read backup {id}")))?;
        origins.push(Arc::new(Origin {
            start: manifest.head.start.lsn,
            host: manifest.body.walk.host,
            walk_began_ns: manifest.body.walk.began_ns,
            bad: by_file(manifest.body.bad_pages),
            shards: manifest.body.shards,
            catalogue: manifest.body.catalogue,
            up_to: None,
        }));
    }
    Ok(origins)
}

fn by_file(records: Vec<BadPageRecord>) -> HashMap<String, Vec<BadPageRecord>> {
    let mut map: HashMap<String, Vec<BadPageRecord>> = HashMap::new();
    for record in records {
        map.entry(record.path.clone()).or_default().push(record);
    }
    map
}

/// What is kept beside the files.
struct Extras {
    catalogue: Vec<CataloguePart>,
    tablespaces: Vec<dr_core::port::TablespaceFacts>,
    host_files: Vec<dr_core::port::HostFile>,
    host_needs: dr_core::port::HostNeeds,
    slots: Vec<dr_core::port::SlotState>,
}

impl Extras {
    async fn collect(
        context: &Context,
        pg: &mut dyn BackupSession,
        catalogue: Vec<CataloguePart>,
    ) -> Result<Self, EngineError> {
        let doing = "cannot list the tablespaces";
        let tablespaces = pg.tablespaces().await.map_err(EngineError::source(doing))?;
        let doing = "cannot read the server's files outside the data directory";
        let mut host_files = pg.host_files().await.map_err(EngineError::source(doing))?;
        if !context.repo.descriptor().is_encrypted() {
            // A private key in clear storage would outlive every rotation.
            host_files.iter_mut().filter(|f| f.role.contains("key")).for_each(|f| f.content = None);
        }
        let host_needs =
            pg.host_needs().await.map_err(EngineError::source("cannot tell what the cluster needs"))?;
        let slots = pg.slots().await.map_err(EngineError::source("cannot list the replication slots"))?;
        Ok(Extras { catalogue, tablespaces, host_files, host_needs, slots })
    }

    /// Stores the host's files as metadata frames.
    async fn store(&self, session: &SessionWriter, body: &mut ManifestBody) -> Result<(), EngineError> {
        let host_files = serde_json::to_vec(&self.host_files).unwrap_or_default();
        let mut writer = session.pack_writer(PackKind::Meta);
        let stored = tokio::task::spawn_blocking(move || {
            let host_files = writer.append_long(&host_files)?;
            writer.flush()?;
            Ok(host_files)
        });
        let doing = "cannot store the server's files outside the data directory";
        let stored = stored.await.map_err(|_| panicked("storing the host's files"))?;
        body.host_files = stored.map_err(EngineError::repo(doing))?;
        Ok(())
    }
}

/// Everything known when the files are copied and PostgreSQL has ended the backup.
struct Done<'a> {
    id: BackupId,
    plan: &'a BackupPlan,
    start: dr_core::port::BackupStart,
    stop: BackupStop,
    control: Vec<u8>,
    walk: WalkMark,
    collected: Collected,
    counters: &'a Counters,
}

impl Done<'_> {
    fn describe(self, context: &Context, extras: &Extras) -> (ManifestHead, ManifestBody) {
        let Collected { shards, mut sessions, bad, files, bytes, .. } = self.collected;
        sessions.insert(self.id);
        sessions.extend(extras.catalogue.iter().map(|part| part.frame.session));
        let status = if bad.is_empty() { BackupStatus::Complete } else { BackupStatus::Degraded };
        let head = ManifestHead {
            id: self.id,
            label: context.label.clone(),
            note: self.plan.options.note.clone(),
            host: context.host.clone(),
            cluster: self.plan.cluster.clone(),
            start: self.start,
            stop_lsn: self.stop.lsn,
            stop_timeline: self.stop.timeline,
            stop_time: self.stop.time,
            parent: self.plan.parent,
            status,
            bad_pages: bad.len() as u64,
            torn_pages: self.counters.torn.load(Ordering::Relaxed),
            files,
            bytes,
            read_bytes: self.counters.bytes_read.load(Ordering::Relaxed),
            stored_bytes: 0,
            previous: None,
            sealed_key: String::new(),
            key_epoch: 0,
        };
        let body = ManifestBody {
            shards,
            sessions: sessions.into_iter().map(SessionRef::unresolved).collect(),
            backup_label: self.stop.backup_label,
            tablespace_map: self.stop.tablespace_map,
            pg_control: self.control,
            tablespaces: extras.tablespaces.clone(),
            host_needs: extras.host_needs.clone(),
            slots: extras.slots.clone(),
            bad_pages: bad,
            relations: Vec::new(),
            catalogue: extras.catalogue.clone(),
            host_files: Vec::new(),
            walk: self.walk,
        };
        (head, body)
    }
}

/// Waits until every segment of the backup's range is archived.
async fn wait_for_wal(context: &Context, plan: &BackupPlan, head: &ManifestHead) -> Result<(), EngineError> {
    if !Guard::WalBeforeCommit.holds() {
        return Ok(());
    }
    let size = plan.cluster.segment_size;
    let timeline = head.stop_timeline;
    let first = WalSegment::holding(timeline, head.start.lsn, size).number;
    let last = WalSegment::holding(timeline, Lsn(head.stop_lsn.0.saturating_sub(1)), size).number;
    let began = Instant::now();
    let mut wait = WAL_POLL.0;
    loop {
        context.cancel.check()?;
        let doing = "cannot list the archived WAL";
        let listed = context.store.wal(size).segments(timeline).await.map_err(EngineError::repo(doing))?;
        let there: BTreeMap<u64, ()> =
            listed.iter().filter(|s| !s.partial).map(|s| (s.segment.number, ())).collect();
        let Some(missing) = (first..=last).find(|number| !there.contains_key(number)) else { return Ok(()) };
        context.events.emit(Event::Progress { stage: "wal", done: missing - first, note: None });
        if began.elapsed() >= plan.options.wal_timeout {
            return Err(EngineError::WalNotArchived {
                missing: WalSegment { timeline, number: missing }.file_name(size),
                waited: dr_core::size::duration(plan.options.wal_timeout),
            });
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 5 / 4).min(WAL_POLL.1);
    }
}

/// The bad pages with their relations' names, read from the catalogue that was just stored.
async fn bad_page_reports(context: &Context, manifest: &Manifest, log: &mut JobLog) -> Vec<BadPageReport> {
    let bad = &manifest.body.bad_pages;
    if bad.is_empty() {
        return Vec::new();
    }
    let wanted: HashSet<(u32, u32)> = bad.iter().filter_map(|b| file_of(&b.path)).collect();
    let mut names = HashMap::new();
    let looked = catalogue::visit(&context.store, manifest, |row| {
        let file = (row.database_oid, row.filenode);
        if wanted.contains(&file) {
            names.insert(file, format!("{}.{}.{}", row.database, row.schema, row.name));
        }
    });
    if let Err(error) = looked.await {
        log.warn(format!("the relations of the bad pages are not known: {error}"));
    }
    let report = |b: &BadPageRecord| BadPageReport {
        path: b.path.clone(),
        relation: file_of(&b.path).and_then(|file| names.get(&file).cloned()),
        block: b.block,
    };
    bad.iter().map(report).collect()
}

/// The database's oid (0: shared) and the file's number.
fn file_of(path: &str) -> Option<(u32, u32)> {
    let mut parts = path.rsplit('/');
    let file = parts.next()?;
    let database: u32 = parts.next()?.parse().unwrap_or(0);
    let digits = file.find(|c: char| !c.is_ascii_digit()).unwrap_or(file.len());
    Some((database, file[..digits].parse().ok()?))
}

fn record(log: &mut JobLog, head: &ManifestHead, bad_pages: &[BadPageReport]) {
    log.fact("files", head.files);
    log.fact("bytes", head.bytes);
    log.fact("bytes_read", head.read_bytes);
    log.fact("bytes_stored", head.stored_bytes);
    log.fact("start_lsn", head.start.lsn.to_string());
    log.fact("stop_lsn", head.stop_lsn.to_string());
    for bad in bad_pages {
        let relation = bad.relation.as_deref().unwrap_or("unknown relation");
        log.warn(format!(
            "block {} of {relation} ({}) has a wrong checksum; the backup is degraded",
            bad.block, bad.path
        ));
    }
}
