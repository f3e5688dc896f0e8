//! Requests that come and go in a running batch: each gets the answer that it would get alone.

use std::collections::HashMap;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Tensor;
use proptest::prelude::*;
use reducers::{DecisionView, Plan, ReducerError, Schedule, Scorer, presets};
use reroute::{FinishReason, GenerationOptions, RerouteError};
use reroute_cli::backend::Backend;
use reroute_zoo::messages::Role;
use reroute_zoo::session::{
    Event, MemoryLimit, Part, Request, RequestId, Session, SessionOptions, Turn,
};
use reroute_zoo::{Answer, Question, Routing, ZooError};

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
                    id, answer, text, ..
                } => self.texts.entry((id, answer)).or_default().push_str(&text),
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
        matches!(unknown, ZooError::Reroute(RerouteError::TokenId { .. })),
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

#[test]
fn memory_is_counted_before_it_is_taken() {
    let limit = |bytes| SessionOptions {
        memory: Some(MemoryLimit {
            bytes,
            arithmetic: None,
        }),
        ..Default::default()
    };
    let error = Session::new(&BUILT_IN, limit(1 << 10))
        .err()
        .expect("no room for weights");
    assert!(
        matches!(
            error,
            ZooError::Memory {
                what: "the weights",
                ..
            }
        ),
        "{error}"
    );
    let good = || request(turn(&["063"], "find the cross"), "dense", 8);
    let mut smallest = None;
    for bytes in (0..64).map(|at| (1 << 20) + (at << 18)) {
        let Ok(mut session) = Session::new(&BUILT_IN, limit(bytes)) else {
            continue;
        };
        match session.admit(good()) {
            Ok(_) => {
                smallest = Some(bytes);
                break;
            }
            Err(error) => assert!(
                matches!(
                    error,
                    ZooError::Memory {
                        what: "this request",
                        ..
                    }
                ),
                "{error}"
            ),
        }
    }
    let smallest = smallest.expect("a few MiB suffice");
    // Where one fits, several wait for each other, and all are answered.
    let mut session = session(limit(smallest));
    let ids: Vec<RequestId> = (0..4).map(|_| session.admit(good()).unwrap()).collect();
    let (mut outcome, mut most) = (Outcome::default(), 0);
    let weights = BUILT_IN.model().num_params() as u64 * 4;
    while !session.is_idle() {
        outcome.take(session.step());
        most = most.max(session.load().1);
        assert!(weights + session.bytes() <= smallest);
    }
    assert!(most <= 2, "{most} at once");
    let expected = alone(good()).remove(0);
    for id in ids {
        assert_eq!(outcome.answers[&(id, 0)].tokens, expected.tokens);
    }
    let busy = SessionOptions {
        max_waiting: 1,
        ..Default::default()
    };
    let mut session = self::session(busy);
    session.admit(good()).unwrap();
    let error = session.admit(good()).unwrap_err();
    assert!(matches!(error, ZooError::Busy { waiting: 1 }), "{error}");
}

/// Whatever a request is at, cancelling gives its memory back and leaves the others alone.
#[test]
fn a_request_can_be_cancelled_at_any_step() {
    let good = |scene: &str| request(turn(&[scene], "find the cross"), "reroute-pdrop@64", 6);
    let expected = alone(good("145")).remove(0);
    for after in 0..20 {
        let mut session = session(SessionOptions {
            cache_bytes: 0,
            layers_per_step: 1,
            ..Default::default()
        });
        let cancelled = session.admit(good("063")).unwrap();
        let kept = session.admit(good("145")).unwrap();
        let mut outcome = Outcome::default();
        for _ in 0..after {
            outcome.take(session.step());
        }
        let ended = outcome.answers.contains_key(&(cancelled, 0));
        let so_far = session.cancel(cancelled);
        let told = outcome
            .texts
            .get(&(cancelled, 0))
            .cloned()
            .unwrap_or_default();
        for answer in so_far {
            assert!(!ended);
            assert_eq!(answer.finish, FinishReason::Cancelled);
            assert!(answer.text.starts_with(&told));
        }
        assert!(session.cancel(cancelled).is_empty());
        outcome.take({
            let mut events = Vec::new();
            while !session.is_idle() {
                events.extend(session.step());
            }
            events
        });
        assert_eq!(
            outcome.answers[&(kept, 0)].tokens,
            expected.tokens,
            "{after}"
        );
        assert_eq!(session.bytes(), 0);
    }
}

/// A system prompt and what was said before are part of the request.
#[test]
fn a_restored_conversation_is_the_conversation() {
    let mut conversation = reroute_zoo::Conversation::new(&BUILT_IN, Schedule::dense(), options(8));
    let first = Question::about(vec![read_image(&scene("063"))], "find the cross");
    let said = conversation.ask(&first, |_| {}).unwrap();
    let second = Question::about(Vec::new(), "find the square");
    let continued = conversation.ask(&second, |_| {}).unwrap();
    let turns = vec![
        Turn::from(&first),
        Turn::text(Role::Assistant, said.text),
        Turn::from(&second),
    ];
    let restored = alone(Request::new(turns, Schedule::dense(), options(8))).remove(0);
    assert_eq!(restored.tokens, continued.tokens);
}

/// Threads ask one service.
#[test]
fn a_service_answers_from_threads() {
    use reroute_zoo::session::Service;
    let service = Service::start(&*BUILT_IN, SessionOptions::default()).unwrap();
    let request = |at: usize| {
        let turn = turn(&[SCENES[at % 4]], TEXTS[at / 4 % 4]);
        self::request(turn, ROUTINGS[at % 6], 8)
    };
    std::thread::scope(|scope| {
        for at in 0..8 {
            let (service, request) = (&service, request(at));
            scope.spawn(move || {
                let expected = alone(request.clone()).remove(0);
                let events = service.ask(request);
                let mut text = String::new();
                for event in events {
                    match event {
                        Event::Token { text: piece, .. } => text.push_str(&piece),
                        Event::Finished { answer, .. } => {
                            assert_eq!(answer.tokens, expected.tokens);
                            assert_eq!(answer.text, text);
                        }
                        other => panic!("{other:?}"),
                    }
                }
                assert_eq!(text, expected.text);
            });
        }
    });
    // Whoever goes away is not waited for; what is refused says why.
    drop(service.ask(request(1)));
    let refused = service.ask(Request {
        answers: 0,
        ..request(2)
    });
    let refused: Vec<Event<Backend>> = refused.collect();
    assert!(matches!(
        &refused[..],
        [Event::Failed {
            error: ZooError::Answers { .. },
            ..
        }]
    ));
}
