//! Who may ask, from which pages, and what is fetched for them.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpListener as Listener};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use reroute_serve::{Network, PublicNetwork};
use serde_json::json;

use super::*;

#[test]
fn without_the_key_nothing_but_the_page_and_health() {
    let server = Running::start(Settings {
        api_key: Some("sesame".into()),
        ..Settings::default()
    });
    let body = about("x").to_string();
    for (given, expected) in [
        (None, 401),
        (Some(""), 401),
        (Some("Bearer "), 401),
        (Some("Bearer sesam"), 401),
        (Some("Bearer sesamf"), 401),
        (Some("Bearer sesame2"), 401),
        (Some("Basic sesame"), 401),
        (Some("sesame"), 401),
        (Some("Bearer sesame"), 200),
        (Some("bearer sesame"), 200),
    ] {
        let mut request = server.agent.post(server.url("/v1/chat/completions"));
        request = request.content_type("application/json");
        if let Some(given) = given {
            let value = ureq::http::HeaderValue::from_bytes(given.as_bytes()).expect("a header");
            request = request.header("authorization", value);
        }
        let mut response = request.send(&body).expect("a response");
        let text = response.body_mut().read_to_string().expect("text");
        assert_eq!(response.status(), expected, "{given:?}: {text}");
        if expected == 401 {
            assert_eq!(refused(401, &text).1["code"], "invalid_api_key");
        }
    }
    for path in ["/v1/models", "/v1/routings", "/metrics"] {
        assert_eq!(server.get(path).0, 401, "{path}");
    }
    for path in ["/health", "/", "/page.js", "/style.css"] {
        assert_eq!(server.get(path).0, 200, "{path}");
    }
}

#[test]
fn without_a_key_a_server_answers_to_its_own_names_alone() {
    let asked = |server: &Running, host: &str| {
        let request = server
            .agent
            .get(server.url("/v1/models"))
            .header("host", host);
        request.call().expect("a response").status().as_u16()
    };
    let server = Running::start(Settings {
        hosts: vec!["models.example".into()],
        ..Settings::default()
    });
    for host in [
        "localhost",
        "LOCALHOST:8000",
        "a.localhost",
        "127.0.0.1:1",
        "[::1]:8000",
        "10.0.0.1",
        "models.example",
    ] {
        assert_eq!(asked(&server, host), 200, "{host}");
    }
    for host in [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
    ] {
        assert_eq!(asked(&server, host), 403, "{host}");
    }
    // Whoever is asked twice who it is meant for is meant by both.
    for (second, status) in [("127.0.0.1", "200"), ("evil.example", "403")] {
        let head = format!(
            "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: {second}\r\nConnection: close\r\n\r\n"
        );
        let mut connection = TcpStream::connect(server.address).expect("a connection");
        connection.write_all(head.as_bytes()).expect("it is sent");
        let mut response = String::new();
        connection
            .read_to_string(&mut response)
            .expect("a response");
        assert_eq!(response.split(' ').nth(1), Some(status), "{response}");
    }
}

#[test]
fn pages_of_other_origins_may_ask_where_they_are_allowed_to() {
    let preflight = |server: &Running, origin: &str| {
        let request = ureq::http::Request::options(server.url("/v1/chat/completions"))
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header(
                "access-control-request-headers",
                "authorization,content-type,x-stainless-lang",
            )
            .body(());
        let response = server
            .agent
            .run(request.expect("a request"))
            .expect("a response");
        let header = |name: &str| {
            let value = response.headers().get(name);
            value.map(|value| value.to_str().expect("text").to_owned())
        };
        let allowed = header("access-control-allow-origin");
        if allowed.is_some() {
            // What OpenAI's client in browsers sends.
            let headers = header("access-control-allow-headers").expect("headers");
            assert!(headers.contains("x-stainless-lang"), "{headers}");
        }
        allowed
    };
    let server = Running::start(Settings::default());
    assert_eq!(preflight(&server, "https://example.com"), None);
    let server = Running::start(Settings {
        cors: vec!["https://example.com".into()],
        api_key: Some("key".into()),
        ..Settings::default()
    });
    let allowed = Some("https://example.com".to_string());
    assert_eq!(preflight(&server, "https://example.com"), allowed);
    assert_eq!(preflight(&server, "https://example.org"), None);
    for never in ["example.com", "", "https://example.com/", "https://a@b"] {
        let settings = Settings {
            cors: vec![never.into()],
            ..Settings::default()
        };
        let models = vec![("built-in".into(), VLM.clone())];
        let error = Server::new(models, settings).expect_err("no origin");
        assert!(error.to_string().contains("an origin is"), "{error}");
    }
}

/// Names of our own; one address of this machine stands for the internet.
#[derive(Debug, Default)]
struct Names {
    names: HashMap<&'static str, Vec<IpAddr>>,
    /// A name that leads elsewhere each time that it is asked for.
    turns: Mutex<Vec<IpAddr>>,
    asked: AtomicUsize,
}

const PUBLIC: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 1));
const PRIVATE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));

impl Network for Names {
    fn look_up(&self, host: &str) -> io::Result<Vec<SocketAddr>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let (name, port) = host.rsplit_once(':').expect("a port");
        let port = port.parse().expect("a port");
        let literal = name.trim_start_matches('[').trim_end_matches(']');
        let addresses = match (name, literal.parse()) {
            (_, Ok(address)) => vec![address],
            ("turning.example", _) => vec![self.turns.lock().expect("whole").remove(0)],
            _ => self.names.get(name).cloned().unwrap_or_default(),
        };
        Ok(addresses
            .into_iter()
            .map(|address| SocketAddr::new(address, port))
            .collect())
    }

    fn is_open(&self, address: IpAddr) -> bool {
        address == PUBLIC
    }
}

/// Answers every path of a web server, each connection once, and counts them.
fn web(listener: Listener, port: u16, hits: Arc<AtomicUsize>) {
    for connection in listener.incoming() {
        let mut connection = connection.expect("a connection");
        let mut head = [0; 2048];
        let read = connection.read(&mut head).unwrap_or(0);
        hits.fetch_add(1, Ordering::Relaxed);
        let head = String::from_utf8_lossy(&head[..read]);
        let path = head.split(' ').nth(1).unwrap_or_default();
        let redirect = |to: String| {
            format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n")
                .into_bytes()
        };
        let answer = match path {
            "/scene.png" => {
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
                    embedded::SCENE.image.len()
                );
                [head.as_bytes(), embedded::SCENE.image].concat()
            }
            "/there" => redirect("/scene.png".into()),
            "/private" => redirect(format!("http://127.0.0.2:{port}/scene.png")),
            "/mapped" => redirect(format!("http://[::ffff:127.0.0.2]:{port}/scene.png")),
            "/by-name" => redirect(format!("http://private.example:{port}/scene.png")),
            "/file" => redirect("file:///etc/passwd".into()),
            "/loop" => redirect("/loop".into()),
            "/turning" => redirect(format!("http://turning.example:{port}/scene.png")),
            "/large" => {
                let head = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n".to_vec();
                [head, vec![0; 3 << 20]].concat()
            }
            "/endless" => {
                let chunk = [&b"100000\r\n"[..], &vec![0; 1 << 20], b"\r\n"].concat();
                let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                let _ = connection.write_all(head);
                while connection.write_all(&chunk).is_ok() {}
                Vec::new()
            }
            _ => b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec(),
        };
        let _ = connection.write_all(&answer);
    }
}

#[test]
fn pictures_are_fetched_from_public_addresses_alone() {
    let hits = [Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0))];
    let public = Listener::bind("127.0.0.1:0").expect("a port");
    let port = public.local_addr().expect("an address").port();
    let private = Listener::bind(("127.0.0.2", port)).expect("the same port");
    for (listener, hits) in [public, private].into_iter().zip(hits.clone()) {
        std::thread::spawn(move || web(listener, port, hits));
    }
    let names = Arc::new(Names {
        names: HashMap::from([
            ("pictures.example", vec![PUBLIC]),
            ("private.example", vec![PRIVATE]),
            ("both.example", vec![PUBLIC, PRIVATE]),
        ]),
        turns: Mutex::new(vec![PRIVATE, PUBLIC, PRIVATE]),
        asked: AtomicUsize::new(0),
    });
    let mut settings = Settings {
        network: Some(names.clone()),
        ..Settings::default()
    };
    settings.limits.body_bytes = 2 << 20;
    let server = Running::start(settings);
    let asking = |url: &str| {
        let part = image_part(url);
        json!({"messages": [{"role": "user", "content": [part, {"type": "text", "text": "x"}]}]})
    };
    let at = |path: &str| asking(&format!("http://pictures.example:{port}{path}"));
    let expected = server.ask(&about("x"));
    for path in ["/scene.png", "/there"] {
        assert_eq!(
            text_of(&server.ask(&at(path))),
            text_of(&expected),
            "{path}"
        );
    }
    let not_public = |request: &Value| {
        let (status, error) = server.refuse(request);
        assert_eq!(status, 400, "{error}");
        let message = error["message"].as_str().expect("a text");
        assert!(message.contains("not public"), "{request}: {message}");
        assert_eq!(error["param"], "messages[0].content[0].image_url.url");
    };
    for path in ["/private", "/mapped", "/by-name"] {
        not_public(&at(path));
    }
    for host in [
        "private.example",
        "both.example",
        "127.0.0.2",
        "[::ffff:127.0.0.2]",
        "turning.example",
    ] {
        not_public(&asking(&format!("http://{host}:{port}/scene.png")));
    }
    // It leads to a good address now, and is not asked again before it is connected to.
    let asked = names.asked.load(Ordering::Relaxed);
    let turning = asking(&format!("http://turning.example:{port}/scene.png"));
    assert_eq!(text_of(&server.ask(&turning)), text_of(&expected));
    assert_eq!(names.asked.load(Ordering::Relaxed), asked + 1);
    not_public(&at("/turning"));
    for (path, word) in [
        ("/nothing", "404"),
        ("/loop", "redirects"),
        ("/large", "larger"),
        ("/endless", "larger"),
        ("/file", "fetched"),
    ] {
        let (status, error) = server.refuse(&at(path));
        let message = error["message"].as_str().expect("a text").to_owned();
        assert!(status == 400 && message.contains(word), "{path}: {message}");
    }
    assert_eq!(
        hits[1].load(Ordering::Relaxed),
        0,
        "nobody came to the private address"
    );
}

#[test]
fn this_machine_is_not_public() {
    let server = Running::start(Settings {
        network: Some(Arc::new(PublicNetwork)),
        ..Settings::default()
    });
    let port = server.address.port();
    for host in [
        "localhost",
        "127.0.0.1",
        "[::1]",
        "0.0.0.0",
        "127.1",
        "2130706433",
        "0x7f.1",
        "169.254.169.254",
    ] {
        let url = format!("http://{host}:{port}/example.png");
        let request = json!({"messages": [{"role": "user", "content": [image_part(&url)]}]});
        let (status, error) = server.refuse(&request);
        assert_eq!(status, 400, "{host}: {error}");
        assert!(
            error["message"]
                .as_str()
                .expect("a text")
                .contains("not public"),
            "{host}: {error}"
        );
    }
}
