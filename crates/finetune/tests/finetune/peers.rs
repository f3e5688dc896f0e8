//! Several peers as threads: they learn what one alone does.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use burn_flex::Flex;
use reroute_finetune::{
    Collective, Course, Event, Peers, Run, Settings, Step, TuneError, Validation, tune,
    tune_by_threads,
};
use reroute_zoo::AdapterConfig;
use safetensors::SafeTensors;

use crate::run::{examples, settings};
use crate::{alone, example, open};

const PATIENCE: Duration = Duration::from_secs(60);

fn without_dropout(batch: usize, accumulate: usize) -> Settings {
    let settings = settings();
    Settings {
        adapter: Some(AdapterConfig::new(["q_proj", "v_proj", "down_proj"], 4)),
        course: Course {
            batch,
            accumulate,
            validate_every: 3,
            ..settings.course
        },
        ..settings
    }
}

struct Found {
    result: Result<(), TuneError>,
    steps: Vec<Step>,
    validations: Vec<Validation>,
}

/// A run by so many threads, told to stop at a step.
fn run(folder: &Path, settings: &Settings, peers: usize, until: usize) -> Found {
    let examples = examples();
    let run = Run {
        settings,
        examples: &examples,
        validation: &examples[..3],
        skips: false,
        folder,
        resume: true,
    };
    let (mut steps, mut validations) = (Vec::new(), Vec::new());
    let watch = &mut |event: Event<'_>| {
        match event {
            Event::Step(step) => steps.push(step.clone()),
            Event::Validated(found) => validations.push(found.clone()),
            _ => {}
        }
        match steps.last().is_some_and(|step| step.step >= until) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let result = match peers {
        1 => tune(open(), &run, watch),
        _ => tune_by_threads(open(), &run, peers, PATIENCE, watch),
    };
    let result = result.map(|vlm| {
        let adapter = folder.join("adapter");
        vlm.model().save_adapter(adapter).expect("an adapter");
    });
    Found {
        result,
        steps,
        validations,
    }
}

fn adapter(folder: &Path) -> Vec<f32> {
    let bytes = fs::read(folder.join("adapter/adapter_model.safetensors")).expect("an adapter");
    let tensors = SafeTensors::deserialize(&bytes).expect("tensors");
    let mut names: Vec<_> = tensors.names().into_iter().map(str::to_owned).collect();
    names.sort();
    let numbers = names.iter().flat_map(|name| {
        let numbers = tensors.tensor(name).expect("it is listed").data();
        let numbers = numbers.as_chunks().0.iter();
        numbers
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect::<Vec<_>>()
    });
    numbers.collect()
}

fn assert_close(found: f64, expected: f64, most: f64, what: &str) {
    let off = (found - expected).abs() / expected.abs();
    assert!(
        off <= most,
        "{what}: {found} and {expected}, off by {off:e}"
    );
}

fn assert_same(found: &Found, expected: &Found) {
    assert_eq!(found.steps.len(), expected.steps.len());
    for (found, expected) in found.steps.iter().zip(&expected.steps) {
        let what = format!("step {}", found.step);
        assert_eq!(found.step, expected.step);
        assert_eq!(found.routing, expected.routing);
        assert_eq!(found.examples, expected.examples);
        assert_eq!(found.tokens, expected.tokens);
        assert_eq!(found.rows, expected.rows);
        assert_close(found.loss, expected.loss, 1e-5, &what);
        assert_close(found.norm, expected.norm, 1e-4, &what);
    }
    assert_eq!(found.validations.len(), expected.validations.len());
    for (found, expected) in found.validations.iter().zip(&expected.validations) {
        assert_eq!(found.boxes, expected.boxes);
        assert_close(found.loss, expected.loss, 1e-5, "validation");
        assert_eq!(found.accuracy, expected.accuracy);
    }
}

fn assert_same_adapter(found: &Path, expected: &Path) {
    let (found, expected) = (adapter(found), adapter(expected));
    assert_eq!(found.len(), expected.len());
    let off = { found.iter().zip(&expected) }.map(|(a, b)| f64::from(a - b).powi(2));
    let size = expected.iter().map(|b| f64::from(*b).powi(2));
    let off = (off.sum::<f64>() / size.sum::<f64>()).sqrt();
    assert!(off < 1e-4, "adapters are {off:e} apart");
}

/// Three passes of a step are dealt out unevenly; a pass of two examples is two passes of one.
#[test]
fn peers_learn_what_one_does_alone() {
    let _alone = alone();
    for (peers, batch, accumulate, joined) in
        [(2, 1, 2, (2, 1)), (2, 1, 3, (1, 3)), (3, 1, 4, (1, 4))]
    {
        let folders = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
        let [of_one, of_several] = folders.each_ref().map(|folder| folder.path());
        let expected = run(of_one, &without_dropout(joined.0, joined.1), 1, 100);
        expected.result.as_ref().expect("a run");
        assert_eq!(expected.steps.len(), 7);
        let found = run(of_several, &without_dropout(batch, accumulate), peers, 100);
        found.result.as_ref().expect("a run");
        assert_same(&found, &expected);
        assert_same_adapter(of_several, of_one);
        let log = |folder: &Path| fs::read_to_string(folder.join("log.jsonl")).expect("a log");
        assert_eq!(log(of_several).lines().count(), log(of_one).lines().count());
    }
}

/// Whoever is told to stop stops all behind the next step; what follows is the same with any number of peers.
#[test]
fn peers_that_are_stopped_go_on() {
    let _alone = alone();
    let settings = without_dropout(1, 2);
    let whole = tempfile::tempdir().expect("a folder");
    let expected = run(whole.path(), &settings, 2, 100);
    for peers in [2, 1] {
        let cut = tempfile::tempdir().expect("a folder");
        let mut found = run(cut.path(), &settings, 2, 3);
        assert!(matches!(found.result, Err(TuneError::Stopped { step: 4 })));
        assert!(cut.path().join("checkpoint-4").exists());
        let rest = run(cut.path(), &settings, peers, 100);
        rest.result.expect("a run");
        found.steps.extend(rest.steps);
        found.validations.extend(rest.validations);
        assert_same(&found, &expected);
        assert_same_adapter(cut.path(), whole.path());
        if peers == 2 {
            let losses =
                |found: &Found| found.steps.iter().map(|step| step.loss.to_bits()).collect();
            let (found, expected): (Vec<_>, Vec<_>) = (losses(&found), losses(&expected));
            assert_eq!(found, expected);
        }
    }
}

/// A peer that fails by itself is what the run fails by, and the next run in this process is not disturbed.
#[test]
fn what_ends_one_peer_ends_all() {
    let _alone = alone();
    let settings = without_dropout(1, 2);
    let mut examples = examples();
    examples.truncate(2);
    let order = [0, 1, 2].map(|bad| {
        let mut examples = examples.clone();
        examples.push(example(2, "the large one"));
        examples[bad].images.clear();
        let folder = tempfile::tempdir().expect("a folder");
        let run = Run {
            settings: &settings,
            examples: &examples,
            validation: &[],
            skips: false,
            folder: folder.path(),
            resume: false,
        };
        let began = Instant::now();
        let settings = Settings {
            course: Course {
                validate_every: 0,
                ..settings.course.clone()
            },
            ..settings.clone()
        };
        let run = Run {
            settings: &settings,
            ..run
        };
        let result = tune_by_threads(
            open(),
            &run,
            2,
            PATIENCE,
            &mut |_| ControlFlow::Continue(()),
        );
        (result.map(drop), began.elapsed())
    });
    for (result, took) in order {
        assert!(
            matches!(result, Err(TuneError::Example { .. })),
            "{result:?}"
        );
        assert!(took < PATIENCE / 2, "{took:?}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    run(folder.path(), &settings, 2, 100).result.expect("a run");
    // The folder is taken: said at once, by the first peer.
    let examples = examples.clone();
    let again = Run {
        settings: &settings,
        examples: &examples,
        validation: &examples,
        skips: false,
        folder: folder.path(),
        resume: false,
    };
    let result = tune_by_threads(open(), &again, 2, PATIENCE, &mut |_| {
        ControlFlow::Continue(())
    });
    assert!(matches!(result, Err(TuneError::Taken { .. })));
    let other = tempfile::tempdir().expect("a folder");
    run(other.path(), &settings, 2, 100).result.expect("a run");
}

/// One that is gone is named within seconds, one that lives and does not come when the time is over.
#[test]
fn a_peer_that_is_lost_is_named() {
    let _alone = alone();
    for (is_dead, patience, most) in [(true, 60, 10), (false, 3, 10)] {
        let folder = tempfile::tempdir().expect("a folder");
        let peer = |peer| {
            let patience = Duration::from_secs(patience);
            Collective::<Flex>::thread(peer, 2, folder.path(), patience, &Default::default())
                .expect("a peer")
        };
        let numbers = || Tensor::<Flex, 1>::from_floats([1.0, 2.0], &Default::default());
        let (mut first, mut second) = (peer(0), peer(1));
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                let sum = second.sum(numbers()).expect("a sum");
                (second, sum.into_data().to_vec::<f32>().expect("floats"))
            });
            let sum = first.sum(numbers()).expect("a sum");
            assert_eq!(sum.into_data().to_vec::<f32>().expect("floats"), [2.0, 4.0]);
            let (second, sum) = other.join().expect("a peer");
            assert_eq!(sum, [2.0, 4.0]);
            let lives = (!is_dead).then_some(second);
            let began = Instant::now();
            let error = first.sum(numbers()).expect_err("nobody comes");
            assert!(began.elapsed() < Duration::from_secs(most));
            let TuneError::PeersLost { peers, reason } = &error else {
                panic!("{error}");
            };
            assert_eq!(peers, "peer 1");
            let expected = if is_dead { "has ended" } else { "within 3 s" };
            assert!(reason.contains(expected), "{error}");
            assert!(error.to_string().contains("--resume"));
            drop(lives);
        });
    }
}

#[test]
fn what_peers_cannot_do_is_refused() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let settings = without_dropout(1, 2);
    let refused = run(folder.path(), &settings, 3, 100).result;
    assert!(matches!(
        refused,
        Err(TuneError::Setting {
            setting: "peers",
            ..
        })
    ));
    let drawn = Settings {
        adapter: Some(AdapterConfig {
            dropout: 0.1,
            ..AdapterConfig::new(["q_proj"], 4)
        }),
        ..settings
    };
    let refused = run(folder.path(), &drawn, 2, 100).result;
    assert!(matches!(
        refused,
        Err(TuneError::Setting {
            setting: "dropout",
            ..
        })
    ));
}
