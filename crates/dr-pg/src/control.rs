//! `global/pg_control` (`src/include/catalog/pg_control.h`).
//!
//! The offsets used here are the same in the control versions 1300 (PostgreSQL 13 to 16), 1700 and
//! 1800; only the place of the CRC moves. An unknown version is refused.

use std::path::Path;

use dr_core::port::{ClusterError, ControlFacts};
use dr_core::{Lsn, SegmentSize, SystemId, Timeline};

/// Bytes of the file (`PG_CONTROL_FILE_SIZE`).
const FILE_LEN: usize = 8192;

/// Control version → offset of its CRC-32C.
const KNOWN: [(u32, usize); 3] = [(1300, 288), (1700, 288), (1800, 292)];

/// `DBState`, as `pg_controldata` words it.
const STATES: [&str; 7] = [
    "starting up",
    "shut down",
    "shut down in recovery",
    "shutting down",
    "in crash recovery",
    "in archive recovery",
    "in production",
];

/// Reads and checks the file below a data directory.
pub fn read(data: &Path) -> Result<ControlFacts, ClusterError> {
    let path = data.join("global/pg_control");
    let bytes = std::fs::read(&path).map_err(|source| ClusterError::File {
        operation: "read",
        path: path.display().to_string(),
        source,
    })?;
    parse(&bytes, &path.display().to_string())
}

/// Reads and checks the bytes of the file.
pub fn parse(bytes: &[u8], path: &str) -> Result<ControlFacts, ClusterError> {
    let damaged = |reason: &str| ClusterError::Damaged { path: path.to_owned(), reason: reason.to_owned() };
    if bytes.len() < FILE_LEN {
        return Err(damaged("it is too short"));
    }
    let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    let version = u32_at(8);
    let Some((_, crc_at)) = KNOWN.iter().find(|(known, _)| *known == version) else {
        return Err(ClusterError::Unsupported {
            what: format!("{path} of control version {version}"),
            reason: "it is not of PostgreSQL 15 to 18".into(),
        });
    };
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &bytes[..*crc_at]) as u32;
    if crc != u32_at(*crc_at) {
        return Err(damaged("its checksum is wrong"));
    }
    let state = u32_at(16) as usize;
    let segment_size = SegmentSize::try_from(u64::from(u32_at(228)))
        .map_err(|error| damaged(&format!("its WAL segment size is wrong: {error}")))?;
    Ok(ControlFacts {
        system_id: SystemId(u64_at(0)),
        control_version: version,
        catalog_version: u32_at(12),
        state: STATES.get(state).copied().unwrap_or("unknown").to_owned(),
        is_shut_down: state == 1 || state == 2,
        redo: Lsn(u64_at(40)),
        timeline: Timeline(u32_at(48)),
        min_recovery_end: Lsn(u64_at(136)),
        page_size: u32_at(216),
        relation_segment_pages: u32_at(220),
        segment_size,
        checksums: u32_at(252) > 0,
    })
}
