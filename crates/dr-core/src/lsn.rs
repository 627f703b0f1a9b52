//! Positions in the write-ahead log and the names of its files.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::guard::InvalidText;

/// A position in the write-ahead log, in bytes.
///
/// Written as PostgreSQL writes it: two hexadecimal halves, `16/B374D848`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Bytes from `earlier` to `self`; zero when `earlier` is not earlier.
    pub fn since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl FromStr for Lsn {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let bad = || InvalidText::new("an LSN such as 16/B374D848", text);
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        let half = |part: &str| {
            let hex = !part.is_empty() && part.len() <= 8 && part.bytes().all(|b| b.is_ascii_hexdigit());
            hex.then(|| u64::from_str_radix(part, 16).ok()).flatten()
        };
        match (half(high), half(low)) {
            (Some(high), Some(low)) => Ok(Lsn(high << 32 | low)),
            _ => Err(bad()),
        }
    }
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A timeline of a cluster; the first is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timeline(pub u32);

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Bytes in one WAL segment file: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct SegmentSize(u32);

impl SegmentSize {
    /// PostgreSQL's default, 16 MiB.
    pub const DEFAULT: SegmentSize = SegmentSize(16 << 20);

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }
}

impl TryFrom<u64> for SegmentSize {
    type Error = InvalidText;

    fn try_from(bytes: u64) -> Result<Self, InvalidText> {
        let valid = bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes);
        match u32::try_from(bytes) {
            Ok(size) if valid => Ok(SegmentSize(size)),
            _ => Err(InvalidText::new(
                "a WAL segment size (a power of two from 1 MiB to 1 GiB, in bytes)",
                &bytes.to_string(),
            )),
        }
    }
}

impl From<SegmentSize> for u64 {
    fn from(size: SegmentSize) -> u64 {
        size.bytes()
    }
}

/// One segment of the write-ahead log: a timeline and a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalSegment {
    /// The timeline in whose name the segment was written.
    pub timeline: Timeline,
    /// The segment's number: its first byte's LSN divided by the segment size.
    pub number: u64,
}

impl WalSegment {
    /// The segment that holds the byte at `lsn`.
    pub fn holding(timeline: Timeline, lsn: Lsn, size: SegmentSize) -> Self {
        WalSegment { timeline, number: lsn.0 / size.bytes() }
    }

    /// The LSN of the segment's first byte.
    pub fn start(self, size: SegmentSize) -> Lsn {
        Lsn(self.number * size.bytes())
    }

    /// The LSN after the segment's last byte.
    pub fn end(self, size: SegmentSize) -> Lsn {
        Lsn((self.number + 1) * size.bytes())
    }

    /// The file name, 24 hexadecimal digits (`XLogFileName` in `xlog_internal.h`).
    pub fn file_name(self, size: SegmentSize) -> String {
        let per_log = 0x1_0000_0000 / size.bytes();
        format!("{:08X}{:08X}{:08X}", self.timeline.0, self.number / per_log, self.number % per_log)
    }

    /// Reads a file name of 24 hexadecimal digits; `None` when it is not one of this size.
    pub fn parse(name: &str, size: SegmentSize) -> Option<Self> {
        if name.len() != 24 || !is_upper_hex(name) {
            return None;
        }
        let part = |at: usize| u64::from_str_radix(&name[at..at + 8], 16).ok();
        let (timeline, log, low) = (part(0)?, part(8)?, part(16)?);
        let per_log = 0x1_0000_0000 / size.bytes();
        if low >= per_log || timeline == 0 {
            return None;
        }
        Some(WalSegment { timeline: Timeline(timeline as u32), number: log * per_log + low })
    }
}

/// Whether these are hexadecimal digits as PostgreSQL writes them: other names are other files.
fn is_upper_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'))
}

/// What PostgreSQL asks an archive to keep or to fetch, by the file's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalName {
    /// A complete segment.
    Segment(WalSegment),
    /// The last, incomplete segment of a timeline, left by a promotion.
    Partial(WalSegment),
    /// The history of a timeline.
    History(Timeline),
    /// The label of a base backup: segment and byte offset within it.
    Label(WalSegment, u32),
}

impl WalName {
    /// Reads the name that PostgreSQL passes as `%f` (see `xlog_internal.h`).
    pub fn parse(name: &str, size: SegmentSize) -> Result<Self, InvalidText> {
        let bad = || InvalidText::new("a WAL file name (segment, .partial, .history or .backup)", name);
        if let Some(stem) = name.strip_suffix(".history") {
            let hex = stem.len() == 8 && is_upper_hex(stem);
            let timeline = hex.then(|| u32::from_str_radix(stem, 16).ok()).flatten();
            return timeline.filter(|t| *t > 0).map(|t| WalName::History(Timeline(t))).ok_or_else(bad);
        }
        if let Some(stem) = name.strip_suffix(".partial") {
            return WalSegment::parse(stem, size).map(WalName::Partial).ok_or_else(bad);
        }
        if let Some(stem) = name.strip_suffix(".backup") {
            let (segment, offset) = stem.split_once('.').ok_or_else(bad)?;
            let segment = WalSegment::parse(segment, size).ok_or_else(bad)?;
            let hex = offset.len() == 8 && is_upper_hex(offset);
            let offset = hex.then(|| u32::from_str_radix(offset, 16).ok()).flatten().ok_or_else(bad)?;
            return Ok(WalName::Label(segment, offset));
        }
        WalSegment::parse(name, size).map(WalName::Segment).ok_or_else(bad)
    }

    /// The file name as PostgreSQL writes it.
    pub fn file_name(&self, size: SegmentSize) -> String {
        match self {
            WalName::Segment(segment) => segment.file_name(size),
            WalName::Partial(segment) => format!("{}.partial", segment.file_name(size)),
            WalName::History(timeline) => format!("{:08X}.history", timeline.0),
            WalName::Label(segment, offset) => {
                format!("{}.{offset:08X}.backup", segment.file_name(size))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_reads_back_as_written() {
        for lsn in [Lsn(0), Lsn(1), Lsn(0x16_B374_D848), Lsn(u64::MAX)] {
            assert_eq!(lsn.to_string().parse::<Lsn>().ok(), Some(lsn));
        }
        for text in ["", "/", "1", "1/", "/1", "1/123456789", "g/1", "+1/1", "1/1/1"] {
            assert!(text.parse::<Lsn>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_segment_name_reads_back_for_every_segment_size() {
        for shift in 20..=30 {
            let size = SegmentSize::try_from(1u64 << shift).expect("a valid size");
            for number in [0, 1, 255, 256, 4095, 4096, 1 << 20] {
                let segment = WalSegment { timeline: Timeline(3), number };
                let name = segment.file_name(size);
                assert_eq!(WalSegment::parse(&name, size), Some(segment), "{name}");
            }
        }
    }

    #[test]
    fn every_kind_of_wal_name_reads_back() {
        let size = SegmentSize::DEFAULT;
        for name in [
            "000000010000000A000000FE",
            "000000010000000A000000FE.partial",
            "00000002.history",
            "000000010000000A000000FE.00000028.backup",
        ] {
            let parsed = WalName::parse(name, size).expect(name);
            assert_eq!(parsed.file_name(size), name);
        }
        for name in [
            "",
            "x",
            "000000010000000A00000100",
            "00000000.history",
            "000000010000000a000000fe",
            "000000010000000A000000FE.0000002d.backup",
            "RECOVERYXLOG",
        ] {
            assert!(WalName::parse(name, size).is_err(), "{name:?} was accepted");
        }
    }
}
