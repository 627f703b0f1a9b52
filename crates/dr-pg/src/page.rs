//! Relation pages (`src/include/storage/bufpage.h`, `checksum_impl.h`).

mod wide;

use dr_core::Lsn;
use dr_core::port::{BadPage, PageChecker};

/// Offset of `pd_checksum`.
const CHECKSUM_AT: usize = 8;
/// Offset of `pd_upper`: zero in a page that was never used.
const UPPER_AT: usize = 14;

/// Sums that the checksum's lanes begin with (`checksumBaseOffsets`).
const LANES: usize = 32;
const BASE: [u32; LANES] = [
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
    0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
    0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
    0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
];
/// The FNV prime.
const PRIME: u32 = 16_777_619;

/// The page format of one cluster.
#[derive(Clone, Debug)]
pub struct PgPages {
    page_size: usize,
    segment_pages: u32,
    checksums: bool,
}

impl PgPages {
    /// The format of a cluster with these properties.
    pub fn new(page_size: u32, relation_segment_pages: u32, checksums: bool) -> Self {
        PgPages { page_size: page_size as usize, segment_pages: relation_segment_pages, checksums }
    }
}

/// The checksum of a page: 32 FNV-1a lanes over its 32-bit words, folded, mixed with the block
/// number (`pg_checksum_page`). The checksum field itself counts as zero.
#[inline(always)]
fn checksum(page: &[u8], block: u32) -> u16 {
    let mut sums = BASE;
    for (row, words) in page.chunks_exact(LANES * 4).enumerate() {
        let mut values = [0u32; LANES];
        for (value, word) in values.iter_mut().zip(words.chunks_exact(4)) {
            *value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        }
        if row == 0 {
            values[CHECKSUM_AT / 4] &= 0xffff_0000;
        }
        mix(&mut sums, &values);
    }
    // Two rounds of zeros mix the last words in.
    mix(&mut sums, &[0; LANES]);
    mix(&mut sums, &[0; LANES]);
    let folded = sums.iter().fold(0, |sum, lane| sum ^ lane) ^ block;
    (folded % 65_535 + 1) as u16
}

#[inline(always)]
fn mix(sums: &mut [u32; LANES], values: &[u32; LANES]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        let mixed = *sum ^ value;
        *sum = mixed.wrapping_mul(PRIME) ^ (mixed >> 17);
    }
}

fn u16_at(page: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([page[at], page[at + 1]])
}

impl PageChecker for PgPages {
    fn page_size(&self) -> usize {
        self.page_size
    }

    fn has_checksums(&self) -> bool {
        self.checksums
    }

    fn check(&self, pages: &[u8], first_block: u32, bad: &mut Vec<BadPage>) {
        for (index, page) in pages.chunks_exact(self.page_size).enumerate() {
            let index = index as u32;
            let found = u16_at(page, CHECKSUM_AT);
            if u16_at(page, UPPER_AT) == 0 {
                // Never used, or a kind of page without this header: all zero, or not a page.
                if self.checksums && page.iter().any(|b| *b != 0) {
                    bad.push(BadPage { index, found, expected: 0 });
                }
                continue;
            }
            if self.checksums {
                let expected = wide::checksum(page, first_block.wrapping_add(index));
                if expected != found {
                    bad.push(BadPage { index, found, expected });
                }
            }
        }
    }

    fn page_lsn(&self, page: &[u8]) -> Lsn {
        // pd_lsn: two 32-bit halves, the high one first (PageXLogRecPtr).
        let half = |at: usize| u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        if page.len() < 8 { Lsn(0) } else { Lsn(u64::from(half(0)) << 32 | u64::from(half(4))) }
    }

    fn first_block(&self, path: &str) -> Option<u32> {
        let mut parts = path.split('/');
        let relation_dir = match parts.next()? {
            "global" => true,
            "base" => parts.next()?.bytes().all(|b| b.is_ascii_digit()),
            // pg_tblspc/<oid>/PG_<major>_<catalogue>/<database>/<file>
            "pg_tblspc" => {
                parts.next().is_some() && parts.next()?.starts_with("PG_") && parts.next().is_some()
            }
            _ => false,
        };
        let file = parts.next()?;
        if !relation_dir || parts.next().is_some() {
            return None;
        }
        let (stem, segment) = match file.split_once('.') {
            Some((stem, segment)) => (stem, number(segment)?),
            None => (file, 0),
        };
        let (node, fork) = stem.split_once('_').unwrap_or((stem, ""));
        number(node)?;
        matches!(fork, "" | "fsm" | "vm" | "init").then(|| segment.saturating_mul(self.segment_pages))
    }
}

fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages() -> PgPages {
        PgPages::new(8192, 131_072, true)
    }

    fn page(block: u32) -> Vec<u8> {
        let mut page: Vec<u8> = (0..8192u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        page[UPPER_AT..UPPER_AT + 2].copy_from_slice(&8000u16.to_le_bytes());
        let sum = checksum(&page, block);
        page[CHECKSUM_AT..CHECKSUM_AT + 2].copy_from_slice(&sum.to_le_bytes());
        page
    }

    #[test]
    fn one_changed_bit_anywhere_makes_a_page_bad() {
        let good = page(7);
        let mut bad = Vec::new();
        pages().check(&good, 7, &mut bad);
        assert!(bad.is_empty());
        for at in (0..8192).step_by(61) {
            let mut changed = good.clone();
            changed[at] ^= 1;
            bad.clear();
            pages().check(&changed, 7, &mut bad);
            assert_eq!(bad.len(), 1, "byte {at}");
        }
        // The same bytes at another place are wrong too.
        bad.clear();
        pages().check(&good, 8, &mut bad);
        assert_eq!(bad.len(), 1);
    }

    #[test]
    fn wide_instructions_give_the_same_sum() {
        for block in [0, 1, 77, u32::MAX] {
            assert_eq!(wide::checksum(&page(block), block), checksum(&page(block), block));
        }
        assert_eq!(wide::checksum(&[0xff; 32768], 5), checksum(&[0xff; 32768], 5));
    }

    #[test]
    fn a_new_page_must_be_all_zero() {
        let mut bad = Vec::new();
        let mut new = vec![0; 8192];
        pages().check(&new, 0, &mut bad);
        assert!(bad.is_empty());
        new[5000] = 1;
        pages().check(&new, 0, &mut bad);
        assert_eq!(bad.len(), 1);
    }

    #[test]
    fn only_relation_files_have_blocks() {
        let first = |path: &str| pages().first_block(path);
        assert_eq!(first("base/5/16384"), Some(0));
        assert_eq!(first("base/5/16384.2"), Some(262_144));
        assert_eq!(first("base/5/16384_fsm"), Some(0));
        assert_eq!(first("global/1262"), Some(0));
        assert_eq!(first("pg_tblspc/16400/PG_15_202209061/5/16401.1"), Some(131_072));
        for path in [
            "base/5/PG_VERSION",
            "base/5/pg_filenode.map",
            "global/pg_control",
            "pg_xact/0000",
            "base/16384",
            "base/5/16384_x",
            "base/5/16384.x",
            "base/5/t3_16384",
            "PG_VERSION",
            "pg_tblspc/16400",
        ] {
            assert_eq!(first(path), None, "{path}");
        }
    }
}
