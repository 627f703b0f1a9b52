//! What a connection string says, resolved.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dr_core::port::SourceError;

use super::text::{self, Pairs};
use super::tls::{Negotiation, TlsMode, TlsOptions};
use super::{passfile, service};

/// Where Debian's and the source's builds put their sockets.
const SOCKET_DIRS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// How long connecting to one host may take when the connection string does not say.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Words that change nothing here: Kerberos and GSS encryption are not offered to the server, and
/// the rest has its own place in this program.
const WITHOUT_EFFECT: [&str; 12] = [
    "fallback_application_name",
    "client_encoding",
    "krbsrvname",
    "gsslib",
    "gssdelegation",
    "sslcompression",
    "sslsni",
    "load_balance_hosts",
    "keepalives",
    "keepalives_interval",
    "keepalives_count",
    "replication",
];

/// One place where a server may listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// A name or an address, with the address to use in place of looking the name up.
    Tcp {
        /// The name: what a certificate is checked against.
        name: String,
        /// The numeric address, if given apart.
        address: Option<String>,
    },
    /// The directory of a Unix-domain socket.
    Unix(PathBuf),
}

/// A host and its port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The host.
    pub host: Host,
    /// The port, which also names a socket.
    pub port: u16,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Tcp { name, .. } => write!(f, "{name}:{}", self.port),
            Host::Unix(dir) => write!(f, "{}/.s.PGSQL.{}", dir.display(), self.port),
        }
    }
}

/// Which kind of server is wanted among several hosts (`target_session_attrs`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SessionKind {
    /// The first that answers.
    #[default]
    Any,
    /// One that accepts writes.
    ReadWrite,
    /// One that does not.
    ReadOnly,
    /// One that is not in recovery.
    Primary,
    /// One that is in recovery.
    Standby,
    /// A standby if there is one, else any.
    PreferStandby,
}

impl SessionKind {
    /// Whether a server of this role is wanted.
    pub(crate) fn accepts(self, standby: bool, read_only: bool) -> bool {
        match self {
            SessionKind::Any => true,
            SessionKind::ReadWrite => !standby && !read_only,
            SessionKind::ReadOnly => standby || read_only,
            SessionKind::Primary => !standby,
            SessionKind::Standby | SessionKind::PreferStandby => standby,
        }
    }

    /// What is to be said of a server of another role.
    pub(crate) fn unwanted(self) -> String {
        format!("it is not what target_session_attrs asks for: {self:?}")
    }
}

/// Whether authentication must be bound to the TLS channel (`channel_binding`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChannelBindingMode {
    /// Never.
    Disable,
    /// When both sides can.
    #[default]
    Prefer,
    /// Always; a server that cannot is refused.
    Require,
}

/// How a server is reached. `Debug` does not show the password.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnInfo {
    /// The hosts, tried in order.
    pub endpoints: Vec<Endpoint>,
    /// The role.
    pub user: String,
    /// The database.
    pub database: String,
    pub(crate) password: Option<String>,
    passfile: Option<PathBuf>,
    /// Server settings for the session, as `-c name=value`.
    pub options: Option<String>,
    /// What the server shows as the application.
    pub application_name: Option<String>,
    /// How long connecting to one host may take.
    pub connect_limit: Duration,
    /// Seconds of silence after which TCP asks whether the other side is there.
    pub keepalive_idle: Option<Duration>,
    /// How long sent bytes may stay unacknowledged before TCP gives the connection up.
    pub user_timeout: Option<Duration>,
    /// Which of the hosts is wanted.
    pub session_kind: SessionKind,
    /// TLS.
    pub tls: TlsOptions,
    /// Channel binding.
    pub channel_binding: ChannelBindingMode,
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnInfo")
            .field("endpoints", &self.endpoints)
            .field("user", &self.user)
            .field("database", &self.database)
            .field("password", &self.password.as_ref().map(|_| "…"))
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}

impl ConnInfo {
    /// Reads a connection string, the service that it names and the defaults.
    ///
    /// Files are looked for below the home directory that the system's user list gives. No
    /// environment variable is read.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let (user, home) = match crate::process::user(rustix::process::geteuid().as_raw()) {
            Some((name, home)) => (Some(name), Some(home)),
            None => (None, None),
        };
        ConnInfo::parse_for(text, user.as_deref(), home.as_deref())
    }

    fn parse_for(text: &str, os_user: Option<&str>, home: Option<&Path>) -> Result<Self, SourceError> {
        let mut written = text::parse(text).map_err(|why| invalid("the connection", why))?;
        let file = take(&mut written, "servicefile").map(PathBuf::from);
        if let Some(name) = take(&mut written, "service") {
            let service =
                service::load(&name, file.as_deref(), home).map_err(|why| invalid("service", why))?;
            // What is written in the string counts more; the last of a word counts.
            written.splice(0..0, service);
        }
        let mut words = Words { pairs: written };
        let info = words.resolve(os_user, home)?;
        words.refuse_rest(info.password.is_some())?;
        Ok(info)
    }

    /// A connection string as it may be shown: with `…` in place of passwords.
    pub fn shown(text: &str) -> String {
        // With a typo in its scheme a URI is no URI, and its password is in the name of a parameter.
        let is_name =
            |(name, _): &(String, String)| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let Some(pairs) = text::parse(text).ok().filter(|pairs| pairs.iter().all(is_name)) else {
            return "… (it cannot be read)".to_owned();
        };
        if !text::follows_password(&pairs) {
            return text.to_owned();
        }
        // What follows a password without its quotes is a part of it, whatever it looks like.
        if ConnInfo::parse(text).is_err() {
            return "… (it cannot be used)".to_owned();
        }
        let word = |(name, value): &(String, String)| {
            let value = if name.contains("password") { "…" } else { value };
            let plain = !value.is_empty() && !value.contains([' ', '\'', '\\']);
            let quoted = format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"));
            format!("{name}={}", if plain { value } else { &quoted })
        };
        pairs.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    /// A connection string with another application name, as keywords; with the password, if it
    /// has one.
    pub(crate) fn with_application(text: &str, name: &str) -> Result<String, SourceError> {
        let mut pairs = text::parse(text).map_err(|why| invalid("the connection", why))?;
        pairs.retain(|(word, _)| word != "application_name");
        pairs.push(("application_name".into(), name.into()));
        let word = |(name, value): &(String, String)| {
            format!("{name}='{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
        };
        Ok(pairs.iter().map(word).collect::<Vec<_>>().join(" "))
    }

    /// The same server, another database.
    pub fn with_database(mut self, database: &str) -> Self {
        database.clone_into(&mut self.database);
        self
    }

    /// The password for an endpoint: the one given, or else the password file's.
    pub(crate) fn password_for(&self, endpoint: &Endpoint, database: &str) -> Option<String> {
        if self.password.is_some() {
            return self.password.clone();
        }
        let host = match &endpoint.host {
            Host::Tcp { name, .. } => name.clone(),
            // The default directory is called localhost in the file (`fe-connect.c`).
            Host::Unix(dir) if SOCKET_DIRS.iter().any(|d| dir == Path::new(d)) => "localhost".into(),
            Host::Unix(dir) => dir.display().to_string(),
        };
        passfile::find(self.passfile.as_deref()?, &host, endpoint.port, database, &self.user)
    }

    /// All hosts, for messages.
    pub fn server(&self) -> String {
        self.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    }
}

fn invalid(setting: &str, reason: impl Into<String>) -> SourceError {
    SourceError::Invalid { setting: setting.to_owned(), reason: reason.into() }
}

/// Removes a word; of several the last counts, as in libpq. Empty values count as not given.
fn take(pairs: &mut Pairs, name: &str) -> Option<String> {
    let mut found = None;
    pairs.retain(|(key, value)| {
        if key == name {
            found = Some(value.clone());
        }
        key != name
    });
    found.filter(|value| !value.is_empty())
}

struct Words {
    pairs: Pairs,
}

impl Words {
    fn take(&mut self, name: &str) -> Option<String> {
        take(&mut self.pairs, name)
    }

    fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)], default: T) -> Result<T, SourceError> {
        let Some(value) = self.take(name) else { return Ok(default) };
        choices.iter().find(|(word, _)| *word == value).map(|(_, choice)| *choice).ok_or_else(|| {
            let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
            invalid(name, format!("{value:?} is none of {}", words.join(", ")))
        })
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, SourceError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        value.parse().map(Some).map_err(|_| invalid(name, format!("{value:?} is no whole number")))
    }

    fn resolve(&mut self, os_user: Option<&str>, home: Option<&Path>) -> Result<ConnInfo, SourceError> {
        let endpoints = self.endpoints()?;
        let user = self.take("user").or_else(|| os_user.map(str::to_owned));
        let user =
            user.ok_or_else(|| invalid("user", "it is not given, and this process's user has no name"))?;
        let tls = self.tls(home)?;
        // libpq: zero and less wait for ever, which nothing here does.
        let limit = self.number("connect_timeout")?.filter(|s| *s > 0).map(Duration::from_secs);
        Ok(ConnInfo {
            endpoints,
            database: self.take("dbname").unwrap_or_else(|| user.clone()),
            user,
            password: self.take("password"),
            passfile: self.take("passfile").map(PathBuf::from).or_else(|| home.map(|h| h.join(".pgpass"))),
            options: self.take("options"),
            application_name: self.take("application_name"),
            connect_limit: limit.unwrap_or(CONNECT_LIMIT),
            keepalive_idle: self.number("keepalives_idle")?.filter(|s| *s > 0).map(Duration::from_secs),
            user_timeout: self.number("tcp_user_timeout")?.filter(|ms| *ms > 0).map(Duration::from_millis),
            session_kind: self.session_kind()?,
            tls,
            channel_binding: self.choice(
                "channel_binding",
                &[
                    ("disable", ChannelBindingMode::Disable),
                    ("prefer", ChannelBindingMode::Prefer),
                    ("require", ChannelBindingMode::Require),
                ],
                ChannelBindingMode::Prefer,
            )?,
        })
    }

    fn session_kind(&mut self) -> Result<SessionKind, SourceError> {
        self.choice(
            "target_session_attrs",
            &[
                ("any", SessionKind::Any),
                ("read-write", SessionKind::ReadWrite),
                ("read-only", SessionKind::ReadOnly),
                ("primary", SessionKind::Primary),
                ("standby", SessionKind::Standby),
                ("prefer-standby", SessionKind::PreferStandby),
            ],
            SessionKind::Any,
        )
    }

    fn endpoints(&mut self) -> Result<Vec<Endpoint>, SourceError> {
        let list = |text: Option<String>| text.map(|t| t.split(',').map(str::to_owned).collect::<Vec<_>>());
        let names = list(self.take("host"));
        let addresses = list(self.take("hostaddr"));
        let ports = list(self.take("port")).unwrap_or_default();
        let count = names.as_ref().or(addresses.as_ref()).map_or(1, Vec::len);
        if let (Some(names), Some(addresses)) = (&names, &addresses)
            && names.len() != addresses.len()
        {
            let why = format!("{} addresses are given for {} hosts", addresses.len(), names.len());
            return Err(invalid("hostaddr", why));
        }
        if ports.len() > 1 && ports.len() != count {
            return Err(invalid("port", format!("{} ports are given for {count} hosts", ports.len())));
        }
        let at = |list: &Option<Vec<String>>, index: usize| {
            list.as_ref().and_then(|l| l.get(index)).filter(|text| !text.is_empty()).cloned()
        };
        (0..count)
            .map(|index| {
                let port = ports.get(index).or(ports.first().filter(|_| ports.len() == 1));
                let port = match port.map(|p| p.trim()).filter(|p| !p.is_empty()) {
                    None => 5432,
                    Some(text) => text
                        .parse()
                        .ok()
                        .filter(|port| *port != 0)
                        .ok_or_else(|| invalid("port", format!("{text:?} is no port")))?,
                };
                Ok(Endpoint { host: host(at(&names, index), at(&addresses, index))?, port })
            })
            .collect()
    }

    fn tls(&mut self, home: Option<&Path>) -> Result<TlsOptions, SourceError> {
        if self.take("gssencmode").is_some_and(|mode| mode == "require") {
            return Err(invalid("gssencmode", "GSS encryption is not supported; use TLS (sslmode)"));
        }
        for word in
            ["sslcrl", "sslcrldir", "requirepeer", "require_auth", "sslpassword", "ssl_max_protocol_version"]
        {
            if self.take(word).is_some() {
                return Err(invalid(word, "it is not supported, and leaving it out would be less safe"));
            }
        }
        let asked = self.choice("sslmode", &TlsMode::WORDS.map(|m| (m.word(), m)), TlsMode::Prefer)?;
        let default_root = home.map(|h| h.join(".postgresql/root.crt"));
        let root = self.take("sslrootcert");
        let system = root.as_deref() == Some("system");
        let root = root.map(PathBuf::from).or(default_root.filter(|path| path.exists()));
        let mode = match asked {
            // With a root certificate at hand, "require" checks it, as in libpq.
            TlsMode::Require if root.is_some() && !system => TlsMode::VerifyCa,
            mode if system && mode != TlsMode::VerifyFull => {
                return Err(invalid("sslmode", "sslrootcert=system needs sslmode=verify-full"));
            }
            mode => mode,
        };
        let negotiation = self.choice(
            "sslnegotiation",
            &[("postgres", Negotiation::Postgres), ("direct", Negotiation::Direct)],
            Negotiation::Postgres,
        )?;
        if negotiation == Negotiation::Direct && !mode.is_demanded() {
            return Err(invalid("sslnegotiation", "direct needs sslmode=require, verify-ca or verify-full"));
        }
        let newest_only = self.choice(
            "ssl_min_protocol_version",
            &[("TLSv1", false), ("TLSv1.1", false), ("TLSv1.2", false), ("TLSv1.3", true)],
            false,
        )?;
        let own = |name: &str| home.map(|h| h.join(".postgresql").join(name)).filter(|path| path.exists());
        Ok(TlsOptions {
            mode,
            root: root.filter(|_| !system),
            system_roots: system,
            certificate: self.take("sslcert").map(PathBuf::from).or_else(|| own("postgresql.crt")),
            key: self.take("sslkey").map(PathBuf::from).or_else(|| own("postgresql.key")),
            negotiation,
            newest_only,
        })
    }

    /// Whatever is left is not known: a typo must not be passed over.
    fn refuse_rest(mut self, has_password: bool) -> Result<(), SourceError> {
        self.pairs.retain(|(name, _)| !WITHOUT_EFFECT.contains(&name.as_str()));
        match self.pairs.first() {
            // The name may be the rest of a password whose space was not quoted.
            Some(_) if has_password => Err(invalid(
                "the connection",
                "it has a parameter that there is not; a password with a space or a quote needs quotes",
            )),
            Some((name, _)) => Err(invalid("the connection", format!("there is no parameter {name:?}"))),
            None => Ok(()),
        }
    }
}

fn host(name: Option<String>, address: Option<String>) -> Result<Host, SourceError> {
    match (name, address) {
        (Some(name), None) if name.starts_with('@') => {
            Err(invalid("host", "abstract sockets are not supported"))
        }
        (Some(name), None) if name.starts_with('/') => Ok(Host::Unix(name.into())),
        (Some(name), address) => Ok(Host::Tcp { name, address }),
        (None, Some(address)) => Ok(Host::Tcp { name: address.clone(), address: Some(address) }),
        (None, None) => {
            let there = SOCKET_DIRS.iter().map(Path::new).find(|dir| dir.is_dir());
            Ok(Host::Unix(there.unwrap_or(Path::new(SOCKET_DIRS[1])).to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(text: &str) -> ConnInfo {
        ConnInfo::parse_for(text, Some("os"), None).unwrap()
    }

    fn refused(text: &str) -> String {
        ConnInfo::parse_for(text, Some("os"), None).unwrap_err().to_string()
    }

    fn tcp(name: &str, port: u16) -> Endpoint {
        Endpoint { host: Host::Tcp { name: name.into(), address: None }, port }
    }

    #[test]
    fn hosts_and_ports_are_paired_in_order() {
        assert_eq!(info("host=a,b port=1,2").endpoints, [tcp("a", 1), tcp("b", 2)]);
        assert_eq!(info("host=a,b port=7").endpoints, [tcp("a", 7), tcp("b", 7)]);
        assert_eq!(info("host=/run").endpoints, [Endpoint { host: Host::Unix("/run".into()), port: 5432 }]);
        assert!(refused("host=a,b,c port=1,2").contains("3 hosts"));
        assert!(refused("host=a,b hostaddr=::1").contains("hostaddr"));
        assert!(refused("port=0").contains("port"));
    }

    #[test]
    fn user_and_database_default_as_in_libpq() {
        let given = info("host=a");
        assert_eq!((given.user.as_str(), given.database.as_str()), ("os", "os"));
        assert_eq!(info("user=me").database, "me");
        assert!(ConnInfo::parse_for("host=a", None, None).is_err());
    }

    #[test]
    fn what_is_unknown_or_would_be_less_safe_is_refused() {
        assert!(refused("host=a sslmod=require").contains("sslmod"));
        assert!(refused("host=a sslmod=").contains("sslmod"));
        assert!(refused("host=a require_auth=scram-sha-256").contains("require_auth"));
        assert!(refused("host=a sslmode=verify_full").contains("verify-full"));
        assert!(refused("host=a sslnegotiation=direct").contains("sslmode"));
        assert!(refused("host=a sslrootcert=system sslmode=require").contains("verify-full"));
        assert!(refused("host=a gssencmode=require").contains("GSS"));
        assert_eq!(info("host=a keepalives=1 gssencmode=prefer").endpoints, [tcp("a", 5432)]);
    }

    #[test]
    fn require_with_a_root_certificate_checks_it() {
        assert_eq!(info("host=a sslmode=require").tls.mode, TlsMode::Require);
        assert_eq!(info("host=a sslmode=require sslrootcert=/ca").tls.mode, TlsMode::VerifyCa);
    }

    #[test]
    fn a_service_gives_what_the_string_does_not_say() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(".pg_service.conf"), "[pos]\nhost=db\nuser=dr\nport=6000\n").unwrap();
        let info = ConnInfo::parse_for("service=pos port=7000", Some("os"), Some(dir.path())).unwrap();
        assert_eq!(info.endpoints, [tcp("db", 7000)]);
        assert_eq!(info.user, "dr");
    }

    #[test]
    fn the_password_never_shows() {
        let info = info("host=a password=secret");
        assert!(!format!("{info:?}").contains("secret"));
        assert_eq!(ConnInfo::shown("host='a b' password=secret"), "host='a b' password=…");
        assert_eq!(ConnInfo::shown("postgres://me:secret@a/d"), "user=me password=… host=a dbname=d");
        assert_eq!(ConnInfo::shown("host=a"), "host=a");
        let named = ConnInfo::with_application("postgres://a/d?application_name=x", "my 'standby'").unwrap();
        assert_eq!(named, r"host='a' dbname='d' application_name='my \'standby\''");
        assert_eq!(
            ConnInfo::parse_for(&named, Some("os"), None).unwrap().application_name.unwrap(),
            "my 'standby'"
        );
        assert!(!ConnInfo::shown("password='secret").contains("secret"));
        for unquoted in [
            "password=a secret",
            "password=a secret=b host=c",
            "password=a secret='b",
            "password=a host=c secret",
        ] {
            assert!(!ConnInfo::shown(unquoted).contains("secret"), "{unquoted}");
            let refused = ConnInfo::parse(unquoted).map_err(|error| format!("{error} {error:?}"));
            assert!(refused.is_err_and(|told| !told.contains("secret")), "{unquoted}");
        }
        assert!(!ConnInfo::shown("postgrse://me:secret@a/d?sslmode=require").contains("secret"));
        assert_eq!(info.password_for(&info.endpoints[0], "x").as_deref(), Some("secret"));
    }
}
