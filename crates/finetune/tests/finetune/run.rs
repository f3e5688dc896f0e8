//! Runs on the built-in model: what is trained, what a kill costs, what comes out.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use burn_flex::Flex;
use reroute_finetune::data::{Example, ImageSource, Piece};
use reroute_finetune::{
    Course, Event, Line, OptimizerSettings, Preparation, Run, Settings, Step, TuneError,
    Validation, tune,
};
use reroute_zoo::{AdapterConfig, Folder, OpenOptions, Schedule, Trained, Vlm, embedded};

use crate::{Ad, alone, example, open};

pub(crate) fn examples() -> Vec<Example> {
    let words = [
        "the red ring",
        "a blue bar",
        "the large one",
        "that thing",
        "a teal block",
    ];
    let words = words.iter().enumerate();
    words.map(|(line, words)| example(line, words)).collect()
}

pub(crate) fn settings() -> Settings {
    Settings {
        adapter: Some(AdapterConfig {
            dropout: 0.1,
            ..AdapterConfig::new(["q_proj", "v_proj", "down_proj"], 4)
        }),
        trained: Vec::new(),
        routings: vec!["dense".into(), "reroute-pdrop@192".into()],
        course: Course {
            steps: 7,
            batch: 2,
            accumulate: 2,
            save_every: 2,
            ..Course::default()
        },
        optimizer: OptimizerSettings {
            learning_rate: 3e-3,
            warmup: 2,
            ..OptimizerSettings::default()
        },
    }
}

/// What a run says, step by step; it is stopped behind one of them.
fn run(
    folder: &Path,
    settings: &Settings,
    examples: &[Example],
    until: usize,
) -> (Result<Vlm<Ad>, TuneError>, Vec<Step>) {
    let run = Run {
        settings,
        examples,
        validation: &[],
        skips: false,
        folder,
        resume: true,
    };
    let mut steps = Vec::new();
    let vlm = tune(open(), &run, &mut |event| match event {
        Event::Step(step) => {
            steps.push(step.clone());
            match step.step >= until {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        }
        _ => ControlFlow::Continue(()),
    });
    (vlm, steps)
}

/// All of a step but its time.
fn said(step: &Step) -> (usize, u64, u64, &str) {
    (
        step.step,
        step.loss.to_bits(),
        step.norm.to_bits(),
        &step.routing,
    )
}

/// Through dense and routed passes, in portions that cross the ends of epochs.
#[test]
fn a_run_that_is_stopped_goes_on_with_the_same_losses() {
    let _alone = alone();
    let (settings, examples) = (settings(), examples());
    let whole = tempfile::tempdir().expect("a folder");
    let (vlm, expected) = run(whole.path(), &settings, &examples, 100);
    let vlm = vlm.expect("a run");
    assert_eq!(expected.len(), 7);
    assert!(expected.iter().any(|step| step.routing == "dense"));
    assert!(expected.iter().any(|step| step.routing != "dense"));
    assert!(expected.last().expect("steps").loss < expected[0].loss);

    let cut = tempfile::tempdir().expect("a folder");
    let (stopped, steps) = run(cut.path(), &settings, &examples, 5);
    assert!(matches!(stopped, Err(TuneError::Stopped { step: 5 })));
    assert_eq!(steps.len(), 5);
    // Stopped, it leaves a checkpoint of step 5; one that a kill has spoilt is not taken.
    let spoilt = cut.path().join("checkpoint-5/optimizer.bin");
    let bytes = fs::read(&spoilt).expect("moments");
    fs::write(&spoilt, &bytes[1..]).expect("can be written");
    let (resumed, steps) = run(cut.path(), &settings, &examples, 100);
    let resumed = resumed.expect("a run");
    assert_eq!(steps.len(), 3);
    for (step, expected) in steps.iter().zip(&expected[4..]) {
        assert_eq!(said(step), said(expected));
    }
    let log = |folder: &Path| {
        let text = fs::read_to_string(folder.join("log.jsonl")).expect("a log");
        let lines = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("a line"));
        lines.collect::<Vec<Line>>()
    };
    for (line, expected) in log(cut.path()).iter().zip(log(whole.path())) {
        let (Line::Step(line), Line::Step(expected)) = (line, &expected) else {
            panic!("no validation");
        };
        assert_eq!(said(line), said(expected));
    }
    assert_eq!(log(cut.path()).len(), 7);
    assert!(whole.path().join("loss.svg").exists());
    // What comes out is the same, too.
    let folders = [whole.path().join("adapter"), cut.path().join("adapter")];
    for (vlm, folder) in [&vlm, &resumed].into_iter().zip(&folders) {
        vlm.model().save_adapter(folder).expect("an adapter");
    }
    let tensors = folders.map(|folder| fs::read(folder.join("adapter_model.safetensors")));
    let [whole_tensors, cut_tensors] = tensors.map(|tensors| tensors.expect("an adapter"));
    assert_eq!(whole_tensors, cut_tensors);

    // What is left out is drawn in training alone.
    let lesson = Preparation::new(vlm.tutor())
        .lesson(&examples[0])
        .expect("a lesson");
    let drawn = || {
        vlm.answer_logits(&[&lesson], None, Schedule::dense())
            .expect("logits")
    };
    let plain = vlm.valid();
    let whole_input = || {
        plain
            .answer_logits(&[&lesson], None, Schedule::dense())
            .expect("logits")
    };
    assert_ne!(drawn().logits.into_data(), drawn().logits.into_data());
    assert_eq!(
        whole_input().logits.into_data(),
        whole_input().logits.into_data()
    );

    let other = Settings {
        course: Course {
            seed: 1,
            ..settings.course.clone()
        },
        ..settings.clone()
    };
    let (refused, _) = run(whole.path(), &other, &examples, 100);
    assert!(matches!(refused, Err(TuneError::OtherRun { what, .. }) if what == "course.seed"));
}

#[test]
fn what_is_frozen_stays_and_what_answers_best_comes_out() {
    let _alone = alone();
    let examples = examples();
    let settings = Settings {
        adapter: None,
        trained: vec![Trained::Projector],
        routings: vec!["dense".into()],
        course: Course {
            steps: 6,
            validate_every: 1,
            patience: 2,
            save_every: 0,
            ..Course::default()
        },
        optimizer: OptimizerSettings {
            // Nothing in the first step, and then so much that it gets worse.
            warmup: 1,
            learning_rate: 0.3,
            ..OptimizerSettings::default()
        },
    };
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run {
        settings: &settings,
        examples: &examples,
        validation: &examples[..2],
        skips: false,
        folder: folder.path(),
        resume: false,
    };
    let (mut found, mut trained): (Vec<Validation>, Vec<String>) = Default::default();
    let vlm = tune(open(), &run, &mut |event| {
        match event {
            Event::Validated(validation) => found.push(validation.clone()),
            Event::Began { trained: all, .. } => {
                trained.extend(all.iter().map(|(path, _)| path.clone()));
            }
            _ => {}
        }
        ControlFlow::Continue(())
    });
    let vlm = vlm.expect("a run");
    assert!(!trained.is_empty());
    assert!(
        trained
            .iter()
            .all(|path| path.starts_with("multi_modal_projector."))
    );
    let best = found
        .iter()
        .map(|one| one.loss)
        .fold(f64::INFINITY, f64::min);
    assert!(found.len() >= 3, "two chances behind the first: {found:?}");
    assert!(best < found.last().expect("validations").loss, "{found:?}");
    assert_eq!(found[0].boxes, 2);
    // The result answers as the best did.
    let preparation = Preparation::new(vlm.tutor());
    let lessons = examples[..2]
        .iter()
        .map(|example| preparation.lesson(example));
    let lessons: Vec<_> = lessons.map(|lesson| lesson.expect("a lesson")).collect();
    let lessons: Vec<_> = lessons.iter().collect();
    let answers = vlm.valid().answer_logits(&lessons, None, Schedule::dense());
    let losses = answers.expect("logits").losses();
    let loss: f32 = losses.mean().into_scalar();
    assert!((f64::from(loss) - best).abs() < 1e-4, "{loss} {best}");
    // A second run in the folder is none by accident.
    let again = tune(open(), &run, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(again, Err(TuneError::Taken { .. })));
    // Outside of the projector all is as it was.
    let to = folder.path().join("model");
    let like = embedded::checkpoint();
    vlm.model()
        .save(&to, &like, &Default::default())
        .expect("a model");
    let saved = Folder::open(&to).expect("a model");
    let saved = Vlm::<Flex>::open(&saved, &OpenOptions::default(), &Default::default());
    let text = |vlm: &Vlm<Flex>| {
        let ids = [5, 9, 12];
        let embedded = vlm.model().decoder().embed(&ids).expect("known tokens");
        embedded.into_data()
    };
    let before = open().valid();
    assert_eq!(text(&saved.expect("opens")), text(&before));
}

/// What is kept of pictures from one epoch to the next holds for those of a later turn, too; and an example
/// that cannot be used costs a step its update at most.
#[test]
fn pictures_of_later_turns_and_bad_ones_go_on() {
    let _alone = alone();
    let mut later = example(0, "the red ring");
    later
        .images
        .push(ImageSource::Bytes(embedded::SCENE.image.to_vec()));
    let mut exchange = example(1, "a blue bar").exchanges.remove(0);
    exchange.question[0] = Piece::Image(1);
    later.exchanges.push(exchange);
    let mut bad = example(2, "the large one");
    bad.images = vec![ImageSource::Bytes(vec![1, 2, 3])];
    let examples = [later, bad, example(3, "that thing")];
    let settings = Settings {
        course: Course {
            steps: 6,
            validate_every: 2,
            ..Course::default()
        },
        ..settings()
    };
    let folder = tempfile::tempdir().expect("a folder");
    let run = |skips| {
        let run = Run {
            settings: &settings,
            examples: &examples,
            validation: &examples[1..],
            skips,
            folder: folder.path(),
            resume: true,
        };
        let (mut steps, mut skipped, mut measured) = (0, 0, 0);
        let vlm = tune(open(), &run, &mut |event| {
            match event {
                Event::Step(_) => steps += 1,
                Event::Skipped(_) => skipped += 1,
                Event::Validated(_) => measured += 1,
                _ => {}
            }
            ControlFlow::Continue(())
        });
        (vlm.map(drop), steps, skipped, measured)
    };
    assert!(matches!(run(false).0, Err(TuneError::Example { .. })));
    // Of two epochs; named once among those that are learnt, once among those that are measured on.
    let (result, steps, skipped, measured) = run(true);
    result.expect("a run");
    assert_eq!((steps, skipped, measured), (4, 2, 3));
    // Nothing is left to do.
    let (result, steps, _, measured) = run(true);
    result.expect("the same run");
    assert_eq!((steps, measured), (0, 0));
}

/// A folder is a run's own: it takes none that has other files in it, none of a run whose settings are lost, and
/// none that another process trains in.
#[test]
fn folders_are_not_taken_from_others() {
    let _alone = alone();
    let examples = examples();
    let settings = Settings {
        course: Course {
            steps: 2,
            validate_every: 1,
            save_every: 1,
            ..Course::default()
        },
        ..settings()
    };
    let go = |folder: &Path, watch: &mut dyn FnMut()| {
        let run = Run {
            settings: &settings,
            examples: &examples[..3],
            validation: &examples[3..],
            skips: false,
            folder,
            resume: true,
        };
        let result = tune(open(), &run, &mut |_| {
            watch();
            ControlFlow::Continue(())
        });
        result.map(drop)
    };
    let strange = tempfile::tempdir().expect("a folder");
    fs::write(strange.path().join("log.jsonl"), "somebody's data").expect("can be written");
    let refused = go(strange.path(), &mut || {});
    assert!(matches!(refused, Err(TuneError::NotEmpty { .. })));
    let kept = fs::read_to_string(strange.path().join("log.jsonl")).expect("is there");
    assert_eq!(kept, "somebody's data");

    let folder = tempfile::tempdir().expect("a folder");
    let mut others = Vec::new();
    let second = || {
        let run = Run {
            settings: &settings,
            examples: &examples[..3],
            validation: &examples[3..],
            skips: false,
            folder: folder.path(),
            resume: true,
        };
        tune(open(), &run, &mut |_| ControlFlow::Continue(())).map(drop)
    };
    go(folder.path(), &mut || others.push(second())).expect("a run");
    assert!(
        others
            .iter()
            .all(|other| matches!(other, Err(TuneError::Busy { .. })))
    );
    assert!(!others.is_empty());

    // What answered best is what was written, or nothing.
    let best = folder.path().join("best.safetensors");
    let mut bytes = fs::read(&best).expect("the best");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&best, bytes).expect("can be written");
    let progress = folder.path().join("checkpoint-2-validated/progress.json");
    let text = fs::read_to_string(&progress).expect("progress");
    let progress: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let again = go(folder.path(), &mut || {});
    match progress["best"][1] == 2 {
        true => again.expect("the last is the best"),
        false => assert!(matches!(again, Err(TuneError::Best { .. }))),
    }
    fs::remove_file(folder.path().join("run.json")).expect("is there");
    let refused = go(folder.path(), &mut || {});
    assert!(matches!(refused, Err(TuneError::NotEmpty { .. })));
}
