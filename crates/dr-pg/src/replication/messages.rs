//! Messages from the server, taken apart (manual, "Message Formats").

use bytes::{Buf, Bytes};

/// Frames of a message: a tag, and a length that counts itself.
pub(super) const HEADER: usize = 5;

/// What a server says. Bodies are slices of the read buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    Authentication(u32, Bytes),
    ParameterStatus(String, String),
    BackendKey(u32, Bytes),
    NegotiateVersion(u32),
    Ready(u8),
    RowDescription(Vec<String>),
    Row(Vec<Option<Bytes>>),
    Complete(String),
    CopyOut,
    CopyIn,
    CopyBoth,
    CopyData(Bytes),
    CopyDone,
    Error(ServerSaid),
    Notice(ServerSaid),
    EmptyQuery,
    Other(u8),
}

/// Fields of an error or a notice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServerSaid {
    pub severity: String,
    pub code: String,
    pub message: String,
}

impl ServerSaid {
    pub fn is_fatal(&self) -> bool {
        self.severity == "FATAL" || self.severity == "PANIC"
    }
}

/// Reads numbers and strings off the front; everything says `None` past the end.
pub(super) struct Fields(pub Bytes);

impl Fields {
    pub fn u8(&mut self) -> Option<u8> {
        (!self.0.is_empty()).then(|| self.0.get_u8())
    }

    pub fn u16(&mut self) -> Option<u16> {
        (self.0.len() >= 2).then(|| self.0.get_u16())
    }

    pub fn u32(&mut self) -> Option<u32> {
        (self.0.len() >= 4).then(|| self.0.get_u32())
    }

    pub fn u64(&mut self) -> Option<u64> {
        (self.0.len() >= 8).then(|| self.0.get_u64())
    }

    pub fn bytes(&mut self, len: usize) -> Option<Bytes> {
        (self.0.len() >= len).then(|| self.0.split_to(len))
    }

    /// A string that ends with a zero byte. Servers with other encodings may send other bytes than
    /// UTF-8 in messages before the session's encoding holds.
    pub fn text(&mut self) -> Option<String> {
        let end = self.0.iter().position(|byte| *byte == 0)?;
        let text = String::from_utf8_lossy(&self.0[..end]).into_owned();
        self.0.advance(end + 1);
        Some(text)
    }
}

/// Takes a message apart. `Err` says what is wrong with it.
pub(super) fn parse(tag: u8, body: Bytes) -> Result<Message, String> {
    let broken = || format!("message {:?} has a wrong form", char::from(tag));
    let mut fields = Fields(body);
    let message = match tag {
        b'd' => Some(Message::CopyData(fields.0)),
        b'R' => fields.u32().map(|kind| Message::Authentication(kind, fields.0)),
        b'S' => fields.text().zip(fields.text()).map(|(name, value)| Message::ParameterStatus(name, value)),
        b'K' => fields.u32().map(|process| Message::BackendKey(process, fields.0)),
        b'v' => fields.u32().map(Message::NegotiateVersion),
        b'Z' => fields.u8().map(Message::Ready),
        b'T' => names(&mut fields).map(Message::RowDescription),
        b'D' => row(&mut fields).map(Message::Row),
        b'C' => fields.text().map(Message::Complete),
        b'H' => Some(Message::CopyOut),
        b'G' => Some(Message::CopyIn),
        b'W' => Some(Message::CopyBoth),
        b'c' => Some(Message::CopyDone),
        b'E' => said(&mut fields).map(Message::Error),
        b'N' => said(&mut fields).map(Message::Notice),
        b'I' => Some(Message::EmptyQuery),
        other => Some(Message::Other(other)),
    };
    message.ok_or_else(broken)
}

fn names(fields: &mut Fields) -> Option<Vec<String>> {
    let count = fields.u16()?;
    (0..count)
        .map(|_| {
            let name = fields.text()?;
            // Table and column, type and its size and modifier, format: text in a simple query.
            fields.bytes(18)?;
            Some(name)
        })
        .collect()
}

fn row(fields: &mut Fields) -> Option<Vec<Option<Bytes>>> {
    let count = fields.u16()?;
    (0..count)
        .map(|_| match fields.u32()? {
            u32::MAX => Some(None),
            len => fields.bytes(len as usize).map(Some),
        })
        .collect()
}

fn said(fields: &mut Fields) -> Option<ServerSaid> {
    let mut said = ServerSaid::default();
    loop {
        match fields.u8()? {
            0 => return Some(said),
            // V is the severity that is never translated (9.6 and later).
            b'V' => said.severity = fields.text()?,
            b'C' => said.code = fields.text()?,
            b'M' => said.message = fields.text()?,
            _ => drop(fields.text()?),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_that_no_library_knows_are_known_here() {
        assert_eq!(parse(b'W', Bytes::from_static(&[0, 0, 0])).unwrap(), Message::CopyBoth);
        assert_eq!(
            parse(b'v', Bytes::from_static(&[0, 3, 0, 0, 0, 0, 0, 0])).unwrap(),
            Message::NegotiateVersion(0x0003_0000)
        );
    }

    #[test]
    fn an_error_gives_its_untranslated_severity_and_code() {
        let body = b"SFATAL\0VFATAL\0C28P01\0Mwrong password\0Fauth.c\0\0";
        let Message::Error(said) = parse(b'E', Bytes::from_static(body)).unwrap() else { panic!("no error") };
        assert_eq!((said.code.as_str(), said.message.as_str()), ("28P01", "wrong password"));
        assert!(said.is_fatal());
    }

    #[test]
    fn cut_messages_are_errors() {
        for (tag, body) in
            [(b'D', &b"\0\x01\0\0\0\x09abc"[..]), (b'T', b"\0\x01name\0\0"), (b'E', b"C28P01"), (b'R', b"\0")]
        {
            assert!(parse(tag, Bytes::copy_from_slice(body)).is_err(), "{tag}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(tag: u8, body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(tag, body.into());
        }
    }
}
