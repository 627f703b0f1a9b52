//! The archives inside a base backup: ustar as PostgreSQL writes it (`src/port/tar.c`).
//!
//! PostgreSQL writes regular files, directories and symbolic links, names up to 99 bytes, sizes in
//! octal or, from 8 GiB on, in base 256, and no extensions. Anything else is an error: a reader
//! that guesses loses step and takes content for headers.

use bytes::Bytes;
use thiserror::Error;

const BLOCK: usize = 512;

/// What kind of thing an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link and its target.
    Link(Vec<u8>),
}

/// The head of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarEntry {
    /// The path, without `./` before it and `/` after it; any bytes but zero.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: TarKind,
    /// Permission bits.
    pub mode: u32,
    /// Bytes of content that follow.
    pub size: u64,
    /// Last change, in seconds since 1970.
    pub mtime: u64,
}

/// What comes next in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarEvent {
    /// An entry begins; its content follows.
    Entry(TarEntry),
    /// Content of the entry, never empty. All pieces together are its size.
    Data(Bytes),
    /// The archive is at its end.
    End,
}

/// What is wrong with an archive.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the archive is damaged at byte {at}: {reason}")]
pub struct TarError {
    /// The place in the archive.
    pub at: u64,
    /// What is wrong.
    pub reason: &'static str,
}

#[derive(Debug)]
enum State {
    /// Bytes of a header so far.
    Header(Vec<u8>),
    /// Bytes of content and of padding to come.
    Content(u64, u64),
    /// Zero blocks after the first.
    Ended,
}

/// Reads an archive that arrives in pieces. Memory: one piece and one header.
#[derive(Debug)]
pub struct TarReader {
    state: State,
    input: Bytes,
    at: u64,
}

impl Default for TarReader {
    fn default() -> Self {
        Self::new()
    }
}

impl TarReader {
    /// A reader at the beginning of an archive.
    pub fn new() -> Self {
        TarReader { state: State::Header(Vec::with_capacity(BLOCK)), input: Bytes::new(), at: 0 }
    }

    /// Gives the next piece; the one before must be used up ([`next`](Self::next) said `None`).
    pub fn push(&mut self, piece: Bytes) {
        debug_assert!(self.input.is_empty(), "the last piece is not used up");
        self.input = piece;
    }

    fn take(&mut self, len: usize) -> Bytes {
        self.at += len as u64;
        self.input.split_to(len)
    }

    fn wrong(&self, reason: &'static str) -> TarError {
        TarError { at: self.at, reason }
    }

    /// What comes next; `None`: the next piece is needed.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<TarEvent>, TarError> {
        while !self.input.is_empty() {
            match &mut self.state {
                State::Header(block) => {
                    let want = (BLOCK - block.len()).min(self.input.len());
                    block.extend_from_slice(&self.input[..want]);
                    let whole = (block.len() == BLOCK).then(|| std::mem::take(block));
                    self.take(want);
                    let Some(block) = whole else { continue };
                    if block.iter().all(|byte| *byte == 0) {
                        self.state = State::Ended;
                        return Ok(Some(TarEvent::End));
                    }
                    let entry = header(&block).map_err(|reason| self.wrong(reason))?;
                    let padding = (BLOCK as u64 - entry.size % BLOCK as u64) % BLOCK as u64;
                    self.state = State::Content(entry.size, padding);
                    return Ok(Some(TarEvent::Entry(entry)));
                }
                State::Content(0, 0) => self.state = State::Header(Vec::with_capacity(BLOCK)),
                State::Content(0, padding) => {
                    let skip = (*padding).min(self.input.len() as u64);
                    *padding -= skip;
                    self.take(skip as usize);
                }
                State::Content(left, _) => {
                    let len = (*left).min(self.input.len() as u64);
                    *left -= len;
                    return Ok(Some(TarEvent::Data(self.take(len as usize))));
                }
                State::Ended => {
                    if self.input.iter().any(|byte| *byte != 0) {
                        return Err(self.wrong("something follows its end"));
                    }
                    self.take(self.input.len());
                }
            }
        }
        Ok(None)
    }

    /// Whether nothing of the archive has arrived.
    pub fn is_unused(&self) -> bool {
        self.at == 0 && self.input.is_empty()
    }

    /// Whether the archive may end here.
    pub fn is_complete(&self) -> bool {
        matches!(self.state, State::Ended)
    }
}

fn header(block: &[u8]) -> Result<TarEntry, &'static str> {
    let sum: u32 = block
        .iter()
        .enumerate()
        .map(|(at, b)| if (148..156).contains(&at) { 32 } else { u32::from(*b) })
        .sum();
    if number(&block[148..156]) != Some(u64::from(sum)) {
        return Err("a header's checksum is wrong");
    }
    let name = until_zero(&block[..100]);
    let prefix = if &block[257..262] == b"ustar" { until_zero(&block[345..500]) } else { &[] };
    let mut path = if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() };
    while path.last() == Some(&b'/') {
        path.pop();
    }
    if path.starts_with(b"./") {
        path.drain(..2);
    }
    let size = number(&block[124..136]).ok_or("a size is no number")?;
    let kind = match block[156] {
        b'0' | 0 => TarKind::File,
        b'5' => TarKind::Directory,
        b'2' => TarKind::Link(until_zero(&block[157..257]).to_vec()),
        _ => return Err("an entry is of a kind that PostgreSQL does not write"),
    };
    if kind != TarKind::File && size != 0 {
        return Err("a directory or link has content");
    }
    if path.is_empty() || path == b"." {
        return Err("an entry has no name");
    }
    let mode = number(&block[100..108]).ok_or("a mode is no number")? as u32 & 0o7777;
    let mtime = number(&block[136..148]).ok_or("a time is no number")?;
    Ok(TarEntry { path, kind, mode, size, mtime })
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len())]
}

/// Octal digits that end with a space or a zero byte; or, with the top bit set, base 256.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let (high, low) = field.split_at(field.len() - 8);
        let rest_is_zero =
            high.iter().enumerate().all(|(at, b)| if at == 0 { b & 0x7F == 0 } else { *b == 0 });
        // A field of 8 bytes holds its flag in the number's own top byte.
        return match <[u8; 8]>::try_from(low) {
            Ok(low) if rest_is_zero && !high.is_empty() => Some(u64::from_be_bytes(low)),
            _ => None,
        };
    }
    let text = field.split(|b| *b == 0 || *b == b' ').find(|part| !part.is_empty())?;
    text.iter().try_fold(0u64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A header as `tarCreateHeader` writes it.
    fn block(path: &str, kind: u8, target: &str, size: u64) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, path);
        put(100, "0000600 ");
        put(108, "0000000 ");
        put(116, "0000000 ");
        if size < 0o77_777_777_777 {
            put(124, &format!("{size:011o} "));
        }
        put(136, "14500000000 ");
        put(157, target);
        put(257, "ustar\x0000");
        block[156] = kind;
        if size >= 0o77_777_777_777 {
            block[124] = 0x80;
            block[128..136].copy_from_slice(&size.to_be_bytes());
        }
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum::<u32>() + 8 * 32;
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    fn read(archive: &[u8], piece: usize) -> Result<(Vec<(TarEntry, Vec<u8>)>, bool), TarError> {
        let mut reader = TarReader::new();
        let mut files: Vec<(TarEntry, Vec<u8>)> = Vec::new();
        for piece in archive.chunks(piece) {
            reader.push(Bytes::copy_from_slice(piece));
            while let Some(event) = reader.next()? {
                match event {
                    TarEvent::Entry(entry) => files.push((entry, Vec::new())),
                    TarEvent::Data(data) => files.last_mut().unwrap().1.extend_from_slice(&data),
                    TarEvent::End => {}
                }
            }
        }
        Ok((files, reader.is_complete()))
    }

    fn archive(contents: &[Vec<u8>]) -> Vec<u8> {
        let mut out = block("base/1/", b'5', "", 0);
        for (number, content) in contents.iter().enumerate() {
            out.extend(block(&format!("base/1/{number}"), b'0', "", content.len() as u64));
            out.extend(content);
            out.resize(out.len().next_multiple_of(BLOCK), 0);
        }
        out.extend(block("pg_tblspc/16400", b'2', "/space one", 0));
        out.resize(out.len() + 2 * BLOCK, 0);
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_archive_reads_the_same_in_pieces_of_any_size(
            sizes in proptest::collection::vec(0usize..1500, 0..5),
            piece in 1usize..2000,
        ) {
            let contents: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(n, len)| vec![n as u8 + 1; *len]).collect();
            let (files, complete) = read(&archive(&contents), piece).unwrap();
            prop_assert!(complete);
            prop_assert_eq!(files.len(), contents.len() + 2);
            for (number, content) in contents.iter().enumerate() {
                prop_assert_eq!(&files[number + 1].1, content);
            }
            prop_assert_eq!(&files.last().unwrap().0.kind, &TarKind::Link(b"/space one".to_vec()));
            prop_assert_eq!(&files[0].0.path, b"base/1");
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000), piece in 1usize..700) {
            let _ = read(&bytes, piece);
        }

        #[test]
        fn a_flipped_byte_of_a_header_is_noticed(at in 0usize..500, flip in 1u8..) {
            // What ends the checksum's digits is any space or zero.
            prop_assume!(!(154..156).contains(&at));
            let mut archive = archive(&[vec![1; 10]]);
            archive[at] ^= flip;
            prop_assert!(read(&archive, 512).is_err());
        }
    }

    #[test]
    fn a_file_of_8_gib_has_its_size_in_base_256() {
        let mut reader = TarReader::new();
        reader.push(block("big", b'0', "", 9 << 30).into());
        let Some(TarEvent::Entry(entry)) = reader.next().unwrap() else { panic!("no entry") };
        assert_eq!(entry.size, 9 << 30);
        assert_eq!(entry.mode, 0o600);
    }

    #[test]
    fn kinds_and_tails_that_postgresql_does_not_write_are_errors() {
        assert!(read(&block("x", b'L', "", 0), 512).is_err());
        assert!(read(&block("x", b'5', "", 10), 512).is_err());
        let mut tail = archive(&[]);
        tail.extend([7; BLOCK]);
        assert!(read(&tail, 512).unwrap_err().reason.contains("follows"));
        assert!(!read(&archive(&[])[..BLOCK], 512).unwrap().1, "an archive without its end is not complete");
    }
}
