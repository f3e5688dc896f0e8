//! Scores against those of lmms-eval's own functions (`fixtures/make_rules.py`).

use reroute_eval::score::{evalai, exact, harness_iou, leave_one_out, release_box};
use reroute_eval::{GroundingPrompt, PictureAt, Sample, Score, Task, Truth, YesNo};
use reroute_zoo::grounding::{BoxUnits, GroundingFormat};
use serde::Deserialize;

use crate::fixture;

#[derive(Deserialize)]
struct Rules {
    evalai: Vec<(String, String)>,
    votes: Vec<(String, Vec<String>, f64)>,
    exact: Vec<(String, String, f64)>,
    pope: Pope,
    boxes: Vec<(String, [f64; 4], [f64; 4], f64)>,
    prompt: String,
    text_vqa: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct Pope {
    said: Vec<String>,
    truth: Vec<String>,
    accuracy: f64,
    precision: f64,
    recall: f64,
    f1: f64,
}

fn rules() -> Rules {
    let text = std::fs::read(fixture("rules.json")).expect("the fixture");
    serde_json::from_slice(&text).expect("it is valid")
}

fn score(truth: &Truth, text: &str) -> Score {
    truth.score(&reroute_eval::score::Answered {
        text,
        found: None,
        units: BoxUnits::Normalized,
        picture: [100, 100],
    })
}

#[test]
fn answers_are_normalised_as_evalai_does() {
    for (answer, expected) in rules().evalai {
        assert_eq!(evalai(&answer), expected, "{answer:?}");
    }
}

#[test]
fn people_agree_as_in_text_vqa() {
    for (said, people, expected) in rules().votes {
        let found = leave_one_out(said.trim(), &people);
        assert!(
            (found - expected).abs() < 1e-12,
            "{said:?} {people:?}: {found}, not {expected}"
        );
        assert_eq!(score(&Truth::Answers(people), &said).score, found);
    }
}

#[test]
fn answers_match_exactly_as_in_gqa() {
    for (said, right, expected) in rules().exact {
        assert_eq!(
            f64::from(exact(&said, &right)),
            expected,
            "{said:?} {right:?}"
        );
        // Of one's own, any of several.
        let any = Truth::AnyOf(vec!["neither this".into(), right]);
        assert_eq!(score(&any, &said).score, expected);
    }
}

#[test]
fn yes_and_no_count_as_in_pope() {
    let Pope {
        said,
        truth,
        accuracy,
        precision,
        recall,
        f1,
    } = rules().pope;
    let scores = said.iter().zip(&truth);
    let scores: Vec<Score> = scores
        .map(|(said, truth)| score(&Truth::Yes(truth == "yes"), said))
        .collect();
    let scores: Vec<&Score> = scores.iter().collect();
    let right: f64 = scores.iter().map(|score| score.score).sum();
    assert!((right / scores.len() as f64 - accuracy).abs() < 1e-12);
    let numbers = YesNo::of(&scores).numbers();
    for ((name, found), expected) in numbers.into_iter().zip([precision, recall, f1]) {
        assert!((found - expected).abs() < 1e-12, "{name}");
    }
}

/// The harness has no parentheses, which the release adds.
#[test]
fn boxes_are_read_and_measured_as_in_the_harness() {
    for (answer, right, expected, iou) in rules().boxes {
        let found = release_box(&answer, BoxUnits::Normalized, [640, 480]);
        if !answer.contains('(') {
            assert_eq!(found, expected, "{answer:?}");
            let found = harness_iou(&right, &found);
            assert!((found - iou).abs() < 1e-9, "{answer:?}: {found}, not {iou}");
        }
    }
}

/// Qwen2.5-VL answers in pixels of a picture of 392×532 that was 375×500.
#[test]
fn the_release_divides_resized_pixels_by_the_size_as_given() {
    let answer = "{\"bbox_2d\": [98, 133, 196, 266], \"label\": \"x\"}";
    let found = release_box(answer, BoxUnits::ResizedPixels, [375, 500]);
    assert_eq!(found, [98.0 / 375.0, 0.266, 196.0 / 375.0, 0.532]);
    // What it is: a quarter to a half of both sides.
    let right = [0.25, 0.25, 0.5, 0.5];
    let iou = harness_iou(&right, &found);
    assert!((0.7..0.8).contains(&iou), "{iou}");
    // Shares stay shares, thousandths are divided by a thousand.
    let shares = release_box("(0.1, 0.2, 0.3, 0.4)", BoxUnits::ResizedPixels, [375, 500]);
    assert_eq!(shares, [0.1, 0.2, 0.3, 0.4]);
    let thousandths = release_box("[250, 250, 500, 500]", BoxUnits::Thousandths, [375, 500]);
    assert_eq!(thousandths, right);
    let shares = release_box("[0.1, 0.2, 0.3, 1]", BoxUnits::Thousandths, [375, 500]);
    assert_eq!(shares, [0.1, 0.2, 0.3, 1.0]);
    assert_eq!(
        release_box("nowhere", BoxUnits::Normalized, [1, 1]),
        [0.0; 4]
    );
}

#[test]
fn questions_are_asked_as_in_the_harness() {
    let rules = rules();
    let family = GroundingFormat::new("find {expression}", BoxUnits::Normalized);
    let sample = |question: &str, truth| Sample {
        index: 0,
        id: "0".into(),
        question: question.into(),
        truth,
        category: None,
        picture: PictureAt::Table { table: 0, row: 0 },
    };
    let asked = sample("the man", Truth::Box([0.0, 0.0, 1.0, 1.0]));
    let of = |prompt| Task::RefCoco.prompt(&asked, prompt, &family);
    assert_eq!(of(GroundingPrompt::Full), rules.prompt);
    assert!(rules.prompt.ends_with(&of(GroundingPrompt::Short)));
    assert_eq!(of(GroundingPrompt::Family), "find the man");
    let nuwa = "Locate the man in this image and output the bbox coordinates in JSON format.";
    assert_eq!(of(GroundingPrompt::Nuwa), nuwa);
    for (question, expected) in rules.text_vqa {
        let asked = sample(&question, Truth::Answers(vec!["x".into()]));
        let found = Task::TextVqa.prompt(&asked, GroundingPrompt::Full, &family);
        assert_eq!(found, expected);
    }
}
