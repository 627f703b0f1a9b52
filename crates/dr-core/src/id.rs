//! Identities: of a cluster, of a backup.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::guard::InvalidText;

/// PostgreSQL's system identifier: the identity of a cluster and of all its copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for SystemId {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        text.parse()
            .map(SystemId)
            .map_err(|_| InvalidText::new("a system identifier (a decimal number)", text))
    }
}

impl Serialize for SystemId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SystemId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The identity of a backup and of the session that writes it: `20261122T110850Z-1a2b3c4d`.
///
/// It sorts by time for people. No rule orders by it: rules order by system identifier, timeline
/// and LSN, because clocks step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId {
    /// Seconds since 1970-01-01 UTC.
    seconds: u64,
    /// Chosen at random by the session.
    random: u32,
}

impl BackupId {
    /// Bytes of the packed form.
    pub const PACKED_LEN: usize = 12;

    /// An identity for a session that begins at `at` (truncated to the second).
    pub fn new(at: Timestamp, random: u32) -> Self {
        BackupId { seconds: at.as_second().max(0) as u64, random }
    }

    /// The second at which the session began.
    pub fn time(self) -> Timestamp {
        Timestamp::from_second(self.seconds as i64).unwrap_or(Timestamp::MAX)
    }

    /// The packed form: `u64` seconds, `u32` random, both little-endian.
    pub fn pack(self) -> [u8; Self::PACKED_LEN] {
        let mut out = [0; Self::PACKED_LEN];
        out[..8].copy_from_slice(&self.seconds.to_le_bytes());
        out[8..].copy_from_slice(&self.random.to_le_bytes());
        out
    }

    /// Reads the packed form.
    pub fn unpack(packed: [u8; Self::PACKED_LEN]) -> Self {
        let mut seconds = [0; 8];
        let mut random = [0; 4];
        seconds.copy_from_slice(&packed[..8]);
        random.copy_from_slice(&packed[8..]);
        BackupId { seconds: u64::from_le_bytes(seconds), random: u32::from_le_bytes(random) }
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:08x}", self.time().strftime("%Y%m%dT%H%M%SZ"), self.random)
    }
}

impl FromStr for BackupId {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let bad = || InvalidText::new("a backup id such as 20261122T110850Z-1a2b3c4d", text);
        let (time, random) = text.split_once('-').ok_or_else(bad)?;
        let hex = random.len() == 8 && random.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !hex || time.len() != 16 {
            return Err(bad());
        }
        let time = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", time).map_err(|_| bad())?;
        let time = time.to_zoned(jiff::tz::TimeZone::UTC).map_err(|_| bad())?.timestamp();
        let random = u32::from_str_radix(random, 16).map_err(|_| bad())?;
        if time.as_second() < 0 {
            return Err(bad());
        }
        Ok(BackupId::new(time, random))
    }
}

impl Serialize for BackupId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BackupId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_id_reads_back_as_text_and_packed() {
        let time: Timestamp = "2026-11-22T11:08:50Z".parse().expect("a time");
        let id = BackupId::new(time, 0x1a2b_3c4d);
        assert_eq!(id.to_string(), "20261122T110850Z-1a2b3c4d");
        assert_eq!(id.to_string().parse::<BackupId>().ok(), Some(id));
        assert_eq!(BackupId::unpack(id.pack()), id);
        for text in [
            "",
            "20261122T110850Z",
            "20261322T110850Z-1a2b3c4d",
            "20261122T110850Z-1A2B3C4D",
            "../x-00000000",
        ] {
            assert!(text.parse::<BackupId>().is_err(), "{text:?} was accepted");
        }
    }
}
