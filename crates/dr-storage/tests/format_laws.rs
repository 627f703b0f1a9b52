//! Laws of the bytes: what is written reads back, and no bytes make a reader panic or take memory
//! that the object cannot stand for.
#![allow(missing_docs, clippy::unwrap_used)]

use dr_core::{BackupId, Lsn, SystemId, Timeline};
use dr_storage::PackKind;
use dr_storage::format::{
    BadMark, Content, Descriptor, Digest, EXTENT_LEN, EntryKind, ExtentEntry, FileEntry, FrameRef,
    MAX_SHARD_ENTRIES, MapRef, PackHeader, PatchedPage, PrintsRef, STRETCH_LEN, Shard, StatMark, StretchMap,
    WalHeader,
};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;

fn session() -> impl Strategy<Value = BackupId> {
    // Few sessions, so that tables are shared.
    (0u8..4, prop_oneof![Just(0u64), 1_700_000_000..1_900_000_000u64]).prop_map(|(random, seconds)| {
        let mut packed = [random; 12];
        packed[..8].copy_from_slice(&seconds.to_le_bytes());
        BackupId::unpack(packed)
    })
}

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 16]>().prop_map(Digest)
}

fn frame() -> impl Strategy<Value = FrameRef> {
    (session(), any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>())
        .prop_map(|(session, seq, offset, stored, raw)| FrameRef { session, seq, offset, stored, raw })
}

fn page() -> impl Strategy<Value = u16> {
    0u16..(STRETCH_LEN / 1024) as u16
}

fn map() -> impl Strategy<Value = StretchMap> {
    (0..=STRETCH_LEN as u32, vec(frame(), 1..12)).prop_flat_map(|(raw_len, frames)| {
        let count = frames.len() as u32;
        let extents = (raw_len as usize).div_ceil(EXTENT_LEN);
        let extent = (digest(), option::of(0..count)).prop_map(|(digest, base)| ExtentEntry { digest, base });
        let patched = btree_map(page(), (0..count, page()), 0..40).prop_map(|pages| {
            let patch = |(page, (frame, index))| PatchedPage { page, frame, index };
            pages.into_iter().map(patch).collect()
        });
        let bad = vec((page(), any::<u16>(), any::<u16>()), 0..5).prop_map(|marks| {
            marks.into_iter().map(|(page, found, expected)| BadMark { page, found, expected }).collect()
        });
        let prints = (frame(), btree_map(page(), any::<u64>(), 0..20))
            .prop_map(|(frame, overrides)| PrintsRef { frame, overrides: overrides.into_iter().collect() });
        (vec(extent, extents), patched, bad, option::of(prints)).prop_map(
            move |(extents, patched, bad, prints)| StretchMap {
                raw_len,
                frames: frames.clone(),
                extents,
                patched,
                bad,
                prints,
            },
        )
    })
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        Just(Content::None),
        vec(any::<u8>(), 0..=64).prop_map(Content::Inline),
        (frame(), any::<u32>(), any::<u32>(), digest())
            .prop_map(|(frame, offset, len, digest)| Content::Slice { frame, offset, len, digest }),
        (vec((frame(), digest()), 0..6), vec(session(), 0..3)).prop_map(|(maps, sessions)| {
            let maps = maps.into_iter().map(|(frame, digest)| MapRef { frame, digest }).collect();
            Content::Stretches { maps, sessions }
        }),
    ]
}

fn entry(path: String) -> impl Strategy<Value = FileEntry> {
    let kind = prop_oneof![
        4 => Just(EntryKind::Regular),
        1 => Just(EntryKind::Directory),
        1 => "[a-zä/]{0,20}".prop_map(EntryKind::Link),
    ];
    let stat = (any::<i64>(), any::<i64>(), any::<u64>(), any::<u64>())
        .prop_map(|(mtime_ns, ctime_ns, inode, device)| StatMark { mtime_ns, ctime_ns, inode, device });
    (kind, any::<u32>(), any::<u64>(), option::of(stat), content()).prop_map(
        move |(kind, mode, size, stat, content)| FileEntry {
            path: path.clone(),
            kind,
            mode,
            size,
            stat,
            content,
        },
    )
}

fn entries() -> impl Strategy<Value = Vec<FileEntry>> {
    // Names that share beginnings, also within a character.
    btree_set("(base|global|pg_wal)/[0-9äöé]{1,6}(_vm|_fsm)?", 0..20)
        .prop_flat_map(|paths| paths.into_iter().map(|path| entry(path).boxed()).collect::<Vec<_>>())
}

fn wal_header() -> impl Strategy<Value = WalHeader> {
    let ids = (1u8..=4, 1u8..=2, any::<[u8; 16]>(), any::<u64>(), any::<u32>(), any::<u32>(), any::<u64>());
    (ids, 0..=1u64 << 30, 1u32..=1 << 20, any::<u64>(), any::<[u8; 32]>(), vec(any::<u8>(), 80)).prop_map(
        |(
            (kind, suite, repository, system, timeline, key_epoch, number),
            raw,
            frame,
            filled,
            digest,
            dek,
        )| {
            let mut sealed_dek = [0; 80];
            sealed_dek.copy_from_slice(&dek);
            WalHeader {
                kind,
                suite,
                repository,
                system_id: SystemId(system),
                timeline: Timeline(timeline),
                key_epoch,
                number,
                raw,
                frame,
                frames: raw.div_ceil(u64::from(frame)) as u32,
                filled_to: Lsn(filled),
                digest,
                sealed_dek,
            }
        },
    )
}

fn pack_header() -> impl Strategy<Value = PackHeader> {
    let kind = prop_oneof![Just(PackKind::Data), Just(PackKind::Meta), Just(PackKind::Page)];
    (kind, 1u8..=2, any::<[u8; 16]>(), any::<u64>(), session(), any::<u32>()).prop_map(
        |(kind, suite, repository, system, session, seq)| PackHeader {
            kind,
            suite,
            repository,
            system_id: SystemId(system),
            session,
            seq,
        },
    )
}

/// Bytes made by cutting, flipping and inserting: what storage or a liar may hand over.
fn damage(bytes: &[u8], edits: &[(prop::sample::Index, u8, u8)]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for (place, how, value) in edits {
        let at = place.index(out.len().max(1));
        match how % 4 {
            0 => out.truncate(at),
            1 if at < out.len() => out[at] ^= 1 << (value % 8),
            2 if at < out.len() => out[at] = *value,
            _ => out.insert(at.min(out.len()), *value),
        }
    }
    out
}

fn edits() -> impl Strategy<Value = Vec<(prop::sample::Index, u8, u8)>> {
    vec((any::<prop::sample::Index>(), any::<u8>(), any::<u8>()), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_stretch_map_reads_back(map in map()) {
        prop_assert_eq!(StretchMap::decode(&map.encode()).unwrap(), map);
    }

    #[test]
    fn a_part_of_the_file_table_reads_back_and_is_a_function_of_its_entries(entries in entries()) {
        let bytes = Shard::encode(&entries);
        let back = Shard::decode(&bytes).unwrap();
        prop_assert_eq!(&back, &entries);
        prop_assert_eq!(Shard::encode(&back), bytes);
    }

    #[test]
    fn headers_read_back(pack in pack_header(), wal in wal_header(), key in any::<[u8; 32]>()) {
        prop_assert_eq!(PackHeader::decode(&pack.encode()).unwrap(), pack);
        prop_assert_eq!(WalHeader::decode(&wal.encode(&key), &key).unwrap(), wal);
    }

    #[test]
    fn a_changed_wal_header_is_never_taken(
        wal in wal_header(), key in any::<[u8; 32]>(), at in 0usize..216, bit in 0u8..8,
    ) {
        let mut bytes = wal.encode(&key);
        bytes[at] ^= 1 << bit;
        prop_assert!(WalHeader::decode(&bytes, &key).is_err());
    }

    #[test]
    fn damaged_maps_tables_and_headers_never_panic(
        map in map(), entries in entries(), wal in wal_header(), pack in pack_header(), edits in edits(),
    ) {
        if let Ok(read) = StretchMap::decode(&damage(&map.encode(), &edits)) {
            // What is accepted is safe to use: every reference leads somewhere.
            prop_assert_eq!(read.extents.len(), (read.raw_len as usize).div_ceil(EXTENT_LEN));
            let known = |index: u32| (index as usize) < read.frames.len();
            prop_assert!(read.extents.iter().all(|extent| extent.base.is_none_or(known)));
            prop_assert!(read.patched.iter().all(|patch| known(patch.frame)));
        }
        if let Ok(read) = Shard::decode(&damage(&Shard::encode(&entries), &edits)) {
            Shard::sessions(&read);
        }
        let _ = WalHeader::decode(&damage(&wal.encode(&[7; 32]), &edits), &[7; 32]);
        let _ = PackHeader::decode(&damage(&pack.encode(), &edits));
    }

    #[test]
    fn a_cut_map_or_table_is_refused(map in map(), entries in entries(), part in any::<prop::sample::Index>()) {
        let bytes = map.encode();
        prop_assert!(StretchMap::decode(&bytes[..part.index(bytes.len())]).is_err());
        let bytes = Shard::encode(&entries);
        prop_assert!(Shard::decode(&bytes[..part.index(bytes.len())]).is_err());
    }

    #[test]
    fn no_bytes_at_all_make_a_reader_panic(mut bytes in vec(any::<u8>(), 0..300)) {
        for first in [0, 1] {
            if let Some(byte) = bytes.first_mut() {
                *byte = first;
            }
            let _ = StretchMap::decode(&bytes);
            let _ = Shard::decode(&bytes);
        }
        let _ = PackHeader::decode(&bytes);
        let _ = WalHeader::decode(&bytes, &[0; 32]);
        let _ = Descriptor::parse(&bytes);
    }
}

/// A number of at most 64 bits that claims as much as fits.
const HUGE: [u8; 10] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];

#[test]
fn counts_and_lengths_that_the_object_cannot_hold_are_refused() {
    // A table of sessions, entries, or a map's frames "of all the memory there is".
    let cases: [Vec<u8>; 4] = [
        [&[1], &HUGE[..]].concat(),
        [&[1, 0], &HUGE[..]].concat(),
        [&[1, 0, 0], &HUGE[..]].concat(),
        [&[1, 0, 1, 0], &HUGE[..]].concat(),
    ];
    for bytes in cases {
        assert!(Shard::decode(&bytes).is_err() && StretchMap::decode(&bytes).is_err(), "{bytes:?}");
    }
    let longer = [&HUGE[..9], &[0x02]].concat();
    assert!(Shard::decode(&[&[1], &longer[..]].concat()).is_err(), "a number has at most 64 bits");
}

fn directory(path: &str) -> FileEntry {
    FileEntry {
        path: path.to_owned(),
        kind: EntryKind::Directory,
        mode: 0o700,
        size: 0,
        stat: None,
        content: Content::None,
    }
}

/// Entries share beginnings: a few bytes each must not become a long path each.
#[test]
fn a_small_table_does_not_become_a_large_one() {
    let long = "a".repeat(100_000);
    let entries: Vec<_> = (0..10).map(|n| directory(&format!("{long}{n}"))).collect();
    assert!(Shard::decode(&Shard::encode(&entries)).is_err());
    let many: Vec<_> = (0..=MAX_SHARD_ENTRIES).map(|n| directory(&format!("{n:06}"))).collect();
    assert!(Shard::decode(&Shard::encode(&many)).is_err());
    assert!(Shard::decode(&Shard::encode(&many[1..])).is_ok());
}

#[test]
fn later_minor_versions_may_add_fields_at_the_end() {
    let mut shard = Shard::encode(&[directory("base")]);
    assert_eq!(shard.pop(), Some(0));
    shard.extend_from_slice(&[3, b'n', b'e', b'w']);
    assert_eq!(Shard::decode(&shard).unwrap().len(), 1);
    let mut map = StretchMap::default().encode();
    assert_eq!(map.pop(), Some(0));
    map.extend_from_slice(&[3, b'n', b'e', b'w']);
    assert_eq!(StretchMap::decode(&map).unwrap(), StretchMap::default());
}

#[test]
fn objects_that_need_unknown_features_are_refused_and_unknown_ignorable_ones_are_not() {
    let pack = PackHeader {
        kind: PackKind::Data,
        suite: 1,
        repository: [1; 16],
        system_id: SystemId(1),
        session: BackupId::unpack([0; 12]),
        seq: 0,
    };
    let mut bytes = pack.encode();
    bytes[12] = 1;
    assert_eq!(PackHeader::decode(&bytes).unwrap(), pack);
    bytes[10] = 1;
    let error = PackHeader::decode(&bytes).unwrap_err();
    assert_eq!(dr_core::Classified::code(&error), "repo-too-new");
}
