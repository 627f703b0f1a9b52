//! Where messages of the frontend/backend protocol begin and end (manual, "Message Formats").
//!
//! A message has a tag, and a length of four bytes that counts itself and not the tag. What a client
//! says first has no tag; the answer to a request for TLS is one byte. After it agreed to TLS
//! nothing can be told apart any more.

/// `SSLRequest`: 1234 and 5679.
const SSL_REQUEST: u32 = 80_877_103;

/// `GSSENCRequest`: 1234 and 5680.
const GSSENC_REQUEST: u32 = 80_877_104;

/// `CancelRequest`: 1234 and 5678.
const CANCEL_REQUEST: u32 = 80_877_102;

/// The first byte of a TLS record with a handshake (RFC 8446 section 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// How far a connection is, which decides how its next bytes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The client's next message has no tag.
    Opening,
    /// The server's next byte says whether encryption begins.
    AskedToEncrypt,
    /// Every message has a tag.
    Talking,
    /// Nothing can be told apart.
    Blind,
}

/// What kind of session the client asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Session {
    /// Nothing is known yet, or it is encrypted.
    #[default]
    Unknown,
    /// SQL.
    Sql,
    /// Replication commands.
    Replication,
    /// A request to cancel what another one does.
    Cancel,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// From the client.
    Frontend,
    /// From the server.
    Backend,
}

/// A piece of one message, or of a stream that nobody can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its bytes, from the front.
    pub len: usize,
    /// How many bytes of the message were before it.
    pub offset: usize,
    /// The whole message's; `None`: there are no messages here.
    pub total: Option<usize>,
}

impl Piece {
    /// Whether a message ends with it.
    pub fn ends(&self) -> bool {
        self.total == Some(self.offset + self.len)
    }
}

/// Finds messages in the bytes of one direction.
#[derive(Debug)]
pub struct Framer {
    side: Side,
    /// Bytes of the current message that were told, and its length.
    current: Option<(usize, usize)>,
}

impl Framer {
    /// At the beginning of a connection.
    pub fn new(side: Side) -> Self {
        Framer { side, current: None }
    }

    /// The next piece of `bytes`, which are what follows the last one; `None`: more are needed to
    /// tell. `phase` goes on with what is found, `session` is set by the client's first words.
    pub fn next(&mut self, bytes: &[u8], phase: &mut Phase, session: &mut Session) -> Option<Piece> {
        let first = *bytes.first()?;
        let (offset, total) = match self.current {
            Some(current) => current,
            None => match (self.side, *phase) {
                (Side::Frontend, Phase::Opening) if first == TLS_HANDSHAKE => {
                    *phase = Phase::Blind;
                    return Some(Piece { len: bytes.len(), offset: 0, total: None });
                }
                (_, Phase::Blind) => return Some(Piece { len: bytes.len(), offset: 0, total: None }),
                (Side::Frontend, Phase::Opening | Phase::AskedToEncrypt) => {
                    (0, opening(bytes, phase, session)?)
                }
                (Side::Backend, Phase::AskedToEncrypt) if first != b'E' => {
                    *phase = if first == b'N' { Phase::Opening } else { Phase::Blind };
                    (0, 1)
                }
                _ => (0, 1 + number(bytes.get(1..5)?).max(4)),
            },
        };
        let len = bytes.len().min(total - offset);
        let piece = Piece { len, offset, total: Some(total) };
        self.current = if piece.ends() { None } else { Some((offset + len, total)) };
        Some(piece)
    }
}

/// The length of a message without a tag. It is whole in the buffer before it is told: servers take
/// at most 10,000 bytes (`MAX_STARTUP_PACKET_LENGTH`).
fn opening(bytes: &[u8], phase: &mut Phase, session: &mut Session) -> Option<usize> {
    let total = number(bytes.get(..4)?).clamp(8, 10_000);
    let whole = bytes.get(..total)?;
    match number(&whole[4..8]) as u32 {
        SSL_REQUEST | GSSENC_REQUEST => *phase = Phase::AskedToEncrypt,
        CANCEL_REQUEST => {
            *session = Session::Cancel;
            *phase = Phase::Talking;
        }
        _ => {
            *session = if is_replication(&whole[8..]) { Session::Replication } else { Session::Sql };
            *phase = Phase::Talking;
        }
    }
    Some(total)
}

/// Whether the parameter `replication` is there; a database may have that name too.
fn is_replication(parameters: &[u8]) -> bool {
    let words: Vec<&[u8]> = parameters.split(|byte| *byte == 0).collect();
    words.chunks(2).any(|pair| pair[0] == b"replication")
}

fn number(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |value, byte| value << 8 | usize::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opening_message(code: u32, rest: &[u8]) -> Vec<u8> {
        let mut out = (8 + rest.len() as u32).to_be_bytes().to_vec();
        out.extend(code.to_be_bytes());
        out.extend(rest);
        out
    }

    fn tagged(tag: u8, len: usize) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend((len as u32 + 4).to_be_bytes());
        out.resize(out.len() + len, 7);
        out
    }

    /// The lengths of the messages in `bytes`, given in chunks of `chunk`.
    fn lengths(side: Side, bytes: &[u8], chunk: usize, phase: &mut Phase) -> Vec<usize> {
        let (mut framer, mut session) = (Framer::new(side), Session::Unknown);
        let (mut held, mut lengths) = (Vec::new(), Vec::new());
        for part in bytes.chunks(chunk) {
            held.extend_from_slice(part);
            while let Some(piece) = framer.next(&held, phase, &mut session) {
                held.drain(..piece.len);
                if piece.ends() {
                    lengths.push(piece.offset + piece.len);
                }
            }
        }
        assert!(held.is_empty(), "{} bytes are held back", held.len());
        lengths
    }

    #[test]
    fn messages_are_found_in_chunks_of_any_size() {
        let opening = opening_message(196_608, b"user\0x\0replication\0true\0\0");
        let client = [opening.clone(), tagged(b'p', 9), tagged(b'Q', 100)].concat();
        let server = [tagged(b'R', 4), tagged(b'd', 5000), tagged(b'c', 0)].concat();
        for chunk in [1, 2, 3, 7, 100, 10_000] {
            let mut phase = Phase::Opening;
            assert_eq!(lengths(Side::Frontend, &client, chunk, &mut phase), [opening.len(), 14, 105]);
            assert_eq!(phase, Phase::Talking);
            assert_eq!(lengths(Side::Backend, &server, chunk, &mut phase), [9, 5005, 5]);
        }
    }

    #[test]
    fn encryption_makes_blind_and_its_refusal_does_not() {
        for (answer, expected) in [(b'S', Phase::Blind), (b'N', Phase::Opening)] {
            let (mut phase, mut session) = (Phase::Opening, Session::Unknown);
            let ask = opening_message(SSL_REQUEST, b"");
            let mut client = Framer::new(Side::Frontend);
            assert!(client.next(&ask, &mut phase, &mut session).is_some_and(|piece| piece.ends()));
            assert_eq!(phase, Phase::AskedToEncrypt);
            let piece = Framer::new(Side::Backend).next(&[answer], &mut phase, &mut session);
            assert_eq!(piece, Some(Piece { len: 1, offset: 0, total: Some(1) }));
            assert_eq!(phase, expected);
        }
        let (mut phase, mut session) = (Phase::Opening, Session::Unknown);
        let piece = Framer::new(Side::Frontend).next(&[22, 3, 1], &mut phase, &mut session);
        assert_eq!((piece.map(|piece| piece.total), phase), (Some(None), Phase::Blind));
    }

    #[test]
    fn the_kind_of_a_session_is_told_by_its_parameter_and_not_by_a_name() {
        let kinds = [
            (196_608, &b"user\0x\0replication\0database\0\0"[..], Session::Replication),
            (196_608, b"user\0x\0database\0replication\0\0", Session::Sql),
            (CANCEL_REQUEST, b"\0\0\0\x01\0\0\0\x02", Session::Cancel),
        ];
        for (code, rest, expected) in kinds {
            let (mut phase, mut session) = (Phase::Opening, Session::Unknown);
            let message = opening_message(code, rest);
            Framer::new(Side::Frontend).next(&message, &mut phase, &mut session);
            assert_eq!(session, expected);
        }
    }
}
