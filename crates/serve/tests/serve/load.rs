//! Hundreds of requests at random times, some of whose clients go: every answer that is completed is the one that
//! the same request gets alone. `REROUTE_SOAK=10000` says how many; a few without it.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use super::*;

const REQUESTS: usize = 240;
const CLIENTS: usize = 12;
const ROUTINGS: [&str; 5] = [
    "dense",
    "pdrop@64",
    "reroute-pdrop@64",
    "reroute-pdrop@192",
    "visionzip@64",
];
const TEXTS: [&str; 4] = [
    "find the cross",
    "find the large cyan square",
    "x",
    "How many rings are there?",
];

/// A request of a few numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Drawn {
    pictures: usize,
    first: usize,
    text: usize,
    routing: usize,
    tokens: usize,
    /// Greedy without.
    seed: Option<u64>,
    n: usize,
    system: bool,
}

impl Drawn {
    fn random(random: &mut StdRng) -> Self {
        Self {
            pictures: random.random_range(0..3),
            first: random.random_range(0..3),
            text: random.random_range(0..TEXTS.len()),
            routing: random.random_range(0..ROUTINGS.len()),
            tokens: random.random_range(1..20),
            seed: random.random_bool(0.3).then(|| random.random_range(0..3)),
            n: if random.random_bool(0.1) { 2 } else { 1 },
            system: random.random_bool(0.2),
        }
    }

    fn request(self, pictures: &[String]) -> Value {
        let shown =
            (0..self.pictures).map(|at| image_part(&pictures[(self.first + at) % pictures.len()]));
        let text = json!({"type": "text", "text": TEXTS[self.text]});
        let content: Vec<Value> = shown.chain([text]).collect();
        let mut messages = vec![json!({"role": "user", "content": content})];
        if self.system {
            messages.insert(0, json!({"role": "system", "content": "in short"}));
        }
        let mut request = json!({
            "messages": messages, "routing": ROUTINGS[self.routing], "max_tokens": self.tokens, "n": self.n,
        });
        if let Some(seed) = self.seed {
            (request["temperature"], request["seed"]) = (1.5.into(), seed.into());
        }
        request
    }
}

fn texts(response: &Value) -> Vec<String> {
    let choices = response["choices"].as_array().expect("a list");
    let text = |choice: &Value| {
        choice["message"]["content"]
            .as_str()
            .expect("a text")
            .to_owned()
    };
    choices.iter().map(text).collect()
}

fn of_chunks(chunks: &[Value], n: usize) -> Vec<String> {
    let mut texts = vec![String::new(); n];
    for choice in chunks
        .iter()
        .flat_map(|chunk| chunk["choices"].as_array().expect("a list"))
    {
        let index = choice["index"].as_u64().expect("a number") as usize;
        texts[index] += choice["delta"]["content"].as_str().unwrap_or_default();
    }
    texts
}

#[test]
fn under_load_no_answer_differs() {
    let requests = std::env::var("REROUTE_SOAK").ok();
    let requests = requests
        .and_then(|count| count.parse().ok())
        .unwrap_or(REQUESTS);
    let mut settings = Settings {
        cache_bytes: 1 << 20,
        ..Settings::default()
    };
    settings.limits.answers = 6;
    let server = Running::start(settings);
    // One that computes each as if it were alone, and keeps nothing.
    let alone = Running::start(Settings {
        cache_bytes: 0,
        apart: true,
        ..Settings::default()
    });
    let scene = scene();
    let (width, height) = (scene.width(), scene.height());
    let mirrored: Vec<u8> = scene.data().chunks(3).rev().flatten().copied().collect();
    let half = &scene.data()[..scene.data().len() / 2];
    let pictures = [
        data_url(embedded::SCENE.image),
        data_url(&png(&mirrored, width, height)),
        data_url(&png(half, width, height / 2)),
    ];
    let known: Mutex<HashMap<Drawn, Vec<String>>> = Mutex::default();
    let (next, compared, gone) = (
        AtomicUsize::new(0),
        AtomicUsize::new(0),
        AtomicUsize::new(0),
    );
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (server, alone, pictures, known) = (&server, &alone, &pictures, &known);
            let (next, compared, gone) = (&next, &compared, &gone);
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(client as u64);
                while next.fetch_add(1, Ordering::Relaxed) < requests {
                    std::thread::sleep(Duration::from_millis(random.random_range(0..40)));
                    let drawn = Drawn::random(&mut random);
                    let request = drawn.request(pictures);
                    if random.random_bool(0.15) {
                        let mut request = request;
                        request["stream"] = random.random_bool(0.5).into();
                        let connection = server.begin(&request);
                        std::thread::sleep(Duration::from_millis(random.random_range(0..60)));
                        drop(connection);
                        gone.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    let found = match random.random_bool(0.5) {
                        true => of_chunks(&server.stream(&request), drawn.n),
                        false => texts(&server.ask(&request)),
                    };
                    let expected = known.lock().expect("whole").get(&drawn).cloned();
                    let expected = expected.unwrap_or_else(|| texts(&alone.ask(&request)));
                    assert_eq!(found, expected, "{drawn:?}");
                    known.lock().expect("whole").insert(drawn, expected);
                    compared.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let (compared, gone) = (compared.into_inner(), gone.into_inner());
    assert_eq!(compared + gone, requests);
    assert!(gone * 20 > requests, "{gone} have gone");
    // Nothing is left of anybody.
    server.wait_for("reroute_requests_under_way", |count| count == 0.0);
    server.wait_for("reroute_running_answers{model=\"built-in\"}", |count| {
        count == 0.0
    });
    server.wait_for("reroute_inbox_bytes", |bytes| bytes == 0.0);
}
