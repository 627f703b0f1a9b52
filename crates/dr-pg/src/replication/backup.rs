//! `BASE_BACKUP` (manual, "Streaming Replication Protocol"; `src/backend/backup/`).

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use dr_core::port::TablespaceFacts;
use dr_core::{Lsn, Timeline};

use super::client::{ReplicationClient, literal};
use super::error::ReplicationError;
use super::messages::{Fields, Message};
use super::patience::Patience;

/// Bytes of a manifest sent in one message.
const MANIFEST_PIECE: usize = 64 << 10;

/// The slowest and the fastest rate that the server takes, in kB/s (`MAX_RATE_LOWER`).
const RATES: std::ops::RangeInclusive<u32> = 32..=1_048_576;

/// How a backup is taken.
#[derive(Clone, Debug)]
pub struct BaseBackupOptions {
    /// The label that the server records.
    pub label: String,
    /// Checkpoint at once, instead of spread out.
    pub fast_checkpoint: bool,
    /// At most so many kB (1,024 bytes) a second; clamped to what the server takes.
    pub max_rate: Option<u32>,
    /// Ask for a manifest, with CRC-32C checksums: SHA-256 halves the rate, and every byte is
    /// digested on this side anyway.
    pub manifest: bool,
    /// Send only blocks changed since the backup whose manifest was uploaded (17 and later).
    pub incremental: bool,
}

/// Where a backup began and what it will send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseBackupStart {
    /// The redo position.
    pub lsn: Lsn,
    /// The timeline there.
    pub timeline: Timeline,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<TablespaceFacts>,
    /// Bytes to come, as the server estimates.
    pub size: u64,
}

/// Where a backup ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupEnd {
    /// WAL up to here makes it consistent.
    pub lsn: Lsn,
    /// The timeline there.
    pub timeline: Timeline,
}

/// An archive begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveStart {
    /// `base.tar`, or a tablespace's oid and `.tar`.
    pub name: String,
    /// Where the tablespace lies; empty for the data directory.
    pub location: String,
}

/// What comes next in a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackupEvent {
    /// An archive begins.
    Archive(ArchiveStart),
    /// The manifest begins; it is the last thing.
    Manifest,
    /// Bytes of the archive or the manifest that is under way.
    Data(Bytes),
    /// The server is so far, in bytes of files.
    Progress(u64),
}

/// A backup under way. Dropping it ends it on the server.
#[derive(Debug)]
pub struct BaseBackup {
    client: ReplicationClient,
    stage: Stage,
}

/// How far a backup is. Kept between two messages, so that a wait that is dropped loses nothing.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Archives come.
    Sending,
    /// All of them came; the end position, if it did too.
    Ending(Option<BackupEnd>),
    /// The server waits for the next command.
    Over(BackupEnd),
}

impl ReplicationClient {
    /// Uploads the manifest of an earlier backup, which an incremental one is made against.
    pub async fn upload_manifest(&mut self, manifest: &[u8]) -> Result<(), ReplicationError> {
        let doing = "take a backup's manifest";
        self.needs(17, "incremental backup")?;
        self.send_command("UPLOAD_MANIFEST").await?;
        match self.wire.receive_soon(doing).await? {
            Message::CopyIn => {}
            other => return self.failed(doing, other).await,
        }
        for piece in manifest.chunks(MANIFEST_PIECE) {
            self.send_copy_data(piece).await?;
        }
        self.wire.send(b"c\0\0\0\x04").await?;
        let mut failure = None;
        loop {
            match self.wire.receive_soon(doing).await? {
                Message::Complete(_) => {}
                Message::Error(said) if said.is_fatal() => return Err(self.wire.said(doing, &said)),
                Message::Error(said) => failure = Some(self.wire.said(doing, &said)),
                Message::Ready(_) => return failure.map_or(Ok(()), Err),
                other => return Err(self.wire.unexpected(doing, &other)),
            }
        }
    }

    /// Begins a backup. The server checkpoints first, which takes a while unless `fast_checkpoint`.
    pub async fn base_backup(
        mut self,
        options: &BaseBackupOptions,
    ) -> Result<(BaseBackupStart, BaseBackup), ReplicationError> {
        self.needs(15, "base backup of this form")?;
        if options.incremental {
            self.needs(17, "incremental backup")?;
        }
        let doing = "start a backup";
        self.send_command(&command(options)).await?;
        let position = self.position(doing, self.wire.patience.checkpoint).await?;
        let (tablespaces, size) = self.tablespaces(doing).await?;
        match self.wire.receive_soon(doing).await? {
            Message::CopyOut => {}
            other => return Err(self.wire.unexpected(doing, &other)),
        }
        let start = BaseBackupStart { lsn: position.lsn, timeline: position.timeline, tablespaces, size };
        Ok((start, BaseBackup { client: self, stage: Stage::Sending }))
    }

    pub(super) fn needs(&self, major: u32, what: &str) -> Result<(), ReplicationError> {
        if self.major() >= major {
            return Ok(());
        }
        let server = self.wire.server.clone();
        Err(ReplicationError::Unsupported { server, major: self.major(), what: what.to_owned() })
    }

    pub(super) async fn send_copy_data(&mut self, data: &[u8]) -> Result<(), ReplicationError> {
        let mut out = BytesMut::with_capacity(data.len() + 5);
        out.extend_from_slice(b"d");
        out.extend_from_slice(&(data.len() as u32 + 4).to_be_bytes());
        out.extend_from_slice(data);
        self.wire.send(&out).await
    }

    /// The error of a command that was answered with something else than what must come; reads on
    /// until the server is ready, so that the connection stays usable.
    pub(super) async fn failed<T>(&mut self, doing: &str, message: Message) -> Result<T, ReplicationError> {
        let error = self.wire.unexpected(doing, &message);
        if matches!(&message, Message::Error(said) if !said.is_fatal()) {
            while !matches!(self.wire.receive_soon(doing).await?, Message::Ready(_)) {}
        }
        Err(error)
    }

    /// A result of one row: a position and its timeline.
    async fn position(&mut self, doing: &str, limit: Duration) -> Result<BackupEnd, ReplicationError> {
        let mut position = None;
        let mut limit = limit;
        loop {
            match self.wire.receive(doing, limit).await? {
                Message::RowDescription(_) => limit = self.wire.patience.command,
                Message::Row(columns) => position = position_of(&columns),
                Message::Complete(_) => {
                    return position.ok_or_else(|| self.wire.protocol("a position is missing"));
                }
                other => return self.failed(doing, other).await,
            }
        }
    }

    async fn tablespaces(&mut self, doing: &str) -> Result<(Vec<TablespaceFacts>, u64), ReplicationError> {
        let mut found = Vec::new();
        let mut size = 0;
        loop {
            match self.wire.receive_soon(doing).await? {
                Message::RowDescription(_) => {}
                Message::Row(columns) => {
                    let text = |at: usize| {
                        columns.get(at)?.as_ref().map(|bytes| String::from_utf8_lossy(bytes).into_owned())
                    };
                    let kibibytes: u64 = text(2).and_then(|text| text.parse().ok()).unwrap_or(0);
                    size += kibibytes << 10;
                    // The data directory itself is the row without an oid.
                    if let (Some(oid), Some(location)) = (text(0), text(1)) {
                        let oid =
                            oid.parse().map_err(|_| self.wire.protocol("a tablespace's oid is no number"))?;
                        found.push(TablespaceFacts { oid, name: String::new(), location });
                    }
                }
                Message::Complete(_) => return Ok((found, size)),
                other => return Err(self.wire.unexpected(doing, &other)),
            }
        }
    }
}

fn command(options: &BaseBackupOptions) -> String {
    let mut words =
        vec![format!("LABEL {}", literal(&options.label)), "PROGRESS true".into(), "WAIT false".into()];
    // Pages are checked on this side, where a bad one is recorded instead of ending the backup.
    words.push("VERIFY_CHECKSUMS false".into());
    words.push("TABLESPACE_MAP true".into());
    words.push(format!("CHECKPOINT '{}'", if options.fast_checkpoint { "fast" } else { "spread" }));
    if options.manifest {
        words.push("MANIFEST 'yes'".into());
        words.push("MANIFEST_CHECKSUMS 'CRC32C'".into());
    }
    if let Some(rate) = options.max_rate {
        words.push(format!("MAX_RATE {}", rate.clamp(*RATES.start(), *RATES.end())));
    }
    if options.incremental {
        words.push("INCREMENTAL true".into());
    }
    format!("BASE_BACKUP ({})", words.join(", "))
}

fn position_of(columns: &[Option<Bytes>]) -> Option<BackupEnd> {
    let text = |at: usize| std::str::from_utf8(columns.get(at)?.as_ref()?).ok();
    Some(BackupEnd { lsn: text(0)?.parse().ok()?, timeline: Timeline(text(1)?.parse().ok()?) })
}

impl BaseBackup {
    /// What comes next; `None` at the end, after which [`finish`](Self::finish) tells where that is.
    ///
    /// Cancel safety: nothing is lost when this is dropped.
    pub async fn next(&mut self) -> Result<Option<BackupEvent>, ReplicationError> {
        loop {
            match self.stage {
                Stage::Sending => match self.sent().await? {
                    Some(event) => return Ok(Some(event)),
                    None => self.stage = Stage::Ending(None),
                },
                Stage::Ending(at) => self.stage = self.after_the_archives(at).await?,
                Stage::Over(_) => return Ok(None),
            }
        }
    }

    /// The next piece of the archives; `None` after the last.
    async fn sent(&mut self) -> Result<Option<BackupEvent>, ReplicationError> {
        let doing = "send a backup";
        let wire = &mut self.client.wire;
        match wire.receive(doing, wire.patience.backup).await? {
            Message::CopyData(data) => event(data).map(Some).map_err(|reason| wire.protocol(reason)),
            Message::CopyDone => Ok(None),
            // Nothing is read after it: the connection ends with this backup.
            other => Err(wire.unexpected(doing, &other)),
        }
    }

    /// Takes one of the last messages: the end position as a result of one row, the command's
    /// completion, and readiness.
    async fn after_the_archives(&mut self, at: Option<BackupEnd>) -> Result<Stage, ReplicationError> {
        let doing = "end a backup";
        let wire = &mut self.client.wire;
        match wire.receive_soon(doing).await? {
            Message::RowDescription(_) | Message::Complete(_) => Ok(Stage::Ending(at)),
            Message::Row(columns) => Ok(Stage::Ending(position_of(&columns))),
            Message::Ready(_) => at.map(Stage::Over).ok_or_else(|| wire.protocol("a position is missing")),
            // With a wrong checksum found the server would fail here; it was told not to look.
            other => Err(wire.unexpected(doing, &other)),
        }
    }

    /// Where the backup ended, and the connection for further commands. `None` before the end.
    pub fn finish(self) -> Option<(BackupEnd, ReplicationClient)> {
        match self.stage {
            Stage::Over(end) => Some((end, self.client)),
            _ => None,
        }
    }

    /// Where the server is, for messages.
    pub fn server(&self) -> &str {
        self.client.server()
    }

    /// How long each wait may last.
    pub fn patience(&self) -> Patience {
        self.client.wire.patience
    }
}

/// A message of the stream: a type byte, and what belongs to it.
fn event(mut data: Bytes) -> Result<BackupEvent, String> {
    if data.is_empty() {
        return Err("an empty message in a backup".into());
    }
    match data.get_u8() {
        b'd' => Ok(BackupEvent::Data(data)),
        b'm' => Ok(BackupEvent::Manifest),
        b'n' => {
            let mut fields = Fields(data);
            let (name, location) = fields.text().zip(fields.text()).ok_or("an archive without a name")?;
            Ok(BackupEvent::Archive(ArchiveStart { name, location }))
        }
        b'p' => {
            Fields(data).u64().map(BackupEvent::Progress).ok_or_else(|| "progress without a number".into())
        }
        other => Err(format!("a message of unknown kind {:?} in a backup", char::from(other))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_label_cannot_leave_its_quotes() {
        let options = BaseBackupOptions {
            label: "it's', VERIFY_CHECKSUMS true, LABEL 'x".into(),
            fast_checkpoint: true,
            max_rate: Some(1),
            manifest: false,
            incremental: false,
        };
        let text = command(&options);
        assert!(
            text.starts_with("BASE_BACKUP (LABEL 'it''s'', VERIFY_CHECKSUMS true, LABEL ''x', PROGRESS"),
            "{text}"
        );
        assert!(text.contains("MAX_RATE 32"), "{text}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_event_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = event(bytes.into());
        }
    }
}
