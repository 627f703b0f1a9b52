//! A shop with a server that archives with `dr`, for the tests on real servers.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::Output;

use dr_testkit::pg::{Scratch, TestCluster, archive_all, command, conninfo_of, ok, run, stop_server};

/// A server that archives with `dr`, and a place for everything.
pub struct Shop {
    pub cluster: TestCluster,
    pub scratch: Scratch,
    pub dr: PathBuf,
}

impl Drop for Shop {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.scratch.path()).into_iter().flatten().flatten() {
            stop_server(&entry.path());
        }
    }
}

impl Shop {
    pub fn open() -> Self {
        Self::open_with(&[])
    }

    pub fn open_with(settings: &[&str]) -> Self {
        let scratch = Scratch::new();
        let base = scratch.path().to_owned();
        // The server's user may not be able to enter the place where the tests are built.
        let dr = base.join("dr");
        std::fs::copy(env!("CARGO_BIN_EXE_dr"), &dr).unwrap();
        std::fs::set_permissions(&dr, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let cluster = TestCluster::create(&base, "data");
        cluster.configure(settings);
        cluster.configure(&[&format!(
            "archive_command = '{} --config {}/dr.toml wal push %p'",
            dr.display(),
            base.display()
        )]);
        cluster.start();
        let shop = Shop { cluster, scratch, dr };
        shop.dr_ok(&[
            "init",
            "--repo",
            &shop.at("repo"),
            "--connection",
            &shop.cluster.conninfo(),
            "--output",
            &shop.at("dr.toml"),
            "--new-key",
            &shop.at("dr.key"),
            "--new-host-key",
            &shop.at("host.key"),
        ]);
        shop
    }

    pub fn at(&self, name: &str) -> String {
        self.scratch.path().join(name).display().to_string()
    }

    pub fn dr(&self, arguments: &[&str]) -> Output {
        let mut command = command(&self.dr);
        command.current_dir(self.scratch.path()).args(arguments);
        run(&mut command)
    }

    pub fn dr_ok(&self, arguments: &[&str]) -> String {
        let mut command = command(&self.dr);
        ok(command.current_dir(self.scratch.path()).args(arguments))
    }

    /// Runs with the configuration file.
    pub fn job(&self, arguments: &[&str]) -> String {
        let config = self.at("dr.toml");
        self.dr_ok(&[&["--config", &config], arguments].concat())
    }

    /// Restores with nothing but the address and the key, starts, and answers the connection.
    pub fn restore(&self, name: &str, arguments: &[&str]) -> String {
        let (repo, key, to) = (self.at("repo"), self.at("dr.key"), self.at(name));
        let fixed =
            ["--config", "/dev/null", "--repo", &repo, "--key-file", &key, "restore", "--to", &to, "--start"];
        self.dr_ok(&[&fixed[..], arguments].concat());
        conninfo_of(Path::new(&to))
    }

    /// Closes the current WAL segment and waits until it is archived.
    pub fn archive_all(&self) {
        archive_all(&self.cluster.conninfo());
    }
}

pub fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}
