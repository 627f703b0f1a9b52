//! The main job over a real S3 server, when DR_TEST_S3_ENDPOINT names one (`cargo xtask test` starts one).
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;

use dr_testkit::pg::{
    Scratch, TestCluster, archive_all, command, conninfo_of, dump_digest, ok, run, stop_server,
};

#[test]
fn a_cluster_is_backed_up_to_s3_and_recovered_from_it() {
    let get = |name: &str| std::env::var(format!("DR_TEST_S3_{name}")).ok();
    let Some(endpoint) = get("ENDPOINT") else {
        eprintln!("no S3 server: DR_TEST_S3_ENDPOINT is not set");
        return;
    };
    let scratch = Scratch::new();
    let base = scratch.path();
    let at = |name: &str| base.join(name).display().to_string();
    let dr = base.join("dr");
    std::fs::copy(env!("CARGO_BIN_EXE_dr"), &dr).unwrap();
    for (name, variable) in [("access", "KEY"), ("secret", "SECRET")] {
        std::fs::write(at(name), get(variable).unwrap()).unwrap();
        std::fs::set_permissions(at(name), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    }
    let repo = format!("s3://{}/e2e-{:08x}", get("BUCKET").unwrap(), std::process::id());
    let s3 = [
        "--config".to_owned(),
        "/dev/null".to_owned(),
        "--repo".to_owned(),
        repo.clone(),
        "--set".to_owned(),
        format!("repository.endpoint={endpoint}"),
        "--set".to_owned(),
        "repository.path_style=true".to_owned(),
        "--set".to_owned(),
        "repository.allow_http=true".to_owned(),
        "--set".to_owned(),
        format!("repository.access_key=file:{}", at("access")),
        "--set".to_owned(),
        format!("repository.secret_key=file:{}", at("secret")),
    ];
    let cluster = TestCluster::create(base, "data");
    cluster.configure(&[&format!(
        "archive_command = '{} --config {} wal push %p'",
        dr.display(),
        at("dr.toml")
    )]);
    cluster.start();
    cluster.load_tenants(2, 2000);
    let mut init = command(&dr);
    ok(init.current_dir(base).args(&s3).args([
        "init",
        "--connection",
        &cluster.conninfo(),
        "--output",
        &at("dr.toml"),
    ]));
    let job = |arguments: &[&str]| ok(command(&dr).args(["--config", &at("dr.toml")]).args(arguments));
    job(&["check"]);
    job(&["backup"]);
    cluster.sql("UPDATE tenant_1.orders SET note = 'x' WHERE id % 40 = 0");
    job(&["backup"]);
    cluster.sql("DELETE FROM tenant_2.orders WHERE id % 2 = 0");
    let digest = dump_digest(&cluster.conninfo());
    archive_all(&cluster.conninfo());
    let to = at("restored");
    let (key, address) = (at("dr.key"), &s3);
    ok(command(&dr).args(address).args(["--key-file", &key, "restore", "--to", &to, "--start"]));
    let same = dump_digest(&conninfo_of(Path::new(&to))) == digest;
    stop_server(Path::new(&to));
    assert!(same, "the recovered cluster differs");
    job(&["verify", "--all"]);
    // A wrong secret is told as what it is, and says nothing of the secret.
    std::fs::write(at("secret"), "wrong-secret").unwrap();
    let denied = run(command(&dr).args(["--config", &at("dr.toml"), "list", "--json"]));
    let said = String::from_utf8_lossy(&denied.stdout).into_owned();
    assert!(said.contains("\"class\": \"denied\"") && !said.contains("wrong-secret"), "{said}");
}
