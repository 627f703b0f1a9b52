//! One cluster's part of a repository: its catalogue, rebuilt from listings alone.

use std::collections::BTreeMap;

use dr_core::guard::Guard;
use dr_core::port::{ObjectInfo, StorageError};
use dr_core::{BackupId, SegmentSize, SystemId, Timestamp};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};

use super::{FrameReader, Repository, SessionWriter, WalStore};
use crate::error::RepoError;
use crate::format::{
    MAX_DOCUMENT_HEAD, Manifest, ManifestBody, ManifestHead, PackList, Point, SealedDocument, SessionBegin,
};
use crate::journal::Journal;

/// Manifest heads read at the same time.
const HEADS_AT_ONCE: usize = 16;

/// What a cluster is, in clear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterIdentity {
    /// Its identity.
    pub system_id: SystemId,
    /// What people call it.
    pub label: String,
    /// When it was registered.
    pub first_seen: Timestamp,
    /// `server_version_num` when it was registered.
    pub version_num: u32,
    /// Bytes in a page.
    pub page_size: u32,
    /// Bytes in a WAL segment.
    pub segment_size: SegmentSize,
    /// Pages in a relation's segment file.
    pub relation_segment_pages: u32,
}

/// A session that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SessionInfo {
    /// Its identity.
    pub id: BackupId,
    /// Whether its backup is committed.
    pub committed: bool,
    /// The number of its last point.
    pub last_point: Option<u32>,
}

/// The backups of a cluster, as far as their manifests can be read.
#[derive(Debug, Default)]
pub struct Catalogue {
    /// Heads, ordered by timeline, start LSN and time.
    pub heads: Vec<ManifestHead>,
    /// Manifests that are there and cannot be read, and why. None of them hides another backup.
    pub unreadable: Vec<(BackupId, RepoError)>,
}

/// One cluster's part of a repository. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct ClusterStore {
    pub(super) repo: Repository,
    pub(super) system_id: SystemId,
}

impl ClusterStore {
    pub(super) fn new(repo: Repository, system_id: SystemId) -> Self {
        ClusterStore { repo, system_id }
    }

    /// The repository that it is in.
    pub fn repository(&self) -> &Repository {
        &self.repo
    }

    /// The cluster.
    pub fn system_id(&self) -> SystemId {
        self.system_id
    }

    pub(super) fn name(&self, rest: &str) -> String {
        format!("cluster/{}/{rest}", self.system_id)
    }

    /// What the cluster was registered as.
    pub async fn identity(&self) -> Result<Option<ClusterIdentity>, RepoError> {
        let bytes = match self.repo.get(&self.name("identity.json")).await {
            Err(RepoError::Storage { source: StorageError::NotFound { .. } }) => return Ok(None),
            other => other?,
        };
        let identity: ClusterIdentity = serde_json::from_slice(&bytes).map_err(|error| {
            RepoError::Malformed { what: self.name("identity.json"), reason: error.to_string() }
        })?;
        if identity.system_id != self.system_id && Guard::ClusterOfObject.holds() {
            return Err(RepoError::OtherOwner {
                what: self.name("identity.json"),
                found: format!("cluster {}", identity.system_id),
                expected: format!("cluster {}", self.system_id),
            });
        }
        Ok(Some(identity))
    }

    /// Registers the cluster, or checks that it is the one registered.
    pub async fn register(&self, identity: &ClusterIdentity) -> Result<(), RepoError> {
        if let Some(known) = self.identity().await? {
            return self.compare(&known, identity);
        }
        let bytes = serde_json::to_vec_pretty(identity).unwrap_or_default();
        match self.repo.create(&self.name("identity.json"), bytes.into()).await {
            Err(RepoError::Storage { source: StorageError::AlreadyExists { .. } }) => {
                match self.identity().await? {
                    Some(known) => self.compare(&known, identity),
                    None => Err(RepoError::Bug { what: "an identity came and went".into() }),
                }
            }
            other => other,
        }
    }

    fn compare(&self, known: &ClusterIdentity, now: &ClusterIdentity) -> Result<(), RepoError> {
        let same = (known.page_size, known.segment_size, known.relation_segment_pages)
            == (now.page_size, now.segment_size, now.relation_segment_pages);
        if same {
            return Ok(());
        }
        let difference = "page size, WAL segment size or relation segment size".to_owned();
        Err(RepoError::OtherCluster { system_id: self.system_id, difference })
    }

    /// The heads of all backups; an error when one cannot be read. See [`catalogue`](Self::catalogue).
    pub async fn heads(&self) -> Result<Vec<ManifestHead>, RepoError> {
        let Catalogue { heads, unreadable } = self.catalogue().await?;
        unreadable.into_iter().next().map_or(Ok(heads), |(_, error)| Err(error))
    }

    /// All backups, by the heads of their manifests. A damaged one is told and hides no other: the
    /// day on which one is damaged may be the day on which another is needed.
    ///
    /// Heads are in clear, so this needs no key; [`manifest`](Self::manifest) verifies.
    pub async fn catalogue(&self) -> Result<Catalogue, RepoError> {
        let listed = self.repo.list(&self.name("manifest/")).await?;
        let named = listed.into_iter().filter_map(|object| {
            let id = object.key.as_str().rsplit('/').next()?.parse::<BackupId>().ok()?;
            Some((id, object))
        });
        let read =
            futures_util::stream::iter(named).map(async |(id, object)| (id, self.head(id, object).await));
        let read: Vec<_> = read.buffered(HEADS_AT_ONCE).collect().await;
        let mut catalogue = Catalogue::default();
        for (id, head) in read {
            match head {
                Ok(head) => catalogue.heads.push(head),
                // The storage did not answer: nothing is known of this one.
                Err(error @ RepoError::Storage { .. }) => return Err(error),
                Err(error) => catalogue.unreadable.push((id, error)),
            }
        }
        catalogue.heads.sort_by_key(|head| (head.start.timeline, head.start.lsn, head.id.time()));
        Ok(catalogue)
    }

    /// Reads the clear head at the start of a manifest.
    async fn head(&self, id: BackupId, object: ObjectInfo) -> Result<ManifestHead, RepoError> {
        let range = 0..object.size.min(MAX_DOCUMENT_HEAD);
        let read = self.repo.target().get(&object.key, Some(range)).await;
        let bytes = read.map_err(RepoError::from_storage)?;
        self.parse_head(id, self.document(1, id, 0).head(&bytes)?)
    }

    fn parse_head(&self, id: BackupId, bytes: &[u8]) -> Result<ManifestHead, RepoError> {
        let head: ManifestHead = serde_json::from_slice(bytes).map_err(|error| RepoError::Malformed {
            what: format!("the head of backup {id}"),
            reason: error.to_string(),
        })?;
        if head.id != id && Guard::ClusterOfObject.holds() {
            return Err(RepoError::OtherOwner {
                what: format!("the manifest of backup {id}"),
                found: format!("backup {}", head.id),
                expected: format!("backup {id}"),
            });
        }
        Ok(head)
    }

    /// A whole manifest, its seal and identity verified. Needs the host key.
    pub async fn manifest(&self, id: BackupId) -> Result<Manifest, RepoError> {
        let bytes = match self.repo.get(&self.name(&format!("manifest/{id}"))).await {
            Err(RepoError::Storage { source: StorageError::NotFound { .. } }) => {
                return Err(RepoError::NoBackup { id });
            }
            other => other?,
        };
        let key = self.repo.metadata_key("reading a manifest")?;
        let (head, body) = self.document(1, id, 0).open(key, &bytes)?;
        let head = self.parse_head(id, head)?;
        let body: ManifestBody = parse(&body, || format!("the manifest of backup {id}"))?;
        Ok(Manifest { head, body })
    }

    /// The sessions that were begun, committed or not.
    pub async fn sessions(&self) -> Result<Vec<SessionInfo>, RepoError> {
        let committed: Vec<String> = self
            .repo
            .list(&self.name("manifest/"))
            .await?
            .iter()
            .filter_map(|o| o.key.as_str().rsplit('/').next().map(str::to_owned))
            .collect();
        let prefix = self.name("session/");
        let mut sessions: BTreeMap<BackupId, SessionInfo> = BTreeMap::new();
        for object in self.repo.list(&prefix).await? {
            let mut parts = object.key.as_str()[prefix.len()..].split('/');
            let (Some(Ok(id)), Some(part)) = (parts.next().map(str::parse::<BackupId>), parts.next()) else {
                continue;
            };
            let committed = committed.contains(&id.to_string());
            let info = sessions.entry(id).or_insert(SessionInfo { id, committed, last_point: None });
            if let Some(number) = part.strip_prefix("point-").and_then(|n| n.parse().ok()) {
                info.last_point = info.last_point.max(Some(number));
            }
        }
        Ok(sessions.into_values().collect())
    }

    /// The last point of a session, verified.
    pub async fn point(&self, id: BackupId) -> Result<Option<Point>, RepoError> {
        let sessions = self.sessions().await?;
        let Some(number) = sessions.iter().find(|s| s.id == id).and_then(|s| s.last_point) else {
            return Ok(None);
        };
        let bytes = self.repo.get(&self.point_name(id, number)).await?;
        let key = self.repo.metadata_key("reading how far a backup came")?;
        let (_, body) = self.document(3, id, number).open(key, &bytes)?;
        parse(&body, || format!("a point of backup {id}")).map(Some)
    }

    pub(super) fn point_name(&self, id: BackupId, number: u32) -> String {
        self.name(&format!("session/{id}/point-{number:04}"))
    }

    /// The packs of a session: of the whole list, or of its last point while it is not committed.
    pub(super) async fn packs(&self, id: BackupId) -> Result<PackList, RepoError> {
        match self.repo.get(&self.name(&format!("session/{id}/packs"))).await {
            Ok(bytes) => {
                let key = self.repo.metadata_key("reading a list of packs")?;
                let (_, body) = self.document(2, id, 0).open(key, &bytes)?;
                parse(&body, || format!("the list of packs of backup {id}"))
            }
            Err(RepoError::Storage { source: StorageError::NotFound { .. } }) => {
                match self.point(id).await? {
                    Some(point) => Ok(PackList { packs: point.packs }),
                    None => Err(RepoError::damaged(format!("backup {id}"), "its list of packs is missing")),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// The digest of the object that lists a session's packs, as it is stored now.
    pub async fn list_digest(&self, id: BackupId) -> Result<crate::format::Digest, RepoError> {
        let bytes = self.repo.get(&self.name(&format!("session/{id}/packs"))).await?;
        Ok(crate::object_digest(&bytes))
    }

    pub(super) fn document(&self, kind: u8, session: BackupId, number: u32) -> SealedDocument {
        SealedDocument {
            kind,
            suite: self.repo.descriptor().suite.code(),
            repository: self.repo.id(),
            system_id: self.system_id,
            session,
            number,
        }
    }

    /// Begins a session: its first objects are put before anything is read from the cluster.
    pub async fn begin_session(&self, id: BackupId, begin: SessionBegin) -> Result<SessionWriter, RepoError> {
        SessionWriter::begin(self.clone(), id, begin).await
    }

    /// Reads frames of this cluster.
    pub async fn reader(&self) -> Result<FrameReader, RepoError> {
        Ok(FrameReader::new(self.clone()))
    }

    /// The cluster's WAL.
    pub fn wal(&self, size: SegmentSize) -> WalStore {
        WalStore::new(self.clone(), size)
    }

    /// The cluster's job records.
    pub fn journal(&self) -> Journal {
        Journal::new(self.repo.target().clone(), self.name("job/"))
    }
}

pub(super) fn parse<T: serde::de::DeserializeOwned>(
    bytes: &[u8],
    what: impl FnOnce() -> String,
) -> Result<T, RepoError> {
    serde_json::from_slice(bytes)
        .map_err(|error| RepoError::Malformed { what: what(), reason: error.to_string() })
}
