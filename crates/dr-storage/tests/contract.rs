//! Every target and every wrapper keeps the contract; a target that breaks it is found out.
#![allow(missing_docs)]

use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "s3")]
use dr_core::port::StorageTarget;
use dr_storage::conformance::check;
use dr_storage::target::{DirectoryOptions, DirectoryTarget, MemoryTarget, RetryPolicy, Retrying};

#[tokio::test]
async fn memory_keeps_the_contract() {
    check(Arc::new(MemoryTarget::new())).await.expect("the contract");
}

#[tokio::test]
async fn a_directory_keeps_the_contract() {
    let dir = tempfile::tempdir().expect("a directory");
    let target = DirectoryTarget::open(dir.path(), DirectoryOptions::default()).expect("a target");
    check(Arc::new(target)).await.expect("the contract");
}

#[tokio::test]
async fn retrying_keeps_the_contract() {
    let policy = RetryPolicy { attempts: 2, first_wait: Duration::from_millis(1) };
    check(Arc::new(Retrying::new(Arc::new(MemoryTarget::new()), policy))).await.expect("the contract");
}

#[tokio::test]
async fn a_lying_target_breaks_the_contract() {
    let broken = check(Arc::new(MemoryTarget::lying())).await;
    assert!(broken.is_err_and(|law| law.contains("taken name")));
}

/// Runs against a real server when one is named by DR_TEST_S3_ENDPOINT, _BUCKET, _KEY, _SECRET.
#[cfg(feature = "s3")]
#[tokio::test(flavor = "multi_thread")]
async fn a_real_s3_server_keeps_the_contract() {
    use dr_storage::target::s3::{S3Config, S3Target};
    let get = |name: &str| std::env::var(format!("DR_TEST_S3_{name}")).ok();
    let Some(endpoint) = get("ENDPOINT") else {
        eprintln!("no S3 server: DR_TEST_S3_ENDPOINT is not set");
        return;
    };
    let target = S3Target::open(S3Config {
        bucket: get("BUCKET").expect("DR_TEST_S3_BUCKET"),
        prefix: format!("contract-{:08x}", dr_storage::random_u32()),
        endpoint: Some(endpoint),
        region: Some("us-east-1".into()),
        path_style: true,
        allow_http: true,
        access_key: get("KEY"),
        secret_key: get("SECRET"),
        ..S3Config::default()
    });
    let target: Arc<dyn StorageTarget> = target.expect("a target").shared();
    check(target.clone()).await.expect("the contract");
    let findings = dr_storage::probe(target.as_ref()).await.expect("a probe");
    assert!(findings.iter().all(|f| f.verdict == dr_core::port::Verdict::Good), "{findings:?}");
}
