//! WAL as it is written: `START_REPLICATION … PHYSICAL` (manual, "Streaming Replication Protocol").

use bytes::Bytes;
use dr_core::{Lsn, Timeline, Timestamp};

use super::client::{ReplicationClient, identifier};
use super::error::ReplicationError;
use super::messages::{Fields, Message};

/// Microseconds between 1970 and 2000, where the protocol's clock begins.
const EPOCH_2000: i64 = 946_684_800_000_000;

/// What the server sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEvent {
    /// WAL, at most 128 KiB, right after the piece before it. The bytes are a slice of the read
    /// buffer: keeping many of them keeps their buffers, so copy what is kept for long.
    Wal {
        /// Where it begins.
        at: Lsn,
        /// The bytes.
        data: Bytes,
        /// Up to where the server has WAL.
        server_end: Lsn,
        /// The server's clock.
        time: Timestamp,
    },
    /// A sign of life.
    Keepalive {
        /// Up to where the server has WAL.
        server_end: Lsn,
        /// The server's clock.
        time: Timestamp,
        /// An answer is wanted at once, or the server hangs up.
        wants_answer: bool,
    },
    /// The timeline ends here; [`WalStream::end`] tells which one follows.
    EndOfTimeline,
}

/// How a stream ended, and the connection, which can stream again.
#[derive(Debug)]
pub struct StreamEnd {
    /// The timeline that follows and where it leaves this one; `None`: the server shuts down, or
    /// this side ended the stream.
    pub next: Option<(Timeline, Lsn)>,
    /// The connection.
    pub client: ReplicationClient,
}

/// WAL of one timeline, streaming. Dropping it ends the connection.
///
/// Report as flushed only what is durable where it has to be: the server removes WAL from its slot
/// and, if this is a synchronous standby, acknowledges commits by it.
#[derive(Debug)]
pub struct WalStream {
    client: ReplicationClient,
    timeline: Timeline,
    next: Lsn,
    server_done: bool,
    /// The server had nothing to stream and told at once what follows; it waits for a command.
    told: Option<Option<(Timeline, Lsn)>>,
}

impl ReplicationClient {
    /// Streams WAL of a timeline from `from` on, keeping it reserved by `slot`. Where `from` is the
    /// timeline's very end, the first event says so.
    ///
    /// Errors: class missing (58P01) when the server has removed that WAL.
    pub async fn stream(
        mut self,
        slot: Option<&str>,
        from: Lsn,
        timeline: Timeline,
    ) -> Result<WalStream, ReplicationError> {
        let doing = "stream WAL";
        let slot = slot.map(|name| format!("SLOT {} ", identifier(name))).unwrap_or_default();
        let command = format!("START_REPLICATION {slot}PHYSICAL {from} TIMELINE {}", timeline.0);
        self.send_command(&command).await?;
        let told = match self.wire.receive_soon(doing).await? {
            Message::CopyBoth => None,
            // The server skips the copy where the timeline ends (`StartReplication`).
            Message::RowDescription(_) => Some(self.what_follows(doing, true).await?),
            other => return self.failed(doing, other).await,
        };
        Ok(WalStream { client: self, timeline, next: from, server_done: told.is_some(), told })
    }

    /// What is said after the last of a timeline, up to the server's readiness. `done`: its part of
    /// the copy is over.
    async fn what_follows(
        &mut self,
        doing: &str,
        mut done: bool,
    ) -> Result<Option<(Timeline, Lsn)>, ReplicationError> {
        let mut next = None;
        loop {
            match self.wire.receive_soon(doing).await? {
                Message::CopyData(_) if !done => {}
                Message::CopyDone if !done => done = true,
                Message::RowDescription(_) | Message::Complete(_) => {}
                Message::Row(columns) => next = next_timeline(&columns),
                Message::Ready(_) => return Ok(next),
                other => return Err(self.wire.unexpected(doing, &other)),
            }
        }
    }
}

impl WalStream {
    /// The timeline that is streamed.
    pub fn timeline(&self) -> Timeline {
        self.timeline
    }

    /// Where the next byte belongs.
    pub fn position(&self) -> Lsn {
        self.next
    }

    /// The next event. A piece of WAL that does not begin where the last one ended is an error.
    ///
    /// Cancel safety: nothing is lost when this is dropped, so it may stand in a `select!`.
    pub async fn next(&mut self) -> Result<StreamEvent, ReplicationError> {
        let doing = "stream WAL";
        if self.server_done {
            return Ok(StreamEvent::EndOfTimeline);
        }
        let wire = &mut self.client.wire;
        match wire.receive(doing, wire.patience.stream).await? {
            Message::CopyData(data) => {
                let event = event(data).map_err(|reason| wire.protocol(reason))?;
                if let StreamEvent::Wal { at, data, .. } = &event {
                    if *at != self.next {
                        return Err(wire.protocol(format!("WAL at {at} where {} belongs", self.next)));
                    }
                    self.next = Lsn(at.0 + data.len() as u64);
                }
                Ok(event)
            }
            Message::CopyDone => {
                self.server_done = true;
                Ok(StreamEvent::EndOfTimeline)
            }
            // Nothing is read after it, so that the error is not lost with a wait that is dropped.
            other => Err(wire.unexpected(doing, &other)),
        }
    }

    /// Tells the server what is written, flushed and applied here. Must come more often than
    /// `wal_sender_timeout`, from a task that nothing blocks. The server listens until
    /// [`end`](Self::end), after the end of the timeline too.
    ///
    /// Not cancel-safe: dropped half way, the connection is at its end.
    pub async fn report(
        &mut self,
        written: Lsn,
        flushed: Lsn,
        applied: Lsn,
        now: Timestamp,
        wants_answer: bool,
    ) -> Result<(), ReplicationError> {
        if self.told.is_some() {
            return Ok(());
        }
        let mut status = Vec::with_capacity(34);
        status.push(b'r');
        for lsn in [written, flushed, applied] {
            status.extend_from_slice(&lsn.0.to_be_bytes());
        }
        status.extend_from_slice(&(now.as_microsecond() - EPOCH_2000).to_be_bytes());
        status.push(u8::from(wants_answer));
        self.client.send_copy_data(&status).await
    }

    /// Ends the stream in good order: after [`StreamEvent::EndOfTimeline`], or because this side
    /// wants to. What the server still sends is dropped.
    pub async fn end(mut self) -> Result<StreamEnd, ReplicationError> {
        if let Some(next) = self.told {
            return Ok(StreamEnd { next, client: self.client });
        }
        self.client.wire.send(b"c\0\0\0\x04").await?;
        let next = self.client.what_follows("end the stream", self.server_done).await?;
        Ok(StreamEnd { next, client: self.client })
    }
}

/// "next_tli" and "next_tli_startpos".
fn next_timeline(columns: &[Option<Bytes>]) -> Option<(Timeline, Lsn)> {
    let text = |at: usize| std::str::from_utf8(columns.get(at)?.as_ref()?).ok();
    Some((Timeline(text(0)?.parse().ok()?), text(1)?.parse().ok()?))
}

fn event(data: Bytes) -> Result<StreamEvent, String> {
    let mut fields = Fields(data);
    let parsed = match fields.u8() {
        Some(b'w') => wal(&mut fields),
        Some(b'k') => keepalive(&mut fields),
        Some(other) => return Err(format!("a message of unknown kind {:?} in a stream", char::from(other))),
        None => None,
    };
    parsed.ok_or_else(|| "a message of a stream is too short".into())
}

fn wal(fields: &mut Fields) -> Option<StreamEvent> {
    let (at, end, time) = (fields.u64()?, fields.u64()?, fields.u64()?);
    let data = fields.0.clone();
    at.checked_add(data.len() as u64)?;
    Some(StreamEvent::Wal { at: Lsn(at), data, server_end: Lsn(end), time: clock(time) })
}

fn keepalive(fields: &mut Fields) -> Option<StreamEvent> {
    let (end, time, answer) = (fields.u64()?, fields.u64()?, fields.u8()?);
    Some(StreamEvent::Keepalive { server_end: Lsn(end), time: clock(time), wants_answer: answer != 0 })
}

fn clock(micros: u64) -> Timestamp {
    let since_1970 = (micros as i64).checked_add(EPOCH_2000).unwrap_or(0);
    Timestamp::from_microsecond(since_1970).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_piece_of_wal_and_a_keepalive_are_read() {
        let mut piece = vec![b'w'];
        piece.extend(0x0200_0000_u64.to_be_bytes());
        piece.extend(0x0300_0000_u64.to_be_bytes());
        piece.extend(0_u64.to_be_bytes());
        piece.extend(b"abc");
        let StreamEvent::Wal { at, data, server_end, time } = event(piece.into()).unwrap() else {
            panic!("no WAL")
        };
        assert_eq!((at, server_end, &data[..]), (Lsn(0x0200_0000), Lsn(0x0300_0000), &b"abc"[..]));
        assert_eq!(time.to_string(), "2000-01-01T00:00:00Z");
        let keepalive = [&b"k"[..], &9_u64.to_be_bytes(), &0_u64.to_be_bytes(), &[1]].concat();
        let StreamEvent::Keepalive { wants_answer: true, .. } = event(keepalive.into()).unwrap() else {
            panic!("no keepalive")
        };
        assert!(event(Bytes::from_static(b"k123")).is_err());
        assert!(event(Bytes::from_static(b"z")).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_event_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = event(bytes.into());
        }
    }
}
