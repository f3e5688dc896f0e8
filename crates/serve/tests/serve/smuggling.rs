//! Bytes that are HTTP to one and not to another, and very many who connect.

use super::*;

/// Sends bytes as they are; the statuses of all responses until the connection ends or is silent.
fn raw(server: &Running, bytes: &[u8]) -> Vec<String> {
    let mut connection = TcpStream::connect(server.address).expect("a connection");
    let silence = Some(Duration::from_secs(3));
    connection.set_read_timeout(silence).expect("a time");
    let _ = connection.write_all(bytes);
    let text = read_all(connection);
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("HTTP/1.1 "));
    lines.map(|line| line[..3].to_owned()).collect()
}

#[test]
fn a_request_has_one_end() {
    let server = Running::start(Settings::default());
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    let second = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";
    // Lengths that two readers may understand differently: none gets as far as the second request.
    for lengths in [
        "Content-Length: 2\r\nContent-Length: 50",
        "Content-Length: 2, 50",
        "Content-Length: +2",
        "Content-Length: -1",
        "Content-Length: 0x2",
        "Content-Length: 99999999999999999999",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding : chunked",
        "Content-Length : 2",
    ] {
        let statuses = raw(
            &server,
            format!("{head}{lengths}\r\n\r\n{{}}{second}").as_bytes(),
        );
        assert!(
            statuses.len() <= 1 && statuses.iter().all(|status| status.starts_with('4')),
            "{lengths}: {statuses:?}"
        );
    }
    // Where both are given, the chunks count (RFC 9112, 6.3), so that what a length would hide is read as a body.
    let hidden = format!(
        "{head}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{second}\r\n0\r\n\r\n",
        second.len()
    );
    let statuses = raw(&server, hidden.as_bytes());
    assert_eq!(statuses, ["400"]);
    // Chunks that have no end, or no size.
    for chunks in [
        "2\r\n{}\r\n",
        "fffffffffffffffff\r\n{}",
        "zz\r\n{}\r\n0\r\n\r\n",
        "2;\r\n\r\n{}",
    ] {
        let body = format!("{head}Transfer-Encoding: chunked\r\n\r\n{chunks}");
        let mut connection = TcpStream::connect(server.address).expect("a connection");
        connection.write_all(body.as_bytes()).expect("it is sent");
        connection
            .shutdown(std::net::Shutdown::Write)
            .expect("the end");
        let text = read_all(connection);
        assert!(
            text.is_empty() || text.starts_with("HTTP/1.1 4"),
            "{chunks}: {text}"
        );
    }
    // Heads that are none.
    for bytes in [
        &b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n"[..],
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n X: folded\r\n\r\n",
        b"GET /he\0alth HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET  /health  HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let statuses = raw(&server, bytes);
        assert!(
            statuses.iter().all(|status| status == "400"),
            "{bytes:?}: {statuses:?}"
        );
    }
    assert_eq!(server.get("/health").0, 200);
}

#[test]
fn those_who_connect_and_say_nothing_keep_nobody_out() {
    let mut settings = Settings::default();
    settings.limits.connections = 400;
    let server = Running::start(settings);
    // Half of them stop within the head, the others within the body: more than there are places of requests (96).
    let connect = |_| TcpStream::connect(server.address).expect("a connection");
    let mut silent: Vec<TcpStream> = (0..300).map(connect).collect();
    let head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{";
    for (index, connection) in silent.iter_mut().enumerate() {
        let half = match index % 2 {
            0 => &head[..index % head.len()],
            _ => head,
        };
        connection.write_all(half).expect("it is sent");
    }
    server.wait_for("reroute_requests_under_way", |count| count == 150.0);
    server.ask(&about("find the cross"));
    drop(silent);
    server.ask(&about("find the cross"));
}
