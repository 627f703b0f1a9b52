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

/// The same with one cluster, called main, that has nothing yet.
fn repository_of_main(dir: &Path) -> String {
    let repo = repository(dir);
    add_cluster(&repo, 7, "main");
    repo
}

fn add_cluster(repo: &str, system_id: u64, label: &str) {
    let place = Path::new(repo).join(format!("cluster/{system_id}"));
    std::fs::create_dir_all(&place).unwrap();
    let identity = serde_json::json!({
        "system_id": system_id.to_string(), "label": label, "first_seen": "2026-01-01T00:00:00Z",
        "version_num": 150018, "page_size": 8192, "segment_size": 16777216, "relation_segment_pages": 131072,
    });
    std::fs::write(place.join("identity.json"), identity.to_string()).unwrap();
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

/// It would pass with no other network: that is no reason to try again.
#[test]
fn an_endpoint_without_tls_is_refused_with_the_setting_that_allows_it() {
    let dir = scratch();
    let endpoint = ["--set", "repository.endpoint=http://127.0.0.1:9"];
    let output = dr(
        dir.path(),
        &[&["--config", "/dev/null", "--repo", "s3://b/p"], &endpoint[..], &["list"]].concat(),
    );
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(16), "{words}");
    assert!(words.contains("http://") && words.contains("repository.allow_http"), "{words}");
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
fn no_password_of_the_configuration_is_printed() {
    let dir = scratch();
    let connection = "connection = 'host=x password=hunter2'";
    let lines =
        format!("[cluster]\n{connection}\n[repository]\nurl = '/x'\nendpoint = 'https://me:hunter2@h'\n");
    std::fs::write(dir.path().join("dr.toml"), lines).unwrap();
    std::fs::write(
        dir.path().join("torn.toml"),
        format!("[cluster]\n{}\n", &connection[..connection.len() - 1]),
    )
    .unwrap();
    for (arguments, said) in [
        (&["--config", "dr.toml", "config", "show", "--origin"][..], "password=…"),
        (&["--config", "dr.toml", "--json", "config", "show"][..], "https://…@h"),
        (&["--config", "torn.toml", "config", "show"][..], "torn.toml: line 2"),
        (&["--config", "torn.toml", "--json", "config", "check"][..], "torn.toml: line 2"),
    ] {
        let output = dr(dir.path(), arguments);
        let all = text(&output.stdout) + &text(&output.stderr);
        assert!(all.contains(said) && !all.contains("hunter2"), "{arguments:?}: {all}");
    }
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
    let repo = repository_of_main(dir.path());
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
fn a_cluster_by_name_is_listed_by_every_cluster_of_that_name_and_refused_by_none() {
    let dir = scratch();
    let repo = repository(dir.path());
    let list =
        |name: &str| dr(dir.path(), &["--config", "/dev/null", "--repo", &repo, "--cluster", name, "list"]);
    let refused = list("main");
    assert_eq!(refused.status.code(), Some(16));
    let told = text(&refused.stderr);
    assert!(
        told.contains("no cluster \"main\", and no other one yet") && refused.stdout.is_empty(),
        "{told}"
    );
    for (system_id, label) in [(7, "main"), (8, "main"), (9, "other")] {
        add_cluster(&repo, system_id, label);
    }
    let listed = text(&list("main").stdout);
    assert!(
        listed.contains("main (7)") && listed.contains("main (8)") && !listed.contains("(9)"),
        "{listed}"
    );
    assert!(text(&list("9").stdout).contains("other (9)"));
    let refused = list("mian");
    let told = text(&refused.stderr);
    assert!(
        told.contains("main (7), main (8), other (9)") && told.contains("config-which-cluster"),
        "{told}"
    );
    assert_eq!((refused.status.code(), refused.stdout.len()), (Some(16), 0));
}

#[test]
fn a_backup_whose_manifest_cannot_be_read_is_listed_as_such() {
    let dir = scratch();
    let repo = repository_of_main(dir.path());
    let id = "20260101T000000Z-00112233";
    let place = Path::new(&repo).join("cluster/7/manifest");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join(id), "not a manifest").unwrap();
    let output = dr(dir.path(), &["--config", "/dev/null", "--repo", &repo, "list"]);
    let listed = text(&output.stdout);
    let line =
        listed.lines().find(|line| line.starts_with("UNREADABLE:")).unwrap_or_else(|| panic!("{listed}"));
    assert!(line.starts_with(&format!("UNREADABLE: backup {id}: ")) && line.len() > 60, "{line}");
    assert!(output.status.success() && listed.contains("Cluster main (7)"), "{listed}");
    assert!(!listed.contains("no backups yet"), "{listed}");
    let output = dr(dir.path(), &["--config", "/dev/null", "--repo", &repo, "--json", "list"]);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let unreadable = &document["result"][0]["unreadable"][0];
    assert_eq!(unreadable["id"], id);
    assert!(unreadable["reason"].as_str().is_some_and(|reason| reason.len() > 10), "{unreadable}");
}

#[test]
fn a_misspelt_tz_is_told_where_a_zone_is_needed_and_only_there() {
    let dir = scratch();
    let repo = repository_of_main(dir.path());
    let restore = |zone: &str, time: &str| {
        let arguments =
            ["--config", "/dev/null", "--repo", &repo, "restore", "--to", "/tmp/never", "--time", time];
        text(&dr_command(dir.path(), &arguments).env("TZ", zone).output().unwrap().stderr)
    };
    let told = restore("Europe/Berlln", "2020-01-01 10:00");
    assert!(told.contains("Berlln") && told.contains("no time zone that is known"), "{told}");
    // The repository has no backup; that is told when the time itself was understood.
    for (zone, time) in [
        ("Europe/Berlin", "2020-01-01 10:00"),
        ("Europe/Berlln", "2020-01-01 10:00 UTC"),
        ("Europe/Berlln", "2020-01-01T10:00:00+02:00"),
        ("Europe/Berlln", "10 min ago"),
    ] {
        let told = restore(zone, time);
        assert!(told.contains("no backup"), "{zone}, {time}: {told}");
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

/// Runs with standard output led to where `to` says, in the words of a shell.
fn dr_into(dir: &Path, arguments: &[&str], to: &str) -> Output {
    let script = format!("set -o pipefail; \"$@\" {to}");
    let mut command = Command::new("/bin/bash");
    command.env_clear().env("PATH", "/usr/bin:/bin").current_dir(dir).stdin(Stdio::null());
    command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_dr"), "--config", "/dev/null"]);
    command.args(arguments).output().unwrap()
}

#[test]
fn what_cannot_be_printed_is_an_error_and_a_reader_that_went_away_is_none() {
    let dir = scratch();
    let repo = repository_of_main(dir.path());
    for arguments in [
        &["--repo", &repo, "list"][..],
        &["--repo", &repo, "--json", "list"],
        &["--repo", &repo, "--json", "jobs"],
        &["config", "show"],
        &["completions", "bash"],
        &["--help"],
        &["--version"],
    ] {
        let output = dr_into(dir.path(), arguments, "> /dev/full");
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(18), "{arguments:?}: {told}");
        assert!(told.contains("standard output cannot be written") && told.contains("cli-output"), "{told}");
        let output = dr_into(dir.path(), arguments, "| true");
        let told = text(&output.stderr);
        assert!(output.status.success() && told.is_empty(), "{arguments:?}: {told}");
    }
}

#[test]
fn not_even_a_full_disk_behind_a_fetch_looks_like_the_end_of_wal() {
    let dir = scratch();
    let repo = repository_of_main(dir.path());
    let arguments = ["--repo", &repo, "--json", "wal", "fetch", "000000010000000000000001", "out"];
    assert_eq!(dr_into(dir.path(), &arguments, "> told").status.code(), Some(1), "it is not in the archive");
    assert_eq!(dr_into(dir.path(), &arguments, "> /dev/full").status.code(), Some(200));
}

#[test]
fn records_that_cannot_be_read_are_told_beside_those_that_can() {
    let dir = scratch();
    let repo = repository_of_main(dir.path());
    let place = Path::new(&repo).join("cluster/7/job");
    std::fs::create_dir(&place).unwrap();
    let receipt = serde_json::json!({
        "job": "backup", "began": "2026-01-01T00:00:00Z", "ended": "2026-01-01T00:00:01Z", "host": "h",
        "version": "0.1.0", "outcome": { "result": "done" }, "stages": [], "facts": {}, "warnings": [],
    });
    let mut previous: Option<(u64, Vec<u8>)> = None;
    for (kind, body) in [("promise", serde_json::json!({ "of": "a later version" })), ("receipt", receipt)] {
        let before = previous.as_ref().map(|(number, bytes)| (*number, &bytes[..]));
        let record = dr_core::journal::JournalRecord::after(before, kind, body);
        std::fs::write(place.join(format!("{:010}.json", record.number)), record.to_bytes()).unwrap();
        previous = Some((record.number, record.to_bytes()));
    }
    let jobs = |arguments: &[&str]| {
        dr(dir.path(), &[&["--config", "/dev/null", "--repo", &repo], arguments, &["jobs"]].concat())
    };
    for arguments in [&[][..], &["--json"], &["--quiet"]] {
        let output = jobs(arguments);
        let (said, warned) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success() && said.contains("backup"), "{arguments:?}: {said}{warned}");
        assert!(warned.contains("warning: not shown") && warned.ends_with("number 1\n"), "{warned}");
    }
    std::fs::remove_file(place.join("0000000002.json")).unwrap();
    assert!(!text(&jobs(&[]).stdout).contains("No jobs ran"), "something ran");
}

#[test]
fn colour_is_where_it_is_asked_for_and_never_in_json_or_in_a_pipe() {
    let dir = scratch();
    let repo = repository_of_main(dir.path());
    let nowhere = ["--config", "/dev/null", "--repo", "/nonexistent/place"];
    // Errors of commands, errors of the command line, and results.
    let cases: [(&[&str], &str); 3] = [
        (&[&nowhere[..], &["list"]].concat(), "error:"),
        (&["list", "--nonsense"], "error:"),
        (&[&nowhere[..], &["check", "--set", "cluster.connection=host=/nonexistent"]].concat(), "BAD "),
    ];
    for (arguments, word) in cases {
        for (color, coloured) in [("always", true), ("never", false), ("auto", false)] {
            let mut command = dr_command(dir.path(), &[arguments, &["--color", color]].concat());
            let output = command.env("NO_COLOR", "1").env("TERM", "xterm").output().unwrap();
            let all = text(&output.stdout) + &text(&output.stderr);
            assert!(all.contains(word), "{arguments:?}: {all}");
            assert_eq!(all.contains("\x1b["), coloured, "{arguments:?} --color {color}: {all:?}");
        }
    }
    for arguments in [&[&nowhere[..], &["--json", "list"]].concat()[..], &["--json", "list", "--nonsense"]] {
        let output = dr(dir.path(), &[arguments, &["--color=always"]].concat());
        assert!(!text(&output.stdout).contains('\x1b'), "{}", text(&output.stdout));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
    }
    let known = ["--config", "/dev/null", "--repo", &repo, "list"];
    let plain = text(&dr(dir.path(), &known).stdout);
    assert!(plain.contains("Cluster main (7)"), "{plain}");
    let output = dr(dir.path(), &["--color", "sometimes", "list"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_terminal_is_coloured_unless_no_color_is_set() {
    let dir = scratch();
    let errors = |variables: &[(&str, &str)]| {
        // `script` gives its child a terminal.
        let line = format!("{} --config /dev/null list", env!("CARGO_BIN_EXE_dr"));
        let mut command = Command::new("script");
        command.env_clear().env("PATH", "/usr/bin:/bin").current_dir(dir.path()).stdin(Stdio::null());
        command.envs(variables.iter().copied()).args(["-qec", &line, "/dev/null"]);
        let said = text(&command.output().unwrap().stdout);
        assert!(said.contains("repository.url is not set"), "{said}");
        said
    };
    assert!(errors(&[("TERM", "xterm")]).contains("\x1b[1;31merror:"));
    assert!(!errors(&[("TERM", "xterm"), ("NO_COLOR", "1")]).contains('\x1b'));
    assert!(!errors(&[("TERM", "dumb")]).contains('\x1b'));
}

#[test]
fn verbose_tells_what_is_used_and_done_beside_the_result_and_no_secret() {
    let dir = scratch();
    let repo = repository_of_main(dir.path());
    let settings = ["--set", "cluster.connection=host=x password=hunter2"];
    let list = |more: &[&str]| {
        dr(
            dir.path(),
            &[&["--config", "/dev/null", "--repo", &repo], &settings[..], more, &["list"]].concat(),
        )
    };
    let plain = list(&[]);
    assert!(plain.stderr.is_empty(), "{}", text(&plain.stderr));
    let (once, twice) = (list(&["-v"]), list(&["-vv"]));
    let told = text(&once.stderr);
    assert!(told.contains(&format!("info: the repository is {repo}")) && !told.contains("debug:"), "{told}");
    let told = text(&twice.stderr);
    assert!(told.contains("debug: get, key repo.json"), "{told}");
    assert!(told.contains("debug: cluster.connection = \"host=x password=…\", written in --set"), "{told}");
    assert!(!told.contains("hunter2"), "{told}");
    assert!(once.stdout == plain.stdout && twice.stdout == plain.stdout);
    let output = list(&["--json", "--verbose"]);
    serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
    assert!(!output.stderr.is_empty());
    assert_eq!(list(&["-v", "-q"]).status.code(), Some(2), "they contradict each other");
}
