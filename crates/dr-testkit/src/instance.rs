//! A server that is none: it remembers what it was told.

use std::path::Path;
use std::sync::Mutex;

use async_trait::async_trait;
use dr_core::port::{
    ClusterError, ControlFacts, HostFacts, HostNeeds, Instance, InstanceStatus, RecoveryEnd, RecoverySpec,
    RunState,
};
use dr_core::{Lsn, SegmentSize, SystemId, Timeline};

/// A fake of [`Instance`] whose answers a test chooses.
#[derive(Debug)]
pub struct FakeInstance {
    /// What `host_facts` answers.
    pub host: HostFacts,
    /// What `status` answers once the server was started.
    pub running: InstanceStatus,
    /// What `recovery_end` answers.
    pub end: RecoveryEnd,
    /// The recovery that was prepared.
    pub prepared: Mutex<Option<RecoverySpec>>,
    /// Whether a server runs before the test starts one.
    pub already_running: bool,
    /// Whether it was started.
    pub started: Mutex<bool>,
}

impl FakeInstance {
    /// A host that can run everything, and a recovery that reaches its target.
    pub fn new() -> Self {
        FakeInstance {
            host: HostFacts { major: Some(15), architecture: "sim".into(), ..HostFacts::default() },
            running: InstanceStatus {
                state: RunState::Primary,
                lsn: Some(Lsn(u64::MAX)),
                last_commit: None,
                timeline: Some(Timeline(2)),
            },
            end: RecoveryEnd {
                stopped_at_target: true,
                new_timeline: Some(Timeline(2)),
                ..RecoveryEnd::default()
            },
            prepared: Mutex::default(),
            already_running: false,
            started: Mutex::default(),
        }
    }
}

impl Default for FakeInstance {
    fn default() -> Self {
        Self::new()
    }
}

/// The bytes of the simulated `pg_control`: the system identifier as text.
pub fn control_bytes(system_id: SystemId) -> Vec<u8> {
    format!("control {system_id}").into_bytes()
}

#[async_trait]
impl Instance for FakeInstance {
    fn control(&self, data: &Path) -> Result<ControlFacts, ClusterError> {
        let path = data.join("global/pg_control");
        let bytes = std::fs::read(&path).map_err(|source| ClusterError::File {
            operation: "read",
            path: path.display().to_string(),
            source,
        })?;
        self.parse_control(&bytes)
    }

    fn parse_control(&self, bytes: &[u8]) -> Result<ControlFacts, ClusterError> {
        let text = String::from_utf8_lossy(bytes);
        let system_id = text.strip_prefix("control ").and_then(|id| id.parse().ok());
        let Some(system_id) = system_id else {
            return Err(ClusterError::Damaged { path: "pg_control".into(), reason: "not simulated".into() });
        };
        Ok(ControlFacts {
            system_id,
            control_version: 1300,
            catalog_version: 1,
            state: "in production".into(),
            is_shut_down: false,
            redo: Lsn(0),
            timeline: Timeline(1),
            min_recovery_end: Lsn(0),
            page_size: 8192,
            relation_segment_pages: 131_072,
            segment_size: SegmentSize::DEFAULT,
            checksums: true,
        })
    }

    fn major(&self, _: &Path) -> Result<u32, ClusterError> {
        Ok(15)
    }

    fn prepare_recovery(&self, data: &Path, _: &[u8], spec: &RecoverySpec) -> Result<(), ClusterError> {
        *self.prepared.lock().unwrap() = Some(spec.clone());
        std::fs::write(data.join("recovery.signal"), "").map_err(|source| ClusterError::File {
            operation: "write",
            path: data.display().to_string(),
            source,
        })
    }

    fn host_facts(&self, _: &HostNeeds) -> HostFacts {
        self.host.clone()
    }

    async fn start(&self, _: &Path, _: u32, _: bool) -> Result<(), ClusterError> {
        *self.started.lock().unwrap() = true;
        Ok(())
    }

    async fn status(&self, _: &Path) -> Result<InstanceStatus, ClusterError> {
        if self.already_running || *self.started.lock().unwrap() {
            return Ok(self.running.clone());
        }
        Ok(InstanceStatus { state: RunState::Stopped, lsn: None, last_commit: None, timeline: None })
    }

    fn connection(&self, _: &Path) -> Option<String> {
        None
    }

    fn recovery_end(&self, _: &Path) -> Result<RecoveryEnd, ClusterError> {
        Ok(self.end.clone())
    }

    async fn stop(&self, _: &Path) -> Result<(), ClusterError> {
        *self.started.lock().unwrap() = false;
        Ok(())
    }
}
