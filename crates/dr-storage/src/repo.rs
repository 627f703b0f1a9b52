//! A repository: its descriptor, its keys, its clusters.

mod cluster;
mod frames;
mod session;
mod wal;

pub use cluster::{Catalogue, ClusterIdentity, ClusterStore, SessionInfo};
pub use frames::{FrameOpener, FrameReader, SessionView};
pub use session::{PackWriter, SessionWriter};
pub use wal::{Fetched, Stored, StoredSegment, WalEncoder, WalObject, WalStore};

use std::sync::Arc;

use bytes::Bytes;
use dr_core::port::{Key, KeyProvider, Payload, RelationEntry, StorageError, StorageTarget};
use dr_core::{SystemId, Timestamp};
use futures_util::TryStreamExt;

use crate::crypto::{Secret, key_pair, random};
use crate::error::RepoError;
use crate::format::{Descriptor, Digest, FORMAT_MAJOR, Suite};
use crate::keys::{HostKey, KeyBundle};

/// One in this many paths ends a part of the file table.
const SHARD_BORDER: u64 = 4096;

/// One row of the relation catalogue in so many ends a part of it, of about 100 KiB.
const CATALOGUE_BORDER: u64 = 512;

/// How a new repository is made.
#[derive(Clone, Copy, Debug)]
pub struct InitSpec {
    /// Whether content is sealed.
    pub encrypted: bool,
    /// zstd level of new frames.
    pub compression_level: i32,
    /// When, for people.
    pub created: Timestamp,
}

/// Which key opens the repository.
#[derive(Clone, Debug)]
pub enum Access {
    /// None: heads can be listed.
    ListOnly,
    /// The host's: backups can be written, not read.
    Host(HostKey),
    /// A key that opens a slot: everything.
    Key(Arc<dyn KeyProvider>),
}

/// The keys at hand.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys {
    pub private: Option<Secret>,
    pub metadata: Option<Secret>,
    pub digest: Option<[u8; 32]>,
}

#[derive(Debug)]
struct Inner {
    target: Arc<dyn StorageTarget>,
    descriptor: Descriptor,
    id: [u8; 16],
    keys: Keys,
}

/// An open repository. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Repository {
    inner: Arc<Inner>,
}

impl Repository {
    /// Makes a repository: key slots first, the descriptor last and create-only.
    ///
    /// A crash before the descriptor leaves key slots that no descriptor names; a new `init` is
    /// not hindered by them.
    pub async fn init(
        target: Arc<dyn StorageTarget>,
        spec: InitSpec,
        providers: &[Arc<dyn KeyProvider>],
    ) -> Result<(Repository, HostKey), RepoError> {
        match target.get(&key("repo.json")?, None).await {
            Err(StorageError::NotFound { .. }) => {}
            Ok(_) => return Err(RepoError::RepositoryExists { location: target.location() }),
            Err(error) => return Err(RepoError::from_storage(error)),
        }
        let (private, public) = key_pair();
        let zero = Secret([0; 32]);
        let bundle = if spec.encrypted {
            KeyBundle { private, metadata: Secret(random()), digest: Secret(random()) }
        } else {
            KeyBundle { private: zero.clone(), metadata: zero.clone(), digest: zero }
        };
        let id: [u8; 16] = random();
        let mut descriptor = Descriptor {
            format: FORMAT_MAJOR,
            features_required: Vec::new(),
            id: hex::encode(id),
            extent: crate::format::EXTENT_LEN as u64,
            suite: if spec.encrypted { Suite::Aes256Gcm } else { Suite::None },
            compression_level: spec.compression_level,
            key_epoch: 1,
            public_key: if spec.encrypted { hex::encode(public) } else { String::new() },
            created: spec.created,
            check: String::new(),
        };
        if spec.encrypted {
            descriptor.check = descriptor.keyed_check(&bundle.digest.0)?;
        }
        let keys = keys_of(&descriptor, bundle.clone());
        let repo = Repository { inner: Arc::new(Inner { target, descriptor, id, keys }) };
        if spec.encrypted {
            if providers.is_empty() {
                return Err(RepoError::absent("init", "at least one key to wrap the repository's keys"));
            }
            for provider in providers {
                repo.put_slot(provider.as_ref(), &bundle).await?;
            }
        }
        let text = serde_json::to_vec_pretty(repo.descriptor()).unwrap_or_default();
        match repo.create("repo.json", text.into()).await {
            Err(RepoError::Storage { source: StorageError::AlreadyExists { .. } }) => {
                return Err(RepoError::RepositoryExists { location: repo.target().location() });
            }
            other => other?,
        }
        let host = HostKey { repository: id, metadata: bundle.metadata, digest: bundle.digest };
        Ok((repo, host))
    }

    /// Opens a repository with the keys that `access` gives.
    pub async fn open(target: Arc<dyn StorageTarget>, access: Access) -> Result<Repository, RepoError> {
        let text = match target.get(&key("repo.json")?, None).await {
            Err(StorageError::NotFound { .. }) => {
                return Err(RepoError::NoRepository { location: target.location() });
            }
            other => other.map_err(RepoError::from_storage)?,
        };
        let descriptor = Descriptor::parse(&text)?;
        let id = descriptor.id_bytes()?;
        let keys = match &access {
            Access::ListOnly if descriptor.is_encrypted() => Keys::default(),
            Access::ListOnly => Keys { digest: Some([0; 32]), ..Keys::default() },
            Access::Host(host) if host.repository != id => {
                return Err(RepoError::OtherOwner {
                    what: "the host key".into(),
                    found: format!("repository {}", hex::encode(host.repository)),
                    expected: format!("repository {}", descriptor.id),
                });
            }
            Access::Host(host) => {
                descriptor.verify(&host.digest.0)?;
                let metadata = descriptor.is_encrypted().then(|| host.metadata.clone());
                Keys { private: None, metadata, digest: Some(host.digest.0) }
            }
            Access::Key(_) if !descriptor.is_encrypted() => return Err(descriptor.not_ours()),
            Access::Key(provider) => {
                let bundle = open_slot(target.as_ref(), descriptor.key_epoch, provider.as_ref()).await?;
                descriptor.verify(&bundle.digest.0)?;
                keys_of(&descriptor, bundle)
            }
        };
        Ok(Repository { inner: Arc::new(Inner { target, descriptor, id, keys }) })
    }

    /// Where the repository is kept.
    pub fn target(&self) -> &Arc<dyn StorageTarget> {
        &self.inner.target
    }

    /// What the repository is.
    pub fn descriptor(&self) -> &Descriptor {
        &self.inner.descriptor
    }

    /// Whether stored content can be opened with the keys at hand.
    pub fn can_read_data(&self) -> bool {
        !self.descriptor().is_encrypted() || self.inner.keys.private.is_some()
    }

    /// Whether backups can be written and metadata read.
    pub fn can_write(&self) -> bool {
        self.inner.keys.digest.is_some()
    }

    /// The host key of this repository.
    pub fn host_key(&self) -> Result<HostKey, RepoError> {
        let digest = Secret(self.digest_key("making a host key")?);
        let metadata = self.inner.keys.metadata.clone().unwrap_or(Secret([0; 32]));
        Ok(HostKey { repository: self.inner.id, metadata, digest })
    }

    /// Wraps the repository's keys for one more provider; answers the slot's name.
    pub async fn add_key(&self, provider: &dyn KeyProvider) -> Result<String, RepoError> {
        let needs = || RepoError::absent("adding a key", "a key that opens the repository");
        let keys = &self.inner.keys;
        let (Some(private), Some(metadata), Some(digest)) = (&keys.private, &keys.metadata, keys.digest)
        else {
            return Err(needs());
        };
        let bundle =
            KeyBundle { private: private.clone(), metadata: metadata.clone(), digest: Secret(digest) };
        self.put_slot(provider, &bundle).await
    }

    async fn put_slot(&self, provider: &dyn KeyProvider, bundle: &KeyBundle) -> Result<String, RepoError> {
        let wrapped = provider.wrap(&bundle.to_bytes()).await.map_err(RepoError::from_key)?;
        // Wrapping anew gives other bytes, so a slot's name ends at random.
        let name =
            format!("key/{}/{}-{:08x}", self.descriptor().key_epoch, provider.id(), crate::random_u32());
        self.create(&name, wrapped.into()).await?;
        Ok(name)
    }

    /// The clusters that the repository knows.
    pub async fn clusters(&self) -> Result<Vec<ClusterIdentity>, RepoError> {
        let names = self.target().list_parts("cluster/").await.map_err(RepoError::from_storage)?;
        let mut clusters = Vec::new();
        for name in names {
            if let Ok(system_id) = name.parse::<SystemId>()
                && let Some(identity) = self.cluster(system_id).identity().await?
            {
                clusters.push(identity);
            }
        }
        Ok(clusters)
    }

    /// The part of one cluster.
    pub fn cluster(&self, system_id: SystemId) -> ClusterStore {
        ClusterStore::new(self.clone(), system_id)
    }

    /// The keyed digest of content.
    pub fn digest(&self, raw: &[u8]) -> Digest {
        cut(&blake3::keyed_hash(&self.inner.keys.digest.unwrap_or_default(), raw))
    }

    /// The keyed digest of content, and a fingerprint of each of its pages in `prints`.
    ///
    /// One pass gives both: pages are subtrees of the digest's tree, and a fingerprint is the
    /// first 8 bytes of a subtree's chaining value (BLAKE3, `hazmat`).
    pub fn digest_with_prints(&self, raw: &[u8], page: usize, prints: &mut Vec<u64>) -> Digest {
        let key = self.inner.keys.digest.unwrap_or_default();
        prints.clear();
        if raw.len() <= page || !raw.len().is_multiple_of(page) || !page.is_power_of_two() || page < 1024 {
            let print = |chunk: &[u8]| first8(blake3::keyed_hash(&key, chunk).as_bytes());
            prints.extend(raw.chunks(page.max(1)).map(print));
            return cut(&blake3::keyed_hash(&key, raw));
        }
        tree_digest(&key, raw, page, prints)
    }

    /// Whether a part of the file table ends with this path. It depends on the path alone, so that
    /// a new file moves no border.
    pub fn ends_shard(&self, path: &str) -> bool {
        self.is_border(path, SHARD_BORDER)
    }

    /// Whether a part of the relation catalogue ends with this row. It depends on the names alone,
    /// so that a new or a rewritten relation moves no border.
    pub fn ends_catalogue_part(&self, row: &RelationEntry) -> bool {
        self.is_border(&format!("{}\0{}\0{}", row.database, row.schema, row.name), CATALOGUE_BORDER)
    }

    fn is_border(&self, name: &str, every: u64) -> bool {
        first8(&self.digest(name.as_bytes()).0).is_multiple_of(every)
    }

    pub(crate) fn id(&self) -> [u8; 16] {
        self.inner.id
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.inner.keys
    }

    pub(crate) fn digest_key(&self, operation: &'static str) -> Result<[u8; 32], RepoError> {
        self.inner.keys.digest.ok_or_else(|| RepoError::absent(operation, "the repository's key or host key"))
    }

    /// The metadata key; `None` inside without encryption.
    pub(crate) fn metadata_key(&self, operation: &'static str) -> Result<Option<&Secret>, RepoError> {
        match (&self.inner.keys.metadata, self.descriptor().is_encrypted()) {
            (_, false) => Ok(None),
            (Some(key), true) => Ok(Some(key)),
            (None, true) => Err(RepoError::absent(operation, "the repository's key or host key")),
        }
    }

    pub(crate) async fn create(&self, name: &str, payload: Payload) -> Result<(), RepoError> {
        self.target().create(&key(name)?, payload).await.map_err(RepoError::from_storage)
    }

    pub(crate) async fn get(&self, name: &str) -> Result<Bytes, RepoError> {
        self.target().get(&key(name)?, None).await.map_err(RepoError::from_storage)
    }

    pub(crate) async fn list(&self, prefix: &str) -> Result<Vec<dr_core::port::ObjectInfo>, RepoError> {
        self.target().list(prefix, None).try_collect().await.map_err(RepoError::from_storage)
    }
}

/// A name made by this crate is always a key; anything else is a defect.
pub(crate) fn key(name: &str) -> Result<Key, RepoError> {
    Key::new(name).map_err(|error| RepoError::Bug { what: error.to_string() })
}

fn keys_of(descriptor: &Descriptor, bundle: KeyBundle) -> Keys {
    let sealed = descriptor.is_encrypted();
    Keys {
        private: sealed.then_some(bundle.private),
        metadata: sealed.then_some(bundle.metadata),
        digest: Some(if sealed { bundle.digest.0 } else { [0; 32] }),
    }
}

/// Tries the key on every slot of its kind.
async fn open_slot(
    target: &dyn StorageTarget,
    epoch: u32,
    provider: &dyn KeyProvider,
) -> Result<KeyBundle, RepoError> {
    let prefix = format!("key/{epoch}/");
    let slots: Vec<_> = target.list(&prefix, None).try_collect().await.map_err(RepoError::from_storage)?;
    let own = format!("{prefix}{}-", provider.id());
    let mut failure = dr_core::port::KeyError::WrongKey { provider: provider.id() };
    for slot in slots.iter().filter(|slot| slot.key.as_str().starts_with(&own)) {
        let wrapped = target.get(&slot.key, None).await.map_err(RepoError::from_storage)?;
        match provider.unwrap(&wrapped).await {
            Ok(bytes) => {
                let damaged =
                    || RepoError::damaged(slot.key.as_str(), "it does not hold the repository's keys");
                return KeyBundle::parse(&bytes).ok_or_else(damaged);
            }
            Err(error) => failure = error,
        }
    }
    Err(RepoError::from_key(failure))
}

fn tree_digest(key: &[u8; 32], raw: &[u8], page: usize, prints: &mut Vec<u64>) -> Digest {
    use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
    let mode = Mode::KeyedHash(key);
    let mut values: Vec<ChainingValue> = Vec::with_capacity(raw.len() / page);
    for (index, chunk) in raw.chunks_exact(page).enumerate() {
        let mut hasher = blake3::Hasher::new_keyed(key);
        hasher.set_input_offset((index * page) as u64);
        let value = hasher.update(chunk).finalize_non_root();
        prints.push(first8(&value));
        values.push(value);
    }
    fn left_len(len: usize) -> usize {
        // The left subtree is the largest power of two that is less than the whole.
        len.next_power_of_two() / 2
    }
    fn merge(values: &[ChainingValue], mode: Mode<'_>) -> ChainingValue {
        match values {
            [one] => *one,
            _ => {
                let (left, right) = values.split_at(left_len(values.len()));
                merge_subtrees_non_root(&merge(left, mode), &merge(right, mode), mode)
            }
        }
    }
    let (left, right) = values.split_at(left_len(values.len()));
    cut(&merge_subtrees_root(&merge(left, mode), &merge(right, mode), mode))
}

fn first8(bytes: &[u8]) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(out)
}

pub(crate) fn cut(hash: &blake3::Hash) -> Digest {
    let mut out = [0; 16];
    out.copy_from_slice(&hash.as_bytes()[..16]);
    Digest(out)
}
