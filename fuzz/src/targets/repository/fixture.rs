//! Repositories in memory, from those of a released format.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use dr_core::port::Key;
use dr_core::{SystemId, Timestamp};
use dr_storage::format::{FrameRef, Manifest, PackInfo, PackKind, PackList};
use dr_storage::keys::FileKey;
use dr_storage::target::MemoryTarget;
use dr_storage::{Access, ClusterStore, InitSpec, Repository};
use tokio::runtime::Runtime;

/// The cluster of the golden repositories.
const SYSTEM: SystemId = SystemId(7_000_000_000_000_000_009);

/// A repository's objects, and what opens it.
pub(super) struct Fixture {
    pub objects: BTreeMap<Key, Bytes>,
    access: Access,
    runtime: Runtime,
    system_id: SystemId,
    repository: Repository,
    target: Arc<MemoryTarget>,
}

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).enable_time().build().expect("a runtime")
}

fn load(root: &Path, folder: &Path, objects: &mut BTreeMap<Key, Bytes>) {
    for entry in std::fs::read_dir(folder).expect("a golden repository") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            load(root, &path, objects);
        } else {
            let name = path.strip_prefix(root).ok().and_then(Path::to_str).expect("a name");
            let content = std::fs::read(&path).expect("an object");
            objects.insert(Key::new(name).expect("a key"), content.into());
        }
    }
}

impl Fixture {
    /// A repository of the engine's golden tests.
    pub fn golden(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let folder = folder.join("../crates/dr-engine/tests/golden").join(name);
        let key = folder.join("dr.key");
        let access = match key.exists() {
            true => Access::Key(Arc::new(FileKey::read(&key).expect("a golden key"))),
            false => Access::ListOnly,
        };
        let mut objects = BTreeMap::new();
        load(&folder.join("repo"), &folder.join("repo"), &mut objects);
        Self::of(objects, access, SYSTEM)
    }

    /// A repository in clear, with nothing in it.
    pub fn empty() -> Self {
        let runtime = runtime();
        let target = Arc::new(MemoryTarget::new());
        let spec = InitSpec { encrypted: false, compression_level: 1, created: Timestamp::UNIX_EPOCH };
        runtime.block_on(Repository::init(target.clone(), spec, &[])).expect("a repository");
        Self::of(target.snapshot(), Access::ListOnly, SystemId(7))
    }

    fn of(objects: BTreeMap<Key, Bytes>, access: Access, system_id: SystemId) -> Self {
        let runtime = runtime();
        let target = Arc::new(MemoryTarget::from_snapshot(objects.clone()));
        let repository = runtime.block_on(Repository::open(target.clone(), access.clone()));
        let repository = repository.expect("a sound repository");
        Fixture { objects, access, runtime, system_id, repository, target }
    }

    /// The same with what was stored since.
    pub fn settled(self) -> Self {
        Self::of(self.target.snapshot(), self.access, self.system_id)
    }

    pub fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    pub fn store(&self, system_id: SystemId) -> ClusterStore {
        self.repository.cluster(system_id)
    }

    /// The repository with one object replaced, not opened.
    pub fn target_with(&self, key: &Key, bytes: &[u8]) -> Arc<MemoryTarget> {
        let mut objects = self.objects.clone();
        objects.insert(key.clone(), Bytes::copy_from_slice(bytes));
        Arc::new(MemoryTarget::from_snapshot(objects))
    }

    /// The cluster's part of the repository with one object replaced.
    pub fn with(&self, key: &Key, bytes: &[u8]) -> ClusterStore {
        let opened = self.run(Repository::open(self.target_with(key, bytes), self.access.clone()));
        opened.expect("the descriptor is sound").cluster(self.system_id)
    }

    /// Opens the repository in a target.
    pub fn open(&self, target: Arc<MemoryTarget>) -> Result<Repository, dr_storage::RepoError> {
        self.run(Repository::open(target, self.access.clone()))
    }

    /// Whose repository it is.
    pub fn system_id(&self) -> SystemId {
        self.system_id
    }

    /// The key of an object of the cluster.
    pub fn key_of(&self, rest: &str) -> Key {
        Key::new(format!("cluster/{}/{rest}", self.system_id)).expect("a key")
    }

    /// What an object is, as its name tells.
    pub fn kind_of(key: &Key) -> &str {
        let parts: Vec<&str> = key.as_str().split('/').collect();
        match parts[..] {
            ["cluster", _, "session", _, part] => part,
            ["cluster", _, part, ..] => part,
            _ => parts[0],
        }
    }

    /// All objects of a kind.
    pub fn kind(&self, kind: &str) -> Vec<Vec<u8>> {
        let of = |(key, _): &(&Key, &Bytes)| Self::kind_of(key) == kind;
        self.objects.iter().filter(of).map(|(_, bytes)| bytes.to_vec()).collect()
    }

    pub fn manifests(&self) -> Vec<Manifest> {
        let store = self.store(self.system_id);
        self.run(async {
            let mut all = Vec::new();
            for head in store.heads().await.expect("golden heads") {
                all.push(store.manifest(head.id).await.expect("a golden manifest"));
            }
            all
        })
    }

    /// The packs of each backup's session.
    pub fn pack_lists(&self) -> Vec<PackList> {
        let store = self.store(self.system_id);
        let packs = |manifest: Manifest| {
            let view = self.run(async { store.reader().await?.session(manifest.head.id).await });
            let mut packs: Vec<PackInfo> = view.expect("a session").packs().copied().collect();
            packs.sort_by_key(|pack| (pack.kind, pack.seq));
            PackList { packs }
        };
        self.manifests().into_iter().map(packs).collect()
    }

    pub fn frame(&self, kind: PackKind, frame: &FrameRef) -> Vec<u8> {
        let store = self.store(self.system_id);
        self.run(async { store.reader().await?.frame(kind, frame).await }).expect("a golden frame")
    }

    /// The parts of all file tables, opened.
    pub fn shards(&self) -> Vec<Vec<u8>> {
        let of = |manifest: &Manifest| manifest.body.shards.clone();
        let all = self.manifests();
        all.iter().flat_map(of).map(|shard| self.frame(PackKind::Meta, &shard.frame)).collect()
    }

    /// The pack that a frame lies in.
    pub fn pack_of(&self, kind: PackKind, frame: &FrameRef) -> Key {
        let lists = self.pack_lists();
        let manifests = self.manifests();
        let of = manifests.iter().position(|manifest| manifest.head.id == frame.session).expect("a session");
        let pack = lists[of].packs.iter().find(|pack| (pack.kind, pack.seq) == (kind, frame.seq));
        self.key_of(&pack.expect("a pack").name(frame.session))
    }
}
