//! What the command line says and how it ends, in an environment of its own.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn dr(dir: &Path, arguments: &[&str]) -> Output {
    dr_command(dir, arguments).output().unwrap()
}

fn dr_command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dr"));
    command.env_clear().env("PATH", "/usr/bin:/bin").current_dir(dir).stdin(Stdio::null());
    command.args(arguments);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// An unencrypted, empty repository made by hand.
fn repository(dir: &Path) -> String {
    let repo = dir.join("repo");
    std::fs::create_dir(&repo).unwrap();
    let descriptor = serde_json::json!({
        "format": 1, "features_required": [], "id": "00112233445566778899aabbccddeeff", "extent": 262144,
        "suite": "none", "compression_level": 1, "key_epoch": 1, "public_key": "", "created": "2026-01-01T00:00:00Z",
    });
    std::fs::write(repo.join("repo.json"), descriptor.to_string()).unwrap();
    repo.display().to_string()
}

#[test]
fn an_error_names_the_thing_the_cause_and_the_way_out() {
    let dir = scratch();
    let output = dr(dir.path(), &["--config", "/dev/null", "--repo", "/nonexistent/place", "list"]);
    assert_eq!(output.status.code(), Some(16));
    assert_eq!(
        text(&output.stderr),
        "error: the storage cannot be used\n  because: /nonexistent/place is not a usable storage address: No such file or directory (os error 2)\nhint: See [repository] in `dr config check`.\n(invalid, see docs/errors/storage-invalid.md)\n"
    );
}

#[test]
fn json_errors_have_the_documented_shape() {
    let dir = scratch();
    let output = dr(dir.path(), &["--config", "/dev/null", "--json", "list"]);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["dr"], 1);
    assert_eq!(document["command"], "list");
    let error = document["error"].as_object().unwrap();
    let names: Vec<&String> = error.keys().collect();
    assert_eq!(names, ["causes", "class", "code", "hint", "message"]);
    assert_eq!(error["code"], "config-missing");
    assert!(output.stderr.is_empty());
}

#[test]
fn a_mistyped_setting_is_refused_with_the_nearest_one() {
    let dir = scratch();
    std::fs::write(dir.path().join("dr.toml"), "[repository]\nurll = '/x'\n").unwrap();
    let output = dr(dir.path(), &["--config", "dr.toml", "list"]);
    let said = text(&output.stderr);
    assert!(said.contains("dr.toml:2: there is no setting \"repository.urll\""), "{said}");
    assert!(said.contains("hint: Did you mean repository.url?"), "{said}");
    let output = dr(dir.path(), &["--config", "/dev/null", "--set", "backup.worker=3", "list"]);
    assert!(text(&output.stderr).contains("Did you mean backup.workers?"));
}

#[test]
fn wrong_arguments_end_with_two_and_fetch_with_200() {
    let dir = scratch();
    assert_eq!(dr(dir.path(), &["nonsense"]).status.code(), Some(2));
    assert_eq!(dr(dir.path(), &["restore"]).status.code(), Some(2));
    assert_eq!(dr(dir.path(), &["restore", "--to", "/x", "--latest", "--immediate"]).status.code(), Some(2));
    assert_eq!(dr(dir.path(), &["wal", "fetch"]).status.code(), Some(200));
    assert_eq!(dr(dir.path(), &["--config", "missing", "wal", "fetch", "a", "b"]).status.code(), Some(200));
    assert_eq!(dr(dir.path(), &["--help"]).status.code(), Some(0));
}

#[test]
fn an_empty_repository_lists_nothing_and_restores_nothing() {
    let dir = scratch();
    let repo = repository(dir.path());
    let output = dr(dir.path(), &["--config", "/dev/null", "--repo", &repo, "list"]);
    assert_eq!(text(&output.stdout), "No backups yet. `dr backup` takes the first.\n");
    let output = dr(
        dir.path(),
        &["--config", "/dev/null", "--repo", &repo, "restore", "--to", "/tmp/never", "--json"],
    );
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["error"]["code"], "config-which-cluster");
}

#[test]
fn a_repository_of_a_future_format_is_refused_by_its_version() {
    let dir = scratch();
    let repo = repository(dir.path());
    let path = Path::new(&repo).join("repo.json");
    let later = std::fs::read_to_string(&path).unwrap().replace("\"format\":1", "\"format\":7");
    std::fs::write(&path, later).unwrap();
    let output = dr(dir.path(), &["--config", "/dev/null", "--repo", &repo, "list"]);
    assert_eq!(output.status.code(), Some(17));
    assert!(text(&output.stderr).contains("repository format 7"), "{}", text(&output.stderr));
}

#[test]
fn a_target_time_needs_a_zone_and_must_have_passed() {
    let dir = scratch();
    let repo = repository(dir.path());
    std::fs::create_dir_all(Path::new(&repo).join("cluster/7")).unwrap();
    let identity = serde_json::json!({
        "system_id": "7", "label": "main", "first_seen": "2026-01-01T00:00:00Z", "version_num": 150018,
        "page_size": 8192, "segment_size": 16777216, "relation_segment_pages": 131072,
    });
    std::fs::write(Path::new(&repo).join("cluster/7/identity.json"), identity.to_string()).unwrap();
    for (time, said) in [
        ("2026-11-22 11:08:50", "has no time zone"),
        ("2026-03-29 02:30 Europe/Berlin", "never happened"),
        ("2026-10-25 02:30 Europe/Berlin", "happened twice"),
        ("2999-01-01 00:00 UTC", "lies in the future"),
        ("soon", "is not a time"),
    ] {
        let arguments =
            ["--config", "/dev/null", "--repo", &repo, "restore", "--to", "/tmp/never", "--time", time];
        let output = dr(dir.path(), &arguments);
        assert_eq!(output.status.code(), Some(16), "{time}");
        assert!(text(&output.stderr).contains(said), "{time}: {}", text(&output.stderr));
    }
}

#[test]
fn init_without_a_server_changes_nothing() {
    let dir = scratch();
    let repo = dir.path().join("repo").display().to_string();
    let output = dr(
        dir.path(),
        &["--config", "/dev/null", "--repo", &repo, "init", "--connection", "host=/nonexistent user=x"],
    );
    assert_eq!(output.status.code(), Some(10));
    assert!(text(&output.stderr).contains("cannot look at the server"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn every_error_code_has_a_page_and_every_page_a_code() {
    let pages = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/errors");
    let names =
        std::fs::read_dir(pages).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let found: BTreeSet<String> = names
        .filter_map(|name| name.strip_suffix(".md").map(str::to_owned))
        .filter(|n| n != "README")
        .collect();
    let codes: BTreeSet<String> = dr_cli::CODES.iter().map(|code| (*code).to_owned()).collect();
    assert_eq!(found, codes);
    // Each code that the sources answer is listed.
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    for source in
        ["dr-core/src/port", "dr-pg/src", "dr-storage/src", "dr-engine/src", "dr-agent/src", "dr-cli/src"]
    {
        for_each_file(&Path::new(root).join(source), &mut |content| {
            for line in
                content.lines().filter(|line| line.contains("} => \"") && line.trim_end().ends_with("\","))
            {
                let code = line.split('"').nth(1).unwrap();
                let looks = [
                    "storage-",
                    "key-",
                    "source-",
                    "replication-",
                    "cluster-",
                    "wal-",
                    "repo-",
                    "job-",
                    "config-",
                    "cli-",
                ];
                if looks.iter().any(|prefix| code.starts_with(prefix)) {
                    assert!(codes.contains(code), "{code} is not in CODES");
                }
            }
        });
    }
}

fn for_each_file(dir: &Path, each: &mut dyn FnMut(&str)) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            for_each_file(&path, each);
        } else if path.extension().is_some_and(|e| e == "rs") {
            each(&std::fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn the_generated_references_are_current() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs");
    for (what, path) in [("cli", "cli/reference.md"), ("config", "reference/config.md")] {
        let stored = std::fs::read_to_string(format!("{docs}/{path}")).unwrap_or_default();
        let now = dr_cli::reference(what).unwrap();
        assert!(stored == now, "docs/{path} is stale: run `cargo xtask gen`");
    }
}

#[test]
fn completions_and_manual_pages_are_made() {
    let dir = scratch();
    for shell in ["bash", "zsh", "fish"] {
        let output = dr(dir.path(), &["completions", shell]);
        assert!(output.status.success() && text(&output.stdout).contains("restore"), "{shell}");
    }
    assert!(dr(dir.path(), &["man", "pages"]).status.success());
    assert!(dir.path().join("pages/dr-restore.1").exists());
}

#[test]
fn a_wrong_command_line_is_told_to_programs_as_json() {
    let dir = scratch();
    let output = dr(dir.path(), &["--json", "backup", "--fulll"]);
    assert_eq!(output.status.code(), Some(2));
    let document: serde_json::Value = serde_json::from_str(&text(&output.stdout)).unwrap();
    assert_eq!(document["error"]["code"], "cli-usage");
    assert!(document["error"]["message"].as_str().unwrap().contains("--fulll"), "{document}");
}

#[test]
fn foreign_variables_of_any_bytes_do_no_harm_and_own_ones_are_checked() {
    use std::os::unix::ffi::OsStrExt;
    let dir = scratch();
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    let mut command = dr_command(dir.path(), &["config", "check"]);
    let output = command.env("SOMETHING", odd).output().unwrap();
    assert!(!text(&output.stderr).contains("panicked"), "{}", text(&output.stderr));
    assert_ne!(output.status.code(), Some(101));
    let mut command = dr_command(dir.path(), &["config", "check"]);
    let output = command.env("DR__BACKUP__WORKERS", odd).output().unwrap();
    assert!(text(&output.stderr).contains("DR__BACKUP__WORKERS is not UTF-8"), "{}", text(&output.stderr));
}
