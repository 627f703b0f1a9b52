//! Pages, WAL and text files as a real server writes them, and bytes that nobody wrote.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;

use dr_core::port::{PageChecker, SegmentFacts, WalFault, WalFormat};
use dr_core::{Lsn, SegmentSize, SystemId, Timeline, TimelineHistory, WalName, WalSegment};
use dr_pg::history_files::parse_backup_label;
use dr_pg::{PgPages, PgWal, control};
use dr_testkit::pg::{Scratch, TestCluster, bin_dir, command, ok, stop_server};
use proptest::prelude::*;

fn inspect(
    name: &WalName,
    size: SegmentSize,
    system: SystemId,
    bytes: &[u8],
) -> Result<SegmentFacts, WalFault> {
    let mut inspector = PgWal.inspect(name, size, system)?;
    bytes.chunks(256 << 10).try_for_each(|piece| inspector.feed(piece))?;
    inspector.finish()
}

/// Checks every relation file below a directory; answers pages seen and bad pages.
fn check_tree(root: &Path, dir: &Path, pages: &PgPages, seen: &mut (u64, u64)) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.path().is_dir() {
            check_tree(root, &entry.path(), pages, seen);
            continue;
        }
        let path = entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        let Some(first) = pages.first_block(&path) else { continue };
        let bytes = std::fs::read(entry.path()).unwrap();
        let mut bad = Vec::new();
        pages.check(&bytes, first, &mut bad);
        seen.0 += (bytes.len() / 8192) as u64;
        seen.1 += bad.len() as u64;
    }
}

#[test]
fn every_page_of_a_real_cluster_is_good_and_a_flipped_bit_is_found() {
    let scratch = Scratch::new();
    let cluster = TestCluster::create(scratch.path(), "data");
    cluster.start();
    cluster.load_tenants(2, 5000);
    for statement in [
        "CREATE INDEX ON tenant_1.orders USING gin (to_tsvector('simple', note))",
        "CREATE INDEX ON tenant_1.orders USING brin (at)",
        "CREATE INDEX ON tenant_1.orders USING hash (note)",
        "CREATE INDEX ON tenant_1.orders USING spgist (note)",
        "CREATE INDEX ON tenant_1.orders USING gist (to_tsvector('simple', note))",
        "CREATE SEQUENCE numbers",
        "CREATE UNLOGGED TABLE unlogged AS SELECT g FROM generate_series(1, 10000) g",
        "VACUUM",
    ] {
        cluster.sql(statement);
    }
    cluster.stop("fast");
    let pages = PgPages::new(8192, 131_072, true);
    let mut seen = (0, 0);
    check_tree(&cluster.data, &cluster.data, &pages, &mut seen);
    assert!(seen.0 > 3000 && seen.1 == 0, "{} of {} pages are bad", seen.1, seen.0);

    let file = cluster.data.join("global/1262");
    let bytes = std::fs::read(&file).unwrap();
    for bit in (0..8192 * 8).step_by(37) {
        let mut changed = bytes[..8192].to_vec();
        changed[bit / 8] ^= 1 << (bit % 8);
        let mut bad = Vec::new();
        pages.check(&changed, 0, &mut bad);
        assert_eq!(bad.len(), 1, "bit {bit}");
    }
    let facts = control::read(&cluster.data).unwrap();
    assert!(pages.page_lsn(&bytes[..8192]) <= facts.redo);
}

/// Segments of every kind: full, switched, a promotion's, partial; in the smallest size too.
#[test]
fn real_segments_pass_and_foreign_moved_or_cut_ones_are_refused() {
    let scratch = Scratch::new();
    let data = scratch.path().join("data");
    let mut initdb = command(bin_dir().join("initdb"));
    ok(initdb.args(["-N", "-k", "-A", "trust", "-U", "postgres", "--wal-segsize=1", "-D"]).arg(&data));
    let port = 19_000 + (std::process::id() % 900) as u16;
    let cluster = TestCluster { bin: bin_dir(), data, socket_dir: scratch.path().to_owned(), port };
    let archive = scratch.path().join("archive");
    ok(command("/bin/mkdir").arg(&archive));
    cluster.configure(&[
        "fsync = off",
        "listen_addresses = ''",
        &format!("unix_socket_directories = '{}'", scratch.path().display()),
        &format!("port = {port}"),
        "archive_mode = on",
        &format!("archive_command = 'cp %p {}/%f'", archive.display()),
    ]);
    cluster.start();
    cluster.load_tenants(1, 20_000);
    cluster.sql("SELECT pg_switch_wal()");
    cluster.sql("CREATE TABLE after_the_switch (a int)");
    cluster.stop("fast");
    // A promotion begins a segment with pages of the timeline before, and leaves a partial one.
    std::fs::write(cluster.data.join("standby.signal"), "").unwrap();
    cluster.configure(&["restore_command = 'false'"]);
    ok(std::process::Command::new("chmod").arg("a+r").arg(cluster.data.join("standby.signal")));
    cluster.start();
    ok(command(bin_dir().join("pg_ctl")).args(["promote", "-w", "-D"]).arg(&cluster.data));
    cluster.sql("CREATE TABLE on_timeline_two (a int)");
    cluster.stop("fast");

    let facts = control::read(&cluster.data).unwrap();
    assert_eq!((facts.segment_size.bytes(), facts.timeline), (1 << 20, Timeline(2)));
    let (mut full, mut short, mut partial, mut older) = (0, 0, 0, 0);
    let mut one = None;
    for entry in std::fs::read_dir(&archive).unwrap().flatten() {
        let file_name = entry.file_name().into_string().unwrap();
        let name = WalName::parse(&file_name, facts.segment_size).unwrap();
        let bytes = std::fs::read(entry.path()).unwrap();
        let segment = match &name {
            WalName::Segment(segment) | WalName::Partial(segment) => *segment,
            WalName::History(timeline) => {
                let history = TimelineHistory::parse(*timeline, &String::from_utf8(bytes).unwrap()).unwrap();
                assert_eq!(history.ancestors[0].0, Timeline(1));
                continue;
            }
            _ => continue,
        };
        let told = inspect(&name, facts.segment_size, facts.system_id, &bytes)
            .unwrap_or_else(|fault| panic!("{fault}"));
        let end = segment.start(facts.segment_size).0 + facts.segment_size.bytes();
        match name {
            WalName::Partial(_) => partial += 1,
            _ if told.timeline < segment.timeline => older += 1,
            _ if told.filled_to < Lsn(end) => short += 1,
            _ => {
                full += 1;
                one = Some((segment, bytes));
            }
        }
    }
    assert!(full > 3 && short > 0 && partial == 1 && older <= 1, "{full} {short} {partial} {older}");

    let (segment, bytes) = one.unwrap();
    let name = WalName::Segment(segment);
    let size = facts.segment_size;
    let refuse = |bytes: &[u8]| inspect(&name, size, facts.system_id, bytes).unwrap_err();
    let other = WalName::Segment(WalSegment { number: segment.number + 1, ..segment });
    assert!(matches!(inspect(&other, size, facts.system_id, &bytes), Err(WalFault::WrongPlace { .. })));
    assert!(matches!(inspect(&name, size, SystemId(1), &bytes), Err(WalFault::WrongCluster { .. })));
    assert!(matches!(refuse(&bytes[..bytes.len() - 8192]), WalFault::BadLength { .. }));
    assert!(matches!(refuse(&bytes[8192..]), WalFault::BadPage { .. }));
    // Magic and address of every page are looked at; so is identity in the first.
    for page in 0..bytes.len() / 8192 {
        for bit in [0, 9, 64, 77, 100] {
            let mut changed = bytes.clone();
            changed[page * 8192 + bit / 8] ^= 1 << (bit % 8);
            refuse(&changed);
        }
    }
    for bit in 24 * 8..40 * 8 {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        refuse(&changed);
    }
    stop_server(&cluster.data);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_a_reader_of_pages_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..40_000),
        block in any::<u32>(),
        size in prop_oneof![Just(1024u32), Just(8192), Just(32768)],
        checksums in any::<bool>(),
    ) {
        let pages = PgPages::new(size, 131_072, checksums);
        let mut bad = Vec::new();
        pages.check(&bytes, block, &mut bad);
        prop_assert!(bad.len() <= bytes.len() / size as usize);
        pages.page_lsn(&bytes);
    }

    #[test]
    fn no_name_makes_a_reader_of_paths_panic(path in "(base|global|pg_tblspc)?(/[0-9a-zPG_.]{0,24}){0,5}|\\PC*") {
        PgPages::new(8192, 131_072, true).first_block(&path);
    }

    #[test]
    fn no_bytes_make_a_reader_of_wal_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..70_000),
        header in any::<bool>(),
        partial in any::<bool>(),
    ) {
        let size = SegmentSize::try_from(1u64 << 20).unwrap();
        let segment = WalSegment { timeline: Timeline(1), number: 1 };
        if header && bytes.len() > 40 {
            bytes[..2].copy_from_slice(&0xD110u16.to_le_bytes());
            bytes[2] |= 2;
        }
        let name = if partial { WalName::Partial(segment) } else { WalName::Segment(segment) };
        prop_assert!(inspect(&name, size, SystemId(7), &bytes).is_err());
    }

    #[test]
    fn no_bytes_make_a_reader_of_pg_control_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..9000),
        version in prop_oneof![Just(1300u32), Just(1700), Just(1800), any::<u32>()],
    ) {
        if bytes.len() > 12 {
            bytes[8..12].copy_from_slice(&version.to_le_bytes());
        }
        prop_assert!(control::parse(&bytes, "x").is_err());
    }

    #[test]
    fn no_text_makes_a_reader_of_labels_panic(text in "(START (WAL LOCATION|TIMELINE): [0-9A-F/x ]{0,30}\n?){0,4}|\\PC*") {
        parse_backup_label(&text);
        let _ = TimelineHistory::parse(Timeline(9), &text);
    }
}
