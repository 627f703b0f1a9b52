//! The text format of metrics that Prometheus reads, version 0.0.4.
//!
//! Source: prometheus.io/docs/instrumenting/exposition_formats. Names and units follow
//! prometheus.io/docs/practices/naming: base units, `_total` for counters, `_seconds`, `_bytes`.

use std::collections::BTreeSet;
use std::fmt::Write;

/// What `Content-Type` says.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What kind of number a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It goes up and down.
    Gauge,
    /// It only goes up, while the process lives.
    Counter,
}

/// One metric with all its samples.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    samples: Vec<(Vec<(&'static str, String)>, f64)>,
}

impl Family {
    /// A gauge without samples.
    pub fn gauge(name: &'static str, help: &'static str) -> Self {
        Family { name, kind: Kind::Gauge, help, samples: Vec::new() }
    }

    /// A counter without samples; its name ends in `_total`.
    pub fn counter(name: &'static str, help: &'static str) -> Self {
        Family { name, kind: Kind::Counter, help, samples: Vec::new() }
    }

    /// With one sample more.
    pub fn with(mut self, labels: &[(&'static str, &str)], value: f64) -> Self {
        let labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        self.samples.push((labels, value));
        self
    }
}

/// All families as one text. Those of one name are brought together, since a name may appear once;
/// a sample whose labels are there already is left out.
pub fn text(families: Vec<Family>) -> String {
    let mut merged: Vec<Family> = Vec::new();
    for family in families {
        match merged.iter_mut().find(|other| other.name == family.name) {
            Some(other) if other.kind == family.kind => other.samples.extend(family.samples),
            Some(_) => tracing::debug!("{} is reported as two kinds of metric", family.name),
            None => merged.push(family),
        }
    }
    let mut out = String::new();
    for Family { name, kind, help, samples } in merged {
        let kind = if kind == Kind::Gauge { "gauge" } else { "counter" };
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        let mut seen = BTreeSet::new();
        for (mut labels, value) in samples {
            labels.sort();
            let labels = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value)));
            let labels = labels.collect::<Vec<_>>().join(",");
            let braced = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
            if seen.insert(labels) {
                let _ = writeln!(out, "{name}{braced} {}", number(value));
            }
        }
    }
    out
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// As Go's `ParseFloat` reads it.
fn number(value: f64) -> String {
    match value {
        value if value.is_nan() => "NaN".into(),
        f64::INFINITY => "+Inf".into(),
        f64::NEG_INFINITY => "-Inf".into(),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_escaped_and_numbers_are_readable() {
        let family = Family::gauge("a", "of\n\\").with(&[("z", "q\"\n\\"), ("b", "")], 1e21);
        let family = family.with(&[("b", "1")], f64::NAN).with(&[("b", "2")], f64::INFINITY);
        let lines = [
            "# HELP a of\\n\\\\",
            "# TYPE a gauge",
            "a{b=\"\",z=\"q\\\"\\n\\\\\"} 1000000000000000000000",
            "a{b=\"1\"} NaN",
            "a{b=\"2\"} +Inf",
        ];
        assert_eq!(text(vec![family]), lines.join("\n") + "\n");
    }

    #[test]
    fn a_name_appears_once_and_a_sample_too() {
        let one = Family::gauge("a", "A.").with(&[("x", "1")], 1.0);
        let same = Family::gauge("a", "A.").with(&[("x", "1")], 2.0).with(&[("x", "2")], 3.0);
        let other_kind = Family::counter("a", "A.").with(&[], 4.0);
        let found = text(vec![one, same, other_kind]);
        assert_eq!(found, "# HELP a A.\n# TYPE a gauge\na{x=\"1\"} 1\na{x=\"2\"} 3\n");
    }
}
