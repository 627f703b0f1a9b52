//! Checks of relation pages, for jobs that know nothing of PostgreSQL's bytes.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::lsn::Lsn;

/// A page whose checksum is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadPage {
    /// The page's index in the bytes that were checked.
    pub index: u32,
    /// The checksum in the page.
    pub found: u16,
    /// The checksum of its bytes.
    pub expected: u16,
}

/// Knows the page format of one cluster. Pure: no I/O.
pub trait PageChecker: Send + Sync + fmt::Debug {
    /// Bytes in a page (BLCKSZ).
    fn page_size(&self) -> usize;

    /// Whether pages carry checksums. Without them, only the shape of new pages is checked.
    fn has_checksums(&self) -> bool;

    /// Checks whole pages of a relation file and appends the bad ones to `bad`.
    ///
    /// `first_block` is the block number of the first page within the relation fork, counted
    /// across its 1 GiB files. A last, incomplete page is left out. New pages (no content yet)
    /// must be all zero.
    fn check(&self, pages: &[u8], first_block: u32, bad: &mut Vec<BadPage>);

    /// The LSN of the last change of a page, from its header.
    fn page_lsn(&self, page: &[u8]) -> Lsn;

    /// For the file name of a relation's segment (`16384`, `16384_fsm`, `16384.2`) inside a
    /// database directory: the block number of its first page. `None` when it is not one.
    fn first_block(&self, path: &str) -> Option<u32>;
}
