//! A host's clock that steps back: nothing is taken for unchanged by its word, and no order follows it.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use common::*;
use dr_core::Timestamp;
use dr_core::port::Clock;
use dr_testkit::sim::{Random, SimCluster, context};

/// A clock that a test sets.
#[derive(Debug)]
struct Hand(AtomicI64);

impl Hand {
    fn turn(&self, seconds: i64) {
        self.0.fetch_add(seconds, Ordering::SeqCst);
    }
}

impl Clock for Hand {
    fn now(&self) -> Timestamp {
        Timestamp::from_second(self.0.fetch_add(1, Ordering::SeqCst)).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_steps_back_hides_no_change_and_orders_nothing() {
    let mut random = Random::new(3);
    let cluster = SimCluster::new(9);
    cluster.put("PG_VERSION", b"15\n".to_vec());
    cluster.put_relation("base/5/100", 300, &mut random);
    let bench = Bench::new().await;
    let clock = Arc::new(Hand(AtomicI64::new(1_800_000_000)));
    let context = context(&bench.repo().await, &cluster, clock.clone());
    let options = options();
    let take = || back_up(&context, &cluster, &options);
    let first = take().await.unwrap().backup;
    clock.turn(60);
    let second = take().await.unwrap().backup;
    assert_eq!(second.read_bytes, 0, "by its times nothing changed");

    clock.turn(-86_400);
    let third = take().await.unwrap().backup;
    assert!(third.id < second.id, "its name is older");
    assert_eq!(third.read_bytes, third.bytes, "times are not believed after the clock stepped back");
    cluster.touch_page("base/5/100", 7, &mut random);
    clock.turn(60);
    let fourth = take().await.unwrap().backup;
    assert!(fourth.read_bytes > 0);

    let wanted = [first.id, second.id, third.id, fourth.id];
    let heads = context.store.heads().await.unwrap();
    assert_eq!(heads.iter().map(|head| head.id).collect::<Vec<_>>(), wanted, "listed by position");
    let before = |id| heads.iter().find(|head| head.id == id).unwrap().previous.unwrap().0;
    assert_eq!([before(third.id), before(fourth.id)], [second.id, third.id]);
    assert_eq!([third.parent, fourth.parent], [Some(second.id), Some(third.id)]);
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("r");
    let report = restore_to(&context, &restore_options(&to)).await.unwrap();
    assert_eq!(report.backup, fourth.id, "the newest is the one that went furthest");
    assert_same(&tree(&to), &cluster.content());
}
