//! What PostgreSQL wrote: pages, WAL, `pg_control`, `backup_label`.

use dr_core::port::{PageChecker, SegmentFacts, WalFault, WalFormat};
use dr_core::{SegmentSize, SystemId, Timeline, WalName, WalSegment};
use dr_pg::history_files::parse_backup_label;
use dr_pg::replication::{TarEvent, TarReader};
use dr_pg::{PgPages, PgWal, control};

use crate::mutate::Chance;
use crate::{Answer, Target};

const PAGE: usize = 8192;
const SEGMENT: u64 = 1 << 20;
const SYSTEM: u64 = 77;

pub(super) fn targets() -> Vec<Target> {
    let label = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000060\n\
                 BACKUP METHOD: streamed\nSTART TIME: 2026-11-27 03:00:00 UTC\nLABEL: dr\nSTART TIMELINE: 1\n";
    vec![
        Target::new("pages", vec![good_page(1), good_pages()], pages),
        Target::new("wal-segment", vec![wal_pages(3), wal_pages(128)], wal_segment),
        Target::new("control-file", [1300, 1700, 1800].map(control_file).to_vec(), read_control),
        Target::new("base-backup-archive", vec![archive(&[0, 700]), archive(&[512, 1])], base_backup_archive),
        Target::new("backup-label", vec![label.as_bytes().to_vec()], |bytes| {
            match parse_backup_label(&String::from_utf8_lossy(bytes)) {
                Some(_) => Answer::Taken,
                None => Answer::Refused("it is no label".into()),
            }
        }),
    ]
}

/// An archive of files with these sizes, as the server writes it.
fn archive(sizes: &[usize]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, size) in sizes.iter().enumerate() {
        let mut header = vec![0; 512];
        let fields =
            [(0, format!("base/1/{number}")), (100, "0000600 ".into()), (124, format!("{size:011o} "))];
        for (at, text) in
            fields.iter().chain(&[(136, "14500000000 ".to_owned()), (257, "ustar\x0000".into())])
        {
            header[*at..*at + text.len()].copy_from_slice(text.as_bytes());
        }
        header[156] = b'0';
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum::<u32>() + 8 * 32;
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend(header);
        out.resize(out.len() + size.next_multiple_of(512), 7);
    }
    out.resize(out.len() + 1024, 0);
    out
}

/// The pieces of an archive are of any size and always come to what the headers say.
fn base_backup_archive(bytes: &[u8]) -> Answer {
    let mut reader = TarReader::new();
    let mut missing = 0;
    for piece in bytes.chunks(usize::from(bytes.first().copied().unwrap_or(1)) * 7 + 1) {
        reader.push(bytes::Bytes::copy_from_slice(piece));
        loop {
            match reader.next() {
                Err(error) => return Answer::Refused(error.to_string()),
                Ok(None) => break,
                Ok(Some(TarEvent::Data(data))) => {
                    assert!(!data.is_empty() && data.len() as u64 <= missing, "content without a header");
                    missing -= data.len() as u64;
                }
                Ok(Some(event)) => {
                    assert_eq!(missing, 0, "a file is cut");
                    if let TarEvent::Entry(entry) = event {
                        missing = entry.size;
                    }
                }
            }
        }
    }
    if reader.is_complete() { Answer::Taken } else { Answer::Refused("it has no end".into()) }
}

/// Content of a page that is all content, with the checksum that it has at block `block`.
fn page_at(block: u32) -> Vec<u8> {
    let mut chance = Chance::new(block.into());
    let mut page: Vec<u8> = (0..PAGE).map(|_| chance.number() as u8).collect();
    page[14..16].copy_from_slice(&8000u16.to_le_bytes());
    page[8..10].fill(0);
    let mut bad = Vec::new();
    checker().check(&page, block, &mut bad);
    if let Some(bad) = bad.first() {
        page[8..10].copy_from_slice(&bad.expected.to_le_bytes());
    }
    page
}

fn good_page(block: u32) -> Vec<u8> {
    [&block.to_le_bytes()[..], &page_at(block)].concat()
}

/// Three pages, of which the second was never used.
fn good_pages() -> Vec<u8> {
    [&7u32.to_le_bytes()[..], &page_at(7), &[0; PAGE], &page_at(9)].concat()
}

fn checker() -> PgPages {
    PgPages::new(PAGE as u32, 131_072, true)
}

/// A block number and pages.
fn pages(bytes: &[u8]) -> Answer {
    let (block, pages) = bytes.split_at(bytes.len().min(4));
    let block = block.iter().fold(0u32, |sum, byte| sum << 8 | u32::from(*byte)).swap_bytes();
    let mut bad = Vec::new();
    for checker in [checker(), PgPages::new(1024, 1, true), PgPages::new(32_768, u32::MAX, false)] {
        bad.clear();
        checker.check(pages, block, &mut bad);
        assert!(bad.len() <= pages.len() / checker.page_size(), "a page is bad once");
        checker.page_lsn(pages);
        checker.first_block(&String::from_utf8_lossy(&pages[..pages.len().min(200)]));
    }
    bad.clear();
    checker().check(pages, block, &mut bad);
    match bad.len() {
        0 => Answer::Taken,
        n => Answer::Refused(format!("{} bad", if n == 1 { "one is" } else { "several are" })),
    }
}

/// The first pages of a segment that was switched after them.
fn wal_pages(count: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; count * PAGE];
    for (index, page) in bytes.chunks_exact_mut(PAGE).enumerate() {
        page[0..2].copy_from_slice(&0xD116u16.to_le_bytes());
        page[4..8].copy_from_slice(&2u32.to_le_bytes());
        page[8..16].copy_from_slice(&(5 * SEGMENT + (index * PAGE) as u64).to_le_bytes());
        page[100] = 9;
    }
    bytes[2..4].copy_from_slice(&2u16.to_le_bytes());
    bytes[24..32].copy_from_slice(&SYSTEM.to_le_bytes());
    bytes[32..36].copy_from_slice(&(SEGMENT as u32).to_le_bytes());
    bytes[36..40].copy_from_slice(&(PAGE as u32).to_le_bytes());
    bytes
}

/// The input, and zeros up to the end of the segment.
fn wal_segment(bytes: &[u8]) -> Answer {
    let segment = WalSegment { timeline: Timeline(2), number: 5 };
    let read = |name: &WalName| -> Result<SegmentFacts, WalFault> {
        let size = SegmentSize::try_from(SEGMENT).unwrap_or(SegmentSize::DEFAULT);
        let mut inspector = PgWal.inspect(name, size, SystemId(SYSTEM))?;
        let whole = bytes.len() / PAGE * PAGE;
        bytes[..whole].chunks(PAGE * 4).try_for_each(|piece| inspector.feed(piece))?;
        let mut last = bytes[whole..].to_vec();
        let mut missing = (SEGMENT as usize).saturating_sub(whole);
        last.resize(PAGE, 0);
        while missing > 0 {
            inspector.feed(&last)?;
            last.fill(0);
            missing -= PAGE;
        }
        inspector.finish()
    };
    let _ = read(&WalName::Partial(segment));
    let facts = read(&WalName::Segment(segment));
    if let Ok(facts) = &facts {
        assert_eq!(facts.system_id, SystemId(SYSTEM), "only this cluster's WAL is taken");
        assert!(facts.filled_to.0 >= 5 * SEGMENT && facts.filled_to.0 <= 6 * SEGMENT, "{facts:?}");
        assert!(facts.timeline <= Timeline(2) && facts.timeline.0 > 0, "{facts:?}");
    }
    facts.into()
}

const CRC_AT: [(u32, usize); 3] = [(1300, 288), (1700, 288), (1800, 292)];

/// The part of a control file that means something, behind a byte that asks for a right checksum.
fn control_file(version: u32) -> Vec<u8> {
    let mut bytes = vec![0; 300];
    for (at, number) in [(8, version), (12, 202_209_061), (16, 6), (48, 1), (216, 8192), (220, 131_072)] {
        bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
    }
    bytes[..8].copy_from_slice(&SYSTEM.to_le_bytes());
    bytes[228..232].copy_from_slice(&(16u32 << 20).to_le_bytes());
    bytes[252] = 1;
    [&[1][..], &bytes].concat()
}

fn read_control(bytes: &[u8]) -> Answer {
    let (ask, rest) = bytes.split_at(bytes.len().min(1));
    let mut file = rest.to_vec();
    if rest.len() < PAGE {
        file.resize(PAGE, 0);
    }
    let version = u32::from_le_bytes([file[8], file[9], file[10], file[11]]);
    if let (Some(1), Some((_, at))) = (ask.first(), CRC_AT.iter().find(|(known, _)| *known == version)) {
        let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &file[..*at]) as u32;
        file[*at..*at + 4].copy_from_slice(&crc.to_le_bytes());
    }
    control::parse(&file, "pg_control").into()
}
