//! With which parts `dr` runs: configuration, the one place that names adapters together, and the
//! resident agent that keeps tasks running.
#![forbid(unsafe_code)]

pub mod config;
mod error;
pub mod metrics;
pub mod supervise;
pub mod wire;

pub use config::Settings;
pub use error::AgentError;
