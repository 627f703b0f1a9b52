//! Paths inside a cluster, and the order in which all walks visit them.

use std::cmp::Ordering;

/// Compares two relative paths component by component, each component bytewise.
///
/// This is the order of every walk, file table and comparison: a directory comes before what is
/// in it, and everything in a directory comes before its next sibling.
///
/// ```
/// use std::cmp::Ordering;
/// assert_eq!(dr_core::path::compare("base/1/2", "base/1-x"), Ordering::Less);
/// ```
pub fn compare(a: &str, b: &str) -> Ordering {
    a.split('/').map(str::as_bytes).cmp(b.split('/').map(str::as_bytes))
}

/// Whether `path` is relative, normal and stays inside its root: what a restore may write to.
pub fn is_contained(path: &str) -> bool {
    !path.is_empty()
        && !path.contains('\0')
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// The text of a raw file name: UTF-8 as it is, other bytes as `%XX`, and a percent sign as `%25`.
///
/// PostgreSQL's own files have plain ASCII names; a stray file may have any.
pub fn encode(raw: &[u8]) -> String {
    let mut out = String::with_capacity(raw.len());
    for chunk in raw.utf8_chunks() {
        out.push_str(&chunk.valid().replace('%', "%25"));
        for byte in chunk.invalid() {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// The raw bytes of an encoded file name; the reverse of [`encode`].
pub fn decode(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|h| std::str::from_utf8(h).ok());
        match (bytes[at], hex.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_comes_before_its_content_and_content_before_the_next_sibling() {
        let mut paths = ["base/1-x", "base/1/10", "base/1", "base", "base/1/2", "PG_VERSION"];
        paths.sort_by(|a, b| compare(a, b));
        assert_eq!(paths, ["PG_VERSION", "base", "base/1", "base/1/10", "base/1/2", "base/1-x"]);
    }

    #[test]
    fn paths_that_leave_the_root_are_not_contained() {
        for path in ["", "/etc/passwd", "../x", "a/../../b", "a//b", "a/", ".", "a/./b", "a\0b"] {
            assert!(!is_contained(path), "{path:?}");
        }
        assert!(is_contained("base/1/1259") && is_contained("..x/y.."));
    }

    #[test]
    fn any_file_name_reads_back() {
        for raw in [&b"plain"[..], b"100%", b"%41", b"\xff\xfe", "käse".as_bytes(), b"a\xc3", b""] {
            assert_eq!(decode(&encode(raw)), raw, "{raw:?}");
        }
    }
}
