//! Reading and writing of the small parts: varints, fixed arrays, session tables.

use dr_core::BackupId;

use crate::error::RepoError;

/// A cursor over untrusted bytes.
pub(crate) struct Decode<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Decode<'a> {
    /// `what` names the object in errors.
    pub fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Decode { rest: bytes, what }
    }

    /// An error about this object.
    pub fn bad(&self, reason: &str) -> RepoError {
        RepoError::Malformed { what: self.what.to_owned(), reason: reason.to_owned() }
    }

    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], RepoError> {
        if n > self.rest.len() {
            return Err(self.bad("it ends too early"));
        }
        let (head, rest) = self.rest.split_at(n);
        self.rest = rest;
        Ok(head)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], RepoError> {
        let bytes = self.bytes(N)?;
        bytes.try_into().map_err(|_| self.bad("it ends too early"))
    }

    pub fn u8(&mut self) -> Result<u8, RepoError> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u16(&mut self) -> Result<u16, RepoError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32, RepoError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, RepoError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A LEB128 number of at most 64 bits.
    pub fn varint(&mut self) -> Result<u64, RepoError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                break;
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.bad("a number is too long"))
    }

    pub fn varint32(&mut self) -> Result<u32, RepoError> {
        u32::try_from(self.varint()?).map_err(|_| self.bad("a number is too large"))
    }

    /// A count of things that take at least `min` bytes each, so that no count can make the reader
    /// allocate more than the object could hold.
    pub fn count(&mut self, min: usize) -> Result<usize, RepoError> {
        let count = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
        if count.saturating_mul(min.max(1)) > self.rest.len() {
            return Err(self.bad("a count is larger than the object"));
        }
        Ok(count)
    }

    pub fn text(&mut self) -> Result<&'a str, RepoError> {
        let len = self.count(1)?;
        let bytes = self.bytes(len)?;
        std::str::from_utf8(bytes).map_err(|_| self.bad("a name is not text"))
    }

    pub fn sessions(&mut self) -> Result<Vec<BackupId>, RepoError> {
        let count = self.count(BackupId::PACKED_LEN)?;
        (0..count).map(|_| Ok(BackupId::unpack(self.array()?))).collect()
    }

    /// One of a session table.
    pub fn session(&mut self, table: &[BackupId]) -> Result<BackupId, RepoError> {
        let index = self.varint()? as usize;
        table.get(index).copied().ok_or_else(|| self.bad("a session is not in the table"))
    }

    /// A length-prefixed area for fields of later minor versions, skipped.
    pub fn extension(&mut self) -> Result<(), RepoError> {
        let len = self.count(1)?;
        self.bytes(len).map(|_| ())
    }

    /// The object must end here.
    pub fn end(&self) -> Result<(), RepoError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.bad("it has bytes after its end")) }
    }
}

/// Appends a LEB128 number.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The index of a session in a table that grows in order of first appearance.
pub(crate) fn put_session(table: &mut Vec<BackupId>, session: BackupId) -> u64 {
    let found = table.iter().position(|s| *s == session);
    found.unwrap_or_else(|| {
        table.push(session);
        table.len() - 1
    }) as u64
}

/// Appends a session table.
pub(crate) fn put_sessions(out: &mut Vec<u8>, table: &[BackupId]) {
    put_varint(out, table.len() as u64);
    table.iter().for_each(|session| out.extend_from_slice(&session.pack()));
}
