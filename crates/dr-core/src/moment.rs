//! Times as people write them, resolved to an instant, or refused.
//!
//! A time needs a zone: an offset (`+01:00`, `Z`), a name (`Europe/Berlin`), or a default that the
//! caller passes in. A civil time that a zone's clock skips is impossible; one that it shows twice
//! is ambiguous: both are refused, the latter with both instants.

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{Span, Timestamp};
use thiserror::Error;

/// Why text is not one instant.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MomentError {
    /// It cannot be read.
    #[error(
        "{text:?} is not a time: write it as '2026-11-22 11:08:50 Europe/Berlin', '2026-11-22T10:08:50Z' or '10 min ago'"
    )]
    Unreadable {
        /// What was written.
        text: String,
    },
    /// It has no zone.
    #[error("{text:?} has no time zone: add one, as '{text} UTC', '{text}+01:00' or '{text} Europe/Berlin'")]
    NoZone {
        /// What was written.
        text: String,
    },
    /// The zone is not known.
    #[error(
        "{zone:?} is not a time zone: use a name such as Europe/Berlin, UTC, or an offset such as +01:00"
    )]
    UnknownZone {
        /// What was written.
        zone: String,
    },
    /// The clock of that zone skips it.
    #[error("{text:?} never happened: the clock was set forward over it; say {before} or {after}")]
    Impossible {
        /// What was written.
        text: String,
        /// The same civil time with the offset before.
        before: Timestamp,
        /// The same civil time with the offset after.
        after: Timestamp,
    },
    /// The clock of that zone shows it twice.
    #[error("{text:?} happened twice: the clock was set back over it; say {first} or {second}")]
    Ambiguous {
        /// What was written.
        text: String,
        /// The first time.
        first: Timestamp,
        /// The second time.
        second: Timestamp,
    },
}

/// Reads a time. `now` serves relative ones; `zone` is taken when none is written.
pub fn parse(text: &str, now: Timestamp, zone: Option<&TimeZone>) -> Result<Timestamp, MomentError> {
    let text = text.trim();
    let unreadable = || MomentError::Unreadable { text: text.to_owned() };
    if text == "now" {
        return Ok(now);
    }
    if let Some(ago) = text.strip_suffix("ago") {
        let span = crate::size::parse_duration(&ago.split_whitespace().collect::<String>())
            .map_err(|_| unreadable())?;
        let span = Span::new().try_milliseconds(i64::try_from(span.as_millis()).map_err(|_| unreadable())?);
        let span = span.map_err(|_| unreadable())?;
        return now.checked_sub(span).map_err(|_| unreadable());
    }
    let (civil, written) = split_zone(text);
    let zone = match (written, zone) {
        (Some(name), _) => read_zone(name)?,
        (None, Some(zone)) => zone.clone(),
        (None, None) => {
            // Say first what is wrong with the time itself.
            read_civil(civil, now, &TimeZone::UTC).ok_or_else(unreadable)?;
            return Err(MomentError::NoZone { text: text.to_owned() });
        }
    };
    let civil = read_civil(civil, now, &zone).ok_or_else(unreadable)?;
    resolve(text, civil, &zone)
}

/// Splits off an offset or a zone's name at the end.
fn split_zone(text: &str) -> (&str, Option<&str>) {
    if let Some(civil) = text.strip_suffix('Z') {
        return (civil.trim_end(), Some("UTC"));
    }
    if let Some((civil, last)) = text.rsplit_once(' ')
        && last.starts_with(|c: char| c.is_ascii_alphabetic())
    {
        return (civil.trim_end(), Some(last));
    }
    // An offset follows the time of day: a sign after the first colon.
    let colon = text.find(':').unwrap_or(text.len());
    match text[colon..].find(['+', '-']) {
        Some(at) => (text[..colon + at].trim_end(), Some(&text[colon + at..])),
        None => (text, None),
    }
}

fn read_zone(name: &str) -> Result<TimeZone, MomentError> {
    let unknown = || MomentError::UnknownZone { zone: name.to_owned() };
    if name.starts_with(['+', '-']) {
        let sign = if name.starts_with('-') { -1 } else { 1 };
        let digits = name[1..].replace(':', "");
        let all_digits = matches!(digits.len(), 2 | 4) && digits.bytes().all(|b| b.is_ascii_digit());
        let number = |range| digits.get(range).and_then(|d: &str| d.parse::<i32>().ok()).unwrap_or(0);
        let (hours, minutes) = (number(0..2), number(2..4));
        let offset = jiff::tz::Offset::from_seconds(sign * (hours * 3600 + minutes * 60));
        return match offset {
            Ok(offset) if all_digits && hours < 24 && minutes < 60 => Ok(TimeZone::fixed(offset)),
            _ => Err(unknown()),
        };
    }
    if name.eq_ignore_ascii_case("utc") || name.eq_ignore_ascii_case("gmt") {
        return Ok(TimeZone::UTC);
    }
    TimeZone::get(name).map_err(|_| unknown())
}

fn read_civil(text: &str, now: Timestamp, zone: &TimeZone) -> Option<DateTime> {
    let text = text.replacen('T', " ", 1);
    let today = now.to_zoned(zone.clone()).date();
    let (day, time) = text.rsplit_once(' ').unwrap_or(("today", &text));
    // The library reads more than a date and a time: whole moments, zones in brackets.
    let only = |text: &str, marks: &str| text.chars().all(|c| c.is_ascii_digit() || marks.contains(c));
    let date = match day.trim() {
        "today" => today,
        "yesterday" => today.yesterday().ok()?,
        day if only(day, "-") => day.parse::<Date>().ok()?,
        _ => return None,
    };
    let time = Some(time).filter(|time| only(time, ":."))?;
    Some(date.to_datetime(time.parse::<Time>().ok()?))
}

fn resolve(text: &str, civil: DateTime, zone: &TimeZone) -> Result<Timestamp, MomentError> {
    let at = |offset: jiff::tz::Offset| {
        offset.to_timestamp(civil).map_err(|_| MomentError::Unreadable { text: text.to_owned() })
    };
    let ambiguous = zone.to_ambiguous_timestamp(civil);
    match ambiguous.offset() {
        AmbiguousOffset::Unambiguous { offset } => at(offset),
        AmbiguousOffset::Gap { before, after } => {
            Err(MomentError::Impossible { text: text.to_owned(), before: at(before)?, after: at(after)? })
        }
        AmbiguousOffset::Fold { before, after } => {
            Err(MomentError::Ambiguous { text: text.to_owned(), first: at(before)?, second: at(after)? })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        "2026-11-22T12:00:00Z".parse().expect("a time")
    }

    fn read(text: &str) -> Result<String, MomentError> {
        parse(text, now(), None).map(|t| t.to_string())
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, instant) in [
            ("2026-11-22 11:08:50 Europe/Berlin", "2026-11-22T10:08:50Z"),
            ("2026-11-22T11:08:50Z", "2026-11-22T11:08:50Z"),
            ("2026-11-22 11:08:50.25+01", "2026-11-22T10:08:50.25Z"),
            ("2026-11-22 11:08:50 -0530", "2026-11-22T16:38:50Z"),
            ("2026-11-22 11:08 UTC", "2026-11-22T11:08:00Z"),
            ("yesterday 14:00 Europe/Berlin", "2026-11-21T13:00:00Z"),
            ("08:30 UTC", "2026-11-22T08:30:00Z"),
            ("10 min ago", "2026-11-22T11:50:00Z"),
            ("now", "2026-11-22T12:00:00Z"),
        ] {
            assert_eq!(read(text).as_deref(), Ok(instant), "{text}");
        }
    }

    #[test]
    fn a_time_without_a_zone_needs_a_default() {
        assert!(matches!(read("2026-11-22 11:08:50"), Err(MomentError::NoZone { .. })));
        let berlin = TimeZone::get("Europe/Berlin").expect("a zone");
        let at = parse("2026-11-22 11:08:50", now(), Some(&berlin));
        assert_eq!(at.map(|t| t.to_string()).as_deref(), Ok("2026-11-22T10:08:50Z"));
    }

    #[test]
    fn impossible_and_ambiguous_times_are_refused() {
        let gap = read("2026-03-29 02:30 Europe/Berlin");
        assert!(matches!(gap, Err(MomentError::Impossible { .. })), "{gap:?}");
        match parse("2026-10-25 02:30 Europe/Berlin", now(), None) {
            Err(MomentError::Ambiguous { first, second, .. }) => {
                assert_eq!(first.to_string(), "2026-10-25T00:30:00Z");
                assert_eq!(second.to_string(), "2026-10-25T01:30:00Z");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_a_time_is_refused() {
        for text in [
            "",
            "soon",
            "2026-13-01 10:00 UTC",
            "2026-11-22 25:00 UTC",
            "10 ago",
            "2026-11-22 UTC",
            "11:00 +99",
            "2026-11-22T10:00 11:00 UTC",
            "2026-11-22[x] 10:00 UTC",
            "2026-11-22 10:00[x] UTC",
            "2026-11-22+01 10:00 UTC",
            "99999999999999999999 ms ago",
            "9223372036854775808ms ago",
            // As a signed number this is a second from now.
            "18446744073709550616ms ago",
        ] {
            assert!(read(text).is_err(), "{text:?}");
        }
        assert!(matches!(read("2026-11-22 11:00 Europe/Berlln"), Err(MomentError::UnknownZone { .. })));
    }
}
