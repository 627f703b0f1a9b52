//! The proxy before a pretended server.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Instant;

use super::*;

const LIMIT: Duration = Duration::from_secs(10);

/// A message of the server: `d`, and a body of `len` bytes.
fn message(len: usize) -> Vec<u8> {
    let mut out = vec![b'd'];
    out.extend((len as u32 + 4).to_be_bytes());
    out.resize(out.len() + len, 9);
    out
}

/// Three messages of 10, 105 and 1005 bytes.
fn speech() -> Vec<u8> {
    [message(5), message(100), message(1000)].concat()
}

/// What a client says first: it wants a replication connection.
fn hello() -> Vec<u8> {
    let words = b"\0\x03\0\0user\0x\0replication\0true\0\0";
    [&(words.len() as u32 + 4).to_be_bytes()[..], words].concat()
}

/// A server that reads a client's first message, speaks, and waits until the client is gone.
/// Answers how it saw the end.
fn server() -> (SocketAddr, std::thread::JoinHandle<io::Result<()>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.read_exact(&mut vec![0; hello().len()])?;
        stream.write_all(&speech())?;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).map(drop)
    });
    (address, thread)
}

fn connect(proxy: &Proxy) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(&hello()).unwrap();
    stream
}

fn backend(place: Place, act: Act) -> Option<Fault> {
    Some(Fault { session: Some(Session::Replication), side: Side::Backend, place, act })
}

#[test]
fn bytes_pass_unchanged_and_messages_are_counted() {
    let (address, thread) = server();
    let proxy = Proxy::tcp(Upstream::Tcp(address));
    let mut client = connect(&proxy);
    let mut got = vec![0; speech().len()];
    client.read_exact(&mut got).unwrap();
    assert_eq!(got, speech());
    // The end passes on too.
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    thread.join().unwrap().unwrap();
    let seen = &proxy.seen()[0];
    assert_eq!((seen.session, seen.hit), (Session::Replication, false));
    assert_eq!((seen.frontend, seen.backend), ((1, hello().len() as u64), (3, got.len() as u64)));
    assert_eq!(seen.tags, b"ddd");
}

#[test]
fn a_cut_comes_at_the_byte_that_was_named() {
    let places = [
        (Place::After(0), 0),
        (Place::After(1), 10),
        (Place::After(2), 115),
        (Place::After(3), 1120),
        (Place::Within(0), 5),
        (Place::Within(1), 62),
        (Place::Within(2), 617),
        (Place::Byte(3), 3),
        (Place::Byte(200), 200),
    ];
    for (place, bytes) in places {
        for act in [Act::Reset, Act::Close] {
            let (address, thread) = server();
            let proxy = Proxy::tcp(Upstream::Tcp(address));
            proxy.set(backend(place, act));
            let mut client = connect(&proxy);
            let mut got = Vec::new();
            let end = client.read_to_end(&mut got);
            match act {
                // What was not read yet is lost with a reset.
                Act::Reset => {
                    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset, "{place:?}");
                    assert!(got.len() <= bytes, "{place:?}");
                }
                _ => {
                    end.unwrap();
                    assert_eq!(got, speech()[..bytes], "{place:?}");
                }
            }
            assert!(proxy.seen()[0].hit);
            drop(client);
            let _ = thread.join().unwrap();
        }
    }
}

#[test]
fn a_fault_concerns_only_its_kind_of_session_and_connections_after_it() {
    let (address, thread) = server();
    let proxy = Proxy::tcp(Upstream::Tcp(address));
    proxy.set(Some(Fault { session: Some(Session::Sql), ..backend(Place::After(1), Act::Close).unwrap() }));
    let mut client = connect(&proxy);
    client.read_exact(&mut vec![0; speech().len()]).unwrap();
    proxy.set(backend(Place::After(0), Act::Close));
    drop(client);
    thread.join().unwrap().unwrap();
}

#[test]
fn in_a_black_hole_nothing_passes_and_the_connection_stays_open_until_it_is_hung_up() {
    let (address, thread) = server();
    let proxy = Proxy::tcp(Upstream::Tcp(address));
    proxy.set(backend(Place::After(1), Act::BlackHole));
    let mut client = connect(&proxy);
    client.read_exact(&mut [0; 10]).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(matches!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
    client.write_all(b"x").unwrap();
    assert_eq!((proxy.open(), thread.is_finished()), (1, false));
    proxy.hang_up();
    assert_eq!(thread.join().unwrap().unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn delay_and_throttle_take_time_and_lose_nothing() {
    let timed = |act| {
        let (address, thread) = server();
        let proxy = Proxy::tcp(Upstream::Tcp(address));
        proxy.set(backend(Place::Within(1), act));
        let mut client = connect(&proxy);
        let began = Instant::now();
        let mut got = vec![0; speech().len()];
        client.read_exact(&mut got).unwrap();
        assert_eq!(got, speech());
        drop(client);
        thread.join().unwrap().unwrap();
        began.elapsed()
    };
    assert!(timed(Act::Delay(Duration::from_millis(300))) >= Duration::from_millis(300));
    // About a thousand bytes after the place.
    let throttled = timed(Act::Throttle(4000));
    assert!(throttled >= Duration::from_millis(200) && throttled < LIMIT, "{throttled:?}");
}

#[test]
fn a_unix_socket_leads_to_the_server_too() {
    let dir = tempfile::tempdir().unwrap();
    let (address, thread) = server();
    let proxy = Proxy::unix(dir.path(), 7777, Upstream::Tcp(address));
    proxy.set(backend(Place::After(2), Act::Close));
    let mut client = std::os::unix::net::UnixStream::connect(dir.path().join(".s.PGSQL.7777")).unwrap();
    client.write_all(&hello()).unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert_eq!(got, speech()[..115]);
    drop(client);
    let _ = thread.join().unwrap();
    assert!(proxy.conninfo().contains("port=7777"));
}
