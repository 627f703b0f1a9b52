//! The units of systemd, read by systemd's own reader.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::environment::{find_program, root};
use crate::steps::Steps;

/// Where they are.
const UNITS: &str = "packaging/systemd";
/// Where a package puts the program; for the check, a program that is there stands in.
const PROGRAM: (&str, &str) = ("/usr/bin/dr", "/bin/true");

/// Checks every unit, or says why not.
pub fn step(steps: &mut Steps, scratch: &Path) {
    if find_program("systemd-analyze").is_none() {
        return steps.skip("systemd units", "systemd-analyze is not installed (it comes with systemd)");
    }
    steps.call("systemd units", || {
        let place = scratch.join("units");
        std::fs::create_dir_all(&place).map_err(|error| error.to_string())?;
        let mut count = 0;
        for entry in std::fs::read_dir(root().join(UNITS)).map_err(|error| error.to_string())?.flatten() {
            let text = std::fs::read_to_string(entry.path()).map_err(|error| error.to_string())?;
            verify(&text, &place.join(entry.file_name()))?;
            count += 1;
        }
        if count == 0 { Err(format!("{UNITS} is empty")) } else { Ok(()) }
    });
}

/// What is not right about a unit. A key that systemd does not know is only warned of, and the exit
/// status is 0: so nothing at all may be said.
fn verify(text: &str, copy: &Path) -> Result<(), String> {
    let text = text.replace(PROGRAM.0, PROGRAM.1);
    std::fs::write(copy, text).map_err(|error| error.to_string())?;
    let mut command = Command::new("systemd-analyze");
    command.args(["verify", "--man=no"]).arg(copy).stdin(Stdio::null());
    let output = command.output().map_err(|error| format!("systemd-analyze: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() && said.trim().is_empty() { Ok(()) } else { Err(said) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_systemd_does_not_know_is_a_fault() {
        if find_program("systemd-analyze").is_none() {
            println!("left out: systemd-analyze is not installed");
            return;
        }
        let place = std::env::temp_dir().join(format!("xtask-units-{}", std::process::id()));
        std::fs::create_dir_all(&place).expect("a folder");
        let good = "[Service]\nExecStart=/usr/bin/dr agent run\nProtectSystem=strict\n";
        let copy = place.join("test.service");
        assert_eq!(verify(good, &copy), Ok(()));
        for bad in [good.replace("System", "Systm"), good.replace("/usr", "/nowhere")] {
            assert!(verify(&bad, &copy).is_err(), "{bad}");
        }
        std::fs::remove_dir_all(&place).expect("removed");
    }
}
