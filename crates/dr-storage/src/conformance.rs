//! The contract of a storage target, as checks that every implementation and every wrapper runs.
//!
//! Write your own target, then call [`check`] with an empty one in a test:
//!
//! ```
//! # async fn example() {
//! use std::sync::Arc;
//! use dr_storage::{conformance, target::MemoryTarget};
//! conformance::check(Arc::new(MemoryTarget::new())).await.expect("the contract is kept");
//! # }
//! ```

use std::sync::Arc;

use bytes::Bytes;
use dr_core::port::{Key, ObjectInfo, Payload, StorageError, StorageTarget};
use futures_util::TryStreamExt;

/// Writers that race for one name.
const RACERS: usize = 8;

/// Runs all checks against an empty target; the error says which part of the contract is broken.
pub async fn check(target: Arc<dyn StorageTarget>) -> Result<(), String> {
    round_trips(target.as_ref()).await?;
    create_only(target.clone()).await?;
    ranges(target.as_ref()).await?;
    absence(target.as_ref()).await?;
    listings(target.as_ref()).await?;
    deletion(target.as_ref()).await
}

fn key(name: &str) -> Result<Key, String> {
    Key::new(name).map_err(|error| error.to_string())
}

fn told(what: &str) -> impl Fn(StorageError) -> String {
    move |error| format!("{what}: {error} ({error:?})")
}

fn expect(holds: bool, law: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(format!("broken: {law}")) }
}

async fn round_trips(target: &dyn StorageTarget) -> Result<(), String> {
    let large: Vec<Bytes> = (0..33u8).map(|n| Bytes::from(vec![n; 1 << 20])).collect();
    let whole: Vec<u8> = large.iter().flat_map(|piece| piece.to_vec()).collect();
    let cases: [(&str, Payload, Vec<u8>); 3] = [
        ("trip/empty", Payload::default(), Vec::new()),
        ("trip/pieces", Payload::new(vec!["a".into(), "".into(), "bc".into()]), b"abc".to_vec()),
        ("trip/large", Payload::new(large), whole),
    ];
    for (name, payload, content) in cases {
        let key = key(name)?;
        target.create(&key, payload).await.map_err(told("create"))?;
        let found = target.get(&key, None).await.map_err(told("get"))?;
        expect(found[..] == content[..], "what was created is read back")?;
        let info = target.head(&key).await.map_err(told("head"))?;
        expect(info.size == content.len() as u64 && info.key == key, "head tells name and size")?;
    }
    Ok(())
}

async fn create_only(target: Arc<dyn StorageTarget>) -> Result<(), String> {
    let name = key("once/object")?;
    target.create(&name, b"first".to_vec().into()).await.map_err(told("create"))?;
    for content in [&b"second"[..], b"first"] {
        let again = target.create(&name, content.to_vec().into()).await;
        expect(matches!(again, Err(StorageError::AlreadyExists { .. })), "a taken name is refused as such")?;
    }
    let found = target.get(&name, None).await.map_err(told("get"))?;
    expect(found[..] == *b"first", "a refused create changes nothing")?;
    let name = key("once/race")?;
    let racers = (0..RACERS).map(|n| {
        let (target, name) = (target.clone(), name.clone());
        tokio::spawn(async move { target.create(&name, vec![n as u8; 1000].into()).await.is_ok() })
    });
    let mut winners = Vec::new();
    for (n, racer) in racers.collect::<Vec<_>>().into_iter().enumerate() {
        if racer.await.map_err(|error| error.to_string())? {
            winners.push(n as u8);
        }
    }
    expect(winners.len() == 1, "of writers that race for a name exactly one wins")?;
    let found = target.get(&name, None).await.map_err(told("get"))?;
    expect(found[..] == vec![winners[0]; 1000], "the winner's content is there, whole")
}

async fn ranges(target: &dyn StorageTarget) -> Result<(), String> {
    let name = key("range/object")?;
    target.create(&name, b"0123456789".to_vec().into()).await.map_err(told("create"))?;
    for (range, content) in [(0..10, "0123456789"), (3..7, "3456"), (9..10, "9"), (4..4, "")] {
        let found = target.get(&name, Some(range)).await.map_err(told("get of a range"))?;
        expect(found[..] == *content.as_bytes(), "a range has exactly its bytes")?;
    }
    for range in [5..11, 10..12, 20..30] {
        let found = target.get(&name, Some(range)).await;
        expect(matches!(found, Err(StorageError::Truncated { .. })), "a range beyond the end is an error")?;
    }
    Ok(())
}

async fn absence(target: &dyn StorageTarget) -> Result<(), String> {
    let name = key("absent/object")?;
    let missing = |error: &StorageError| matches!(error, StorageError::NotFound { .. });
    expect(target.get(&name, None).await.is_err_and(|e| missing(&e)), "a missing object is told by get")?;
    expect(target.get(&name, Some(0..1)).await.is_err_and(|e| missing(&e)), "also for a range")?;
    expect(target.head(&name).await.is_err_and(|e| missing(&e)), "and by head")?;
    let parts = target.list_parts("absent/").await.map_err(told("list_parts"))?;
    expect(parts.is_empty(), "an empty prefix lists nothing")
}

async fn listings(target: &dyn StorageTarget) -> Result<(), String> {
    let names = ["l/a/1", "l/a/2", "l/a.b/1", "l/a0/1", "l/b", "l/B", "lx/1"];
    for name in names {
        target.create(&key(name)?, name.as_bytes().to_vec().into()).await.map_err(told("create"))?;
    }
    let list = |prefix: &'static str, after: Option<Key>| async move {
        let listed: Result<Vec<ObjectInfo>, _> = target.list(prefix, after.as_ref()).try_collect().await;
        listed
            .map(|l| l.into_iter().map(|o| o.key.as_str().to_owned()).collect::<Vec<_>>())
            .map_err(told("list"))
    };
    let all = list("l/", None).await?;
    let mut sorted: Vec<String> = names[..6].iter().map(|n| (*n).to_owned()).collect();
    sorted.sort();
    expect(all == sorted, "a listing is complete, in bytewise order, and of whole parts")?;
    for after in &sorted {
        let rest = list("l/", Some(key(after)?)).await?;
        let expected: Vec<String> = sorted.iter().filter(|n| *n > after).cloned().collect();
        expect(rest == expected, "a listing after a name begins behind it")?;
    }
    let parts = target.list_parts("l/").await.map_err(told("list_parts"))?;
    expect(parts == ["B", "a", "a.b", "a0", "b"], "parts are what follows the prefix, sorted, once")
}

async fn deletion(target: &dyn StorageTarget) -> Result<(), String> {
    let name = key("gone/object")?;
    target.create(&name, b"x".to_vec().into()).await.map_err(told("create"))?;
    for _ in 0..2 {
        target.delete(&name).await.map_err(told("delete"))?;
    }
    expect(target.head(&name).await.is_err(), "a deleted object is gone")?;
    target.create(&name, b"y".to_vec().into()).await.map_err(told("create after delete"))
}
