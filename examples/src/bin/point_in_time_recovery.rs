//! Recovers a cluster to the moment before a mistake, on another directory, and proves it.
//!
//! PostgreSQL fetches WAL by running this same program (`wal_verb`): nothing but the library is
//! needed.

use std::time::Duration;

use dr_core::port::{Instance, RecoveryTarget};
use dr_engine::backup::{self, BackupOptions};
use dr_engine::restore::{self, RestoreOptions};
use dr_examples::{Place, Result, context, shop, wal_verb};
use dr_pg::{InstanceOptions, LocalInstance, LocalSource, LocalSourceOptions, StandbyPolicy};
use dr_testkit::pg::{Scratch, TestCluster, archive_all, conninfo_of, sql};

#[tokio::main]
async fn main() -> Result<()> {
    if let Some(code) = wal_verb().await {
        std::process::exit(code);
    }
    let scratch = Scratch::new();
    let place = Place::below(scratch.path());
    let (server, repository) = shop(&scratch, &place).await?;
    server.load_tenants(1, 5_000);
    let source = LocalSource::new(LocalSourceOptions {
        conninfo: server.conninfo(),
        data_directory: None,
        standby: StandbyPolicy::Never,
    });
    let system_id = dr_pg::control::read(&server.data)?.system_id;
    let context = context(&repository, system_id);
    let plan = backup::plan(&context, &source, &BackupOptions::default()).await?;
    backup::apply(&context, &source, &plan).await?;

    let moment = make_mistake(&server);

    let to = scratch.path().join("recovered");
    let options = RestoreOptions {
        target: RecoveryTarget::Time { time: moment.parse()? },
        start: true,
        ..RestoreOptions::new(&to, place.wal_command("wal-fetch", system_id, "%f %p")?)
    };
    let instance = LocalInstance::new(InstanceOptions::default());
    let plan = restore::plan(&context, &instance, &options).await?;
    let report = restore::apply(&context, &instance, &plan).await?;
    let reached = report.reached.ok_or("the server was not followed")?;
    println!("reached {} on timeline {}", reached.lsn, reached.timeline);

    let rows = sql(&conninfo_of(&to), "SELECT count(*) FROM tenant_1.payments");
    instance.stop(&to).await?;
    if rows != "5001" {
        return Err(format!("expected 5001 rows, found {rows}").into());
    }
    println!("all {rows} rows are back");
    Ok(())
}

/// Adds a row, remembers the moment, drops the table, and waits until the WAL is archived.
fn make_mistake(server: &TestCluster) -> String {
    server.sql("INSERT INTO tenant_1.payments VALUES (5001, 1, 1.25, 'card')");
    let moment = server
        .sql("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
    std::thread::sleep(Duration::from_millis(50));
    server.sql("DROP TABLE tenant_1.payments");
    archive_all(&server.conninfo());
    moment
}
