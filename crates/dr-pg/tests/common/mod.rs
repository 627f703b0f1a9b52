//! Backups that are written to a directory, for the tests of the replication client.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dr_pg::replication::{BackupEvent, BaseBackupOptions, ReplicationClient, TarEvent, TarKind, TarReader};
use dr_testkit::pg::ok;

/// Writes a backup's archives below `root`; answers the manifest.
pub async fn unpack(
    client: ReplicationClient,
    options: &BaseBackupOptions,
    root: &Path,
) -> (Vec<u8>, ReplicationClient, u64) {
    let (start, mut backup) = client.base_backup(options).await.unwrap();
    let places: BTreeMap<String, PathBuf> = start
        .tablespaces
        .iter()
        .map(|t| (format!("{}.tar", t.oid), root.join(format!("space_{}", t.oid))))
        .collect();
    let data = root.join("data");
    let mut manifest = None;
    let mut tar = TarReader::new();
    let (mut place, mut file, mut sent) = (PathBuf::new(), None, 0);
    while let Some(event) = backup.next().await.unwrap() {
        match event {
            BackupEvent::Archive(archive) => {
                assert!(place.as_os_str().is_empty() || tar.is_complete(), "the last archive was whole");
                tar = TarReader::new();
                place = places.get(&archive.name).unwrap_or(&data).clone();
                std::fs::create_dir_all(&place).unwrap();
            }
            BackupEvent::Manifest => manifest = Some(Vec::new()),
            BackupEvent::Progress(_) => {}
            BackupEvent::Data(bytes) if manifest.is_some() => {
                manifest.as_mut().unwrap().extend_from_slice(&bytes)
            }
            BackupEvent::Data(bytes) => {
                sent += bytes.len() as u64;
                tar.push(bytes);
                while let Some(event) = tar.next().unwrap() {
                    match event {
                        TarEvent::Entry(entry) => {
                            let path = place.join(std::str::from_utf8(&entry.path).unwrap());
                            match entry.kind {
                                TarKind::Directory => std::fs::create_dir_all(path).unwrap(),
                                // With a tablespace map the server sends no links.
                                TarKind::Link(_) => panic!("a link"),
                                TarKind::File => file = Some(std::fs::File::create(path).unwrap()),
                            }
                        }
                        TarEvent::Data(bytes) => {
                            std::io::Write::write_all(file.as_mut().unwrap(), &bytes).unwrap()
                        }
                        TarEvent::End => file = None,
                    }
                }
            }
        }
    }
    let (end, client) = backup.finish().unwrap();
    assert!(end.lsn > start.lsn && start.size > 0);
    let manifest = manifest.unwrap_or_default();
    std::fs::write(data.join("backup_manifest"), &manifest).unwrap();
    for tablespace in &start.tablespaces {
        let space = &places[&format!("{}.tar", tablespace.oid)];
        std::os::unix::fs::symlink(space, data.join(format!("pg_tblspc/{}", tablespace.oid))).unwrap();
    }
    (manifest, client, sent)
}

pub fn options(incremental: bool) -> BaseBackupOptions {
    BaseBackupOptions {
        label: "te'st".into(),
        fast_checkpoint: true,
        max_rate: None,
        manifest: true,
        incremental,
    }
}

/// Gives the files to the server's user, who must be able to read them.
pub fn own(path: &Path) {
    if dr_testkit::pg::server_ids().is_some() {
        ok(std::process::Command::new("chown").arg("-R").arg("postgres").arg(path));
    }
}
