//! Sessions: packs, frames, documents and the commit.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use dr_core::port::{
    BackupStart, Capabilities, ClusterDescription, HostNeeds, Key, ObjectInfo, Payload, StorageError,
    StorageTarget,
};
use dr_core::{BackupId, Classified, Lsn, SegmentSize, SystemId, Timeline, Timestamp};
use dr_storage::format::{
    BackupStatus, Digest, EXTENT_LEN, FrameRef, ManifestBody, ManifestHead, Point, SessionBegin, SessionRef,
    WalkMark,
};
use dr_storage::keys::FileKey;
use dr_storage::target::MemoryTarget;
use dr_storage::{Access, InitSpec, PackKind, Repository, SessionWriter};
use futures_util::stream::BoxStream;
use proptest::prelude::*;

const SYSTEM: SystemId = SystemId(9);

async fn repository(target: Arc<dyn StorageTarget>, encrypted: bool) -> (Repository, FileKey) {
    let key = FileKey::generate();
    let spec = InitSpec { encrypted, compression_level: 1, created: Timestamp::UNIX_EPOCH };
    let (repo, _) = Repository::init(target, spec, &[Arc::new(key.clone())]).await.unwrap();
    (repo, key)
}

fn id(number: u32) -> BackupId {
    BackupId::new(Timestamp::from_second(1_790_000_000).unwrap(), number)
}

async fn begin(repo: &Repository, number: u32) -> SessionWriter {
    let begin = SessionBegin { host: "h".into(), note: String::new(), parent: None };
    repo.cluster(SYSTEM).begin_session(id(number), begin).await.unwrap()
}

/// Packs are written on threads that may block.
async fn write(session: &SessionWriter, kind: PackKind, frames: Vec<Vec<u8>>) -> Vec<FrameRef> {
    let session = session.clone();
    let writing = tokio::task::spawn_blocking(move || {
        let mut writer = session.pack_writer(kind);
        let refs = frames.iter().map(|raw| writer.append(raw).unwrap()).collect();
        writer.flush().unwrap();
        refs
    });
    tokio::time::timeout(Duration::from_secs(60), writing).await.unwrap().unwrap()
}

fn start() -> BackupStart {
    BackupStart { lsn: Lsn(1), timeline: Timeline(1), time: Timestamp::UNIX_EPOCH }
}

fn walk() -> WalkMark {
    WalkMark { host: "h".into(), began_ns: 0 }
}

fn head(number: u32) -> ManifestHead {
    ManifestHead {
        id: id(number),
        label: "main".into(),
        note: String::new(),
        host: "h".into(),
        cluster: ClusterDescription {
            system_id: SYSTEM,
            version_num: 150_018,
            page_size: 8192,
            segment_size: SegmentSize::DEFAULT,
            relation_segment_pages: 131_072,
            checksums: true,
            timeline: Timeline(1),
            in_recovery: false,
            data_directory: "/d".into(),
        },
        start: start(),
        stop_lsn: Lsn(2),
        stop_timeline: Timeline(1),
        stop_time: Timestamp::UNIX_EPOCH,
        parent: None,
        status: BackupStatus::Complete,
        bad_pages: 0,
        torn_pages: 0,
        files: 0,
        bytes: 0,
        read_bytes: 0,
        stored_bytes: 0,
        previous: None,
        sealed_key: String::new(),
        key_epoch: 1,
    }
}

fn body(sessions: &[u32]) -> ManifestBody {
    ManifestBody {
        shards: Vec::new(),
        sessions: sessions.iter().map(|n| SessionRef::unresolved(id(*n))).collect(),
        backup_label: "label".into(),
        tablespace_map: String::new(),
        pg_control: vec![1, 2, 3],
        tablespaces: Vec::new(),
        host_needs: HostNeeds::default(),
        slots: Vec::new(),
        relations: Vec::new(),
        catalogue: Vec::new(),
        host_files: Vec::new(),
        bad_pages: Vec::new(),
        walk: walk(),
    }
}

fn point() -> Point {
    Point {
        start: start(),
        walk: walk(),
        shards: Vec::new(),
        sessions: Vec::new(),
        bad_pages: Vec::new(),
        last_path: "base/1".into(),
        packs: Vec::new(),
    }
}

/// Bytes that do not compress.
fn noise(len: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_read_back_and_no_place_in_a_pack_is_used_twice() {
    for encrypted in [true, false] {
        let (repo, _) = repository(Arc::new(MemoryTarget::new()), encrypted).await;
        let session = begin(&repo, 1).await;
        let mut raws: Vec<Vec<u8>> = (0..140).map(|n| noise(EXTENT_LEN, n)).collect();
        raws.extend([vec![7; EXTENT_LEN], vec![1], Vec::new(), b"text text text text text".to_vec()]);
        for kind in [PackKind::Data, PackKind::Meta, PackKind::Page] {
            let refs = write(&session, kind, raws.clone()).await;
            assert!(refs.last().unwrap().seq > 0, "more than one pack");
            // The nonce of a frame is its place and the key is the pack's: places must differ.
            let places: HashSet<(u32, u32)> = refs.iter().map(|f| (f.seq, f.offset)).collect();
            assert_eq!(places.len(), refs.len());
            for pair in refs.windows(2).filter(|pair| pair[0].seq == pair[1].seq) {
                assert_eq!(pair[1].offset, pair[0].offset + pair[0].stored, "back to back, upward");
            }
            session.settle().await.unwrap();
        }
        session.commit(head(1), body(&[1])).await.unwrap();
        let reader = repo.cluster(SYSTEM).reader().await.unwrap();
        for kind in [PackKind::Data, PackKind::Meta, PackKind::Page] {
            let view = reader.session(id(1)).await.unwrap();
            assert_eq!(view.packs().filter(|pack| pack.kind == kind).count(), 2);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_opens_only_in_its_own_place() {
    let target = Arc::new(MemoryTarget::new());
    let (repo, key) = repository(target.clone(), true).await;
    let mut all = Vec::new();
    for number in [1, 2] {
        let session = begin(&repo, number).await;
        let raws = vec![noise(5000, 1), noise(5000, 2), b"text text text text".repeat(20)];
        for kind in [PackKind::Data, PackKind::Meta] {
            let refs = write(&session, kind, raws.clone()).await;
            all.extend(refs.into_iter().zip(raws.clone()).map(|(frame, raw)| (kind, frame, raw)));
        }
        session.commit(head(number), body(&[number])).await.unwrap();
    }
    let reader = repo.cluster(SYSTEM).reader().await.unwrap();
    for (kind, frame, raw) in &all {
        assert_eq!(reader.frame(*kind, frame).await.unwrap(), *raw);
        let others = [
            FrameRef { offset: frame.offset + 1, ..*frame },
            FrameRef { stored: frame.stored - 1, ..*frame },
            FrameRef { raw: frame.raw + 1, ..*frame },
            FrameRef { seq: frame.seq + 1, ..*frame },
        ];
        for other in others {
            assert!(reader.frame(*kind, &other).await.is_err(), "{other:?} was opened");
        }
        // The same bytes at the same place of another pack: of another session, of another kind.
        let session = if frame.session == id(1) { id(2) } else { id(1) };
        let other_kind = if *kind == PackKind::Data { PackKind::Meta } else { PackKind::Data };
        let own = pack_bytes(&target, *kind, frame.session);
        for (kind, session) in [(*kind, session), (other_kind, frame.session)] {
            let swapped = Arc::new(MemoryTarget::from_snapshot(target.snapshot()));
            swapped.tamper(&pack_key(&target, kind, session), |bytes| *bytes = own.clone());
            let other = Repository::open(swapped, Access::Key(Arc::new(key.clone()))).await.unwrap();
            let reader = other.cluster(SYSTEM).reader().await.unwrap();
            let place = FrameRef { session, ..*frame };
            assert!(reader.frame(kind, &place).await.is_err(), "a frame was opened in another place");
        }
    }
}

fn pack_key(target: &MemoryTarget, kind: PackKind, session: BackupId) -> Key {
    let part = format!("/{}/{session}/", kind.directory());
    target.snapshot().keys().find(|key| key.as_str().contains(&part)).unwrap().clone()
}

fn pack_bytes(target: &MemoryTarget, kind: PackKind, session: BackupId) -> Vec<u8> {
    target.snapshot()[&pack_key(target, kind, session)].to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bit_and_every_byte_of_a_document_counts() {
    for encrypted in [true, false] {
        let target = Arc::new(MemoryTarget::new());
        let (repo, key) = repository(target.clone(), encrypted).await;
        let session = begin(&repo, 1).await;
        write(&session, PackKind::Data, vec![vec![1; 100]]).await;
        session.put_point(1, &point()).await.unwrap();
        session.commit(head(1), body(&[1])).await.unwrap();
        for part in ["/manifest/", "/packs", "/point-0001"] {
            let objects = target.snapshot();
            let (name, bytes) = objects.iter().find(|(key, _)| key.as_str().contains(part)).unwrap();
            let damaged = (0..bytes.len() * 8)
                .map(|bit| {
                    let mut changed = bytes.to_vec();
                    changed[bit / 8] ^= 1 << (bit % 8);
                    changed
                })
                .chain((0..bytes.len()).map(|len| bytes[..len].to_vec()))
                .chain([[&bytes[..], b"x"].concat()]);
            for (n, content) in damaged.enumerate() {
                let copy = Arc::new(MemoryTarget::from_snapshot(objects.clone()));
                copy.tamper(name, |bytes| *bytes = content);
                let access = match encrypted {
                    true => Access::Key(Arc::new(key.clone())),
                    false => Access::ListOnly,
                };
                let store = Repository::open(copy, access).await.unwrap().cluster(SYSTEM);
                let refused = match part {
                    "/manifest/" => store.manifest(id(1)).await.is_err(),
                    "/packs" => store.reader().await.unwrap().session(id(1)).await.is_err(),
                    _ => store.point(id(1)).await.is_err(),
                };
                // Without a seal only the header, zstd and JSON speak; that none panics is the law.
                assert!(refused || !encrypted, "damage {n} to {part} went unnoticed");
            }
        }
    }
}

/// A target on which another writer is a moment ahead: what it asks for first is not there yet.
#[derive(Debug)]
struct Behind {
    inner: Arc<MemoryTarget>,
    hidden: Mutex<Option<String>>,
}

#[async_trait]
impl StorageTarget for Behind {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn create(&self, key: &Key, payload: Payload) -> Result<(), StorageError> {
        // What is created becomes visible.
        self.hidden.lock().unwrap().take_if(|hidden| key.as_str().ends_with(&**hidden));
        self.inner.create(key, payload).await
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StorageError> {
        if self.hidden.lock().unwrap().as_ref().is_some_and(|hidden| key.as_str().ends_with(hidden)) {
            return Err(StorageError::NotFound { key: key.to_string(), target: self.location() });
        }
        self.inner.get(key, range).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectInfo, StorageError> {
        self.inner.head(key).await
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> BoxStream<'a, Result<ObjectInfo, StorageError>> {
        self.inner.list(prefix, after)
    }

    async fn list_parts(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        self.inner.list_parts(prefix).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        self.inner.delete(key).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_backups_that_continue_one_interrupted_session_agree_on_its_packs() {
    let inner = Arc::new(MemoryTarget::new());
    let (repo, key) = repository(inner.clone(), true).await;
    let interrupted = begin(&repo, 1).await;
    write(&interrupted, PackKind::Data, vec![vec![1; 100]]).await;
    interrupted.put_point(1, &point()).await.unwrap();
    let first = begin(&repo, 2).await;
    let first = first.commit(head(2), body(&[1, 2])).await.unwrap();
    let hidden = Mutex::new(Some(format!("session/{}/packs", id(1))));
    let behind = Arc::new(Behind { inner, hidden });
    let other = Repository::open(behind, Access::Key(Arc::new(key))).await.unwrap();
    let second = begin(&other, 3).await;
    let second = second.commit(head(3), body(&[1, 3])).await.unwrap();
    let list = |manifest: &dr_storage::format::Manifest| manifest.body.sessions[0];
    assert_eq!(list(&first), list(&second));
    assert_ne!(list(&first).packs, Digest([0; 16]));
    // The interrupted one, if it still lives, cannot commit with more than it was closed with.
    write(&interrupted, PackKind::Data, vec![vec![2; 100]]).await;
    let error = interrupted.commit(head(1), body(&[1])).await.map(drop).unwrap_err();
    assert_eq!(error.code(), "repo-fenced");
    assert_eq!(repo.cluster(SYSTEM).heads().await.unwrap().len(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// One pass gives digest and fingerprints: the digest is BLAKE3's own, and a fingerprint
    /// changes with its page alone.
    #[test]
    fn digests_with_fingerprints_are_the_plain_digests(
        pages in 0usize..34, shift in 10u32..16, tail in 0usize..1024, seed in any::<u8>(), touched in any::<prop::sample::Index>(),
    ) {
        let page = 1usize << shift;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (repo, _) = runtime.block_on(repository(Arc::new(MemoryTarget::new()), true));
        let mut raw = noise((pages * page + tail).min(EXTENT_LEN), seed);
        let (mut prints, mut again) = (Vec::new(), Vec::new());
        prop_assert_eq!(repo.digest_with_prints(&raw, page, &mut prints), repo.digest(&raw));
        prop_assert_eq!(prints.len(), raw.len().div_ceil(page));
        if !raw.is_empty() {
            let at = touched.index(raw.len());
            raw[at] ^= 1;
            prop_assert_eq!(repo.digest_with_prints(&raw, page, &mut again), repo.digest(&raw));
            for (index, (before, after)) in prints.iter().zip(&again).enumerate() {
                prop_assert_eq!(before == after, index != at / page);
            }
        }
    }
}
