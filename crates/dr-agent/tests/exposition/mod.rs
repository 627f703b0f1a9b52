//! A strict reader of the text format of metrics, version 0.0.4, and of the rules for names.
//!
//! Sources: prometheus.io/docs/instrumenting/exposition_formats and /docs/practices/naming.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};

type Samples = BTreeMap<String, f64>;

/// All samples by name and labels; or the first fault.
pub fn read(text: &str) -> Result<Samples, String> {
    if !text.ends_with('\n') {
        return Err("the last line has no end".into());
    }
    let (mut samples, mut seen) = (Samples::new(), BTreeSet::new());
    let (mut family, mut kind) = (String::new(), String::new());
    for line in text.lines() {
        let fault = |what: &str| Err(format!("{what}: {line}"));
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let Some((name, help)) = rest.split_once(' ') else { return fault("no help") };
            if !seen.insert(name.to_owned()) {
                return fault("a name that was there before");
            }
            if !help.ends_with('.') || help.len() < 10 {
                return fault("help that is no sentence");
            }
            named(name)?;
            (family, kind) = (name.to_owned(), String::new());
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let Some((name, is)) = rest.split_once(' ') else { return fault("no type") };
            if name != family || !kind.is_empty() {
                return fault("a type that does not follow its help");
            }
            match is {
                "counter" if name.ends_with("_total") => {}
                "gauge" if !name.ends_with("_total") => {}
                _ => return fault("a type that does not fit the name"),
            }
            kind = is.to_owned();
        } else {
            let Some((key, value)) = line.rsplit_once(' ') else { return fault("no value") };
            let (name, labels) = match key.split_once('{') {
                Some((name, rest)) => (name, Some(rest)),
                None => (key, None),
            };
            if name != family || kind.is_empty() {
                return fault("a sample without help and type before it");
            }
            if let Some(rest) = labels {
                labelled(rest).map_err(|what| format!("{what}: {line}"))?;
            }
            let value: f64 = value.parse().map_err(|_| format!("no number: {line}"))?;
            if kind == "counter" && value < 0.0 {
                return fault("a counter below nothing");
            }
            if samples.insert(key.to_owned(), value).is_some() {
                return fault("a sample that was there before");
            }
        }
    }
    Ok(samples)
}

fn named(name: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if !name.starts_with("dr_") || !name.chars().all(fits) {
        return Err(format!("{name} is no name of ours"));
    }
    let units = ["_ms", "_milliseconds", "_minutes", "_hours", "_kilobytes", "_mb", "_percent", "_timestamp"];
    match units.iter().find(|unit| name.trim_end_matches("_total").ends_with(**unit)) {
        Some(unit) => Err(format!("{name}: {unit} is no base unit")),
        None => Ok(()),
    }
}

fn labelled(rest: &str) -> Result<(), &'static str> {
    let mut rest = rest;
    let mut seen = BTreeSet::new();
    loop {
        let (name, after) = rest.split_once("=\"").ok_or("a label without a value")?;
        let good = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || !name.chars().all(good) || name.starts_with("__") || !seen.insert(name) {
            return Err("a bad or repeated label");
        }
        let mut escaped = false;
        let end = after.char_indices().find_map(|(at, c)| match (escaped, c) {
            (true, '\\' | '"' | 'n') => {
                escaped = false;
                None
            }
            (true, _) => Some(None),
            (false, '\\') => {
                escaped = true;
                None
            }
            (false, '"') => Some(Some(at)),
            _ => None,
        });
        rest = &after[end.flatten().ok_or("a label's value without end, or badly escaped")? + 1..];
        match rest {
            "}" => return Ok(()),
            _ => rest = rest.strip_prefix(',').ok_or("something after a label")?,
        }
    }
}

#[test]
fn the_reader_takes_what_is_right_and_nothing_else() {
    let right = "# HELP dr_a Something here.\n# TYPE dr_a gauge\ndr_a{x=\"1\\n\\\"\",y=\"\"} 1\ndr_a NaN\n";
    assert_eq!(read(right).unwrap().len(), 2);
    for (from, to) in [
        ("dr_a NaN\n", "dr_a NaN"),
        ("dr_a NaN", "dr_a{x=\"1\\n\\\"\",y=\"\"} 2"),
        ("dr_a NaN", "dr_b 1"),
        ("dr_a NaN", "dr_a one"),
        ("dr_a NaN", "dr_a"),
        ("dr_a NaN", "dr_a{x=\"\\q\"} 1"),
        ("dr_a NaN", "dr_a{x=\"1\",x=\"2\"} 1"),
        ("dr_a NaN", "dr_a{x=\"1\" y=\"2\"} 1"),
        ("dr_a NaN", "dr_a{x=1} 1"),
        ("dr_a NaN", "# HELP dr_a Something here.\n# TYPE dr_a gauge\ndr_a 1"),
        (" gauge", " counter"),
        (" gauge", " number"),
        ("# TYPE dr_a gauge\n", ""),
        ("# HELP dr_a Something here.\n", ""),
        ("Something here.", "x"),
        ("dr_a", "dr_a_ms"),
        ("dr_a", "dr_a_total"),
        ("dr_a", "go_a"),
    ] {
        assert!(read(&right.replace(from, to)).is_err(), "{from:?} -> {to:?}");
    }
}
