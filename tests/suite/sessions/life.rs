//! What requests take, and how they come, go and end.

use burn::module::Module;
use reducers::Schedule;
use reroute::FinishReason;
use reroute_cli::backend::Backend;
use reroute_zoo::messages::Role;
use reroute_zoo::session::{
    Event, MemoryLimit, Request, RequestId, Service, Session, SessionOptions, Turn,
};
use reroute_zoo::{Question, ZooError};

use super::{Outcome, ROUTINGS, SCENES, TEXTS, alone, options, request, session, turn};
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
