//! Thousands of random requests in one process, with cancels and faults: no answer differs from the same
//! request alone, and no memory is lost. `REROUTE_SOAK=10000` says how many; a few without it.
#![cfg(feature = "embedded")]

use std::collections::HashMap;
use std::sync::Arc;

use burn::tensor::Tensor;
use burn_flex::Flex;
use peak_alloc::PeakAlloc;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use reducers::{DecisionView, ReducerError, Scorer, presets};
use reroute_zoo::messages::Role;
use reroute_zoo::session::{Event, Part, Request, RequestId, Session, SessionOptions, Turn};
use reroute_zoo::{
    Answer, DecodeLimits, OpenOptions, RgbImage, Routing, Vlm, ZooError, decode, embedded,
};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// Requests without [`REROUTE_SOAK`](self).
const REQUESTS: usize = 150;
/// Requests at once.
const AT_ONCE: usize = 6;
const ROUTINGS: [&str; 4] = ["dense", "pdrop@64", "reroute-pdrop@64", "visionzip@64"];
const TEXTS: [&str; 3] = ["find the cross", "find the large cyan square", "x"];
const PHASES: usize = 5;
/// What may be in use at the end beyond what was after the first phase: caches that had not been full.
const GROWTH: usize = 1 << 20;

/// Scores that are no numbers.
struct Nan;

impl Scorer<Flex> for Nan {
    fn score(&self, view: &dyn DecisionView<Flex>) -> Result<Tensor<Flex, 1>, ReducerError> {
        let device = view.hidden_states().device();
        Ok(Tensor::full([view.rows()], f32::NAN, &device))
    }
}

/// A request of a few numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Drawn {
    picture: Option<usize>,
    text: usize,
    routing: usize,
    tokens: usize,
    seed: Option<u64>,
}

struct Soak<'v> {
    vlm: &'v Vlm<Flex>,
    pictures: [RgbImage; 2],
    known: HashMap<Drawn, Answer>,
}

impl<'v> Soak<'v> {
    fn draw(&self, random: &mut StdRng) -> Drawn {
        Drawn {
            picture: random.random_bool(0.8).then(|| random.random_range(0..2)),
            text: random.random_range(0..TEXTS.len()),
            routing: random.random_range(0..ROUTINGS.len()),
            tokens: random.random_range(0..10),
            seed: random.random_bool(0.3).then(|| random.random_range(0..3)),
        }
    }

    fn request(&self, drawn: Drawn) -> Request<'v, Flex> {
        let encoder = self.vlm.config().encoder();
        let layers = self.vlm.config().decoder().num_layers;
        let preset = presets::find(ROUTINGS[drawn.routing]).expect("a preset");
        let mut options = self.vlm.generation_defaults();
        options.max_new_tokens = drawn.tokens;
        if let Some(seed) = drawn.seed {
            (options.sampling.temperature, options.sampling.seed) = (1.5, seed);
        }
        let picture = drawn
            .picture
            .map(|at| Part::from(self.pictures[at].clone()));
        let turn = Turn {
            role: Role::User,
            parts: picture
                .into_iter()
                .chain([TEXTS[drawn.text].into()])
                .collect(),
        };
        let plan = preset.plan(layers, &encoder).expect("deep enough");
        Request::new(vec![turn], plan, options)
    }

    /// The answer to a request alone.
    fn expected(&mut self, drawn: Drawn) -> Answer {
        if let Some(answer) = self.known.get(&drawn) {
            return answer.clone();
        }
        let options = SessionOptions {
            cache_bytes: 0,
            ..Default::default()
        };
        let mut session = Session::new(self.vlm, options).expect("a session");
        session.admit(self.request(drawn)).expect("a good request");
        let mut answer = None;
        while !session.is_idle() {
            for event in session.step() {
                if let Event::Finished { answer: found, .. } = event {
                    answer = Some(*found);
                }
            }
        }
        let answer = answer.expect("an answer");
        self.known.insert(drawn, answer.clone());
        answer
    }

    /// A request that fails: at once, or when it is prefilled.
    fn fault(&self, session: &mut Session<'v, Flex>, kind: u32) -> Option<RequestId> {
        let drawn = Drawn {
            picture: Some(0),
            text: 0,
            routing: 2,
            tokens: 4,
            seed: None,
        };
        let mut request = self.request(drawn);
        match kind {
            0 => {
                request.routing = Routing {
                    scorer: Some(Arc::new(Nan)),
                    ..request.routing
                }
            }
            1 => request
                .turns
                .push(Turn::text(Role::User, "x ".repeat(5000))),
            2 => request.options.sampling.temperature = f32::NAN,
            _ => request.answers = 0,
        }
        session.admit(request).ok()
    }
}

#[test]
fn memory_is_flat_and_no_answer_differs() {
    let requests = std::env::var("REROUTE_SOAK").ok();
    let requests = requests
        .and_then(|count| count.parse().ok())
        .unwrap_or(REQUESTS);
    let folder = embedded::checkpoint();
    let vlm = Vlm::<Flex>::open(&folder, &OpenOptions::default(), &Default::default());
    let vlm = vlm.expect("it is built in");
    let scene = decode(embedded::SCENE.image, &DecodeLimits::default()).expect("a picture");
    let (width, height) = (scene.width(), scene.height());
    let mirrored = scene.data().chunks(3).rev().flatten().copied().collect();
    let mirrored = RgbImage::new(width, height, mirrored).expect("a picture");
    let mut soak = Soak {
        vlm: &vlm,
        pictures: [scene, mirrored],
        known: HashMap::new(),
    };
    let options = SessionOptions {
        cache_bytes: 1 << 20,
        layers_per_step: 3,
        ..Default::default()
    };
    let mut session = Session::new(&vlm, options).expect("a session");
    let mut random = StdRng::seed_from_u64(7);
    let mut running: HashMap<RequestId, Option<Drawn>> = HashMap::new();
    let (mut admitted, mut compared, mut cancelled, mut failed) = (0, 0, 0, 0);
    let mut in_use = Vec::new();
    for phase in 1..=PHASES {
        let until = requests * phase / PHASES;
        while admitted < until || !session.is_idle() {
            while admitted < until && running.len() < AT_ONCE {
                admitted += 1;
                if random.random_bool(0.1) {
                    let kind = random.random_range(0..4);
                    match soak.fault(&mut session, kind) {
                        Some(id) => drop(running.insert(id, None)),
                        None => failed += 1,
                    }
                    continue;
                }
                let drawn = soak.draw(&mut random);
                let id = session.admit(soak.request(drawn)).expect("a good request");
                running.insert(id, Some(drawn));
            }
            if random.random_bool(0.05)
                && let Some(&id) = running.keys().min()
            {
                session.cancel(id);
                running.remove(&id);
                cancelled += 1;
            }
            for event in session.step() {
                match event {
                    Event::Finished { id, answer, .. } => {
                        let drawn = running.remove(&id).flatten().expect("a good request");
                        let expected = soak.expected(drawn);
                        assert_eq!(answer.tokens, expected.tokens);
                        assert_eq!(answer.text, expected.text);
                        compared += 1;
                    }
                    Event::Failed { id, error } => {
                        assert_eq!(running.remove(&id), Some(None), "{error}");
                        assert!(!matches!(error, ZooError::Session { .. }), "{error}");
                        failed += 1;
                    }
                    _ => {}
                }
            }
        }
        assert!(running.is_empty());
        // What is known to compare with is not the session's.
        soak.known = HashMap::new();
        in_use.push(HEAP.current_usage());
    }
    println!("{requests} requests: {compared} compared, {cancelled} cancelled, {failed} failed");
    println!("bytes in use after each fifth: {in_use:?}");
    assert!(compared > requests / 2 && failed > 0 && cancelled > 0);
    let [first, .., last] = in_use[..] else {
        unreachable!("there are phases");
    };
    assert!(last <= first + GROWTH, "{in_use:?}");
}
