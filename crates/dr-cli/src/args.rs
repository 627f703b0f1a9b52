//! Flags and commands.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

/// Disaster recovery for PostgreSQL: back up, archive WAL, recover to any moment, and prove it.
#[derive(Debug, Parser)]
#[command(name = "dr", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "Start with `dr init`, then `dr check`. Documentation: docs/cli/reference.md")]
pub struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags of every command.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Global {
    /// Configuration file, read in place of /etc/dr
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where backups are kept: a path, file:///path or s3://bucket/prefix
    #[arg(long, global = true, value_name = "URL")]
    pub repo: Option<String>,
    /// The key that reads everything
    #[arg(long, global = true, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// The host's key, which writes and lists but does not read
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "key_file")]
    pub host_key_file: Option<PathBuf>,
    /// Any other setting, as backup.workers=4
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// The cluster, by label or system identifier
    #[arg(long, global = true, value_name = "CLUSTER")]
    pub cluster: Option<String>,
    /// Machine-readable output (docs/cli/json.md)
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress, no notes: only the result, warnings and errors
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Say more on standard error: the files and places that are used; twice: each request
    #[arg(long, short, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,
    /// Colour: always, never, or auto: on a terminal, unless NO_COLOR is set or TERM is dumb
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        value_enum,
        hide_possible_values = true,
        default_value_t
    )]
    pub color: Color,
}

/// When output is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    #[default]
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a repository and a commented configuration for a cluster
    Init(Init),
    /// Say what is missing or wrong, and how to mend it
    Check,
    /// Take a backup
    Backup(Backup),
    /// List backups and the WAL between them
    List,
    /// Show a backup
    Show(Show),
    /// Make, bring forward and look at standbys
    #[command(subcommand)]
    Standby(Standby),
    /// Archive and fetch WAL
    #[command(subcommand)]
    Wal(Wal),
    /// Restore a backup and recover to a moment
    Restore(Box<Restore>),
    /// Prove that stored backups are whole
    Verify(Verify),
    /// Show what ran, how it ended and how long it took
    Jobs(Jobs),
    /// Run and ask the resident agent
    #[command(subcommand)]
    Agent(Agent),
    /// Check and show the configuration
    #[command(subcommand)]
    Config(Config),
    /// Manage the keys of a repository
    #[command(subcommand)]
    Key(Key),
    /// Print shell completions
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages into a directory
    Man {
        /// The directory
        dir: PathBuf,
    },
    /// Print the reference of all commands (Markdown)
    #[command(hide = true)]
    Reference {
        /// What: cli or config
        what: String,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Init {
    /// The configuration file to write
    #[arg(long, value_name = "FILE", default_value = "dr.toml")]
    pub output: PathBuf,
    /// The server, as a libpq connection string; found on this host when not given
    #[arg(long, value_name = "CONNINFO")]
    pub connection: Option<String>,
    /// What to call the cluster
    #[arg(long, value_name = "NAME", default_value = "main")]
    pub label: String,
    /// Where to write the new key file [default: beside the configuration, dr.key]
    #[arg(long, value_name = "FILE")]
    pub new_key: Option<PathBuf>,
    /// Also write the host's key, for hosts that must not read backups
    #[arg(long, value_name = "FILE")]
    pub new_host_key: Option<PathBuf>,
    /// Also seal the repository's keys to an age recipient (age1…); may be repeated
    #[arg(long, value_name = "RECIPIENT")]
    pub age_recipient: Vec<String>,
    /// Store in clear
    #[arg(long)]
    pub no_encryption: bool,
    /// zstd level
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(i32).range(-5..=19))]
    pub compression_level: i32,
    /// Only say what would be done
    #[arg(long)]
    pub plan: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Backup {
    /// A word for people, shown by `dr list`
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub note: String,
    /// Store everything afresh
    #[arg(long)]
    pub full: bool,
    /// Read every file, whatever its time stamps say
    #[arg(long)]
    pub read_all: bool,
    /// Where the cluster's files come from: this host's disk, or a replication connection
    #[arg(long, value_name = "SOURCE", value_parser = ["files", "stream"])]
    pub source: Option<String>,
    /// Only say what would be done
    #[arg(long)]
    pub plan: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Show {
    /// A backup's id, or "latest"
    #[arg(default_value = "latest")]
    pub backup: String,
    /// Also list relations
    #[arg(long)]
    pub relations: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Wal {
    /// Archive a WAL file (for archive_command: dr wal push %p)
    Push {
        /// The file, as PostgreSQL names it with %p
        path: PathBuf,
    },
    /// Fetch a WAL file (for restore_command: dr wal fetch %f %p)
    ///
    /// Exits with 0 when the file is in place, 1 when the archive provably does not have it, and 200
    /// for everything else, at which PostgreSQL stops instead of ending recovery.
    Fetch {
        /// The file's name, %f
        name: String,
        /// Where to put it, %p
        destination: PathBuf,
    },
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("target").multiple(false))]
pub(crate) struct Restore {
    /// The data directory to make
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// The backup to start from [default: the best one for the target]
    #[arg(long, value_name = "ID")]
    pub backup: Option<String>,
    /// Recover to the end of the archived WAL (the default)
    #[arg(long, group = "target")]
    pub latest: bool,
    /// Recover to a time: '2026-11-22 11:08:50 Europe/Berlin', '10 min ago'
    #[arg(long, value_name = "TIME", group = "target")]
    pub time: Option<String>,
    /// Recover to a WAL position
    #[arg(long, value_name = "LSN", group = "target")]
    pub lsn: Option<String>,
    /// Recover to the end of a transaction
    #[arg(long, value_name = "XID", group = "target")]
    pub xid: Option<u64>,
    /// Recover to a named restore point
    #[arg(long, value_name = "NAME", group = "target")]
    pub name: Option<String>,
    /// Recover only until the cluster is consistent
    #[arg(long, group = "target")]
    pub immediate: bool,
    /// Stop before the target instead of after it
    #[arg(long)]
    pub exclusive: bool,
    /// The timeline to follow: latest, current or a number
    #[arg(long, value_name = "TIMELINE", default_value = "latest")]
    pub timeline: String,
    /// Move a tablespace: its oid, name or old path, and the new path; may be repeated
    #[arg(long, value_name = "OLD=NEW")]
    pub tablespace: Vec<String>,
    /// Change an existing directory of the same cluster: only what differs is fetched
    #[arg(long)]
    pub delta: bool,
    /// Start the server, follow the replay and prove what was reached
    #[arg(long)]
    pub start: bool,
    /// What the server does at the target
    #[arg(long, value_enum, default_value_t = Action::Promote)]
    pub action: Action,
    /// Whether the recovered server archives its WAL
    #[arg(long, value_enum, default_value_t = Archiving::Off)]
    pub archive_mode: Archiving,
    /// Write the server's files from outside the data directory below this one
    #[arg(long, value_name = "DIR")]
    pub host_files: Option<PathBuf>,
    /// Do not sync: for scratch restores only
    #[arg(long)]
    pub no_sync: bool,
    /// Only say what would be done
    #[arg(long)]
    pub plan: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Standby {
    /// Build a standby from a backup and the archive, and prove that it follows
    Create(Box<StandbyCreate>),
    /// Bring a cold standby forward: start it in private, replay up to now, stop it
    Refresh {
        /// Its data directory
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// How long it may take to replay what the primary wrote
        #[arg(long, value_name = "DURATION", default_value = "10min")]
        timeout: String,
    },
    /// Show the standbys and slots of the primary, and how far each is behind
    Status {
        /// Also look at the standby that runs on this directory of this host
        #[arg(long, value_name = "DIR")]
        to: Option<PathBuf>,
    },
}

#[derive(Args, Debug)]
pub(crate) struct StandbyCreate {
    /// The data directory to make
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// hot streams and answers queries, warm follows the archive, cold is stopped until a refresh
    #[arg(long, value_enum, default_value_t = Warmth::Hot)]
    pub temperature: Warmth,
    /// Its name on the primary, as synchronous_standby_names would have it [default: dr_HOST]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// The replication slot that keeps WAL for it, made if need be [default: its name]
    #[arg(long, value_name = "SLOT", conflicts_with = "no_slot")]
    pub slot: Option<String>,
    /// No slot: the archive serves a standby that fell behind
    #[arg(long)]
    pub no_slot: bool,
    /// The backup to start from [default: the newest]
    #[arg(long, value_name = "ID")]
    pub backup: Option<String>,
    /// Move a tablespace: its oid, name or old path, and the new path; may be repeated
    #[arg(long, value_name = "OLD=NEW")]
    pub tablespace: Vec<String>,
    /// A setting of the standby's own, as port=5433; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub server_setting: Vec<String>,
    /// Rebuild in a directory of the same cluster: only what differs is fetched
    #[arg(long)]
    pub delta: bool,
    /// Leave it stopped and unproven
    #[arg(long)]
    pub no_start: bool,
    /// How long it may take to replay what the primary wrote after it was started
    #[arg(long, value_name = "DURATION", default_value = "10min")]
    pub timeout: String,
    /// Only say what would be done
    #[arg(long)]
    pub plan: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Warmth {
    /// Runs, streams, answers queries
    Hot,
    /// Runs, follows the archive, takes no connections
    Warm,
    /// Does not run
    Cold,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Action {
    /// Become a primary on a new timeline
    Promote,
    /// Stay read-only, for a look
    Pause,
    /// Stop
    Shutdown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Archiving {
    /// Switched off, so that it cannot write into the archive of a server that still runs
    Off,
    /// As it was configured
    Keep,
}

#[derive(Args, Debug)]
pub(crate) struct Verify {
    /// Backups by id [default: the newest]
    #[arg(value_name = "ID")]
    pub backups: Vec<String>,
    /// All backups
    #[arg(long)]
    pub all: bool,
    /// Only that everything is there with its size
    #[arg(long, conflicts_with = "packs")]
    pub metadata: bool,
    /// Only stored bytes against the digests in their names; needs no reading key
    #[arg(long)]
    pub packs: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Jobs {
    /// How many
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub last: usize,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Agent {
    /// Run the agent in the foreground, until it is asked to stop
    ///
    /// SIGTERM and SIGINT ask its tasks to stop at their next safe point, within agent.stop_timeout;
    /// a second one cuts them off. SIGHUP reloads the configuration. It exits with 0 after an orderly
    /// stop.
    Run,
    /// Say how the agent is and what its tasks do
    Status(Ask),
    /// Put the configuration in force anew; a bad one is refused and changes nothing
    Reload(Ask),
    /// Ask the agent to stop at the next safe point of its tasks, and wait until it has
    Stop {
        #[command(flatten)]
        ask: Ask,
        /// Cut off its tasks, as a crash would
        #[arg(long)]
        now: bool,
        /// How long to wait [default: agent.stop_timeout of the agent and 10s]
        #[arg(long, value_name = "DURATION")]
        timeout: Option<String>,
    },
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Ask {
    /// The agent's socket [default: agent.socket]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Config {
    /// Check the configuration
    Check,
    /// Show the settings in force
    Show {
        /// Also where each was written
        #[arg(long)]
        origin: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Key {
    /// Seal the repository's keys to one more key
    Add {
        /// An age recipient (age1…)
        #[arg(long, value_name = "RECIPIENT", conflicts_with = "new_file")]
        age_recipient: Option<String>,
        /// A new key file to write
        #[arg(long, value_name = "FILE", required_unless_present = "age_recipient")]
        new_file: Option<PathBuf>,
    },
    /// Write the host's key to a new file
    Host {
        /// The file
        file: PathBuf,
    },
}
