//! Writing past the page cache.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// What addresses, offsets and lengths must be multiples of: the largest sector in use.
const ALIGN: usize = 4096;

/// Bytes that begin at a multiple of 4,096, as direct writes demand.
#[derive(Debug, Default)]
pub struct PageBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl PageBuffer {
    /// Makes it `len` bytes long. What was there stays; what is new has no meaning.
    pub fn set_len(&mut self, len: usize) -> &mut [u8] {
        if self.start + len > self.bytes.len() {
            let grown = vec![0; len + ALIGN];
            let start = grown.as_ptr().align_offset(ALIGN);
            let old = std::mem::replace(self, PageBuffer { bytes: grown, start, len });
            self[..old.len].copy_from_slice(&old);
        }
        self.len = len;
        self
    }

    /// Makes it `len` bytes long; what is new is zero.
    pub fn extend_with_zeros(&mut self, len: usize) {
        let old = self.len.min(len);
        self.set_len(len)[old..].fill(0);
    }

    /// Makes it empty, keeping the memory.
    pub fn clear(&mut self) {
        self.len = 0;
    }
}

impl std::ops::Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// A file open for writing past the page cache.
///
/// A cache is of no use to bytes that are written once, and filling it costs as much system time
/// as all of decompression.
#[derive(Debug)]
pub struct DirectFile {
    file: File,
}

impl DirectFile {
    /// Opens an existing file; `None` where the file system has no direct writes.
    pub fn open(path: &Path) -> Option<DirectFile> {
        let flags = rustix::fs::OFlags::DIRECT.bits();
        let flags = i32::try_from(flags).ok()?;
        OpenOptions::new().write(true).custom_flags(flags).open(path).ok().map(|file| DirectFile { file })
    }

    /// Writes what can be written directly and answers how many bytes from the beginning of
    /// `content` that was. The rest is the caller's to write in the ordinary way: all of it when
    /// address, offset or length are no multiples of 4,096, or when the file system refuses.
    ///
    /// Durability: none; a sync is still needed, of the file or of the file system.
    pub fn write_at(&self, offset: u64, content: &[u8]) -> io::Result<usize> {
        let aligned = content.as_ptr().align_offset(ALIGN) == 0
            && content.len().is_multiple_of(ALIGN)
            && offset.is_multiple_of(ALIGN as u64);
        if !aligned || content.is_empty() {
            return Ok(0);
        }
        loop {
            match self.file.write_at(content, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(0),
                answer => return answer,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_buffer_begins_at_a_page_and_keeps_its_content_when_it_grows() {
        let mut buffer = PageBuffer::default();
        buffer.set_len(10).copy_from_slice(b"0123456789");
        for len in [11, 5000, 300_000] {
            buffer.extend_with_zeros(len);
            assert_eq!(buffer.as_ptr().align_offset(ALIGN), 0);
            assert_eq!(&buffer[..10], b"0123456789");
            assert!(buffer[10..].iter().all(|byte| *byte == 0));
        }
        buffer.fill(7);
        buffer.clear();
        buffer.extend_with_zeros(100);
        assert_eq!(&buffer[..], [0; 100], "what was there before is not taken for content");
    }

    #[test]
    fn only_whole_pages_are_written_directly_and_the_rest_is_left_to_the_caller() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![1; 3 * ALIGN]).unwrap();
        let Some(file) = DirectFile::open(&path) else {
            return; // The file system of this machine's temporary directory has no direct writes.
        };
        let mut buffer = PageBuffer::default();
        buffer.set_len(2 * ALIGN).fill(2);
        assert_eq!(file.write_at(100, &buffer).unwrap(), 0, "the place is no multiple");
        assert_eq!(file.write_at(0, &buffer[..100]).unwrap(), 0, "the length is no multiple");
        assert_eq!(file.write_at(0, &buffer[1..=ALIGN]).unwrap(), 0, "the address is no multiple");
        assert_eq!(std::fs::read(&path).unwrap(), vec![1; 3 * ALIGN], "nothing was written");
        let done = file.write_at(ALIGN as u64, &buffer).unwrap();
        assert!(done == 0 || done == 2 * ALIGN);
        if done > 0 {
            assert_eq!(std::fs::read(&path).unwrap(), [vec![1; ALIGN], vec![2; 2 * ALIGN]].concat());
        }
    }
}
