//! Where settings are written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{SETTINGS, Written};
use crate::error::AgentError;

const SYSTEM_FILE: &str = "/etc/dr/dr.toml";
const SYSTEM_DIR: &str = "/etc/dr/conf.d";

/// Everything that settings may come from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// `--config FILE`: read in place of the system's files.
    pub file: Option<PathBuf>,
    /// The environment.
    pub environment: Vec<(String, String)>,
    /// Flags: `(setting, value, the flag as written)`.
    pub flags: Vec<(String, String, String)>,
}

/// The environment variable of a setting: `DR__SECTION__KEY`.
pub fn variable(name: &str) -> String {
    format!("DR__{}", name.replace('.', "__").to_ascii_uppercase())
}

type Values = BTreeMap<&'static str, Written>;

pub(super) fn read(sources: &Sources) -> Result<Values, AgentError> {
    read_with(sources, Path::new(SYSTEM_FILE), Path::new(SYSTEM_DIR))
}

fn read_with(sources: &Sources, system_file: &Path, system_dir: &Path) -> Result<Values, AgentError> {
    let mut values = Values::new();
    for setting in SETTINGS.iter().filter(|s| !s.default.is_empty()) {
        let written = Written { value: setting.default.to_owned(), origin: "default".to_owned() };
        values.insert(setting.name, written);
    }
    match &sources.file {
        Some(file) => read_file(&mut values, file)?,
        None => {
            if is_there(system_file)? {
                read_file(&mut values, system_file)?;
            }
            for file in fragments(system_dir)? {
                read_file(&mut values, &file)?;
            }
        }
    }
    for (name, value) in &sources.environment {
        if name.starts_with("DR__") {
            let known = SETTINGS.iter().find(|s| variable(s.name) == *name);
            match known {
                Some(setting) => put(&mut values, setting.name, value, &format!("variable {name}"))?,
                None => {
                    let key = name.trim_start_matches("DR__").replace("__", ".").to_ascii_lowercase();
                    put(&mut values, &key, value, &format!("variable {name}"))?;
                }
            }
        }
    }
    for (name, value, flag) in &sources.flags {
        put(&mut values, name, value, flag)?;
    }
    Ok(values)
}

/// Whether a name is there. A link that leads nowhere is there, and cannot be read: what it should
/// lead to must not pass for a file that nobody wrote.
fn is_there(path: &Path) -> Result<bool, AgentError> {
    match std::fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(AgentError::Unreadable { path: path.to_owned(), source }),
    }
}

/// The fragments of a directory in the order of their names. One that is not there has none; one
/// that cannot be read must not pass for that.
fn fragments(dir: &Path) -> Result<Vec<PathBuf>, AgentError> {
    let unreadable = |source| AgentError::Unreadable { path: dir.to_owned(), source };
    if !is_there(dir)? {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(dir).map_err(unreadable)?;
    let files: Result<Vec<PathBuf>, _> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
    let mut files = files.map_err(unreadable)?;
    files.retain(|path| path.extension().is_some_and(|e| e == "toml"));
    files.sort();
    Ok(files)
}

fn read_file(values: &mut Values, path: &Path) -> Result<(), AgentError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| AgentError::Unreadable { path: path.to_owned(), source })?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| AgentError::Syntax {
        path: path.to_owned(),
        // The error's full text quotes the line, which may hold a secret.
        reason: match error.span() {
            Some(span) => format!("line {}: {}", line_at(&text, span.start), error.message()),
            None => error.message().to_owned(),
        },
    })?;
    for (section, content) in table {
        let origin = |key: &str| match line_of(&text, &section, key) {
            Some(line) => format!("{}:{line}", path.display()),
            None => path.display().to_string(),
        };
        let toml::Value::Table(content) = content else {
            return Err(unknown(&section, &origin(&section)));
        };
        for (key, value) in content {
            let value = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(flag) => flag.to_string(),
                other => {
                    return Err(AgentError::Syntax {
                        path: path.to_owned(),
                        reason: format!("[{section}] {key} is a {}, not a simple value", other.type_str()),
                    });
                }
            };
            put(values, &format!("{section}.{key}"), &value, &origin(&key))?;
        }
    }
    Ok(())
}

/// The number of the line that holds a byte.
fn line_at(text: &str, at: usize) -> usize {
    text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1
}

/// The line of a key, for messages.
fn line_of(text: &str, section: &str, key: &str) -> Option<usize> {
    let mut inside = false;
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') {
            inside = line.trim_matches(['[', ']']).trim() == section;
        } else if inside && line.split('=').next().map(str::trim) == Some(key) {
            return Some(index + 1);
        }
    }
    None
}

fn put(values: &mut Values, name: &str, value: &str, origin: &str) -> Result<(), AgentError> {
    let setting = SETTINGS.iter().find(|s| s.name == name).ok_or_else(|| unknown(name, origin))?;
    values.insert(setting.name, Written { value: value.to_owned(), origin: origin.to_owned() });
    Ok(())
}

fn unknown(name: &str, origin: &str) -> AgentError {
    let nearest = SETTINGS.iter().map(|s| (distance(s.name, name), s.name)).min();
    let suggestion = nearest.filter(|(distance, _)| *distance <= name.len() / 3 + 1).map(|(_, name)| name);
    AgentError::UnknownKey { origin: origin.to_owned(), key: name.to_owned(), suggestion }
}

/// Edits that turn one name into the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn load(
        text: &str,
        environment: &[(&str, &str)],
        flags: &[(&str, &str)],
    ) -> Result<Settings, AgentError> {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("dr.toml");
        std::fs::write(&file, text).expect("a file");
        let own = |(a, b): &(&str, &str)| ((*a).to_owned(), (*b).to_owned());
        Settings::load(&Sources {
            file: Some(file),
            environment: environment.iter().map(own).collect(),
            flags: flags
                .iter()
                .map(|(a, b)| ((*a).to_owned(), (*b).to_owned(), "--set".to_owned()))
                .collect(),
        })
    }

    #[test]
    fn later_layers_win_and_origins_are_kept() {
        let text = "[repository]\nurl = '/a'\n[backup]\nworkers = 3\n";
        let settings =
            load(text, &[("DR__BACKUP__WORKERS", "4")], &[("repository.url", "/b")]).expect("settings");
        assert_eq!(settings.text("repository.url"), Some("/b"));
        assert_eq!(settings.number("backup.workers"), Some(4));
        assert_eq!(settings.values()["backup.workers"].origin, "variable DR__BACKUP__WORKERS");
        assert_eq!(settings.values()["backup.wal_timeout"].origin, "default");
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line_and_the_nearest_one() {
        match load("[repository]\nurl = '/a'\nregoin = 'x'\n", &[], &[]) {
            Err(AgentError::UnknownKey { origin, key, suggestion }) => {
                assert!(origin.ends_with("dr.toml:3"), "{origin}");
                assert_eq!((key.as_str(), suggestion), ("repository.regoin", Some("repository.region")));
            }
            other => panic!("{other:?}"),
        }
        assert!(load("", &[("DR__BACKUP__WORKRES", "4")], &[]).is_err());
        assert!(load("[nonsense]\nx = 1\n", &[], &[]).is_err());
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_refused_and_secrets_do_not_show() {
        for (key, value) in [
            ("backup.workers", "many"),
            ("backup.wal_timeout", "30"),
            ("backup.point_bytes", "5"),
            ("repository.path_style", "yes"),
            ("encryption.key_file", "relative"),
        ] {
            assert!(matches!(load("", &[], &[(key, value)]), Err(AgentError::BadValue { .. })), "{key}");
        }
        let error = load("", &[], &[("repository.secret_key", "hunter2")]).expect_err("a clear secret");
        assert!(!error.to_string().contains("hunter2"));
    }

    #[test]
    fn a_syntax_error_names_the_line_and_not_what_is_written_there() {
        let error =
            load("[cluster]\nconnection = 'host=x password=hunter2\n", &[], &[]).expect_err("a syntax error");
        let text = format!("{error} {error:?}");
        assert!(text.contains("line 2") && !text.contains("hunter2"), "{text}");
    }

    #[test]
    fn fragments_win_over_the_system_file_and_a_named_file_is_read_in_place_of_both() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        let write = |name: &str, workers: u32, label: &str| {
            let text = format!("[backup]\nworkers = {workers}\n[cluster]\nlabel = '{label}'\n");
            std::fs::write(at(name), text).expect("a file");
        };
        std::fs::create_dir(at("conf.d")).expect("a directory");
        write("dr.toml", 1, "system");
        write("conf.d/20.toml", 3, "second");
        write("conf.d/10.toml", 2, "first");
        std::fs::write(at("conf.d/30.toml"), "[restore]\nworkers = 9\n").expect("a file");
        std::fs::write(at("conf.d/40.toml.bak"), "not read").expect("a file");
        let read = |sources: &Sources| read_with(sources, &at("dr.toml"), &at("conf.d")).expect("settings");
        let value = |values: &Values, name: &str| values.get(name).map(|w| w.value.clone());

        let system = read(&Sources::default());
        assert_eq!(value(&system, "backup.workers").as_deref(), Some("3"));
        assert_eq!(value(&system, "restore.workers").as_deref(), Some("9"));

        std::fs::write(at("own.toml"), "[cluster]\nlabel = 'own'\n").expect("a file");
        let mut sources = Sources { file: Some(at("own.toml")), ..Sources::default() };
        let own = read(&sources);
        assert_eq!(value(&own, "cluster.label").as_deref(), Some("own"));
        assert_eq!((value(&own, "backup.workers"), value(&own, "restore.workers")), (None, None));

        sources.environment = vec![("DR__CLUSTER__LABEL".into(), "variable".into())];
        assert_eq!(value(&read(&sources), "cluster.label").as_deref(), Some("variable"));
        sources.flags = vec![("cluster.label".into(), "flag".into(), "--set".into())];
        assert_eq!(value(&read(&sources), "cluster.label").as_deref(), Some("flag"));
    }

    #[test]
    fn a_file_of_the_system_that_cannot_be_read_is_an_error_and_one_that_is_not_there_is_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        let read = || read_with(&Sources::default(), &at("dr.toml"), &at("conf.d"));
        let refused = |name: &str| match read() {
            Err(AgentError::Unreadable { path, .. }) => assert_eq!(path, at(name)),
            other => panic!("{name}: {other:?}"),
        };
        assert!(read().is_ok());
        std::os::unix::fs::symlink("nowhere", at("dr.toml")).expect("a link");
        refused("dr.toml");
        std::fs::remove_file(at("dr.toml")).expect("removed");
        std::fs::create_dir(at("dr.toml")).expect("no file");
        refused("dr.toml");
        std::fs::remove_dir(at("dr.toml")).expect("removed");
        std::os::unix::fs::symlink("nowhere", at("conf.d")).expect("a link");
        refused("conf.d");
        std::fs::remove_file(at("conf.d")).expect("removed");
        std::fs::create_dir(at("conf.d")).expect("a directory");
        std::os::unix::fs::symlink("nowhere", at("conf.d/a.toml")).expect("a link");
        refused("conf.d/a.toml");
    }

    #[test]
    fn a_folder_of_fragments_that_cannot_be_read_is_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(fragments(&dir.path().join("none")).expect("nothing").is_empty());
        std::fs::write(dir.path().join("file"), "").expect("a file");
        assert!(matches!(fragments(&dir.path().join("file")), Err(AgentError::Unreadable { .. })));
    }

    #[test]
    fn a_password_in_the_connection_does_not_show() {
        let text = "[cluster]\nconnection = 'host=x password=hunter2 user=me'\n";
        let settings = load(text, &[], &[]).expect("settings");
        let shown = &settings.shown()["cluster.connection"].value;
        assert!(shown.contains("user") && !shown.contains("hunter2"), "{shown}");
        assert!(settings.text("cluster.connection").expect("a connection").contains("hunter2"));
    }

    #[test]
    fn a_password_in_an_address_does_not_show() {
        let written =
            [("repository.url", "https://me:hunter2@a/b"), ("repository.endpoint", "https://hunter2@h:1")];
        let settings = load("", &[], &written).expect("settings");
        let shown = settings.shown();
        assert_eq!(shown["repository.url"].value, "https://…@a/b");
        assert_eq!(shown["repository.endpoint"].value, "https://…@h:1");
        let error = crate::wire::target(&settings, false).expect_err("no such scheme");
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
        let plain = "s3://bucket/a@b";
        let settings = load("", &[], &[("repository.url", plain)]).expect("settings");
        assert_eq!(settings.shown()["repository.url"].value, plain);
    }

    #[test]
    fn every_setting_is_named_once_and_its_default_is_valid() {
        let names: std::collections::BTreeSet<_> = SETTINGS.iter().map(|s| s.name).collect();
        assert_eq!(names.len(), SETTINGS.len());
        load("", &[], &[]).expect("defaults are valid");
    }
}
