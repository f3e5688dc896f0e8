//! Whole runs of the built-in model.

use std::fs;
use std::io::Write;

use reducers::Cost;
use reroute_eval::record::{file_name, read};
use reroute_eval::{
    Data, EvalError, GroundingPrompt, Reckoning, Shard, Task, Truth, report, summaries,
};
use reroute_zoo::grounding::iou;
use reroute_zoo::{DecodeLimits, Question, decode, reducers};

use crate::{VLM, fixture, folder, killed, measure, open, settings};

const ROUTINGS: [&str; 3] = ["dense", "pdrop@192", "reroute-pdrop@192"];

/// Each sample is answered as if it were asked by itself, the score is that of its box, and the tokens are those that
/// the plan costs.
#[test]
fn expressions_are_scored_as_the_model_answers_them() {
    let data = open(Task::RefCoco, "RefCOCO");
    let scratch = folder();
    let settings = settings(&ROUTINGS);
    let records = measure(&data, &settings, scratch.path()).expect("a run");
    assert_eq!(records.len(), 3);
    let shape = VLM.config().decoder().shape();
    let mut pictures = data.pictures();
    let options = reroute_zoo::GenerationOptions {
        max_new_tokens: 8,
        ..VLM.generation_defaults()
    };
    for (records, (name, plan)) in records.iter().zip(&settings.routings) {
        assert_eq!(records.records.len(), data.samples.len());
        let mut right = 0.0;
        for sample in &data.samples {
            let record = &records.records[&sample.index];
            let score = record.score.as_ref().expect("a score");
            right += score.score;
            if sample.index % 4 != 0 && !matches!(&*sample.id, "1005" | "1007") {
                continue;
            }
            let bytes = pictures.read(&sample.picture).expect("a picture");
            let image = decode(&bytes, &DecodeLimits::default()).expect("a good one");
            let asked = Question::about(vec![image], format!("find {}", sample.question));
            let answer = VLM.ask(&asked, plan, &options, |_| {}).expect("an answer");
            assert_eq!(
                record.answer.as_ref(),
                Some(&answer.text),
                "{name} {}",
                sample.index
            );
            let Truth::Box(truth) = sample.truth else {
                panic!("no box");
            };
            let found = VLM.answered_box(&answer);
            assert_eq!(score.found, found);
            let expected = found.map_or(0.0, |found| iou(&found, &truth));
            assert_eq!(score.iou, Some(expected));
            let text = answer.prompt_rows - answer.visual_tokens;
            let cost = Cost::of(
                &shape,
                &plan.schedule,
                answer.visual_tokens,
                text,
                VLM.kv_type(),
            );
            assert!(
                (record.average_tokens - cost.average_tokens()).abs() < 1e-9,
                "{name}"
            );
        }
        // On scenes it was not trained on, the model finds about half (`tests/fixtures/scenes`).
        let share = right / data.samples.len() as f64;
        assert!(*name != "dense" || (0.3..0.8).contains(&share), "{share}");
    }
    let found = summaries(
        &records,
        &Reckoning {
            release: true,
            ..Reckoning::default()
        },
    );
    let found = found.expect("summaries");
    let names: Vec<&str> = found[1]
        .metrics
        .iter()
        .map(|metric| &*metric.name)
        .collect();
    let expected = [
        "accuracy at IoU 0.5",
        "mean IoU",
        "accuracy at IoU 0.5, release's division",
        "mean IoU, release's division",
        "accuracy at IoU 0.1",
    ];
    assert_eq!(names[..5], expected);
    assert!(found[0].metrics[0].difference.is_none());
    let pdrop = &found[1].metrics[0];
    let difference = pdrop.difference.as_ref().expect("a difference to dense");
    let dense = found[0].metrics[0].value;
    assert!((pdrop.value - dense - difference.value).abs() < 1e-12);
    let [low, high] = difference.interval.expect("an interval");
    assert!(low <= difference.value && difference.value <= high && low < high);
    // 23 objects with expressions, two of them on one picture.
    assert_eq!(
        (found[0].pictures, found[0].samples),
        (22, data.samples.len())
    );
    assert!(found[1].average_tokens < found[0].average_tokens);
    // Shares mean the same to the release, but for the picture whose middle alone is seen.
    let differ = records[0].records.values().filter(|record| {
        let score = record.score.as_ref().expect("a score");
        let (ours, theirs) = (score.iou.expect("a box"), score.release_iou.expect("a box"));
        (ours - theirs).abs() > 1e-4
    });
    let differ: Vec<&str> = differ.map(|record| &*record.id).collect();
    assert!(differ.iter().all(|id| *id == "1007"), "{differ:?}");
}

#[test]
fn a_killed_run_goes_on_to_the_same_results() {
    let data = open(Task::RefCoco, "RefCOCO");
    let mut settings = settings(&ROUTINGS);
    settings.limit = Some(13);
    let (whole, broken) = (folder(), folder());
    let expected = measure(&data, &settings, whole.path()).expect("a run");
    killed(&data, &settings, broken.path(), 7);
    // Nobody goes on by chance.
    let error = measure(&data, &settings, broken.path()).expect_err("there are records");
    assert!(matches!(error, EvalError::Taken { .. }) && error.to_string().contains("--resume"));
    settings.resume = true;
    killed(&data, &settings, broken.path(), 5);
    // The kill has cut a line.
    let path = broken.path().join("records-dense.jsonl");
    let mut file = fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .expect("records");
    file.write_all(b"{\"sample\": 12, \"id\": \"to")
        .expect("it is written");
    let before = read(&path).expect("records").records.len();
    assert!((1..13).contains(&before), "{before}");
    let resumed = measure(&data, &settings, broken.path()).expect("the rest");
    assert_eq!(resumed, expected);
    for (records, routing) in expected.iter().zip(ROUTINGS) {
        let path = broken.path().join(file_name(routing, Shard::default()));
        assert_eq!(read(&path).expect("records"), *records);
        // Nothing was answered twice.
        let lines = fs::read_to_string(path).expect("records");
        assert_eq!(lines.lines().count(), 1 + 13);
    }
    // The reports are the same to the byte.
    for (folder, records) in [(&whole, &expected), (&broken, &resumed)] {
        let found = summaries(records, &Reckoning::default()).expect("summaries");
        report::write(folder.path(), records, &found).expect("a report");
    }
    for name in ["results.csv", "results.json", "accuracy.svg"] {
        let of = |folder: &tempfile::TempDir| fs::read(folder.path().join(name)).expect(name);
        assert_eq!(of(&whole), of(&broken), "{name}");
    }
    let plot = fs::read_to_string(whole.path().join("accuracy.svg")).expect("a plot");
    assert!(plot.contains("reroute-pdrop") && plot.contains("dense"));
    let csv = fs::read_to_string(whole.path().join("results.csv")).expect("a table");
    let columns = |line: &str| line.split(',').count();
    assert!(csv.lines().all(|line| columns(line) == 16), "{csv}");
}

/// What decides the numbers must be the same; the first difference is named.
#[test]
fn other_runs_are_not_gone_on_with() {
    let data = open(Task::RefCoco, "RefCOCO");
    let scratch = folder();
    let mut first = settings(&["dense"]);
    first.limit = Some(3);
    measure(&data, &first, scratch.path()).expect("a run");
    first.resume = true;
    let refused = |change: &dyn Fn(&mut reroute_eval::Settings), data: &Data| {
        let mut other = first.clone();
        change(&mut other);
        let error = measure(data, &other, scratch.path()).expect_err("another run");
        assert!(matches!(error, EvalError::OtherRun { .. }), "{error}");
        error.to_string()
    };
    let error = refused(&|other| other.limit = Some(4), &data);
    assert!(error.contains("another samples: 3, now 4"), "{error}");
    let error = refused(&|other| other.prompt = GroundingPrompt::Nuwa, &data);
    assert!(
        error.contains("another prompt: \"family\", now \"nuwa\""),
        "{error}"
    );
    let error = refused(&|other| other.model = serde_json::json!("other"), &data);
    assert!(error.contains("another model"), "{error}");
    let error = refused(&|other| other.max_new_tokens = None, &data);
    assert!(
        error.contains("another max_new_tokens: 8, now 128"),
        "{error}"
    );
    let error = refused(&|other| other.batch = 1, &data);
    assert!(error.contains("another apart"), "{error}");
    // A line that has come from elsewhere.
    let path = scratch.path().join("records-dense.jsonl");
    let lines = fs::read_to_string(&path).expect("records");
    fs::write(&path, lines.replace("\"sample\":2", "\"sample\":3")).expect("a file");
    let error = measure(&data, &first, scratch.path()).expect_err("a foreign record");
    assert!(matches!(error, EvalError::Record { .. }), "{error}");
    assert!(
        error.to_string().contains("sample 3 is none of 0 to 2"),
        "{error}"
    );
    fs::write(&path, &lines).expect("a file");
    let error = refused(
        &|other| other.routings[0].1 = VLM.plan("pdrop@192").expect("a preset"),
        &data,
    );
    assert!(error.contains("another plan"), "{error}");
    let mut changed = open(Task::RefCoco, "RefCOCO");
    changed.fingerprint.files[0].1 += 1;
    assert!(refused(&|_| {}, &changed).contains("another data.files"));
    // A record that a hand has spoilt is not passed over.
    let path = scratch.path().join("records-dense.jsonl");
    let text = fs::read_to_string(&path).expect("records");
    fs::write(&path, text.replacen("\"sample\"", "\"simple\"", 1)).expect("a file");
    let error = measure(&data, &first, scratch.path())
        .expect_err("no record")
        .to_string();
    assert!(error.contains("line 2: it is no record"), "{error}");
    for (good, bad) in [
        ("\"score\":", "\"scores\":"),
        ("\"score\":", "\"score\":7,\"was\":"),
        ("\"average_tokens\":", "\"average_tokens\":1e308,\"was\":"),
    ] {
        assert!(text.contains(good), "{text}");
        fs::write(&path, text.replacen(good, bad, 1)).expect("a file");
        let error = measure(&data, &first, scratch.path()).expect_err(bad);
        assert!(
            error.to_string().contains("it is no record"),
            "{bad}: {error}"
        );
    }
    // The same name twice.
    let twice = settings(&["dense", "dense"]);
    let error = measure(&data, &twice, folder().path())
        .expect_err("twice")
        .to_string();
    assert!(error.contains("dense is given twice"), "{error}");
}

/// A model that has never seen words still runs through every task.
#[test]
fn questions_are_answered_and_counted() {
    for (task, name, samples, metrics) in [
        (
            Task::Pope,
            "POPE",
            12,
            &["accuracy", "precision", "recall", "F1", "answered yes"][..],
        ),
        (Task::Gqa, "GQA", 4, &["accuracy"]),
        (Task::TextVqa, "textvqa", 4, &["accuracy"]),
    ] {
        let data = open(task, name);
        let scratch = folder();
        let records = measure(&data, &settings(&["dense"]), scratch.path()).expect("a run");
        let found = summaries(&records, &Reckoning::default()).expect("a summary");
        assert_eq!((found[0].samples, found[0].errors), (samples, 0));
        let names: Vec<&str> = found[0]
            .metrics
            .iter()
            .map(|metric| &*metric.name)
            .collect();
        assert_eq!(names[..metrics.len()], *metrics);
        let of = |name: &str| names.contains(&name);
        assert_eq!(of("popular: F1"), task == Task::Pope);
        let table = report::table(&records, &found);
        assert!(table.contains(&format!("{samples} samples")), "{table}");
    }
}

#[test]
fn ones_own_pictures_are_asked_about() {
    let scratch = folder();
    let scenes = fixture("../../../zoo/assets/scenes");
    let text = fs::read(scenes.join("scenes.json")).expect("the scenes");
    let text: Vec<serde_json::Value> = serde_json::from_slice(&text).expect("JSON");
    let lines = text.iter().map(|scene| {
        let corners: Vec<f64> = { scene["box"].as_array().expect("a box") }
            .iter()
            .map(|share| share.as_f64().expect("a number") * 112.0)
            .collect();
        let image = scenes.join(scene["image"].as_str().expect("a name"));
        let line =
            serde_json::json!({"image": image, "expression": scene["expression"], "box": corners});
        line.to_string()
    });
    let mut lines: Vec<String> = lines.collect();
    let image = scenes.join("063.png");
    let asked = |answer: &str| {
        let line = serde_json::json!({"image": image, "question": "find the large cyan square", "answer": answer});
        line.to_string()
    };
    lines.push(asked("nothing"));
    lines
        .push(serde_json::json!({"image": "none.png", "question": "?", "answer": "x"}).to_string());
    // Width and height for the second corner.
    let box_of = serde_json::json!({"image": image, "expression": "?", "box": [60, 20, 62, 114]});
    lines.push(box_of.to_string());
    let file = scratch.path().join("own.jsonl");
    fs::write(&file, lines.join("\n")).expect("a file");
    let data = Data::open(Task::Own, "all", &file).expect("good lines");
    let mut settings = settings(&["dense"]);
    settings.on_error = reroute_eval::OnError::Skip;
    let records = measure(&data, &settings, scratch.path()).expect("a run");
    let found = summaries(&records, &Reckoning::default()).expect("a summary");
    assert_eq!(
        (found[0].samples, found[0].errors, found[0].pictures),
        (9, 2, 8)
    );
    let of = |name: &str| {
        let found = found[0].metrics.iter().find(|metric| metric.name == name);
        found.expect(name).value
    };
    // Of the eight scenes the model takes two for others: the topmost large shape, and what is nearest the diamond.
    assert_eq!(of("accuracy at IoU 0.5"), 0.75);
    assert_eq!(of("accuracy of answers"), 0.0);
    let error = records[0].records[&9].error.as_deref().expect("an error");
    assert!(error.contains("none.png"), "{error}");
    let error = records[0].records[&10].error.as_deref().expect("an error");
    assert!(error.contains("112 × 112 pixels"), "{error}");
    // Another picture under the same questions is another run.
    fs::write(&file, lines.join("\n").replace("063.png", "052.png")).expect("a file");
    let other = Data::open(Task::Own, "all", &file).expect("good lines");
    assert_ne!(other.fingerprint.questions, data.fingerprint.questions);
}
