//! `reroute serve` as a process: it says where it listens, answers, and ends when it is told to.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

/// The program, and where it listens.
struct Serving {
    program: Child,
    address: String,
    _out: BufReader<ChildStdout>,
}

impl Serving {
    fn start(flags: &[&str]) -> Self {
        let mut program = Command::new(env!("CARGO_BIN_EXE_reroute"))
            .args(["serve", "--port", "0"])
            .args(flags)
            .env("REROUTE_API_KEY", "key")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        let mut out = BufReader::new(program.stdout.take().expect("a pipe"));
        let mut line = String::new();
        out.read_line(&mut line).expect("a line");
        let address = line.trim().strip_prefix("listening at http://");
        let address = address.expect("an address").to_owned();
        Self {
            program,
            address,
            _out: out,
        }
    }

    fn begin(&self, body: &str) -> TcpStream {
        let mut connection = TcpStream::connect(&self.address).expect("a connection");
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        connection
            .write_all(request.as_bytes())
            .expect("it is sent");
        connection
    }

    fn signal(&self, name: &str) {
        let id = self.program.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &id]).status();
        assert!(sent.expect("kill").success());
    }

    /// The exit code, when it has ended.
    fn wait(mut self) -> Option<i32> {
        for _ in 0..600 {
            if let Some(status) = self.program.try_wait().expect("it is ours") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        self.program.kill().expect("it is ours");
        panic!("it does not end");
    }
}

/// Chunks for a few seconds.
const LONG: &str = r#"{"messages": [{"role": "user", "content": "x"}], "temperature": 50, "seed": 5,
    "max_tokens": 400, "n": 8, "stream": true, "model": "mine"}"#;

fn read_all(mut connection: TcpStream) -> String {
    let mut text = Vec::new();
    let _ = connection.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn told_to_end_it_ends_what_it_has_begun() {
    for name in ["TERM", "INT"] {
        let serving = Serving::start(&["--name", "mine"]);
        let mut running = BufReader::new(serving.begin(LONG));
        let mut line = String::new();
        while !line.starts_with("data: ") {
            line.clear();
            running.read_line(&mut line).expect("a chunk");
        }
        serving.signal(name);
        let mut rest = String::new();
        running.read_to_string(&mut rest).expect("all chunks");
        assert!(
            rest.contains("finish_reason\":\"") && rest.contains("[DONE]"),
            "{rest}"
        );
        assert_eq!(serving.wait(), Some(0), "{name}");
    }
}

#[test]
fn told_twice_it_ends_at_once() {
    let serving = Serving::start(&["--name", "mine", "--apart"]);
    let mut running = BufReader::new(serving.begin(LONG));
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        running.read_line(&mut line).expect("a chunk");
    }
    serving.signal("TERM");
    std::thread::sleep(Duration::from_millis(100));
    serving.signal("TERM");
    assert_eq!(serving.wait(), Some(1));
}

#[test]
fn it_answers_with_its_flags() {
    let serving = Serving::start(&[
        "--name",
        "mine",
        "--max-tokens",
        "3",
        "--routing",
        "pdrop@64",
    ]);
    let body = r#"{"messages": [{"role": "user", "content": "x"}], "trace": true}"#;
    let answer = read_all(serving.begin(body));
    assert!(
        answer.contains("\"model\":\"mine\"") && answer.contains("pdrop@64"),
        "{answer}"
    );
    let body = r#"{"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}"#;
    assert!(read_all(serving.begin(body)).starts_with("HTTP/1.1 400"));
    serving.signal("TERM");
    assert_eq!(serving.wait(), Some(0));
}

#[test]
fn what_cannot_be_served_is_refused() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    for flags in [
        &["--port", &port][..],
        &["--routing", "fastv@17"],
        &["--adapter", "nowhere"],
        &["--adapter", "mine=nowhere"],
        &["--allow-dir", "nowhere"],
        &["--model", "nowhere"],
        &["--max-tokens", "0"],
        &["--host", "everywhere"],
        &["--memory", "1000"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_reroute"))
            .args(
                ["serve", "--port", "0"][..]
                    .iter()
                    .take(if flags[0] == "--port" { 1 } else { 3 }),
            )
            .args(flags)
            .output()
            .expect("the program starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
        assert!(
            !said.is_empty() && !said.contains("panicked"),
            "{flags:?}: {said}"
        );
    }
}
