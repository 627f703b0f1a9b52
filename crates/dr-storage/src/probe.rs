//! The probe: what a target really does, found out before anything depends on it.

use dr_core::Classified;
use dr_core::guard::Guard;
use dr_core::port::{Finding, Key, StorageError, StorageTarget};
use futures_util::TryStreamExt;

use crate::crypto::random;

/// Writes a small object below `dr-probe/` and sees whether the target keeps the contract:
/// create-only, whole reads, ranges, listing, deletion. What it wrote is removed again.
pub async fn probe(target: &dyn StorageTarget) -> Result<Vec<Finding>, StorageError> {
    let mark: [u8; 16] = random();
    let content = hex::encode(mark).into_bytes();
    let key = Key::new(format!("dr-probe/{}", hex::encode(&mark[..8])))
        .map_err(|e| StorageError::Invalid { target: target.location(), reason: e.to_string() })?;
    target.create(&key, content.clone().into()).await?;
    let findings = examine(target, &key, &content).await;
    let deleted = target.delete(&key).await;
    let mut findings = findings?;
    match deleted {
        Ok(()) => {}
        Err(error) => findings.push(Finding::warning(
            "storage-delete",
            format!("{} does not let this identity delete objects ({error})", target.location()),
            "That protects backups; expiry will need an identity that may.",
        )),
    }
    Ok(findings)
}

async fn examine(
    target: &dyn StorageTarget,
    key: &Key,
    content: &[u8],
) -> Result<Vec<Finding>, StorageError> {
    let place = target.location();
    let mut findings = vec![Finding::good("storage-writable", format!("{place} can be written"))];
    let second = target.create(key, b"another writer".to_vec().into()).await;
    let found = target.get(key, None).await?;
    let refused = matches!(second, Err(StorageError::AlreadyExists { .. })) && found[..] == *content;
    if refused || !Guard::ProbeCreateOnly.holds() {
        findings
            .push(Finding::good("storage-create-only", format!("{place} refuses to overwrite an object")));
    } else {
        let what = match second {
            Ok(()) => "accepted a second object under the same name".to_owned(),
            Err(error) => format!("answered a second create with a {} error", error.class()),
        };
        findings.push(Finding::bad(
            "storage-create-only",
            format!("{place} {what}: two writers could destroy each other's backups"),
            "Use a store that honours create-only (If-None-Match: *); this one cannot be the sole home of a repository.",
        ));
    }
    let range = target.get(key, Some(4..12)).await?;
    let listed: Vec<_> = target.list("dr-probe/", None).try_collect().await?;
    let whole = range[..] == content[4..12] && listed.iter().any(|o| o.key == *key);
    findings.push(if whole {
        Finding::good(
            "storage-readable",
            format!("{place} gives back what was written, and lists it at once"),
        )
    } else {
        let detail = format!("{place} does not give back, or does not list, what was just written");
        Finding::bad("storage-readable", detail, "Use a store with read-after-write consistency.")
    });
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::MemoryTarget;
    use dr_core::port::Verdict;

    #[tokio::test]
    async fn an_honest_target_passes_and_nothing_is_left() {
        let target = MemoryTarget::new();
        let findings = probe(&target).await.expect("a probe");
        assert!(findings.iter().all(|f| f.verdict == Verdict::Good), "{findings:?}");
        assert!(target.list("", None).try_collect::<Vec<_>>().await.expect("a listing").is_empty());
    }

    #[tokio::test]
    async fn a_target_that_ignores_create_only_is_found_out() {
        let findings = probe(&MemoryTarget::lying()).await.expect("a probe");
        assert!(findings.iter().any(|f| f.check == "storage-create-only" && f.verdict == Verdict::Bad));
    }
}
