//! Sizes and durations as people write and read them.

use crate::guard::InvalidText;

/// Bytes as a person reads them, in binary units: `1.5 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Reads a size with its unit: `64MiB`, `10 GB`, `512 B`. A bare number is refused.
pub fn parse_bytes(text: &str) -> Result<u64, InvalidText> {
    let bad = || InvalidText::new("a size with its unit, as 64MiB or 10GB", text);
    let split = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(bad)?;
    let number: u64 = text[..split].trim().parse().map_err(|_| bad())?;
    let factor: u64 = match &text[split..] {
        "B" => 1,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err(bad()),
    };
    number.checked_mul(factor).ok_or_else(bad)
}

/// A duration as a person reads it: `950 ms`, `2.5 s`, `3 min 20 s`, `1 h 5 min`.
pub fn duration(value: std::time::Duration) -> String {
    let seconds = value.as_secs();
    match seconds {
        0 => format!("{} ms", value.as_millis()),
        1..=59 => format!("{:.1} s", value.as_secs_f64()),
        60..=3599 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Reads a duration with its unit: `500ms`, `30s`, `5min`, `12h`, `7d`. A bare number is refused.
pub fn parse_duration(text: &str) -> Result<std::time::Duration, InvalidText> {
    let bad = || InvalidText::new("a duration with its unit, as 500ms, 30s, 5min, 12h or 7d", text);
    let split = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(bad)?;
    let number: u64 = text[..split].trim().parse().map_err(|_| bad())?;
    let millis: u64 = match &text[split..] {
        "ms" => 1,
        "s" => 1_000,
        "min" | "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(bad()),
    };
    Ok(std::time::Duration::from_millis(number.checked_mul(millis).ok_or_else(bad)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn sizes_and_durations_need_a_unit() {
        assert_eq!(parse_bytes("64MiB").ok(), Some(64 << 20));
        assert_eq!(parse_bytes("10 GB").ok(), Some(10_000_000_000));
        assert_eq!(parse_duration("7d").ok(), Some(Duration::from_secs(604_800)));
        for text in ["", "64", "MiB", "-1MiB", "1.5GiB", "1XB", "99999999999TiB"] {
            assert!(parse_bytes(text).is_err(), "{text:?}");
        }
        assert!(parse_duration("30").is_err() && parse_duration("1y").is_err());
    }

    #[test]
    fn sizes_and_durations_are_written_for_people() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(1536 << 20), "1.5 GiB");
        assert_eq!(duration(Duration::from_millis(950)), "950 ms");
        assert_eq!(duration(Duration::from_secs(200)), "3 min 20 s");
    }
}
