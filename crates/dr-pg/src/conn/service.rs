//! Service files: named sets of connection parameters (manual, "The Connection Service File").

use std::path::{Path, PathBuf};

use super::text::Pairs;

/// The file for the whole system on Debian and on systems built from source.
const SYSTEM_FILES: [&str; 2] =
    ["/etc/postgresql-common/pg_service.conf", "/usr/local/pgsql/etc/pg_service.conf"];

/// The parameters of a service: of the user's file, or else of the system's.
pub(super) fn load(name: &str, file: Option<&Path>, home: Option<&Path>) -> Result<Pairs, String> {
    let own = file.map(Path::to_owned).or_else(|| home.map(|home| home.join(".pg_service.conf")));
    let system = SYSTEM_FILES.iter().map(PathBuf::from);
    let mut looked = Vec::new();
    for path in own.into_iter().chain(system) {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && file != Some(&path) => continue,
            Err(error) => return Err(format!("the service file {} cannot be read: {error}", path.display())),
        };
        if let Some(pairs) = find(&text, name).map_err(|why| format!("{}: {why}", path.display()))? {
            return Ok(pairs);
        }
        looked.push(path.display().to_string());
    }
    let looked = if looked.is_empty() { "no service file was found".into() } else { looked.join(", ") };
    Err(format!("there is no service {name:?} ({looked})"))
}

/// The section of a service in the text of a file; the first of that name counts.
fn find(text: &str, name: &str) -> Result<Option<Pairs>, String> {
    let mut inside = false;
    let mut pairs = Pairs::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(section) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            if inside {
                break;
            }
            inside = section == name;
        } else if inside {
            let (key, value) = line.split_once('=').ok_or(format!("line {} has no \"=\"", number + 1))?;
            if key.trim() == "service" {
                return Err(format!("line {}: a service cannot name a service", number + 1));
            }
            pairs.push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    Ok(inside.then_some(pairs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_found_by_its_name_and_its_faults_are_told_by_line() {
        let text = "# comment\n[other]\nhost=x\n[pos]\n host = db1 \nport=5433\n\n[pos]\nhost=later\n";
        let pairs = find(text, "pos").unwrap().unwrap();
        assert_eq!(pairs, [("host".to_owned(), "db1".to_owned()), ("port".to_owned(), "5433".to_owned())]);
        assert_eq!(find(text, "none").unwrap(), None);
        assert!(find("[a]\nhost\n", "a").unwrap_err().contains("line 2"));
        assert!(find("[a]\nservice=b\n", "a").unwrap_err().contains("line 2"));
    }

    #[test]
    fn a_missing_service_names_the_files_that_were_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("services");
        std::fs::write(&file, "[a]\nhost=x\n").unwrap();
        assert!(load("b", Some(&file), None).unwrap_err().contains("services"));
        assert!(load("b", Some(&dir.path().join("none")), None).unwrap_err().contains("cannot be read"));
    }
}
