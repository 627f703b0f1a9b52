//! Whether stored backups are whole: metadata, packs, every byte of content.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::Ordering;

use dr_core::event::{Event, Outcome, Receipt, Unit};
use dr_core::port::{Key, StorageTarget};
use dr_core::{BackupId, Classified, Lsn, WalName, WalSegment};
use dr_engine::{Context, EngineError, JobLog, chain};
use dr_storage::format::{Manifest, PackInfo};
use serde::Serialize;

/// How deep to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Manifests, lists of packs, sizes of objects.
    Metadata,
    /// Also every stored byte against the digest in its name. Needs no reading key.
    Packs,
    /// Also every extent and every WAL file, opened and compared with its digest.
    Content,
}

/// What to verify.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerifyOptions {
    /// The backups; empty: the newest.
    pub backups: Vec<BackupId>,
    /// All backups of the cluster.
    pub all: bool,
    /// How deep.
    pub level: Level,
    /// Worker threads.
    pub workers: usize,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Where, as an object's or a file's name.
    pub place: String,
    /// What is wrong.
    pub what: String,
}

/// How one backup came out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackupVerdict {
    /// The backup.
    pub id: BackupId,
    /// What is wrong; empty: it is whole as far as was looked.
    pub problems: Vec<Problem>,
    /// Packs looked at.
    pub packs: u64,
    /// Bytes of content read back and compared.
    pub content_bytes: u64,
    /// WAL files of its range.
    pub wal_files: u64,
}

/// What a verification found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VerifyReport {
    /// How deep it looked.
    pub level: Level,
    /// Each backup.
    pub backups: Vec<BackupVerdict>,
    /// Holes in the archived WAL after the oldest backup.
    pub wal_gaps: Vec<String>,
    /// The receipt, as stored.
    pub receipt: Receipt,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_whole(&self) -> bool {
        self.wal_gaps.is_empty() && self.backups.iter().all(|b| b.problems.is_empty())
    }
}

/// Verifies backups. Damage is in the report; an error means that nothing could be said.
pub async fn verify(context: &Context, options: &VerifyOptions) -> Result<VerifyReport, EngineError> {
    let mut log = JobLog::begin(context, "verify");
    let mut report = match run(context, options, &mut log).await {
        Ok(report) => report,
        Err(error) => {
            log.close(Err(&error)).await;
            return Err(error);
        }
    };
    log.fact("whole", report.is_whole());
    log.fact("level", serde_json::to_value(report.level).unwrap_or_default());
    for problem in report.backups.iter().flat_map(|b| &b.problems) {
        log.warn(format!("{}: {}", problem.place, problem.what));
    }
    let outcome = if report.is_whole() { Outcome::Done } else { Outcome::Degraded };
    report.receipt = log.close(Ok(outcome)).await;
    Ok(report)
}

async fn run(
    context: &Context,
    options: &VerifyOptions,
    log: &mut JobLog,
) -> Result<VerifyReport, EngineError> {
    if options.level == Level::Content && !context.repo.can_read_data() {
        return Err(EngineError::Invalid {
            what: "reading content back needs the repository's key".into(),
            hint: "Give --key-file, or verify the stored objects alone with --packs.".into(),
        });
    }
    let catalogue = context.store.catalogue().await.map_err(EngineError::repo("cannot list the backups"))?;
    let heads = catalogue.heads;
    let mut wanted: Vec<BackupId> = options.backups.clone();
    if options.all {
        wanted = heads.iter().map(|head| head.id).collect();
    } else if wanted.is_empty() {
        wanted.extend(heads.last().map(|head| head.id));
    }
    let stage = log.stage("verify", Some(wanted.len() as u64), Unit::Steps);
    let mut seen = HashMap::new();
    let mut backups: Vec<BackupVerdict> = Vec::new();
    for (id, error) in &catalogue.unreadable {
        let problem = Problem { place: format!("manifest/{id}"), what: chain(error) };
        let problems = vec![problem];
        backups.push(BackupVerdict { id: *id, problems, packs: 0, content_bytes: 0, wal_files: 0 });
    }
    wanted.retain(|id| catalogue.unreadable.iter().all(|(unreadable, _)| unreadable != id));
    for id in wanted {
        context.cancel.check()?;
        backups.push(one(context, options, id, &mut seen).await?);
        context.events.emit(Event::Progress { stage: "verify", done: backups.len() as u64, note: None });
    }
    log.end(stage);
    let wal_gaps = wal_gaps(context, &heads).await?;
    let receipt = Receipt::begun("verify", context.clock.now());
    Ok(VerifyReport { level: options.level, backups, wal_gaps, receipt })
}

/// Packs that were found good or bad already, by name.
type Seen = HashMap<String, Option<String>>;

async fn one(
    context: &Context,
    options: &VerifyOptions,
    id: BackupId,
    seen: &mut Seen,
) -> Result<BackupVerdict, EngineError> {
    let mut verdict = BackupVerdict { id, problems: Vec::new(), packs: 0, content_bytes: 0, wal_files: 0 };
    let manifest = match context.store.manifest(id).await {
        Ok(manifest) => manifest,
        Err(error) if error.class() == dr_core::ErrorClass::Corrupt => {
            verdict.problems.push(Problem { place: format!("manifest/{id}"), what: chain(&error) });
            return Ok(verdict);
        }
        Err(error) => return Err(EngineError::repo(format!("cannot read backup {id}"))(error)),
    };
    packs(context, options, &manifest, seen, &mut verdict).await?;
    if options.level == Level::Content {
        match dr_engine::read_back(context, &manifest, options.workers).await {
            Ok(counters) => verdict.content_bytes = counters.bytes.load(Ordering::Relaxed),
            Err(error) if is_damage(&error) => {
                verdict.problems.push(Problem { place: format!("backup {id}"), what: chain(&error) });
            }
            Err(error) => return Err(error),
        }
    }
    wal(context, options, &manifest, &mut verdict).await?;
    Ok(verdict)
}

fn is_damage(error: &EngineError) -> bool {
    use dr_core::ErrorClass::{Corrupt, Fenced, Missing};
    matches!(error.class(), Corrupt | Missing | Fenced)
}

/// Every pack that the backup reaches: there, of the right length, with the right bytes.
async fn packs(
    context: &Context,
    options: &VerifyOptions,
    manifest: &Manifest,
    seen: &mut Seen,
    verdict: &mut BackupVerdict,
) -> Result<(), EngineError> {
    let reader = context.store.reader().await.map_err(EngineError::repo("cannot read the repository"))?;
    let base = format!("cluster/{}", context.store.system_id());
    for session in &manifest.body.sessions {
        let place = format!("session/{}/packs", session.id);
        match context.store.list_digest(session.id).await {
            Ok(digest) if digest == session.packs => {}
            Ok(_) => {
                let what = "its digest differs from the one in the manifest".to_owned();
                verdict.problems.push(Problem { place: place.clone(), what });
            }
            Err(error) => {
                verdict.problems.push(Problem { place: place.clone(), what: chain(&error) });
                continue;
            }
        }
        let view = match reader.session(session.id).await {
            Ok(view) => view,
            Err(error) => {
                verdict.problems.push(Problem { place, what: chain(&error) });
                continue;
            }
        };
        for pack in view.packs() {
            context.cancel.check()?;
            verdict.packs += 1;
            let name = format!("{base}/{}", pack.name(session.id));
            let found = match seen.get(&name) {
                Some(found) => found.clone(),
                None => {
                    let found =
                        pack_problem(context.repo.target().as_ref(), options.level, &name, pack).await?;
                    seen.insert(name.clone(), found.clone());
                    found
                }
            };
            verdict.problems.extend(found.map(|what| Problem { place: name, what }));
        }
    }
    Ok(())
}

async fn pack_problem(
    target: &dyn StorageTarget,
    level: Level,
    name: &str,
    pack: &PackInfo,
) -> Result<Option<String>, EngineError> {
    let key = Key::new(name).map_err(|error| EngineError::Bug { what: error.to_string() })?;
    let damage = |error: &dr_core::port::StorageError| {
        matches!(error.class(), dr_core::ErrorClass::Missing | dr_core::ErrorClass::Corrupt)
    };
    let wrong_len =
        |len: u64| (len != pack.len).then(|| format!("it has {len} bytes instead of {}", pack.len));
    if level == Level::Metadata {
        return match target.head(&key).await {
            Ok(info) => Ok(wrong_len(info.size)),
            Err(error) if damage(&error) => Ok(Some(error.to_string())),
            Err(error) => Err(EngineError::storage(format!("cannot look at {name}"))(error)),
        };
    }
    match target.get(&key, None).await {
        Ok(bytes) if bytes.len() as u64 != pack.len => Ok(wrong_len(bytes.len() as u64)),
        Ok(bytes) if dr_storage::object_digest(&bytes) != pack.digest => {
            Ok(Some("its bytes do not have the digest in its name".into()))
        }
        Ok(_) => Ok(None),
        Err(error) if damage(&error) => Ok(Some(error.to_string())),
        Err(error) => Err(EngineError::storage(format!("cannot read {name}"))(error)),
    }
}

/// The WAL without which the backup cannot become consistent.
async fn wal(
    context: &Context,
    options: &VerifyOptions,
    manifest: &Manifest,
    verdict: &mut BackupVerdict,
) -> Result<(), EngineError> {
    let head = &manifest.head;
    let size = head.cluster.segment_size;
    let store = context.store.wal(size);
    let timeline = head.stop_timeline;
    let doing = "cannot list the archived WAL";
    let listed = store.segments(timeline).await.map_err(EngineError::repo(doing))?;
    let there: BTreeSet<u64> = listed.iter().filter(|s| !s.partial).map(|s| s.segment.number).collect();
    let first = WalSegment::holding(timeline, head.start.lsn, size).number;
    let last = WalSegment::holding(timeline, Lsn(head.stop_lsn.0.saturating_sub(1)), size).number;
    for number in first..=last {
        let segment = WalSegment { timeline, number };
        let name = segment.file_name(size);
        verdict.wal_files += 1;
        if !there.contains(&number) {
            verdict.problems.push(Problem { place: name, what: "it is not in the archive".into() });
        } else if options.level == Level::Content
            && let Err(error) = store.fetch(&WalName::Segment(segment), &mut std::io::sink()).await
        {
            verdict.problems.push(Problem { place: name, what: chain(&error) });
        }
    }
    Ok(())
}

/// Segments that are missing between others, from the oldest backup on.
async fn wal_gaps(
    context: &Context,
    heads: &[dr_storage::format::ManifestHead],
) -> Result<Vec<String>, EngineError> {
    let mut oldest: BTreeMap<dr_core::Timeline, (u64, dr_core::SegmentSize)> = BTreeMap::new();
    for head in heads {
        let size = head.cluster.segment_size;
        let first = WalSegment::holding(head.start.timeline, head.start.lsn, size).number;
        let entry = oldest.entry(head.start.timeline).or_insert((first, size));
        entry.0 = entry.0.min(first);
    }
    let mut gaps = Vec::new();
    for (timeline, (first, size)) in oldest {
        let doing = "cannot list the archived WAL";
        let listed = context.store.wal(size).segments(timeline).await.map_err(EngineError::repo(doing))?;
        let numbers: BTreeSet<u64> =
            listed.iter().map(|s| s.segment.number).filter(|n| *n >= first).collect();
        let Some(last) = numbers.last() else { continue };
        let missing = (first..=*last).filter(|n| !numbers.contains(n));
        gaps.extend(missing.map(|number| WalSegment { timeline, number }.file_name(size)));
    }
    Ok(gaps)
}
