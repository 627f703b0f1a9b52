//! Configuration: what was written, where, and what it resolves to.
//!
//! Every setting is one row of a table: name, kind, default, explanation. From it come the check for
//! unknown keys, the environment variables, `dr config show` and `docs/reference/config.md`.

mod layers;
mod table;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use layers::{Sources, variable};
pub use table::{Kind, SETTINGS, Setting, reference};

use crate::error::AgentError;

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Written {
    /// The text.
    pub value: String,
    /// A file with its section, a variable, a flag, or "default".
    pub origin: String,
}

/// Resolved settings, each with its origin.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    values: BTreeMap<&'static str, Written>,
}

/// A URL as it may be shown: with `…` in place of a user and password before its host.
pub(crate) fn shown_url(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    match rest[..end].rfind('@') {
        Some(at) => format!("{scheme}://…{}", &rest[at..]),
        None => url.to_owned(),
    }
}

impl Settings {
    /// Reads all layers: defaults, the files of `/etc/dr` or in their place the one of `--config`,
    /// variables, flags.
    pub fn load(sources: &Sources) -> Result<Self, AgentError> {
        let settings = Settings { values: layers::read(sources)? };
        for setting in SETTINGS {
            settings.check(setting)?;
        }
        Ok(settings)
    }

    /// All values, by name.
    pub fn values(&self) -> &BTreeMap<&'static str, Written> {
        &self.values
    }

    /// The text of a setting, when it has one.
    pub fn text(&self, name: &'static str) -> Option<&str> {
        self.values.get(name).map(|w| w.value.as_str()).filter(|value| !value.is_empty())
    }

    /// The text of a setting that must be there.
    pub fn needed(&self, name: &'static str, needed_for: &'static str) -> Result<&str, AgentError> {
        self.text(name).ok_or(AgentError::Missing { key: name, needed_for })
    }

    /// A path.
    pub fn path(&self, name: &'static str) -> Option<PathBuf> {
        self.text(name).map(PathBuf::from)
    }

    /// A switch; checked when loaded.
    pub fn flag(&self, name: &'static str) -> bool {
        self.text(name) == Some("true")
    }

    /// A whole number; checked when loaded.
    pub fn number(&self, name: &'static str) -> Option<u64> {
        self.text(name).and_then(|text| text.parse().ok())
    }

    /// A duration; checked when loaded.
    pub fn duration(&self, name: &'static str) -> Duration {
        self.text(name).and_then(|text| dr_core::size::parse_duration(text).ok()).unwrap_or_default()
    }

    /// An address; checked when loaded.
    pub fn address(&self, name: &'static str) -> Option<SocketAddr> {
        self.text(name).and_then(|text| text.parse().ok())
    }

    /// A duration of at least so much.
    pub fn duration_from(&self, name: &'static str, least: Duration) -> Result<Duration, AgentError> {
        let (value, written) = (self.duration(name), self.values.get(name));
        if value >= least {
            return Ok(value);
        }
        Err(AgentError::BadValue {
            origin: written.map(|w| w.origin.clone()).unwrap_or_default(),
            key: name,
            value: written.map(|w| w.value.clone()).unwrap_or_default(),
            reason: format!("it is at least {} s", least.as_secs_f64()),
        })
    }

    /// All settings whose names begin so, as one text: to see whether any of them changed. It may
    /// hold secrets.
    pub(crate) fn made_of(&self, prefixes: &[&str]) -> String {
        let fitting = self.values.iter().filter(|(name, _)| prefixes.iter().any(|p| name.starts_with(p)));
        fitting.map(|(name, written)| format!("{name} = {:?}\n", written.value)).collect()
    }

    /// All values as they may be shown to people and programs: without passwords.
    pub fn shown(&self) -> BTreeMap<&'static str, Written> {
        let mut values = self.values.clone();
        if let Some(connection) = values.get_mut("cluster.connection") {
            connection.value = dr_pg::ConnInfo::shown(&connection.value);
        }
        for address in ["repository.url", "repository.endpoint"] {
            if let Some(written) = values.get_mut(address) {
                written.value = shown_url(&written.value);
            }
        }
        values
    }

    /// A size in bytes; checked when loaded.
    pub fn bytes(&self, name: &'static str) -> u64 {
        self.text(name).and_then(|text| dr_core::size::parse_bytes(text).ok()).unwrap_or_default()
    }

    /// A size in bytes; `None` when it is not set.
    pub fn optional_bytes(&self, name: &'static str) -> Option<u64> {
        self.text(name).and_then(|text| dr_core::size::parse_bytes(text).ok())
    }

    fn check(&self, setting: &'static Setting) -> Result<(), AgentError> {
        let Some(written) = self.values.get(setting.name).filter(|w| !w.value.is_empty()) else {
            return Ok(());
        };
        let value = &written.value;
        let reason = match setting.kind {
            Kind::Text => None,
            Kind::Path => (!value.starts_with('/')).then(|| "a path must be absolute".to_owned()),
            Kind::Flag => {
                (!matches!(value.as_str(), "true" | "false")).then(|| "it is true or false".to_owned())
            }
            Kind::Choice(words) => {
                (!words.contains(&value.as_str())).then(|| format!("it is one of {}", words.join(", ")))
            }
            Kind::Number => value.parse::<u64>().err().map(|_| "it is a whole number".to_owned()),
            Kind::Duration => dr_core::size::parse_duration(value).err().map(|e| e.to_string()),
            Kind::Size => dr_core::size::parse_bytes(value).err().map(|e| e.to_string()),
            Kind::Address => value
                .parse::<SocketAddr>()
                .err()
                .map(|_| "it is an IP address with a port, as 127.0.0.1:7434 or [::1]:7434".to_owned()),
            Kind::Secret => {
                let known = ["file:", "env:", "exec:"].iter().any(|scheme| value.starts_with(scheme));
                (!known)
                    .then(|| "a secret is given by reference: file:PATH, env:NAME or exec:COMMAND".to_owned())
            }
        };
        match reason {
            None => Ok(()),
            Some(reason) => Err(AgentError::BadValue {
                origin: written.origin.clone(),
                key: setting.name,
                // A secret written in clear must not be shown on.
                value: if setting.kind == Kind::Secret { "…".into() } else { value.clone() },
                reason,
            }),
        }
    }
}
