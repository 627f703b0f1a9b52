//! With which parts `dr` runs: configuration, the one place that names adapters together, and the
//! resident agent that keeps tasks running.
#![forbid(unsafe_code)]

pub mod check;
pub mod config;
mod error;
pub mod metrics;
pub mod protocol;
pub mod resident;
pub mod supervise;
pub mod wire;

pub use config::Settings;
pub use error::AgentError;

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
