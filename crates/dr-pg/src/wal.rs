//! WAL segments (`src/include/access/xlog_internal.h`).

use dr_core::guard::Guard;
use dr_core::port::{SegmentFacts, SegmentInspector, WalFault, WalFormat};
use dr_core::{Lsn, SegmentSize, SystemId, Timeline, WalName, WalSegment};

/// Bytes of a WAL page (`XLOG_BLCKSZ`).
const PAGE: usize = 8192;

/// `XLOG_PAGE_MAGIC` of PostgreSQL 15, 16, 17, 18.
const MAGICS: [u16; 4] = [0xD110, 0xD113, 0xD116, 0xD118];

/// `XLP_LONG_HEADER`: the first page of a segment has the long header.
const LONG_HEADER: u16 = 0x0002;

/// The WAL format of PostgreSQL 15 to 18.
#[derive(Clone, Copy, Debug, Default)]
pub struct PgWal;

impl WalFormat for PgWal {
    fn inspect(
        &self,
        name: &WalName,
        size: SegmentSize,
        expected: SystemId,
    ) -> Result<Box<dyn SegmentInspector>, WalFault> {
        let file_name = name.file_name(size);
        let (segment, partial) = match name {
            WalName::Segment(segment) => (*segment, false),
            WalName::Partial(segment) => (*segment, true),
            _ => return Err(WalFault::BadName { name: file_name }),
        };
        let facts = SegmentFacts {
            system_id: expected,
            timeline: segment.timeline,
            size,
            filled_to: segment.start(size),
        };
        Ok(Box::new(Inspector { name: file_name, segment, partial, facts, magic: 0, fed: 0, ended: false }))
    }
}

struct Inspector {
    name: String,
    segment: WalSegment,
    partial: bool,
    facts: SegmentFacts,
    magic: u16,
    fed: u64,
    /// A page without content was seen: nothing may follow it.
    ended: bool,
}

fn u16_at(page: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([page[at], page[at + 1]])
}

fn u32_at(page: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
}

fn u64_at(page: &[u8], at: usize) -> u64 {
    u64::from(u32_at(page, at)) | u64::from(u32_at(page, at + 4)) << 32
}

impl SegmentInspector for Inspector {
    fn feed(&mut self, bytes: &[u8]) -> Result<(), WalFault> {
        for page in bytes.chunks(PAGE) {
            if page.len() == PAGE && Guard::WalSegmentCheck.holds() {
                self.page(page)?;
            }
            self.fed += page.len() as u64;
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<SegmentFacts, WalFault> {
        let expected = self.facts.size.bytes();
        if self.fed != expected && Guard::WalSegmentCheck.holds() {
            return Err(WalFault::BadLength { name: self.name, found: self.fed, expected });
        }
        Ok(self.facts)
    }
}

impl Inspector {
    fn page(&mut self, page: &[u8]) -> Result<(), WalFault> {
        if self.fed == 0 {
            return self.first_page(page);
        }
        let expected = self.segment.start(self.facts.size).0 + self.fed;
        if u16_at(page, 0) == 0 {
            // After a forced switch the rest of a segment is zeros, page headers included
            // (CopyXLogRecordToWAL in xlog.c).
            if !page.iter().all(|b| *b == 0) {
                return Err(self.bad("the page has no header but content"));
            }
            self.ended = true;
            return Ok(());
        }
        // A partial segment may end in pages of the file's earlier use.
        let stale = self.partial && (self.ended || u64_at(page, 8) != expected);
        if stale {
            self.ended = true;
            return Ok(());
        }
        if self.ended {
            return Err(self.bad("content follows the end of the WAL"));
        }
        if u16_at(page, 0) != self.magic {
            return Err(self.bad("the page is of another version of PostgreSQL"));
        }
        if u64_at(page, 8) != expected {
            return Err(self.bad(&format!("the page says that it is at {}", Lsn(u64_at(page, 8)))));
        }
        self.timeline(page)?;
        self.facts.filled_to = Lsn(expected + PAGE as u64);
        Ok(())
    }

    fn first_page(&mut self, page: &[u8]) -> Result<(), WalFault> {
        self.magic = u16_at(page, 0);
        if !MAGICS.contains(&self.magic) {
            return Err(self.bad("it does not begin as WAL of PostgreSQL 15 to 18 does"));
        }
        if u16_at(page, 2) & LONG_HEADER == 0 {
            return Err(self.bad("its first page has no long header"));
        }
        let found = SystemId(u64_at(page, 24));
        if found != self.facts.system_id && Guard::WalSystemId.holds() {
            let (name, expected) = (self.name.clone(), self.facts.system_id);
            return Err(WalFault::WrongCluster { name, found, expected });
        }
        let size = u64::from(u32_at(page, 32));
        if size != self.facts.size.bytes() {
            let reason = format!("its segments have {size} bytes");
            return Err(WalFault::WrongPlace { name: self.name.clone(), reason });
        }
        if u32_at(page, 36) as usize != PAGE {
            return Err(self.bad("its pages are not of 8 KiB"));
        }
        let at = Lsn(u64_at(page, 8));
        let start = self.segment.start(self.facts.size);
        if at != start {
            let reason = format!("it begins at {at} instead of {start}");
            return Err(WalFault::WrongPlace { name: self.name.clone(), reason });
        }
        self.timeline(page)?;
        self.facts.timeline = Timeline(u32_at(page, 4));
        self.facts.filled_to = Lsn(start.0 + PAGE as u64);
        Ok(())
    }

    /// Just after a promotion a segment begins with pages of the timeline before.
    fn timeline(&self, page: &[u8]) -> Result<(), WalFault> {
        let found = u32_at(page, 4);
        if found == 0 || found > self.segment.timeline.0 {
            let reason = format!("a page is of timeline {found}");
            return Err(WalFault::WrongPlace { name: self.name.clone(), reason });
        }
        Ok(())
    }

    fn bad(&self, reason: &str) -> WalFault {
        WalFault::BadPage { name: self.name.clone(), offset: self.fed, reason: reason.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;
    const SYSTEM: SystemId = SystemId(77);

    fn segment() -> WalSegment {
        WalSegment { timeline: Timeline(2), number: 5 }
    }

    fn made() -> Vec<u8> {
        let mut bytes = vec![0u8; SIZE as usize];
        for (index, page) in bytes.chunks_exact_mut(PAGE).enumerate() {
            page[0..2].copy_from_slice(&MAGICS[0].to_le_bytes());
            page[4..8].copy_from_slice(&2u32.to_le_bytes());
            page[8..16].copy_from_slice(&(5 * SIZE + (index * PAGE) as u64).to_le_bytes());
            page[100] = 9;
        }
        bytes[2..4].copy_from_slice(&LONG_HEADER.to_le_bytes());
        bytes[24..32].copy_from_slice(&SYSTEM.0.to_le_bytes());
        bytes[32..36].copy_from_slice(&(SIZE as u32).to_le_bytes());
        bytes[36..40].copy_from_slice(&(PAGE as u32).to_le_bytes());
        bytes
    }

    fn inspect(name: &WalName, bytes: &[u8]) -> Result<SegmentFacts, WalFault> {
        let size = SegmentSize::try_from(SIZE).expect("a size");
        let mut inspector = PgWal.inspect(name, size, SYSTEM)?;
        bytes.chunks(PAGE * 4).try_for_each(|piece| inspector.feed(piece))?;
        inspector.finish()
    }

    #[test]
    fn a_whole_segment_passes_and_says_how_far_it_is_filled() {
        let name = WalName::Segment(segment());
        assert_eq!(inspect(&name, &made()).expect("a segment").filled_to, Lsn(6 * SIZE));
        let mut switched = made();
        switched[PAGE * 10..].fill(0);
        let facts = inspect(&name, &switched).expect("a segment after a switch");
        assert_eq!(facts.filled_to, Lsn(5 * SIZE + 10 * PAGE as u64));
    }

    #[test]
    fn a_damaged_misplaced_or_cut_segment_is_refused() {
        let name = WalName::Segment(segment());
        type Damage = (&'static str, fn(&mut Vec<u8>));
        let damages: [Damage; 9] = [
            ("magic", |b| b[0] ^= 1),
            ("no long header", |b| b[2] = 0),
            ("another place", |b| b[9] ^= 1),
            ("a later timeline", |b| b[4] = 3),
            ("a page moved", |b| b[PAGE * 3 + 9] ^= 1),
            ("a page of another version", |b| b[PAGE * 3] ^= 3),
            ("a hole of zeros", |b| b[PAGE * 3..PAGE * 4].fill(0)),
            ("a header of zeros", |b| b[PAGE * 3..PAGE * 3 + 24].fill(0)),
            ("cut", |b| b.truncate(PAGE * 20)),
        ];
        for (what, damage) in damages {
            let mut bytes = made();
            damage(&mut bytes);
            assert!(inspect(&name, &bytes).is_err(), "{what}");
        }
    }

    #[test]
    fn wal_of_another_cluster_is_refused() {
        let mut bytes = made();
        bytes[24] ^= 1;
        let refused = inspect(&WalName::Segment(segment()), &bytes);
        assert!(matches!(refused, Err(WalFault::WrongCluster { .. })));
    }

    #[test]
    fn a_partial_segment_may_end_in_old_pages() {
        let mut bytes = made();
        for page in bytes[PAGE * 10..].chunks_exact_mut(PAGE) {
            page[9] ^= 1;
        }
        assert!(inspect(&WalName::Segment(segment()), &bytes).is_err());
        let facts = inspect(&WalName::Partial(segment()), &bytes).expect("a partial segment");
        assert_eq!(facts.filled_to, Lsn(5 * SIZE + 10 * PAGE as u64));
    }
}
