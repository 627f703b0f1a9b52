//! All settings there are.

use std::fmt::Write;

/// What a setting's text must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// An absolute path.
    Path,
    /// `true` or `false`.
    Flag,
    /// A whole number.
    Number,
    /// A duration with its unit.
    Duration,
    /// A size with its unit.
    Size,
    /// A secret by reference: `file:PATH`, `env:NAME` or `exec:COMMAND`.
    Secret,
    /// An IP address with a port.
    Address,
    /// One of these words.
    Choice(&'static [&'static str]),
}

impl Kind {
    fn words(self) -> String {
        let words = match self {
            Kind::Choice(words) => {
                return words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(" or ");
            }
            Kind::Text => "text",
            Kind::Path => "absolute path",
            Kind::Flag => "true or false",
            Kind::Number => "whole number",
            Kind::Duration => "duration with unit (500ms, 30s, 5min, 12h, 7d)",
            Kind::Size => "size with unit (64MiB, 10GB)",
            Kind::Address => "IP address with port (127.0.0.1:7434, [::1]:7434)",
            Kind::Secret => "secret by reference (file:PATH, env:NAME, exec:COMMAND)",
        };
        words.to_owned()
    }
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// `section.key`.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// What it is when nothing is written; empty: not set.
    pub default: &'static str,
    /// One sentence.
    pub about: &'static str,
}

const fn setting(name: &'static str, kind: Kind, default: &'static str, about: &'static str) -> Setting {
    Setting { name, kind, default, about }
}

/// Every setting, by section.
pub const SETTINGS: &[Setting] = &[
    setting(
        "cluster.label",
        Kind::Text,
        "main",
        "What people call the cluster; several clusters share a repository.",
    ),
    setting(
        "cluster.connection",
        Kind::Text,
        "host=/var/run/postgresql dbname=postgres",
        "libpq connection string of the server to back up.",
    ),
    setting(
        "cluster.data_directory",
        Kind::Path,
        "",
        "Its data directory; the server is asked when this is not set.",
    ),
    setting(
        "cluster.bin_dir",
        Kind::Path,
        "",
        "The directory of the server's programs, when it is not one of the usual places.",
    ),
    setting(
        "repository.url",
        Kind::Text,
        "",
        "Where backups are kept: an absolute path, file:///path or s3://bucket/prefix.",
    ),
    setting(
        "repository.endpoint",
        Kind::Text,
        "",
        "S3: the server's address, as https://s3.example.com; AWS when not set.",
    ),
    setting("repository.region", Kind::Text, "us-east-1", "S3: the region."),
    setting(
        "repository.path_style",
        Kind::Flag,
        "false",
        "S3: the bucket is part of the path, not of the host name.",
    ),
    setting("repository.allow_http", Kind::Flag, "false", "S3: allow a connection without TLS."),
    setting("repository.ca_file", Kind::Path, "", "S3: certificates (PEM) to trust beside the system's."),
    setting(
        "repository.access_key",
        Kind::Secret,
        "",
        "S3: the access key; the environment's or the instance's identity when not set.",
    ),
    setting("repository.secret_key", Kind::Secret, "", "S3: the secret key."),
    setting("repository.session_token", Kind::Secret, "", "S3: the session token of temporary credentials."),
    setting(
        "encryption.key_file",
        Kind::Path,
        "",
        "The key that reads everything: needed to restore, to fetch WAL, to verify content.",
    ),
    setting(
        "encryption.host_key_file",
        Kind::Path,
        "",
        "The host's key: enough to back up, push WAL, list and show.",
    ),
    setting(
        "encryption.age_identity_file",
        Kind::Path,
        "",
        "An age identity that opens the repository, in place of a key file.",
    ),
    setting(
        "backup.workers",
        Kind::Number,
        "",
        "Worker threads; as many as the host has cores, at most 8, when not set.",
    ),
    setting("backup.fast_checkpoint", Kind::Flag, "true", "Ask PostgreSQL for an immediate checkpoint."),
    setting(
        "backup.wal_timeout",
        Kind::Duration,
        "60s",
        "How long to wait for the backup's last WAL to arrive in the archive.",
    ),
    setting(
        "backup.source",
        Kind::Choice(&["files", "stream"]),
        "files",
        "Where a backup gets the cluster's files: `files` of this host, or the `stream` of a replication connection, \
         which needs no access to the server's host.",
    ),
    setting(
        "backup.standby",
        Kind::Choice(&["never", "prefer", "only"]),
        "never",
        "Whether backups are read from a standby; with several hosts in the connection string a stream chooses one. \
         The primary's archive_timeout then decides how soon a backup is complete.",
    ),
    setting(
        "backup.max_rate",
        Kind::Size,
        "",
        "Read at most so many bytes a second of the cluster; no limit when not set.",
    ),
    setting(
        "backup.point_every",
        Kind::Duration,
        "5min",
        "How often an interruptible backup records how far it is.",
    ),
    setting("backup.point_bytes", Kind::Size, "50GB", "… or after how many bytes read."),
    setting(
        "restore.workers",
        Kind::Number,
        "",
        "Worker threads; as many as the host has cores, at most 8, when not set.",
    ),
    setting(
        "restore.stall_limit",
        Kind::Duration,
        "10min",
        "How long replay may stand still before the restore fails.",
    ),
    setting(
        "agent.socket",
        Kind::Path,
        "/run/dr/agent.sock",
        "Where the resident agent is asked: a Unix socket, open to its user and group.",
    ),
    setting(
        "agent.listen",
        Kind::Address,
        "127.0.0.1:7434",
        "Where it answers HTTP: /healthz, /readyz, /metrics, to anybody who can connect; off when empty.",
    ),
    setting(
        "agent.stop_timeout",
        Kind::Duration,
        "60s",
        "How long its tasks may take to their next safe point when it stops.",
    ),
    setting("agent.check_interval", Kind::Duration, "5min", "How often it runs `dr check`; at least 1s."),
];

/// The reference of all settings, in Markdown.
pub fn reference() -> String {
    let mut out = String::from(
        "# Settings\n\nGenerated from the table in `dr-agent`; change it there and run `cargo xtask gen`.\n\n\
         Layers, later ones win:\n\n\
         1. defaults;\n\
         2. `/etc/dr/dr.toml`, then `/etc/dr/conf.d/*.toml` in the order of their names. With `--config FILE`\n   \
         that file is read **in place of** all of these. A file that is there and cannot be read is an error;\n\
         3. environment variables, `DR__SECTION__KEY`;\n\
         4. flags: `--set section.key=value`, then those with a name of their own, as `--repo`.\n\n\
         `dr config show --origin` tells what is in force, and where each value was written.\n",
    );
    let mut section = "";
    for setting in SETTINGS {
        let (now, key) = setting.name.split_once('.').unwrap_or(("", setting.name));
        if now != section {
            section = now;
            let _ = write!(out, "\n## [{section}]\n\n| key | takes | default | |\n|---|---|---|---|\n");
        }
        let default =
            if setting.default.is_empty() { "–".to_owned() } else { format!("`{}`", setting.default) };
        let _ = writeln!(out, "| `{key}` | {} | {default} | {} |", setting.kind.words(), setting.about);
    }
    out
}
