//! Repositories of released formats stay readable: by this program, and by the script that needs no dr.
//!
//! `DR_WRITE_GOLDEN=<directory>` writes new fixtures there. Those of a released format are never replaced.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use dr_core::port::KeyProvider;
use dr_core::{Lsn, SegmentSize, Timeline, Timestamp, WalName, WalSegment};
use dr_storage::keys::FileKey;
use dr_storage::target::{DirectoryOptions, DirectoryTarget};
use dr_storage::{Access, InitSpec, Repository, object_digest};
use dr_testkit::sim::{BAD, PAGE, Random, SimCluster, TickingClock, context, relation};
use serde_json::json;

const SYSTEM: u64 = 7_000_000_000_000_000_009;
const SPACE: &str = "16400";

type Digests = BTreeMap<String, String>;

fn digests(files: &BTreeMap<String, Vec<u8>>) -> Digests {
    files.iter().map(|(path, content)| (path.clone(), object_digest(content).to_hex())).collect()
}

/// What a restore must give: under the names that files have on disk.
fn wanted(cluster: &SimCluster) -> Digests {
    let name = |path: String| String::from_utf8(dr_core::path::decode(&path)).unwrap();
    digests(&cluster.content().into_iter().map(|(path, content)| (name(path), content)).collect())
}

fn target(repo: &Path) -> Arc<DirectoryTarget> {
    let options = DirectoryOptions { create: true, sync: false };
    Arc::new(DirectoryTarget::open(repo, options).unwrap())
}

async fn open(dir: &Path) -> Repository {
    let key = dir.join("dr.key");
    let access = match key.exists() {
        true => Access::Key(Arc::new(FileKey::read(&key).unwrap())),
        false => Access::ListOnly,
    };
    Repository::open(target(&dir.join("repo")), access).await.unwrap()
}

/// One of each: inline and shared small files, an empty one, base frames, patches, zeros, a bad page,
/// a tablespace, names that need care.
fn cluster() -> (SimCluster, Random) {
    let mut random = Random::new(41);
    let cluster = SimCluster::new(SYSTEM);
    cluster.put("PG_VERSION", b"15\n".to_vec());
    cluster.put("empty", Vec::new());
    cluster.put("global/PG_VERSION", b"15\n".to_vec());
    cluster.put("pg_wal/1 %25 of käse", random.bytes(3000));
    cluster.put("pg_xact/113", random.bytes(9000));
    cluster.put_relation("base/5/100", 34, &mut random);
    cluster.put("base/5/101", vec![0; 40 * PAGE]);
    cluster.put_relation("base/5/102", 2, &mut random);
    cluster.edit("base/5/102", |content| content[PAGE..PAGE + 8].copy_from_slice(BAD));
    cluster.put_link(&format!("pg_tblspc/{SPACE}"), "/old/place");
    cluster.put_relation(&format!("pg_tblspc/{SPACE}/PG_15/5/200"), 1, &mut random);
    (cluster, random)
}

/// A repository, its key and what it must restore to.
async fn make(dir: &Path, encrypted: bool) {
    let key = FileKey::generate();
    let spec = InitSpec { encrypted, compression_level: 1, created: Timestamp::UNIX_EPOCH };
    let providers: Vec<Arc<dyn KeyProvider>> = if encrypted {
        key.write(&dir.join("dr.key")).unwrap();
        vec![Arc::new(key)]
    } else {
        Vec::new()
    };
    let (repo, _) = Repository::init(target(&dir.join("repo")), spec, &providers).await.unwrap();
    let (cluster, mut random) = cluster();
    let context = context(&repo, &cluster, Arc::<TickingClock>::default());
    let mut backups: BTreeMap<String, Digests> = BTreeMap::new();
    for _ in 0..2 {
        let report = back_up(&context, &cluster, &options()).await.unwrap();
        backups.insert(report.backup.id.to_string(), wanted(&cluster));
        cluster.touch_page("base/5/100", 3, &mut random);
        cluster.touch_page("base/5/100", 33, &mut random);
        cluster.put("pg_xact/114", random.bytes(70));
        cluster.remove("pg_xact/113");
    }
    let wal = store_wal(&context.store.wal(SegmentSize::DEFAULT)).await;
    let expected = json!({ "backups": backups, "wal": wal });
    std::fs::write(dir.join("expected.json"), serde_json::to_vec_pretty(&expected).unwrap()).unwrap();
}

/// The names and digests of all archived files.
async fn store_wal(store: &dr_storage::WalStore) -> Digests {
    let size = SegmentSize::DEFAULT;
    let second = WalSegment { timeline: Timeline(1), number: 2 };
    // Two incomplete ones of one segment: the one that goes further is the one that counts.
    for (filled, fill) in [(40, 7u8), (30, 6)] {
        let mut encoder = store.encoder(&WalName::Partial(second)).unwrap();
        for _ in 0..size.bytes() / (256 << 10) {
            encoder.feed(&vec![fill; 256 << 10]).unwrap();
        }
        store.store(encoder.finish(Lsn(second.start(size).0 + filled)).unwrap()).await.unwrap();
    }
    let label = WalName::Label(WalSegment { timeline: Timeline(1), number: 1 }, 0x28);
    let history = WalName::History(Timeline(2));
    store.store_small(&label, b"START WAL LOCATION: 0/1000028\n").await.unwrap();
    store.store_small(&history, b"1\t0/2000000\tno recovery target specified\n").await.unwrap();
    let mut wal = Digests::new();
    for (name, content) in [
        ("000000010000000000000001", vec![1; 16 << 20]),
        ("000000010000000000000002.partial", vec![7; 16 << 20]),
        ("000000010000000000000001.00000028.backup", b"START WAL LOCATION: 0/1000028\n".to_vec()),
        ("00000002.history", b"1\t0/2000000\tno recovery target specified\n".to_vec()),
    ] {
        wal.insert(name.to_owned(), object_digest(&content).to_hex());
    }
    wal
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy(&from, &to)
        } else {
            let _: u64 = std::fs::copy(&from, &to).unwrap();
        }
    }
}

/// Copies of the committed fixtures, and repositories that this program wrote just now.
async fn repositories(dir: &Path) -> Vec<PathBuf> {
    let mut places = Vec::new();
    for name in ["v1", "v1-clear"] {
        let place = dir.join(format!("golden-{name}"));
        copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name), &place);
        let fresh = dir.join(format!("fresh-{name}"));
        std::fs::create_dir(&fresh).unwrap();
        make(&fresh, name == "v1").await;
        places.extend([place, fresh]);
    }
    places
}

fn expected(place: &Path) -> (BTreeMap<String, Digests>, Digests) {
    let text = std::fs::read(place.join("expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let part = |name: &str| expected[name].clone();
    (serde_json::from_value(part("backups")).unwrap(), serde_json::from_value(part("wal")).unwrap())
}

/// What a restore gave, without what it adds.
fn restored(to: &Path) -> Digests {
    let mut files = tree(to);
    files.remove("tablespace_map");
    files.remove("postgresql.auto.conf");
    digests(&files)
}

#[tokio::test(flavor = "multi_thread")]
async fn repositories_of_format_1_restore() {
    if let Some(place) = std::env::var_os("DR_WRITE_GOLDEN") {
        for (name, encrypted) in [("v1", true), ("v1-clear", false)] {
            let dir = Path::new(&place).join(name);
            std::fs::create_dir_all(&dir).unwrap();
            make(&dir, encrypted).await;
        }
    }
    let scratch = tempfile::tempdir().unwrap();
    for place in repositories(scratch.path()).await {
        let repo = open(&place).await;
        let (cluster, _) = cluster();
        let context = context(&repo, &cluster, Arc::<TickingClock>::default());
        let (backups, wal) = expected(&place);
        assert_eq!((backups.len(), context.store.heads().await.unwrap().len()), (2, 2));
        for (id, files) in backups {
            let manifest = context.store.manifest(id.parse().unwrap()).await.unwrap();
            let relations = dr_engine::catalogue::read(&context.store, &manifest).await.unwrap();
            assert_eq!(relations, [relation("tenant_1", "orders", 100)], "{id}");
            let to = place.join(&id);
            let options = dr_engine::restore::RestoreOptions {
                backup: Some(id.parse().unwrap()),
                tablespaces: vec![(SPACE.to_owned(), place.join(format!("{id}-space")))],
                ..restore_options(&to)
            };
            restore_to(&context, &options).await.unwrap();
            assert_eq!(restored(&to), files, "{id}");
        }
        for (name, digest) in wal {
            let name = WalName::parse(name.trim_end_matches(".partial"), SegmentSize::DEFAULT).unwrap();
            let mut content = Vec::new();
            context.store.wal(SegmentSize::DEFAULT).fetch(&name, &mut content).await.unwrap();
            assert_eq!(object_digest(&content).to_hex(), digest, "{name:?}");
        }
    }
}

/// The script, or why it cannot run.
struct Script(PathBuf);

impl Script {
    async fn find() -> Option<Self> {
        let asked = std::env::var("DR_TEST_PYTHON");
        let script = Script(asked.clone().unwrap_or_else(|_| "python3".into()).into());
        let ready = script.run(&["-c", "import cryptography, zstandard, blake3"]).await;
        if ready.is_ok() {
            return Some(script);
        }
        let must = asked.is_ok() || std::env::var_os("CI").is_some();
        assert!(!must, "{:?} lacks cryptography, zstandard or blake3", script.0);
        eprintln!("SKIPPED: no Python with cryptography, zstandard and blake3; `cargo xtask test` makes one");
        None
    }

    async fn run(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = tokio::process::Command::new(&self.0);
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        let output = tokio::time::timeout(Duration::from_secs(120), command.output()).await.unwrap();
        let output = output.map_err(|error| error.to_string())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    async fn on(&self, place: &Path, arguments: &[&str]) -> Result<String, String> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tools/restore.py");
        let (repo, key) = (place.join("repo").display().to_string(), place.join("dr.key"));
        let key = key.display().to_string();
        self.run(&[&[script, "--repo", &repo, "--key", &key], arguments].concat()).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_script_restores_every_repository_without_dr() {
    let Some(script) = Script::find().await else { return };
    let scratch = tempfile::tempdir().unwrap();
    for place in repositories(scratch.path()).await {
        let (backups, wal) = expected(&place);
        let list = script.on(&place, &["list"]).await.unwrap();
        for (id, files) in backups {
            assert!(list.contains(&id), "{list}");
            let at = |what: &str| place.join(format!("{id}{what}")).display().to_string();
            let (to, spaces, host) = (at(""), at("-spaces"), at("-host"));
            let options = ["--tablespaces", &spaces, "--host-files", &host];
            script.on(&place, &[&["restore", &id, &to], &options[..]].concat()).await.unwrap();
            let to = Path::new(&to);
            assert_eq!(restored(to), files, "{id}");
            assert_eq!(std::fs::metadata(to).unwrap().permissions().mode() & 0o777, 0o700);
            assert!(to.join("global/pg_control").exists() && to.join("backup_label").exists());
            let map = std::fs::read_to_string(to.join("tablespace_map")).unwrap();
            assert_eq!(map, format!("{SPACE} {spaces}/{SPACE}\n"));
            assert_eq!(std::fs::read(Path::new(&host).join("etc/sim/server.conf")).unwrap(), b"a = 1\n");
            let again = script.on(&place, &["restore", &id, &to.display().to_string()]).await.unwrap_err();
            assert!(again.contains("is not empty"), "{again}");
        }
        let to = place.join("wal");
        script.on(&place, &["wal", &SYSTEM.to_string(), &to.display().to_string()]).await.unwrap();
        assert_eq!(digests(&tree(&to)), wal);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_script_detects_damage() {
    let Some(script) = Script::find().await else { return };
    let scratch = tempfile::tempdir().unwrap();
    let sound = scratch.path().join("sound");
    std::fs::create_dir(&sound).unwrap();
    make(&sound, true).await;
    let newest = expected(&sound).0.pop_last().unwrap().0;
    let mut objects = BTreeMap::new();
    for (name, _) in tree(&sound.join("repo")) {
        let parts: Vec<&str> = name.split('/').collect();
        let kind = match parts[..] {
            ["cluster", _, "session", _, part] => part.to_owned(),
            ["cluster", _, part, ..] => part.to_owned(),
            _ => parts[0].to_owned(),
        };
        if !["begin", "job", "page", "identity.json"].contains(&kind.as_str()) {
            objects.insert(kind, name);
        }
    }
    assert_eq!(
        objects.keys().map(String::as_str).collect::<Vec<_>>(),
        ["dek-1", "history", "key", "manifest", "meta", "pack", "packs", "repo.json", "wal"]
    );
    for (kind, name) in objects {
        let place = scratch.path().join(&kind);
        copy(&sound, &place);
        let object = place.join("repo").join(name);
        let mut bytes = std::fs::read(&object).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        std::fs::write(&object, bytes).unwrap();
        let (to, wal) = (place.join("to").display().to_string(), place.join("wal").display().to_string());
        let first = script.on(&place, &["restore", &newest, &to]).await;
        let second = script.on(&place, &["wal", &SYSTEM.to_string(), &wal]).await;
        let error = first.and(second).expect_err(&kind);
        assert!(!error.contains("Traceback"), "{kind}: {error}");
    }
}
