//! What a repository's store hands back: documents, maps, tables, frames, WAL, and whole
//! repositories with one object changed.

mod fixture;
mod whole;

use std::rc::Rc;

use dr_core::journal::JournalRecord;
use dr_core::{Lsn, SegmentSize, SystemId, Timeline, WalName, WalSegment};
use dr_storage::format::{
    Content, Descriptor, EXTENT_LEN, FrameRef, ManifestBody, ManifestHead, PackHeader, PackKind, PackList,
    Point, SessionBegin, Shard, StretchMap, WalHeader,
};
use dr_storage::{ClusterIdentity, RepoError};
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::fixture::Fixture;
use crate::Target;

/// A frame may open to 64 MiB whatever its stored size, and is held twice.
const FRAME_MEMORY: usize = 160 << 20;

pub(super) fn targets() -> Vec<Target> {
    let clear = Rc::new(Fixture::golden("v1-clear"));
    let sealed = Rc::new(Fixture::golden("v1"));
    let mut all = documents(&clear);
    all.extend(tables(&clear));
    all.extend([
        Target::new("descriptor", [clear.kind("repo.json"), sealed.kind("repo.json")].concat(), |bytes| {
            Descriptor::parse(bytes).into()
        }),
        Target::new("pack-header", sealed.kind("pack"), |bytes| {
            let header = PackHeader::decode(bytes);
            if let Ok(header) = &header {
                assert_eq!(PackHeader::decode(&header.encode()).ok(), Some(*header));
            }
            header.into()
        }),
        manifest(clear.clone()),
        frame(clear.clone()),
        wal_object(),
        whole::target("clear-repository", clear, false),
        whole::target("sealed-repository", sealed, true),
    ]);
    all
}

/// A reader of JSON that writes again what it read.
fn json<T: Serialize + DeserializeOwned + PartialEq + 'static>(
    name: &'static str,
    seeds: Vec<Vec<u8>>,
) -> Target {
    Target::new(name, seeds, |bytes| {
        let read = serde_json::from_slice::<T>(bytes);
        if let Ok(value) = &read {
            let again = serde_json::to_vec(value).and_then(|bytes| serde_json::from_slice::<T>(&bytes));
            assert!(again.is_ok_and(|again| again == *value), "what is taken can be written and read again");
        }
        read.into()
    })
}

/// The JSON inside of documents, which lies behind compression and so is out of reach from outside.
fn documents(clear: &Fixture) -> Vec<Target> {
    let bytes = |value: serde_json::Result<Vec<u8>>| value.expect("a value of ours is JSON");
    let manifests = clear.manifests();
    let heads = manifests.iter().map(|manifest| bytes(serde_json::to_vec(&manifest.head))).collect();
    let bodies = manifests.iter().map(|manifest| bytes(serde_json::to_vec(&manifest.body))).collect();
    let packs = clear.pack_lists();
    let points = manifests.iter().zip(&packs).map(|(manifest, packs)| Point {
        start: manifest.head.start.clone(),
        walk: manifest.body.walk.clone(),
        shards: manifest.body.shards.clone(),
        sessions: vec![manifest.head.id],
        bad_pages: manifest.body.bad_pages.clone(),
        last_path: "base/5/102".into(),
        packs: packs.packs.clone(),
    });
    let points = points.map(|point| bytes(serde_json::to_vec(&point))).collect();
    let packs = packs.iter().map(|list| bytes(serde_json::to_vec(list))).collect();
    vec![
        json::<ManifestHead>("manifest-head", heads),
        json::<ManifestBody>("manifest-body", bodies),
        json::<PackList>("pack-list", packs),
        json::<Point>("point", points),
        json::<SessionBegin>("session-begin", clear.kind("begin")),
        json::<ClusterIdentity>("cluster", clear.kind("identity.json")),
        Target::new("journal", clear.kind("job")[..1].to_vec(), |bytes| {
            let record = JournalRecord::parse(1, bytes);
            if let Ok(record) = &record {
                // Not the whole body: a fraction with many digits is not read exactly.
                let again = JournalRecord::parse(1, &record.to_bytes());
                let names = |record: &JournalRecord| (record.previous.clone(), record.kind.clone());
                assert_eq!(again.as_ref().map(names), Ok(names(record)));
            }
            record.into()
        }),
    ]
}

/// Maps and parts of the file table, as they are once opened.
fn tables(clear: &Fixture) -> Vec<Target> {
    let shards = clear.shards();
    let mut maps = Vec::new();
    for entry in shards.iter().flat_map(|bytes| Shard::decode(bytes).expect("a part of a golden table")) {
        if let Content::Stretches { maps: refs, .. } = entry.content {
            maps.extend(refs.iter().map(|map| clear.frame(PackKind::Meta, &map.frame)));
        }
    }
    vec![
        Target::new("stretch-map", maps, |bytes| {
            let map = StretchMap::decode(bytes);
            if let Ok(map) = &map {
                // What is accepted is safe to use: every reference leads somewhere.
                let known = |index: u32| (index as usize) < map.frames.len();
                assert_eq!(map.extents.len(), (map.raw_len as usize).div_ceil(EXTENT_LEN));
                assert!(map.extents.iter().all(|extent| extent.base.is_none_or(known)));
                assert!(map.patched.iter().all(|patch| known(patch.frame)));
                assert_eq!(StretchMap::decode(&map.encode()).ok().as_ref(), Some(map));
            }
            map.into()
        }),
        // Paths share beginnings, and each may be as long as a path can be: 16 Ki entries of 16 KiB.
        Target::new("file-table", shards, |bytes| {
            let entries = Shard::decode(bytes);
            if let Ok(entries) = &entries {
                Shard::sessions(entries);
                assert_eq!(Shard::decode(&Shard::encode(entries)).ok().as_ref(), Some(entries));
            }
            entries.into()
        })
        .memory(1 << 30),
    ]
}

/// A stored manifest, read as a backup's.
fn manifest(clear: Rc<Fixture>) -> Target {
    let newest = clear.manifests().pop().expect("a golden manifest").head.id;
    let key = clear.key_of(&format!("manifest/{newest}"));
    let seed = clear.objects[&key].to_vec();
    // A body may be 40,000 times its compressed form, and not more than 1 GiB.
    Target::new("manifest", vec![seed], move |bytes| {
        let store = clear.with(&key, bytes);
        let head = clear.run(async { store.catalogue().await.map(|read| read.heads.len()) });
        let whole: Result<_, RepoError> = clear.run(store.manifest(newest));
        if let (Ok(manifest), Ok(heads)) = (&whole, head) {
            assert!(manifest.head.id == newest && heads > 0, "a manifest that opens is listed");
        }
        whole.into()
    })
    .memory(2 << 30)
}

/// A reference to a frame, and the pack that it leads into.
fn frame(clear: Rc<Fixture>) -> Target {
    let shard = clear.manifests().pop().expect("a golden manifest").body.shards[0].clone();
    let key = clear.pack_of(PackKind::Meta, &shard.frame);
    let FrameRef { session, seq, offset, stored, raw } = shard.frame;
    let numbers = [seq, offset, stored, raw].map(u32::to_le_bytes).concat();
    let seed = [&numbers[..], &clear.objects[&key]].concat();
    Target::new("frame", vec![seed], move |bytes| {
        let (numbers, pack) = bytes.split_at(bytes.len().min(16));
        let number = |at: usize| {
            let bytes = numbers.get(at * 4..at * 4 + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        let frame =
            FrameRef { session, seq: number(0), offset: number(1), stored: number(2), raw: number(3) };
        let store = clear.with(&key, pack);
        let read = clear.run(async { store.reader().await?.frame(PackKind::Meta, &frame).await });
        if let Ok(opened) = &read {
            assert_eq!(opened.len(), frame.raw as usize);
        }
        read.into()
    })
    .memory(FRAME_MEMORY)
}

/// The fields that the check of a WAL object's header covers, and the check.
const WAL_FIELDS: usize = 200;
const WAL_CHECK: usize = 16;

/// An archived segment of 1 MiB behind a byte that asks for a right check of the header: in clear it
/// has a key of zeros, so that whoever damages the fields can make them fit.
fn wal_object() -> Target {
    let fixture = Fixture::empty();
    let size = SegmentSize::try_from(1 << 20).expect("a size");
    let name = WalName::Segment(WalSegment { timeline: Timeline(1), number: 3 });
    let store = fixture.store(SystemId(7)).wal(size);
    let mut encoder = store.encoder(&name).expect("an encoder");
    for piece in 0..4u8 {
        let content: Vec<u8> = (0..256 << 10).map(|at: u32| (at % 251) as u8 ^ piece).collect();
        encoder.feed(&content).expect("a piece");
    }
    fixture.run(store.store(encoder.finish(Lsn(4 << 20)).expect("an object"))).expect("stored");
    let fixture = fixture.settled();
    let key = fixture.key_of(&format!("wal/00000001/00000000/{}", name.file_name(size)));
    let seed = [&[1][..], &fixture.objects[&key]].concat();
    Target::new("wal-object", vec![seed], move |bytes| {
        let (ask, object) = bytes.split_at(bytes.len().min(1));
        let mut object = object.to_vec();
        if ask.first() == Some(&1) && object.len() >= WAL_FIELDS + WAL_CHECK {
            let check = blake3::keyed_hash(&[0; 32], &object[..WAL_FIELDS]);
            object[WAL_FIELDS..WAL_FIELDS + WAL_CHECK].copy_from_slice(&check.as_bytes()[..WAL_CHECK]);
        }
        let _ = WalHeader::decode(&object, &[0; 32]);
        let store = fixture.with(&key, &object);
        let mut out = Vec::new();
        let fetched = fixture.run(store.wal(size).fetch(&name, &mut out));
        if fetched.is_ok() {
            assert_eq!(out.len(), 1 << 20, "only whole segments are handed over");
        }
        fetched.into()
    })
    .memory(64 << 20)
}
