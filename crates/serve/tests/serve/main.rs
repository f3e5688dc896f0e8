//! The server over real connections, with the built-in model.

mod answers;
mod limits;
mod load;
mod models;
mod pictures;
mod refused;
mod schema;
mod security;
mod smuggling;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use burn_flex::Flex;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use reroute_serve::{Server, Settings};
use reroute_zoo::{DecodeLimits, OpenOptions, RgbImage, Vlm, decode, embedded};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

static VLM: LazyLock<Arc<Vlm<Flex>>> = LazyLock::new(|| {
    let (folder, options) = (embedded::checkpoint(), OpenOptions::default());
    Arc::new(Vlm::open(&folder, &options, &Default::default()).expect("the built-in model"))
});

/// Long enough for anything on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server, until it is dropped.
struct Running {
    address: SocketAddr,
    agent: ureq::Agent,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(settings: Settings) -> Self {
        Self::start_with(vec![("built-in".into(), VLM.clone())], settings)
    }

    fn start_with(models: Vec<(String, Arc<Vlm<Flex>>)>, settings: Settings) -> Self {
        let server = Server::new(models, settings).expect("good settings");
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().expect("threads");
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
                let address = listener.local_addr().expect("an address");
                tell.send(address).expect("somebody waits");
                let shutdown = async {
                    let _ = stopped.await;
                };
                server.run(listener, shutdown).await.expect("it runs");
            });
        });
        let agent = ureq::Agent::config_builder().http_status_as_error(false);
        let agent = agent.timeout_global(Some(PATIENCE)).build().new_agent();
        Self {
            address: told.recv().expect("it starts"),
            agent,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn get(&self, path: &str) -> (u16, String) {
        let mut response = self.agent.get(self.url(path)).call().expect("a response");
        let text = response.body_mut().read_to_string().expect("text");
        (response.status().as_u16(), text)
    }

    fn get_json(&self, path: &str) -> Value {
        let (status, text) = self.get(path);
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).expect("JSON")
    }

    /// Sends a body; the status and what comes.
    fn send(&self, body: &[u8]) -> (u16, String) {
        let request = self.agent.post(self.url("/v1/chat/completions"));
        let request = request.content_type("application/json");
        let mut response = request.send(body).expect("a response");
        let text = response.body_mut().read_to_string().expect("text");
        (response.status().as_u16(), text)
    }

    /// The answer to a good request.
    fn ask(&self, request: &Value) -> Value {
        let (status, text) = self.send(request.to_string().as_bytes());
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).expect("JSON")
    }

    /// What is wrong with a request: the status and OpenAI's error.
    fn refuse(&self, request: &Value) -> (u16, Value) {
        let (status, text) = self.send(request.to_string().as_bytes());
        refused(status, &text)
    }

    /// The chunks of a good request that streams.
    fn stream(&self, request: &Value) -> Vec<Value> {
        let mut request = request.clone();
        request["stream"] = true.into();
        let (status, text) = self.send(request.to_string().as_bytes());
        assert_eq!(status, 200, "{text}");
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        let mut data: Vec<&str> = data.collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        let chunks = data.into_iter().map(serde_json::from_str);
        chunks.collect::<Result<_, _>>().expect("JSON")
    }

    /// A number of the metrics, of the first line that begins so.
    fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics");
        let mut lines = text.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |number| number.trim().parse().expect("a number"))
    }

    /// Waits until the metrics say so.
    fn wait_for(&self, name: &str, is: impl Fn(f64) -> bool) {
        let started = Instant::now();
        while !is(self.metric(name)) {
            assert!(
                started.elapsed() < PATIENCE,
                "{name}: {}",
                self.metric(name)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A connection that a request was sent on, and that nobody reads.
    fn begin(&self, request: &Value) -> TcpStream {
        let mut connection = TcpStream::connect(self.address).expect("a connection");
        let body = request.to_string();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        connection.write_all(head.as_bytes()).expect("it is sent");
        connection.write_all(body.as_bytes()).expect("it is sent");
        connection
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.expect("it ran").expect("it ends well");
        }
    }
}

/// What is wrong, in OpenAI's shape.
fn refused(status: u16, text: &str) -> (u16, Value) {
    let error: Value = serde_json::from_str(text).expect("JSON");
    let error = error["error"].clone();
    for field in ["message", "type"] {
        assert!(error[field].is_string(), "{error}");
    }
    for field in ["param", "code"] {
        assert!(
            error[field].is_string() || error[field].is_null(),
            "{error}"
        );
    }
    (status, error)
}

fn scene() -> RgbImage {
    decode(embedded::SCENE.image, &DecodeLimits::default()).expect("a picture")
}

/// Pixels as a PNG file.
fn png(rgb: &[u8], width: usize, height: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let encoder = PngEncoder::new(&mut bytes);
    let (width, height) = (width as u32, height as u32);
    let encoded = encoder.write_image(rgb, width, height, ExtendedColorType::Rgb8);
    encoded.expect("a picture");
    bytes
}

/// A file as clients send it.
fn data_url(bytes: &[u8]) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(bytes))
}

fn image_part(url: &str) -> Value {
    json!({"type": "image_url", "image_url": {"url": url}})
}

/// A question about the scene.
fn about(text: &str) -> Value {
    let picture = image_part(&data_url(embedded::SCENE.image));
    json!({"messages": [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]})
}

fn text_of(response: &Value) -> &str {
    response["choices"][0]["message"]["content"]
        .as_str()
        .expect("a text")
}

fn read_all(mut connection: TcpStream) -> String {
    let mut text = Vec::new();
    let _ = connection.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}
