//! What is too much, too many or too long, and what becomes of those who go.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use reroute_serve::Limits;
use reroute_zoo::session::MemoryLimit;
use serde_json::json;

use super::*;

/// Limits of a server that takes its time.
fn limited(limits: Limits) -> Settings {
    Settings {
        limits,
        apart: true,
        ..Settings::default()
    }
}

#[test]
fn bodies_texts_and_pictures_have_limits() {
    let server = Running::start(limited(Limits {
        body_bytes: 100_000,
        text_bytes: 1000,
        pictures: 2,
        pixels: 3 * 96 * 96,
        ..Limits::default()
    }));
    let large = vec![b' '; 3_000_000];
    let (status, text) = server.send(&large);
    assert_eq!(refused(status, &text).0, 413);
    // One that is announced need not come.
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100001\r\n\r\n";
    let mut connection = TcpStream::connect(server.address).expect("a connection");
    connection.write_all(head.as_bytes()).expect("it is sent");
    let mut line = String::new();
    let read = BufReader::new(&connection).read_line(&mut line);
    read.expect("a response");
    assert!(line.starts_with("HTTP/1.1 413"), "{line}");
    let (status, error) =
        server.refuse(&json!({"messages": [{"role": "user", "content": "x".repeat(1001)}]}));
    assert_eq!((status, &error["param"]), (400, &json!("messages")));
    let picture = image_part(&data_url(embedded::SCENE.image));
    let several = |count| json!({"messages": [{"role": "user", "content": vec![picture.clone(); count]}], "max_tokens": 1});
    server.ask(&several(2));
    assert_eq!(server.refuse(&several(3)).0, 400);
    // Few bytes that would become many pixels.
    for (width, height) in [(200, 200), (2000, 1000)] {
        let bomb = png(&vec![0; width * height * 3], width, height);
        assert!(bomb.len() < 50_000);
        let request =
            json!({"messages": [{"role": "user", "content": [image_part(&data_url(&bomb))]}]});
        let (status, error) = server.refuse(&request);
        assert_eq!(status, 400);
        assert!(
            error["message"]
                .as_str()
                .expect("a text")
                .contains("pixels"),
            "{error}"
        );
    }
    server.wait_for("reroute_inbox_bytes", |bytes| bytes == 0.0);
}

#[test]
fn all_requests_share_the_memory_for_pictures() {
    let bytes = (scene().data().len() * 2) as u64;
    let server = Running::start(limited(Limits {
        inbox_bytes: bytes,
        ..Limits::default()
    }));
    server.ask(&about("x"));
    let picture = image_part(&data_url(embedded::SCENE.image));
    let many = json!({"messages": [{"role": "user", "content": vec![picture; 3]}]});
    let (status, error) = server.refuse(&many);
    assert_eq!(
        (status, &error["code"]),
        (429, &json!("rate_limit_exceeded"))
    );
    server.ask(&about("x"));
}

#[test]
fn a_full_queue_answers_429_and_who_goes_makes_room() {
    let server = Running::start(limited(Limits {
        queue: 1,
        answers: 8,
        tokens: 100_000,
        ..Limits::default()
    }));
    // Nine places: one of them runs.
    let runners: Vec<_> = (0..9).map(|_| server.begin(&endless())).collect();
    server.wait_for("reroute_requests_under_way", |count| count == 9.0);
    for _ in 0..3 {
        let request = server.agent.post(server.url("/v1/chat/completions"));
        let request = request.content_type("application/json");
        let mut response = request.send(about("x").to_string()).expect("a response");
        assert_eq!(response.status(), 429);
        assert!(response.headers().contains_key("retry-after"));
        let (_, error) = refused(429, &response.body_mut().read_to_string().expect("text"));
        assert_eq!(error["type"], "rate_limit_error");
    }
    assert!(server.metric("reroute_requests_total{outcome=\"busy\"}") == 3.0);
    drop(runners);
    server.wait_for("reroute_requests_total{outcome=\"cancelled\"}", |count| {
        count == 9.0
    });
    // A place is free once the session has seen that nobody waits: between two steps.
    server.wait_for("reroute_queue_length{model=\"built-in\"}", |count| {
        count == 0.0
    });
    server.wait_for("reroute_running_answers{model=\"built-in\"}", |count| {
        count == 0.0
    });
    server.ask(&about("x"));
}

/// A request that goes on for seconds, if nobody ends it: sampling that hot hardly ends by itself, and takes all
/// places of answers.
fn endless() -> Value {
    json!({
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 50.0, "seed": 5, "max_tokens": 100_000, "n": 8, "stream": true,
    })
}

#[test]
fn who_goes_is_cancelled_while_waiting_and_while_answered() {
    let server = Running::start(limited(Limits {
        queue: 4,
        answers: 8,
        tokens: 100_000,
        ..Limits::default()
    }));
    let mut first = BufReader::new(server.begin(&endless()));
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        first.read_line(&mut line).expect("a chunk");
    }
    let mut whole = endless();
    whole["stream"] = false.into();
    let waiting = [server.begin(&endless()), server.begin(&whole)];
    server.wait_for("reroute_requests_under_way", |count| count == 3.0);
    drop(waiting);
    server.wait_for("reroute_requests_total{outcome=\"cancelled\"}", |count| {
        count == 2.0
    });
    assert_eq!(server.metric("reroute_requests_under_way"), 1.0);
    drop(first);
    server.wait_for("reroute_requests_total{outcome=\"cancelled\"}", |count| {
        count == 3.0
    });
    server.wait_for("reroute_running_answers{model=\"built-in\"}", |count| {
        count == 0.0
    });
}

/// As many as there may be, whose answers fill every buffer on the way.
#[test]
fn who_reads_nothing_does_not_hold_a_connection() {
    let server = Running::start(limited(Limits {
        silence: Duration::from_secs(1),
        connections: 2,
        ..Limits::default()
    }));
    let asked = "GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(4000);
    let deaf: Vec<TcpStream> = (0..2)
        .map(|_| {
            let mut stream = TcpStream::connect(server.address).expect("a connection");
            let time = Some(Duration::from_millis(500));
            stream.set_write_timeout(time).expect("a time");
            // The server reads no more when it cannot write.
            let _ = stream.write_all(asked.as_bytes());
            stream
        })
        .collect();
    // In its turn, when those are gone.
    assert_eq!(server.get("/health").0, 200);
    drop(deaf);
}

#[test]
fn a_request_has_its_time() {
    let server = Running::start(limited(Limits {
        time: Duration::from_millis(500),
        tokens: 100_000,
        ..Limits::default()
    }));
    let mut request = endless();
    request["stream"] = false.into();
    let (status, error) = server.refuse(&request);
    assert_eq!((status, &error["code"]), (504, &json!("timeout")));
    let (status, text) = server.send(endless().to_string().as_bytes());
    assert_eq!(status, 200);
    let mut data = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .rev();
    assert_eq!(data.next(), Some("[DONE]"));
    let last: Value = serde_json::from_str(data.next().expect("an error")).expect("JSON");
    assert_eq!(last["error"]["code"], "timeout");
    // One who reads nothing holds a place no longer than others.
    let silent = server.begin(&endless());
    server.wait_for("reroute_requests_total{outcome=\"timeout\"}", |count| {
        count == 3.0
    });
    server.wait_for("reroute_requests_under_way", |count| count == 0.0);
    drop(silent);
    // Nor one who sends half a body.
    let mut half = std::net::TcpStream::connect(server.address).expect("a connection");
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{";
    half.write_all(head.as_bytes()).expect("it is sent");
    assert!(read_all(half).starts_with("HTTP/1.1 504"));
}

#[test]
fn what_would_not_fit_into_memory_is_refused() {
    let weights = reroute_zoo::burn::module::Module::num_params(VLM.model()) as u64 * 4;
    let mut settings = Settings {
        cache_bytes: 0,
        memory: Some(MemoryLimit {
            bytes: weights + (24 << 20),
            arithmetic: None,
        }),
        ..Settings::default()
    };
    settings.limits.tokens = 1_000_000;
    let server = Running::start(settings);
    server.ask(&about("x"));
    let mut request = about("x");
    (request["max_tokens"], request["n"]) = (1_000_000.into(), 8.into());
    let (status, error) = server.refuse(&request);
    assert_eq!(status, 400, "{error}");
    assert!(
        error["message"].as_str().expect("a text").contains("MiB"),
        "{error}"
    );
}

#[test]
fn what_runs_when_the_server_is_to_end_has_the_grace_time() {
    for (grace, ends_well) in [
        (Duration::from_secs(60), true),
        (Duration::from_millis(300), false),
    ] {
        let mut settings = limited(Limits {
            tokens: 100_000,
            ..Limits::default()
        });
        settings.grace = grace;
        let mut server = Running::start(settings);
        let mut request = endless();
        request["max_tokens"] = if ends_well {
            400.into()
        } else {
            100_000.into()
        };
        let running = server.begin(&request);
        server.wait_for("reroute_generated_tokens_total", |count| count > 0.0);
        drop(server.stop.take());
        // Those who come now are told so, as long as something runs.
        let mut told = false;
        while let Ok(mut response) = server.agent.get(server.url("/health")).call() {
            if response.status() == 503 {
                told = true;
                let text = response.body_mut().read_to_string().expect("text");
                assert_eq!(refused(503, &text).1["code"], "shutting_down");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(told);
        let text = read_all(running);
        assert!(text.contains("data: [DONE]"), "{text}");
        assert_eq!(text.contains("shutting_down"), !ends_well, "{grace:?}");
    }
}
