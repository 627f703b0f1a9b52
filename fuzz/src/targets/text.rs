//! What people, file names and small text files say.

use dr_core::Timeline;
use dr_core::{
    BackupId, Lsn, SegmentSize, SystemId, Timestamp, WalName, history::TimelineHistory, moment, path, size,
};

use dr_pg::ConnInfo;

use crate::{Answer, Target};

fn seeds(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn text(name: &'static str, texts: &[&str], read: impl Fn(&str) -> Answer + 'static) -> Target {
    Target::new(name, seeds(texts), move |bytes| match std::str::from_utf8(bytes) {
        Ok(text) => read(text),
        Err(_) => Answer::Refused("it is not text".into()),
    })
}

pub(super) fn targets() -> Vec<Target> {
    vec![
        text(
            "history",
            &["1\t0/5000000\tno recovery target specified\n\n2\t0/7000000\tbefore 2026\n"],
            |text| {
                let history = TimelineHistory::parse(Timeline(9), text);
                if let Ok(history) = &history {
                    // Whatever is taken leads from every position to one timeline.
                    assert!(
                        history.timeline_at(Lsn(0x600_0000)).0 <= 9 && history.contains(Timeline(9), Lsn(0))
                    );
                }
                history.into()
            },
        ),
        connection(),
        text(
            "wal-name",
            &["0000000100000000000000F0", "00000002.history", "000000010000000000000001.00000028.backup"],
            |name| {
                let read = WalName::parse(name, SegmentSize::DEFAULT);
                if let Ok(read) = &read {
                    assert_eq!(
                        read.file_name(SegmentSize::DEFAULT),
                        name,
                        "a name reads back as it was written"
                    );
                }
                read.into()
            },
        ),
        text(
            "moment",
            &["2026-11-22 11:08:50 Europe/Berlin", "10 min ago", "yesterday 14:00 UTC", "08:30 +0530"],
            |text| moment::parse(text, Timestamp::UNIX_EPOCH, None).into(),
        ),
        text("position", &["16/B374D848", "0/0"], |text| {
            let lsn = text.parse::<Lsn>();
            if let Ok(lsn) = &lsn {
                assert_eq!(lsn.to_string().parse::<Lsn>().ok(), Some(*lsn));
            }
            lsn.into()
        }),
        text("identity", &["7000000000000000009", "20270115T080002Z-77e3f50a"], |text| {
            match text.parse::<BackupId>() {
                Ok(id) => {
                    assert_eq!(BackupId::unpack(id.pack()), id);
                    Answer::Taken
                }
                Err(_) => text.parse::<SystemId>().into(),
            }
        }),
        text("amount", &["64MiB", "10GB", "500ms", "30s", "7d"], |text| {
            size::parse_bytes(text).map(drop).or_else(|_| size::parse_duration(text).map(drop)).into()
        }),
        Target::new("path", seeds(&["base/1/1259", "pg_wal/1 %25 of käse", "%ff"]), |bytes| {
            let text = String::from_utf8_lossy(bytes);
            assert_eq!(path::decode(&path::encode(bytes)), bytes, "any name reads back");
            path::compare(&text, "base/1/1259");
            path::is_contained(&text);
            path::decode(&text);
            Answer::Taken
        }),
    ]
}

/// Connection strings, which may be shown to people: reading and showing agree on what can be read.
fn connection() -> Target {
    let seeds = [
        r"host=a,b password=x port=1,2 user='it\'s' dbname=x sslmode=require options='-c a=b'",
        "postgresql://me:p%40ss@[::1]:5432,b/db?sslmode=verify-full&sslrootcert=/ca",
    ];
    text("connection", &seeds, |text| {
        let shown = ConnInfo::shown(text);
        // No service file of this machine is read.
        if text.contains("service") {
            return Answer::Refused("a service".into());
        }
        let read = ConnInfo::parse(text);
        assert!(read.is_err() || !shown.ends_with("(it cannot be read)"), "what is read can be shown");
        read.map_err(|error| error.to_string()).into()
    })
}
