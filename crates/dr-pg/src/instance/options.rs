//! How a server is started on a restored directory.
//!
//! A copy of a production cluster carries production's configuration. What reaches outside the
//! copy, or hides what the recovery says, is switched off on the command line, which wins over
//! every file.

use std::path::Path;

/// What the log must look like to be read (`super::log`): the server's words, untranslated, in
/// their plain form.
const LOG: [(&str, &str); 8] = [
    ("lc_messages", "C"),
    ("logging_collector", "off"),
    ("log_destination", "stderr"),
    ("log_min_messages", "warning"),
    ("log_error_verbosity", "default"),
    ("log_line_prefix", "%m [%p] "),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
];

/// What keeps a private copy to itself.
const PRIVATE: [(&str, &str); 9] = [
    ("listen_addresses", ""),
    ("unix_socket_group", ""),
    ("ssl", "off"),
    ("hot_standby", "on"),
    // Debian writes this file for the first server; the copy would overwrite and remove it.
    ("external_pid_file", ""),
    // A copied subscription would drain the publisher's slot of the first server.
    ("max_logical_replication_workers", "0"),
    // The copy has no standbys: its commits would wait for ever.
    ("synchronous_standby_names", ""),
    // A smaller host is no reason not to start.
    ("huge_pages", "try"),
    ("bonjour", "off"),
];

/// The options for `pg_ctl -o`, which hands them to a shell.
pub(super) fn server_options(data: &Path, private: Option<&Path>) -> String {
    let mut out = Vec::new();
    let mut set = |name: &str, value: &str| out.push(format!("-c {}", quoted(&format!("{name}={value}"))));
    // A data_directory in the copied configuration would name the first server's.
    set("data_directory", &data.display().to_string());
    if let Some(sockets) = private {
        LOG.iter().for_each(|(name, value)| set(name, value));
        PRIVATE.iter().for_each(|(name, value)| set(name, value));
        set("unix_socket_directories", &sockets.display().to_string());
        set("hba_file", &sockets.join("hba").display().to_string());
    }
    out.join(" ")
}

/// One word for a POSIX shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_path_is_one_word_for_the_shell() {
        let options = server_options(Path::new("/a b/it's $(x)"), None);
        assert!(options.contains(r"-c 'data_directory=/a b/it'\''s $(x)'"), "{options}");
        assert!(!options.contains("listen_addresses"), "a public server keeps its addresses");
    }

    #[test]
    fn a_private_copy_listens_nowhere_and_reaches_nobody() {
        let options = server_options(Path::new("/d"), Some(Path::new("/s")));
        for expected in ["'listen_addresses='", "'hba_file=/s/hba'", "'max_logical_replication_workers=0'"] {
            assert!(options.contains(expected), "{options}");
        }
    }
}
