//! The relation catalogue: each relation with every file that it had, and what is the same stored once.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::*;
use dr_core::port::RelationEntry;
use dr_core::{Classified, ErrorClass};
use dr_engine::{Context, catalogue};
use dr_storage::format::Manifest;
use dr_testkit::sim::{BAD, PAGE, Random, SimCluster, relation};

fn cluster() -> SimCluster {
    let cluster = SimCluster::new(1);
    cluster.put("PG_VERSION", b"15\n".to_vec());
    cluster
}

/// Sorted, as a source lists them.
fn many(count: u32) -> Vec<RelationEntry> {
    let named = |n| relation(&format!("tenant_{:05}", n / 40), &format!("table_{:02}", n % 40), 20_000 + n);
    (0..count).map(named).collect()
}

async fn backed_up(context: &Context, cluster: &SimCluster) -> Manifest {
    let report = back_up(context, cluster, &options()).await.unwrap();
    context.store.manifest(report.backup.id).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relation_that_moves_while_it_is_backed_up_keeps_both_files() {
    let (bench, cluster) = (Bench::new().await, cluster());
    let [before, moved, dropped, made] =
        [("orders", 100), ("orders", 200), ("old", 101), ("young", 201)].map(|(n, f)| relation("t", n, f));
    cluster.list_relations(vec![vec![dropped.clone(), before.clone()], vec![moved.clone(), made.clone()]]);
    let context = bench.context(&cluster).await;
    let manifest = backed_up(&context, &cluster).await;
    let rows = catalogue::read(&context.store, &manifest).await.unwrap();
    assert_eq!(rows, [dropped, before, moved, made]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_did_not_change_of_the_catalogue_is_stored_once() {
    let (bench, cluster) = (Bench::new().await, cluster());
    let mut rows = many(50_000);
    cluster.list_relations(vec![rows.clone()]);
    let context = bench.context(&cluster).await;
    let first = backed_up(&context, &cluster).await;
    assert_eq!(catalogue::read(&context.store, &first).await.unwrap(), rows);
    let parts = first.body.catalogue.len();
    assert!((40..400).contains(&parts), "{parts} parts of 50,000 rows");

    let second = backed_up(&context, &cluster).await;
    assert_eq!(second.body.catalogue, first.body.catalogue, "nothing changed");
    assert!(second.body.sessions.iter().any(|session| session.id == first.head.id));
    assert!(second.head.stored_bytes < 1000, "{} bytes were stored", second.head.stored_bytes);

    // One moves, one goes, one comes: three parts at most, and one more listing of each.
    rows[10_000].filenode = 9;
    rows.remove(20_000);
    rows.insert(30_000, RelationEntry { name: "table_00_new".into(), ..rows[30_000].clone() });
    rows.sort_unstable();
    cluster.list_relations(vec![rows.clone()]);
    let third = backed_up(&context, &cluster).await;
    assert_eq!(catalogue::read(&context.store, &third).await.unwrap(), rows);
    let new = third.body.catalogue.iter().filter(|part| part.frame.session == third.head.id).count();
    assert!((1..=6).contains(&new), "{new} parts are new");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_exchanged_part_does_not_look_like_a_catalogue() {
    let (bench, cluster) = (Bench::new().await, cluster());
    cluster.list_relations(vec![many(5000)]);
    let context = bench.context(&cluster).await;
    let whole = backed_up(&context, &cluster).await;
    let mut exchanged = whole.clone();
    exchanged.body.catalogue[0].frame = whole.body.catalogue[1].frame;
    let mut early = whole.clone();
    early.body.catalogue.clear();
    early.body.relations = vec![whole.body.catalogue[0].frame];
    for wrong in [exchanged, early] {
        let error = catalogue::read(&context.store, &wrong).await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Corrupt, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_page_is_told_with_its_relation_even_if_that_is_gone() {
    let (bench, cluster) = (Bench::new().await, cluster());
    cluster.put_relation("base/5/100", 4, &mut Random::new(1));
    cluster.edit("base/5/100", |content| content[PAGE..PAGE + 8].copy_from_slice(BAD));
    cluster.list_relations(vec![vec![relation("tenant_7", "orders", 100)], Vec::new()]);
    let context = bench.context(&cluster).await;
    let report = back_up(&context, &cluster, &options()).await.unwrap();
    assert_eq!(report.bad_pages[0].relation.as_deref(), Some("pos.tenant_7.orders"));
}
