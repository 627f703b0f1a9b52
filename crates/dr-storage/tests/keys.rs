//! Who may read and write what, and what the storage cannot change.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;

use dr_core::port::{Key, KeyProvider};
use dr_core::{Classified, ErrorClass, SystemId, Timestamp};
use dr_storage::keys::FileKey;
use dr_storage::target::MemoryTarget;
use dr_storage::{Access, InitSpec, Repository};

struct Made {
    target: Arc<MemoryTarget>,
    key: Arc<dyn KeyProvider>,
    host: dr_storage::keys::HostKey,
}

async fn made(encrypted: bool) -> Made {
    let target = Arc::new(MemoryTarget::new());
    let key: Arc<dyn KeyProvider> = Arc::new(FileKey::generate());
    let spec = InitSpec { encrypted, compression_level: 1, created: Timestamp::UNIX_EPOCH };
    let (_, host) = Repository::init(target.clone(), spec, std::slice::from_ref(&key)).await.unwrap();
    Made { target, key, host }
}

impl Made {
    async fn open(&self, access: Access) -> Result<Repository, dr_storage::RepoError> {
        Repository::open(self.target.clone(), access).await
    }

    fn descriptor(&self) -> serde_json::Value {
        serde_json::from_slice(&self.target.snapshot()[&Key::new("repo.json").unwrap()]).unwrap()
    }

    fn replace_descriptor(&self, descriptor: &serde_json::Value) {
        let bytes = serde_json::to_vec(descriptor).unwrap();
        self.target.tamper(&Key::new("repo.json").unwrap(), |content| *content = bytes);
    }
}

#[tokio::test]
async fn a_repository_opens_with_its_keys_and_no_other() {
    let own = made(true).await;
    assert!(own.open(Access::Key(own.key.clone())).await.unwrap().can_read_data());
    let host = own.open(Access::Host(own.host.clone())).await.unwrap();
    assert!(host.can_write() && !host.can_read_data());
    let listing = own.open(Access::ListOnly).await.unwrap();
    assert!(!listing.can_write() && listing.clusters().await.unwrap().is_empty());
    let other = made(true).await;
    let error = own.open(Access::Key(other.key.clone())).await.map(drop).unwrap_err();
    assert_eq!((error.code(), error.class()), ("key-wrong", ErrorClass::Denied));
    let error = own.open(Access::Host(other.host.clone())).await.map(drop).unwrap_err();
    assert_eq!(error.code(), "repo-other-owner");
}

/// Without this, the next backup would be sealed to the key of who controls the storage.
#[tokio::test]
async fn a_public_key_that_the_storage_put_there_is_refused() {
    let (own, other) = (made(true).await, made(true).await);
    let mut descriptor = own.descriptor();
    descriptor["public_key"] = other.descriptor()["public_key"].clone();
    own.replace_descriptor(&descriptor);
    for access in [Access::Key(own.key.clone()), Access::Host(own.host.clone())] {
        assert_eq!(own.open(access).await.map(drop).unwrap_err().code(), "repo-damaged");
    }
}

/// Without this, the next backup would lie there in clear.
#[tokio::test]
async fn a_repository_that_says_that_nothing_is_sealed_is_refused_where_a_key_is_configured() {
    let own = made(true).await;
    let mut descriptor = own.descriptor();
    descriptor["suite"] = "none".into();
    descriptor["public_key"] = "".into();
    descriptor.as_object_mut().unwrap().remove("check");
    own.replace_descriptor(&descriptor);
    for access in [Access::Key(own.key.clone()), Access::Host(own.host.clone())] {
        assert_eq!(own.open(access).await.map(drop).unwrap_err().code(), "repo-damaged");
    }
}

#[tokio::test]
async fn each_field_of_the_descriptor_is_covered_by_its_digest() {
    let own = made(true).await;
    let sound = own.descriptor();
    for (field, value) in [
        ("id", serde_json::json!("00".repeat(16))),
        ("key_epoch", serde_json::json!(2)),
        ("compression_level", serde_json::json!(19)),
        ("created", serde_json::json!("2030-01-01T00:00:00Z")),
        ("check", serde_json::json!("")),
        ("extent", serde_json::json!(1 << 20)),
    ] {
        let mut changed = sound.clone();
        changed[field] = value;
        own.replace_descriptor(&changed);
        assert!(own.open(Access::Host(own.host.clone())).await.is_err(), "a changed {field} was taken");
    }
    own.replace_descriptor(&sound);
    own.open(Access::Host(own.host.clone())).await.unwrap();
}

#[tokio::test]
async fn a_repository_without_encryption_opens_without_a_key() {
    let own = made(false).await;
    let repo = own.open(Access::ListOnly).await.unwrap();
    assert!(repo.can_write() && repo.can_read_data());
    own.open(Access::Host(own.host.clone())).await.unwrap();
}

#[tokio::test]
async fn each_operation_without_its_key_says_which_one_it_needs() {
    let own = made(true).await;
    let cluster = own.open(Access::ListOnly).await.unwrap().cluster(SystemId(1));
    let begin = dr_storage::format::SessionBegin { host: "h".into(), note: String::new(), parent: None };
    let id = dr_core::BackupId::new(Timestamp::UNIX_EPOCH, 1);
    let error = cluster.begin_session(id, begin).await.map(drop).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(error.code(), "key-absent");
    assert!(cause.contains("taking a backup"), "{cause}");
    assert!(own.target.snapshot().keys().all(|key| !key.as_str().starts_with("cluster/")), "nothing was put");
}
