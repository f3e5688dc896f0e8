//! Requests that come and go in a running batch: each gets the answer that it would get alone.

mod life;

use std::collections::HashMap;
use std::sync::Arc;

use burn::tensor::DType;
use burn::tensor::Tensor;
use proptest::prelude::*;
use reducers::{DecisionView, Plan, ReducerError, Scorer, presets};
use reroute::{FinishReason, GenerationOptions, RerouteError};
use reroute_cli::backend::{self, Backend};
use reroute_zoo::messages::Role;
use reroute_zoo::session::{Event, Part, Request, RequestId, Session, SessionOptions, Turn};
use reroute_zoo::{Answer, OpenOptions, Routing, Vlm, ZooError, embedded};

use crate::program::{BUILT_IN, read_image, scene};

/// A user's turn about scenes.
fn turn(scenes: &[&str], text: &str) -> Turn {
    let images = scenes.iter().map(|name| read_image(&scene(name)));
    let images = images.map(Part::from);
    Turn {
        role: Role::User,
        parts: images.chain([text.into()]).collect(),
    }
}

fn plan(name: &str) -> Plan {
    let (layers, encoder) = (
        BUILT_IN.config().decoder().num_layers,
        BUILT_IN.config().encoder(),
    );
    let preset = presets::find(name).expect("a preset");
    preset.plan(layers, &encoder).expect("deep enough")
}

fn options(tokens: usize) -> GenerationOptions {
    GenerationOptions {
        max_new_tokens: tokens,
        ..BUILT_IN.generation_defaults()
    }
}

fn request(turn: Turn, routing: &str, tokens: usize) -> Request<'static, Backend> {
    Request::new(vec![turn], plan(routing), options(tokens))
}

fn session(options: SessionOptions) -> Session<'static, Backend> {
    Session::new(&BUILT_IN, options).expect("it fits")
}

/// What has become of requests.
#[derive(Default)]
struct Outcome {
    /// Answers by request and index.
    answers: HashMap<(RequestId, usize), Answer>,
    texts: HashMap<(RequestId, usize), String>,
    failed: HashMap<RequestId, ZooError>,
}

impl Outcome {
    fn take(&mut self, events: Vec<Event<Backend>>) {
        for event in events {
            match event {
                Event::Token {
                    id, index, text, ..
                } => self.texts.entry((id, index)).or_default().push_str(&text),
                Event::Finished {
                    id, index, answer, ..
                } => drop(self.answers.insert((id, index), *answer)),
                Event::Failed { id, error } => drop(self.failed.insert(id, error)),
                _ => {}
            }
        }
    }
}

fn run(session: &mut Session<'_, Backend>) -> Outcome {
    let mut outcome = Outcome::default();
    while !session.is_idle() {
        outcome.take(session.step());
    }
    outcome
}

/// The answer to a request alone, in a session of its own that knows nothing.
fn alone(request: Request<'static, Backend>) -> Vec<Answer> {
    let mut session = session(SessionOptions {
        cache_bytes: 0,
        ..Default::default()
    });
    let (answers, id) = (
        request.answers,
        session.admit(request).expect("a good request"),
    );
    let mut outcome = run(&mut session);
    let answer = |index| outcome.answers.remove(&(id, index)).expect("an answer");
    (0..answers).map(answer).collect()
}

const SCENES: [&str; 4] = ["031", "063", "078", "145"];
const TEXTS: [&str; 4] = [
    "find the cross",
    "find the large cyan square",
    "find the shape nearest the cyan diamond",
    "x",
];
const ROUTINGS: [&str; 6] = [
    "dense",
    "fastv@64",
    "pdrop@64",
    "reroute-fastv@64",
    "reroute-pdrop@128",
    "visionzip@64",
];

/// A request of a few numbers.
#[derive(Debug, Clone)]
struct Drawn {
    scenes: Vec<usize>,
    text: usize,
    routing: usize,
    tokens: usize,
    seed: Option<u64>,
    answers: usize,
    /// Steps until it comes, and until it is cancelled.
    arrives: usize,
    cancelled: Option<usize>,
}

impl Drawn {
    fn request(&self) -> Request<'static, Backend> {
        let scenes: Vec<&str> = self.scenes.iter().map(|&scene| SCENES[scene]).collect();
        let turn = turn(&scenes, TEXTS[self.text]);
        let mut request = request(turn, ROUTINGS[self.routing], self.tokens);
        request.answers = self.answers;
        if let Some(seed) = self.seed {
            request.options.sampling.temperature = 1.5;
            request.options.sampling.seed = seed;
        }
        request
    }
}

fn drawn() -> impl Strategy<Value = Drawn> {
    (
        prop::collection::vec(0..SCENES.len(), 0..3),
        (0..TEXTS.len(), 0..ROUTINGS.len()),
        0..12_usize,
        prop::option::of(0..9_u64),
        1..4_usize,
        (0..24_usize, prop::option::weighted(0.3, 0..12_usize)),
    )
        .prop_map(
            |(scenes, (text, routing), tokens, seed, answers, (arrives, cancelled))| Drawn {
                scenes,
                text,
                routing,
                tokens,
                seed,
                answers,
                arrives,
                cancelled,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// In f32 every answer equals the same request alone, whoever else comes, goes or is cancelled, and
    /// whatever is known from before.
    #[test]
    fn an_answer_does_not_depend_on_the_others(
        all in prop::collection::vec(drawn(), 1..7),
        cache_bytes in prop::sample::select(vec![0, 1 << 20, 64 << 20]),
        layers_per_step in 1..4_usize,
        apart in any::<bool>(),
    ) {
        let mut session = session(SessionOptions {
            cache_bytes,
            layers_per_step,
            apart,
            max_answers: 6,
            ..Default::default()
        });
        let mut ids = vec![None; all.len()];
        let mut outcome = Outcome::default();
        for step in 0.. {
            for (drawn, id) in all.iter().zip(&mut ids) {
                if drawn.arrives == step {
                    *id = Some(session.admit(drawn.request()).expect("a good request"));
                }
                if let (Some(id), Some(after)) = (*id, drawn.cancelled)
                    && step == drawn.arrives + after
                {
                    session.cancel(id);
                }
            }
            outcome.take(session.step());
            if step > 36 && session.is_idle() {
                break;
            }
        }
        prop_assert!(outcome.failed.is_empty());
        for (drawn, id) in all.iter().zip(ids) {
            let id = id.expect("it came");
            let expected = alone(drawn.request());
            for (index, expected) in expected.into_iter().enumerate() {
                let text = outcome.texts.get(&(id, index)).map_or("", String::as_str);
                match outcome.answers.get(&(id, index)) {
                    Some(found) => {
                        prop_assert_eq!(&found.tokens, &expected.tokens);
                        prop_assert_eq!((&found.text, found.finish), (&expected.text, expected.finish));
                        prop_assert_eq!(text, &expected.text);
                    }
                    None => {
                        prop_assert!(drawn.cancelled.is_some());
                        prop_assert!(expected.text.starts_with(text));
                    }
                }
            }
        }
        prop_assert_eq!(session.load(), (0, 0));
        prop_assert!(session.bytes() <= 2 * cache_bytes);
    }
}

/// In every type the backend has, answers that are computed apart are those of requests alone, to the last
/// bit of every probability.
#[test]
fn apart_no_bit_depends_on_the_others() {
    let device = Default::default();
    for dtype in backend::dtypes(&device) {
        let options = OpenOptions {
            dtype,
            ..Default::default()
        };
        let vlm =
            Vlm::<Backend>::open(&embedded::checkpoint(), &options, &device).expect("built in");
        let request = |at: usize| {
            let turn = turn(&[SCENES[at]], TEXTS[at]);
            let mut request = request(turn, ROUTINGS[at], 6);
            request.options.logprobs = Some(3);
            request
        };
        let run = |requests: &[usize]| {
            let apart = SessionOptions {
                apart: true,
                ..Default::default()
            };
            let mut session = Session::new(&vlm, apart).expect("it fits");
            let ids = requests
                .iter()
                .map(|&at| session.admit(request(at)).expect("good"));
            let ids: Vec<RequestId> = ids.collect();
            let outcome = self::run(&mut session);
            let answer = |id| outcome.answers[&(id, 0)].clone();
            ids.into_iter().map(answer).collect::<Vec<_>>()
        };
        for (at, together) in run(&[0, 1, 2, 3]).into_iter().enumerate() {
            let alone = run(&[at]).remove(0);
            assert_eq!(together.tokens, alone.tokens, "{dtype:?}");
            assert_eq!(together.logprobs, alone.logprobs, "{dtype:?}");
        }
    }
}

/// Answers side by side are those of requests alone, but for the rounding of products with more rows: a logit
/// is off by no more than a bound times the largest of its row.
#[test]
fn side_by_side_only_rounding_depends_on_the_others() {
    let device = Default::default();
    for dtype in backend::dtypes(&device) {
        let options = OpenOptions {
            dtype,
            ..Default::default()
        };
        let vlm =
            Vlm::<Backend>::open(&embedded::checkpoint(), &options, &device).expect("built in");
        let answers = |requests: &[usize]| {
            let mut session = Session::new(&vlm, SessionOptions::default()).expect("it fits");
            let admit = |&at: &usize| {
                let turn = turn(&[SCENES[at % 4]], TEXTS[at % 4]);
                let mut request = request(turn, ROUTINGS[at % 6], 6);
                request.options.logits = true;
                session.admit(request).expect("good")
            };
            let ids: Vec<RequestId> = requests.iter().map(admit).collect();
            let outcome = run(&mut session);
            let answer = |id| outcome.answers[&(id, 0)].clone();
            ids.into_iter().map(answer).collect::<Vec<_>>()
        };
        let mut off = 0.0_f32;
        for (at, together) in answers(&[0, 1, 2, 3, 4, 5, 6, 7]).into_iter().enumerate() {
            let alone = answers(&[at]).remove(0);
            let both = together.tokens.iter().zip(&alone.tokens);
            // What follows another token is another question.
            let same = 1 + both.take_while(|(a, b)| a == b).count();
            for (found, expected) in together.logits.iter().zip(&alone.logits).take(same) {
                let largest = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                let pairs = found.iter().zip(expected);
                let most = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                off = off.max(most / largest);
            }
        }
        // In half precision a sum that is rounded otherwise is a last place off.
        let bound = match dtype {
            DType::F32 => 2e-6,
            DType::F16 => 2.0_f32.powi(-10),
            _ => 2.0_f32.powi(-7),
        };
        assert!(off <= bound, "{dtype:?}: {off:e}");
    }
}

/// Several answers share the prefill, and draw from streams of their own.
#[test]
fn answers_of_one_request_differ_by_their_draws() {
    let mut several = request(turn(&["063"], "find the cross"), "reroute-pdrop@64", 8);
    several.options.sampling.temperature = 1.5;
    several.options.sampling.seed = 5;
    several.answers = 3;
    let answers = alone(several.clone());
    for (index, answer) in answers.iter().enumerate() {
        let mut one = several.clone();
        (one.answers, one.options.sampling.seed) = (1, 5 + index as u64);
        assert_eq!(alone(one)[0].tokens, answer.tokens);
    }
    assert_ne!(answers[0].tokens, answers[1].tokens);
}

#[test]
fn bias_mask_stop_strings_and_logprobs() {
    let turn = || turn(&["063"], "find the cross");
    let plain = request(turn(), "dense", 8);
    let answer = alone(plain.clone()).remove(0);
    // The likeliest token is the one that was chosen, and all of them together are certain.
    let mut asked = plain.clone();
    asked.options.logprobs = Some(BUILT_IN.config().decoder().vocab_size);
    let likely = alone(asked).remove(0);
    assert_eq!(likely.tokens, answer.tokens);
    assert_eq!(likely.logprobs.len(), answer.tokens.len());
    for (token, logprobs) in likely.tokens.iter().zip(&likely.logprobs) {
        assert_eq!(logprobs.top[0], (*token, logprobs.logprob));
        let sum: f64 = logprobs.top.iter().map(|(_, p)| f64::from(*p).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-4, "{sum}");
    }
    // Forbidden, it is not chosen; alone allowed, nothing else is.
    let first = answer.tokens[0];
    let mut biased = plain.clone();
    biased.options.sampling.logit_bias = vec![(first, f32::NEG_INFINITY)];
    assert_eq!(alone(biased)[0].tokens[0], likely.logprobs[0].top[1].0);
    let mut masked = plain.clone();
    masked.options.sampling.allowed_tokens = Some(vec![first]);
    masked.options.stop_tokens.clear();
    assert_eq!(alone(masked.clone())[0].tokens, [first; 8]);
    // A stop string ends the answer before itself.
    let stop = answer.text[3..5].to_string();
    let mut stopped = plain.clone();
    stopped.stop = vec![stop.clone()];
    let found = alone(stopped).remove(0);
    assert_eq!(found.stopped_by.as_ref(), Some(&stop));
    let before = answer.text.split(&stop).next().expect("it is there");
    assert_eq!(
        (found.text.as_str(), found.finish),
        (before.trim(), FinishReason::Stop)
    );
    assert!(found.tokens.len() < answer.tokens.len());
    // What cannot be is refused at once.
    let mut session = session(SessionOptions::default());
    masked.options.sampling.logit_bias = vec![(first, f32::NEG_INFINITY)];
    let nothing = session.admit(masked).unwrap_err();
    assert!(
        matches!(nothing, ZooError::Reroute(RerouteError::Sampling { .. })),
        "{nothing}"
    );
    let mut unknown = plain.clone();
    unknown.options.sampling.allowed_tokens = Some(vec![u32::MAX]);
    let unknown = session.admit(unknown).unwrap_err();
    assert!(
        matches!(unknown, ZooError::Reroute(RerouteError::Sampling { .. })),
        "{unknown}"
    );
    for answers in [0, usize::MAX] {
        let error = session
            .admit(Request {
                answers,
                ..plain.clone()
            })
            .unwrap_err();
        assert!(matches!(error, ZooError::Answers { .. }), "{error}");
    }
    assert!(session.is_idle());
}

/// Scores that are no numbers.
struct Nan;

impl Scorer<Backend> for Nan {
    fn score(&self, view: &dyn DecisionView<Backend>) -> Result<Tensor<Backend, 1>, ReducerError> {
        let device = view.hidden_states().device();
        Ok(Tensor::full([view.rows()], f32::NAN, &device))
    }
}

/// What is wrong with one request is nothing to the others.
#[test]
fn a_bad_request_fails_alone() {
    let good = || request(turn(&["063"], "find the cross"), "reroute-pdrop@64", 8);
    let mut session = session(SessionOptions::default());
    let first = session.admit(good()).unwrap();
    session.step();
    let mut bad = good();
    bad.routing = Routing {
        scorer: Some(Arc::new(Nan)),
        ..Routing::from(plan("reroute-pdrop@64"))
    };
    let bad = session.admit(bad).unwrap();
    let long = "find the cross ".repeat(400);
    let long = session.admit(request(turn(&["063"], &long), "dense", 8));
    let last = session.admit(good()).unwrap();
    let outcome = run(&mut session);
    let expected = alone(good()).remove(0);
    for id in [first, last] {
        assert_eq!(outcome.answers[&(id, 0)].tokens, expected.tokens);
    }
    let error = &outcome.failed[&bad];
    assert!(
        matches!(
            error,
            ZooError::Reducer(ReducerError::NanScore { .. })
                | ZooError::Reroute(RerouteError::Reducer(ReducerError::NanScore { .. }))
        ),
        "{error}"
    );
    let too_long = |error: &ZooError| error.to_string().contains("positions");
    match long {
        Ok(id) => assert!(too_long(&outcome.failed[&id])),
        Err(error) => assert!(too_long(&error), "{error}"),
    }
    assert_eq!(outcome.answers.len(), 2);
}

/// A picture that was seen, and a prompt that begins like one that has ended, are not computed again.
#[test]
fn what_is_known_is_not_computed_again() {
    let turns = |answer: &str| {
        vec![
            turn(&["063"], "find the cross"),
            Turn::text(Role::Assistant, answer),
            Turn::text(Role::User, "find the square"),
        ]
    };
    for routing in ["dense", "reroute-pdrop@64", "pdrop@64"] {
        let mut session = session(SessionOptions::default());
        let first = session
            .admit(request(turn(&["063"], "find the cross"), routing, 8))
            .unwrap();
        let first = run(&mut session).answers.remove(&(first, 0)).unwrap();
        let next = || Request::new(turns(&first.text), plan(routing), options(8));
        let id = session.admit(next()).unwrap();
        let resumed = run(&mut session).answers.remove(&(id, 0)).unwrap();
        let fresh = alone(next()).remove(0);
        assert_eq!(resumed.tokens, fresh.tokens, "{routing}");
        assert_eq!(resumed.kv_bytes, fresh.kv_bytes, "{routing}");
        let rows = |answer: &Answer| {
            answer
                .trace
                .rows
                .iter()
                .map(|rows| rows[0])
                .collect::<Vec<_>>()
        };
        let (resumed, fresh) = (rows(&resumed), rows(&fresh));
        match routing {
            "dense" => assert!(
                resumed.iter().zip(&fresh).all(|(a, b)| a + 64 < *b),
                "{resumed:?}"
            ),
            // Below the first decision new rows alone.
            "reroute-pdrop@64" => assert!(resumed[0] + 64 < fresh[0], "{resumed:?} {fresh:?}"),
            // The rows before the first picture.
            _ => assert!(
                resumed
                    .iter()
                    .zip(&fresh)
                    .all(|(a, b)| a < b && a + 64 > *b)
            ),
        }
    }
}

/// Another picture in the same place is another prompt.
#[test]
fn another_picture_is_not_taken_for_the_one_before() {
    let mut session = session(SessionOptions::default());
    for scene in ["063", "145", "063"] {
        let request = || request(turn(&[scene], "find the cross"), "dense", 8);
        let id = session.admit(request()).unwrap();
        let found = run(&mut session).answers.remove(&(id, 0)).unwrap();
        assert_eq!(found.tokens, alone(request())[0].tokens);
    }
}
