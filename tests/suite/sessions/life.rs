//! What requests take, and how they come, go and end.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use burn::module::Module;
use burn::tensor::Tensor;
use reducers::{DecisionView, ReducerError, Schedule, Scorer};
use reroute::FinishReason;
use reroute_cli::backend::Backend;
use reroute_zoo::messages::Role;
use reroute_zoo::reroute_checkpoint::CheckpointError;
use reroute_zoo::session::{
    Event, MemoryLimit, Part, Request, RequestId, Service, Session, SessionOptions, Turn,
};
use reroute_zoo::{OpenOptions, Question, Vlm, ZooError, embedded};

use super::{Outcome, ROUTINGS, SCENES, TEXTS, alone, options, request, run, session, turn};
use crate::program::{BUILT_IN, read_image, scene};

#[test]
fn memory_is_counted_before_it_is_taken() {
    let limit = |bytes| SessionOptions {
        memory: Some(MemoryLimit {
            bytes,
            arithmetic: None,
        }),
        ..Default::default()
    };
    let error = Session::new(&BUILT_IN, limit(1 << 10)).expect_err("no room for weights");
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
    for bytes in (0..128).map(|at| (1 << 20) + (at << 18)) {
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
        for (_, answer) in so_far {
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
    let conversation = reroute_zoo::Conversation::new(&BUILT_IN, Schedule::dense(), options(8));
    let mut conversation = conversation.with_system("Be brief.");
    let first = Question::about(vec![read_image(&scene("063"))], "find the cross");
    let said = conversation.ask(&first, |_| {}).unwrap();
    let second = Question::about(Vec::new(), "find the square");
    let continued = conversation.ask(&second, |_| {}).unwrap();
    let turns = vec![
        Turn::text(Role::System, "Be brief."),
        Turn::from(&first),
        Turn::text(Role::Assistant, said.text),
        Turn::from(&second),
    ];
    let restored = alone(Request::new(turns, Schedule::dense(), options(8))).remove(0);
    assert_eq!(restored.tokens, continued.tokens);
}

/// A running answer gets a token beside every picture that the tower sees, and beside every layer.
#[test]
fn pictures_go_through_the_tower_one_a_step() {
    let mut session = session(SessionOptions {
        layers_per_step: 1,
        ..Default::default()
    });
    // Without a picture it may have nothing to say.
    let mut running = request(turn(&[], "find the cross"), "dense", 200);
    running.options.stop_tokens.clear();
    let running = session.admit(running).unwrap();
    while session.load() != (0, 1) {
        session.step();
    }
    let pictures = turn(&SCENES[..4], "find the square");
    let asked = session.admit(request(pictures, "dense", 1)).unwrap();
    let layers = BUILT_IN.config().decoder().num_layers;
    for step in 0..4 + layers {
        let events = session.step();
        let of = |id| events.iter().filter(move |event| event.id() == id).count();
        assert_eq!(of(running), 1, "step {step}");
        let is_last = step == 3 + layers;
        assert_eq!(of(asked) > 0, is_last, "step {step}");
    }
}

/// Threads ask one service.
#[test]
fn a_service_answers_from_threads() {
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

/// Many threads, some of which go away, and more requests than may wait: each is answered or refused, and
/// nothing is left.
#[test]
fn a_service_under_load_loses_nothing() {
    let options = SessionOptions {
        max_waiting: 4,
        ..Default::default()
    };
    let service = Service::start(&*BUILT_IN, options).unwrap();
    let served = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (service, served) = (&service, &served);
            scope.spawn(move || {
                for at in 0..12 {
                    let turn = turn(&[SCENES[(thread + at) % 4]], TEXTS[at % 4]);
                    let mut answers = service.ask(request(turn, ROUTINGS[at % 6], 4));
                    if at % 5 == 4 {
                        answers.next();
                        continue;
                    }
                    match answers.last() {
                        Some(Event::Finished { .. }) => served.fetch_add(1, Ordering::Relaxed),
                        Some(Event::Failed { error, .. }) => {
                            assert!(matches!(error, ZooError::Busy { .. }), "{error}");
                            0
                        }
                        other => panic!("{other:?}"),
                    };
                }
            });
        }
    });
    assert!(served.into_inner() > 0);
    // The last step may still be on its way.
    for _ in 0..1000 {
        if service.load() == (0, 0) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{:?} are left", service.load());
}

/// What a long answer had room for is not what a short one takes over.
#[test]
fn a_beginning_that_is_taken_over_keeps_the_memory_limit() {
    let weights = BUILT_IN.model().num_params() as u64 * 4;
    let bytes = weights + (12 << 20);
    let mut session = session(SessionOptions {
        memory: Some(MemoryLimit {
            bytes,
            arithmetic: None,
        }),
        ..Default::default()
    });
    let first = session.admit(request(turn(&["063"], "find the cross"), "dense", 400));
    first.expect("it fits");
    run(&mut session);
    for _ in 0..20 {
        let turns = vec![
            turn(&["063"], "find the cross"),
            Turn::text(Role::Assistant, "x"),
            Turn::text(Role::User, "find"),
        ];
        let again = request(turn(&["063"], "find the cross"), "dense", 8);
        session.admit(Request { turns, ..again }).expect("it fits");
    }
    while !session.is_idle() {
        session.step();
        assert!(weights + session.bytes() <= bytes);
    }
}

/// A rule that panics takes what runs with it, and says so; those who come later are served.
#[test]
fn a_service_survives_a_rule_that_panics() {
    struct Boom;
    impl Scorer<Backend> for Boom {
        fn score(&self, _: &dyn DecisionView<Backend>) -> Result<Tensor<Backend, 1>, ReducerError> {
            unreachable!("a fault of the caller's own")
        }
    }
    let service = Service::start(&*BUILT_IN, SessionOptions::default()).unwrap();
    let good = || request(turn(&["063"], "find the cross"), "reroute-pdrop@64", 6);
    let mut bad = good();
    bad.routing.scorer = Some(Arc::new(Boom));
    let bad: Vec<Event<Backend>> = service.ask(bad).collect();
    assert!(matches!(
        &bad[..],
        [Event::Failed {
            error: ZooError::Session { .. },
            ..
        }]
    ));
    let last = service.ask(good()).last();
    assert!(matches!(last, Some(Event::Finished { .. })));
    let running = service.ask(good());
    drop(service);
    assert!(matches!(
        running.last(),
        Some(Event::Failed { .. } | Event::Finished { .. })
    ));
}

/// Chance falls otherwise among other rows: nothing is taken over.
#[test]
fn a_random_routing_answers_the_same_again() {
    let mut session = session(SessionOptions::default());
    let request = || {
        request(
            turn(&["063"], "find the cross"),
            "reroute-random@128-exact",
            8,
        )
    };
    let expected = alone(request()).remove(0);
    for _ in 0..3 {
        let id = session.admit(request()).unwrap();
        assert_eq!(run(&mut session).answers[&(id, 0)].tokens, expected.tokens);
    }
}

/// Requests that make no sense are refused before anything is computed.
#[test]
fn requests_without_sense_are_refused() {
    let mut session = session(SessionOptions::default());
    let good = || request(turn(&["063"], "find the cross"), "dense", 8);
    for turns in [
        Vec::new(),
        vec![Turn::text(Role::System, "be brief")],
        vec![turn(&[], "x"), Turn::text(Role::Assistant, "y")],
    ] {
        let error = session.admit(Request { turns, ..good() }).unwrap_err();
        assert!(matches!(error, ZooError::Turns), "{error}");
    }
    // No token that was forbidden is chosen, however large the numbers are.
    let mut forbidden = good();
    let sampling = &mut forbidden.options.sampling;
    sampling.allowed_tokens = Some(vec![5]);
    sampling.repetition_penalty = f32::MAX;
    let id = session.admit(forbidden).unwrap();
    let outcome = run(&mut session);
    match outcome.answers.get(&(id, 0)) {
        Some(answer) => assert!(answer.tokens.iter().all(|&token| token == 5)),
        None => assert!(outcome.failed.contains_key(&id)),
    }
    // A special token is none where two texts meet.
    let parts: Vec<Part> = vec!["</".into(), "s>".into()];
    let (halves, whole) = (Turn::user(parts), Turn::user(["</s>".into()]));
    let asked = |turn: Turn| {
        let request = Request {
            turns: vec![turn],
            ..good()
        };
        alone(request).remove(0).prompt_rows
    };
    assert_eq!(asked(halves), asked(whole));
}

/// Loading stops after the tensor at which it is told to.
#[test]
fn loading_can_be_stopped() {
    let (folder, options) = (embedded::checkpoint(), OpenOptions::default());
    let load = |most: usize| {
        let mut told = Vec::new();
        let vlm = Vlm::<Backend>::open_with_progress(
            &folder,
            &options,
            &Default::default(),
            &mut |progress| {
                told.push(progress);
                match told.len() == most {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            },
        );
        (vlm.map(drop), told)
    };
    let (loaded, all) = load(usize::MAX);
    loaded.expect("it is built in");
    assert_eq!(
        all.last().map(|last| last.loaded_bytes),
        all.last().map(|last| last.total_bytes)
    );
    for most in [1, all.len() / 2, all.len()] {
        let (stopped, told) = load(most);
        assert!(matches!(
            stopped,
            Err(ZooError::Checkpoint(CheckpointError::Stopped))
        ));
        assert_eq!(told, all[..most]);
    }
}
