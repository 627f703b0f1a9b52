//! Password files (manual, "The Password File").

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The password of the first line that fits; `None` when none does.
///
/// As in libpq a file that others may read is not used; that is told in the log.
pub(super) fn find(path: &Path, host: &str, port: u16, database: &str, user: &str) -> Option<String> {
    let metadata = std::fs::metadata(path).ok()?;
    if !metadata.is_file() || metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(
            file = %path.display(),
            "the password file is not used: others may read it (chmod 0600), or it is no file"
        );
        return None;
    }
    let text = std::fs::read_to_string(path).ok()?;
    let wanted = [host, &port.to_string(), database, user];
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| fits(line, &wanted))
}

/// The line's password when its first four fields fit.
fn fits(line: &str, wanted: &[&str; 4]) -> Option<String> {
    let mut rest = line;
    for want in wanted {
        let (field, after) = field(rest)?;
        if field != *want && rest.split(':').next() != Some("*") {
            return None;
        }
        rest = after;
    }
    // libpq takes the rest of the line, with its escapes.
    let mut password = String::new();
    let mut chars = rest.chars();
    while let Some(c) = chars.next() {
        if c == '\\' { password.extend(chars.next()) } else { password.push(c) }
    }
    (!password.is_empty()).then_some(password)
}

/// The field before the next `:` that no backslash escapes, and what follows.
fn field(text: &str) -> Option<(String, &str)> {
    let mut field = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => field.extend(chars.next().map(|(_, c)| c)),
            ':' => return Some((field, &text[at + 1..])),
            c => field.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_fitting_line_gives_the_password() {
        let wanted = ["db1", "5432", "pos", "dr"];
        assert_eq!(fits("db1:5432:pos:dr:secret", &wanted).as_deref(), Some("secret"));
        assert_eq!(fits("*:*:*:dr:a\\:b\\\\c", &wanted).as_deref(), Some("a:b\\c"));
        assert_eq!(fits("*:*:*:other:x", &wanted), None);
        assert_eq!(fits("*:*:*:dr:", &wanted), None);
        assert_eq!(fits("nonsense", &wanted), None);
        assert_eq!(fits("\\*:*:*:dr:x", &wanted), None, "an escaped star is a name");
    }

    #[test]
    fn a_file_that_others_may_read_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pgpass");
        std::fs::write(&path, "# mine\n*:*:*:*:secret\n").unwrap();
        for (mode, found) in [(0o600, Some("secret".to_owned())), (0o644, None)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(find(&path, "h", 1, "d", "u"), found);
        }
    }
}
