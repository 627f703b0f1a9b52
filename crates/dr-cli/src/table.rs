//! Aligned columns and other small shapes for people.

use dr_core::Timestamp;

use crate::paint::width as columns;

/// Rows in aligned columns; numbers (columns named in `right`) to the right.
pub(crate) fn table(header: &[&str], right: &[usize], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| columns(cell));
        cells.chain([columns(header[column])]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let mut text = String::new();
        for (column, cell) in cells.iter().enumerate() {
            let pad = " ".repeat(widths[column].saturating_sub(columns(cell)));
            if right.contains(&column) {
                text.push_str(&pad);
                text.push_str(cell);
            } else {
                text.push_str(cell);
                text.push_str(&pad);
            }
            text.push_str("  ");
        }
        format!("{}\n", text.trim_end())
    };
    let mut out = line(header.to_vec());
    for row in rows {
        out.push_str(&line(row.iter().map(String::as_str).collect()));
    }
    out
}

/// An instant in UTC to the second, and in the zone of this host when that is another.
pub(crate) fn when(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// An instant with all its digits, in UTC and in the zone of this host.
pub(crate) fn instant(at: Timestamp) -> String {
    let zone = jiff::tz::TimeZone::system();
    let local = at.to_zoned(zone.clone());
    if local.offset() == jiff::tz::Offset::UTC {
        format!("{at}")
    } else {
        format!("{at} = {}", local.strftime("%Y-%m-%d %H:%M:%S%.f %:z"))
    }
}

/// Name and value, aligned.
pub(crate) fn facts(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("  {name:<width$}  {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stay_aligned_under_colour() {
        let row = |cell: &str| vec![cell.to_owned(), "x".to_owned()];
        let plain = table(&["a", "b"], &[], &[row("DEGRADED"), row("ok")]);
        let coloured = table(&["a", "b"], &[], &[row("\x1b[1;31mDEGRADED\x1b[0m"), row("ok")]);
        assert_eq!(coloured.replace("\x1b[1;31m", "").replace("\x1b[0m", ""), plain);
        assert_eq!(plain.lines().nth(2), Some("ok        x"));
    }
}
