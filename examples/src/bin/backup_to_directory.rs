//! Takes two backups of a running server into a directory and shows what the second one stored.
//!
//! The order is that of every job: plan, look at the plan, apply it.

use dr_engine::backup::{self, BackupOptions};
use dr_examples::{Place, Result, context, shop, wal_verb};
use dr_pg::{LocalSource, LocalSourceOptions, StandbyPolicy};
use dr_testkit::pg::Scratch;

#[tokio::main]
async fn main() -> Result<()> {
    if let Some(code) = wal_verb().await {
        std::process::exit(code);
    }
    let scratch = Scratch::new();
    let (server, repository) = shop(&scratch, &Place::below(scratch.path())).await?;
    server.load_tenants(2, 20_000);

    let source = LocalSource::new(LocalSourceOptions {
        conninfo: server.conninfo(),
        data_directory: None,
        standby: StandbyPolicy::Never,
    });
    let system_id = dr_pg::control::read(&server.data)?.system_id;
    let context = context(&repository, system_id);
    for note in ["first", "after one small change"] {
        let options = BackupOptions { note: note.into(), ..BackupOptions::default() };
        let plan = backup::plan(&context, &source, &options).await?;
        let report = backup::apply(&context, &source, &plan).await?;
        let head = &report.backup;
        println!("{}: {note}: {} bytes of content, {} stored", head.id, head.bytes, head.stored_bytes);
        server.sql("UPDATE tenant_1.orders SET note = 'changed' WHERE id = 1");
    }

    // Each is a full description: the catalogue is nothing but a listing.
    let heads = context.store.heads().await?;
    let [first, second] = &heads[..] else { return Err("expected two backups".into()) };
    if second.stored_bytes * 5 > first.stored_bytes {
        return Err("the second backup should have stored little".into());
    }
    server.stop("fast");
    Ok(())
}
