//! Telling systemd how the agent is: datagrams to the socket in `NOTIFY_SOCKET`.
//!
//! Source: sd_notify(3), sd_watchdog_enabled(3), and the sketch of an implementation in the former.
//! Without the variable nobody is told, and nothing fails: the agent runs by hand too.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Who is told, and how often the watchdog wants to hear.
#[derive(Debug, Default)]
pub struct Notifier {
    to: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
    /// The last line for people.
    said: Mutex<String>,
}

impl Notifier {
    /// As the environment says.
    pub fn from_environment() -> Self {
        let variable = |name| std::env::var(name).ok();
        let watchdog = watchdog(variable("WATCHDOG_USEC"), variable("WATCHDOG_PID"), std::process::id());
        match variable("NOTIFY_SOCKET") {
            Some(address) => Self::to(&address, watchdog),
            None => Notifier::default(),
        }
    }

    /// To this address: a path, or `@name` in the abstract namespace. `watchdog`: how long the agent
    /// may be silent.
    pub fn to(address: &str, watchdog: Option<Duration>) -> Self {
        let target = match address.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name),
            None if address.starts_with('/') => SocketAddr::from_pathname(address),
            None => Err(std::io::Error::other("it is neither a path nor an abstract name")),
        };
        let socket = UnixDatagram::unbound().and_then(|socket| {
            // A service manager that does not read must not hold up the agent.
            socket.set_nonblocking(true)?;
            Ok((socket, target?))
        });
        match socket {
            Ok(to) => Notifier { to: Some(to), watchdog, said: Mutex::default() },
            Err(error) => {
                tracing::warn!("NOTIFY_SOCKET = {address:?} cannot be used: {error}");
                Notifier::default()
            }
        }
    }

    /// It serves; also the end of a reload.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// It reads its configuration anew.
    pub fn reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let micros = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
        // Both in one datagram, as Type=notify-reload wants them.
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// It stops, which may take so long: more than the unit says, if the agent's settings do.
    pub fn stopping(&self, limit: Duration) {
        self.send(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={}", limit.as_micros()));
    }

    /// How it is, in one line for people; the same line is not said twice.
    pub fn status(&self, line: &str) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if *said == line {
            return;
        }
        line.clone_into(&mut said);
        self.send(&format!("STATUS={}", line.replace('\n', " ")));
    }

    /// It lives.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    /// How often to say that it lives: twice in the time that it may be silent, as
    /// sd_watchdog_enabled(3) recommends.
    pub fn every(&self) -> Option<Duration> {
        self.watchdog.map(|silence| silence / 2)
    }

    fn send(&self, state: &str) {
        let Some((socket, to)) = &self.to else { return };
        if let Err(error) = socket.send_to_addr(state.as_bytes(), to) {
            tracing::debug!("the service manager was not told {state:?}: {error}");
        }
    }
}

/// How long the service manager lets this process be silent.
fn watchdog(micros: Option<String>, of_process: Option<String>, own: u32) -> Option<Duration> {
    if of_process.is_some_and(|process| process.parse() != Ok(own)) {
        return None;
    }
    let micros: u64 = micros?.parse().ok()?;
    (micros > 0).then(|| Duration::from_micros(micros))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(server: &UnixDatagram) -> String {
        server.set_read_timeout(Some(Duration::from_secs(10))).expect("a limit");
        let mut text = [0; 1000];
        let length = server.recv(&mut text).expect("a datagram");
        String::from_utf8_lossy(&text[..length]).into_owned()
    }

    fn says_all(notifier: &Notifier, server: &UnixDatagram) {
        notifier.ready();
        assert_eq!(told(server), "READY=1");
        notifier.reloading();
        let text = told(server);
        let micros = text.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect("both in one datagram");
        assert!(micros.parse::<u64>().expect("a number") > 0);
        notifier.status("two\nlines");
        notifier.status("two\nlines");
        assert_eq!(told(server), "STATUS=two lines");
        notifier.alive();
        assert_eq!(told(server), "WATCHDOG=1");
        notifier.stopping(Duration::from_secs(75));
        assert_eq!(told(server), "STOPPING=1\nEXTEND_TIMEOUT_USEC=75000000");
    }

    #[test]
    fn states_arrive_at_a_path_and_at_an_abstract_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notify");
        let server = UnixDatagram::bind(&path).expect("a socket");
        says_all(&Notifier::to(path.to_str().expect("text"), None), &server);

        let name = format!("dr-agent-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let server = UnixDatagram::bind_addr(&address).expect("a socket");
        says_all(&Notifier::to(&format!("@{name}"), None), &server);
    }

    #[test]
    fn a_service_manager_that_is_not_there_or_does_not_read_holds_nothing_up() {
        Notifier::default().ready();
        Notifier::to("vsock:2:1234", None).ready();
        Notifier::to("/nonexistent/notify", None).ready();
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notify");
        let _server = UnixDatagram::bind(&path).expect("a socket");
        let notifier = Notifier::to(path.to_str().expect("text"), None);
        for _ in 0..10_000 {
            notifier.alive();
        }
    }

    #[test]
    fn the_watchdog_hears_twice_in_its_time_and_only_from_whom_it_watches() {
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(watchdog(text("60000000"), None, 7), Some(Duration::from_secs(60)));
        assert_eq!(watchdog(text("60000000"), text("7"), 7), Some(Duration::from_secs(60)));
        assert_eq!(watchdog(text("60000000"), text("8"), 7), None);
        for wrong in ["0", "", "soon", "-1"] {
            assert_eq!(watchdog(text(wrong), None, 7), None);
        }
        assert_eq!(watchdog(None, None, 7), None);
        let notifier = Notifier { watchdog: Some(Duration::from_secs(60)), ..Notifier::default() };
        assert_eq!(notifier.every(), Some(Duration::from_secs(30)));
    }
}
