//! What a model is taught: boxes, turns, logits.

use std::sync::Arc;

use burn::tensor::Tolerance;
use burn_flex::Flex;
use reroute_finetune::Preparation;
use reroute_finetune::data::{BoxIn, Piece};
use reroute_zoo::messages::{Content, Message, Role};
use reroute_zoo::reducers::{Attention, Scorer};
use reroute_zoo::{
    Conversation, GenerationOptions, Lesson, Question, Routing, Schedule, Visual, decode, embedded,
};

use crate::{example, open};

/// Boxes are written in the model's units; what is asked is its own question.
#[test]
fn lessons_say_what_the_model_is_to_say() {
    let vlm = open();
    let preparation = Preparation::new(vlm.tutor());
    let image = decode(embedded::SCENE.image, &Default::default()).expect("a picture");
    let (width, height) = (image.width() as f64, image.height() as f64);
    let mut example = example(3, embedded::SCENE.expression);
    let corners = [0.25 * width, 0.5 * height, 0.5 * width, 0.75 * height];
    example.exchanges[0].answer = vec![Piece::Box {
        corners,
        image: 0,
        unit: BoxIn::Pixels,
    }];
    let lesson = preparation.lesson(&example).expect("a lesson");
    let answers = vlm
        .answer_logits(&[&lesson], None, Schedule::dense())
        .expect("logits");
    let text = vlm.tokenizer().decode(&answers.tokens).expect("text");
    assert_eq!(text.trim(), "[0.25, 0.50, 0.50, 0.75]");
    let (sought, _) = preparation.sought(&example).expect("one box");
    assert_eq!(sought.corners, corners);
    let asked = vlm.grounding().question(embedded::SCENE.expression);
    assert_eq!(sought.text, asked);
    // The same logits as those of the question that a user asks.
    let question = Question::about(vec![image], asked);
    let known = &answers.tokens[..answers.tokens.len() - 1];
    for preset in ["dense", "reroute-pdrop@192", "pdrop@128"] {
        let plan = vlm.plan(preset).expect("a preset");
        let expected = vlm
            .logits(&question, known, &plan)
            .expect("logits")
            .into_data();
        let seen = vlm.seen(&lesson).expect("visual tokens");
        let blind = lesson.clone().without_pixels();
        for (lesson, seen) in [(&lesson, None), (&blind, Some(&seen))] {
            let seen = seen.map(std::slice::from_ref);
            let found = vlm.answer_logits(&[lesson], seen, &plan).expect("logits");
            found.logits.into_data().assert_eq(&expected, true);
        }
    }
    // Of a box outside of its picture something is said.
    example.exchanges[0].answer = vec![Piece::Box {
        corners: [10.0, 10.0, width + 50.0, 20.0],
        image: 0,
        unit: BoxIn::Pixels,
    }];
    let refused = preparation
        .lesson(&example)
        .expect_err("outside")
        .to_string();
    assert!(
        refused.contains("line 3") && refused.contains("lies outside"),
        "{refused}"
    );
}

/// Several turns in one sequence are those turns in a conversation, packed beside others or alone.
#[test]
fn turns_are_learnt_as_in_a_conversation() {
    let vlm = open().valid();
    let preparation = Preparation::new(vlm.tutor());
    let mut several = example(0, "the red ring");
    let more = [example(1, "a blue bar"), example(2, "the large one")];
    for example in &more {
        let mut exchange = example.exchanges[0].clone();
        exchange.question.remove(0);
        several.exchanges.push(exchange);
    }
    let several = preparation.lesson(&several).expect("a lesson");
    let single = preparation
        .lesson(&example(3, "that thing"))
        .expect("a lesson");
    let logits = |lessons: &[&Lesson], preset: &str| {
        let plan = vlm.plan(preset).expect("a preset");
        vlm.answer_logits(lessons, None, &plan).expect("logits")
    };
    for preset in ["dense", "reroute-pdrop@192"] {
        let alone = [logits(&[&several], preset), logits(&[&single], preset)];
        assert_eq!(alone[0].tokens.len(), several.answer_tokens());
        let both = logits(&[&several, &single], preset);
        for (index, alone) in alone.into_iter().enumerate() {
            let rows = both
                .lessons
                .iter()
                .enumerate()
                .filter(|(_, of)| **of == index);
            let rows: Vec<usize> = rows.map(|(row, _)| row).collect();
            let tokens: Vec<u32> = rows.iter().map(|&row| both.tokens[row]).collect();
            let mut expected: Vec<(u32, f32)> = Vec::new();
            let tokens_of = alone.tokens.clone();
            let losses = alone.losses().into_data().to_vec::<f32>().expect("floats");
            expected.extend(tokens_of.into_iter().zip(losses));
            let losses = both
                .clone()
                .losses()
                .into_data()
                .to_vec::<f32>()
                .expect("floats");
            let found = tokens.into_iter().zip(rows.iter().map(|&row| losses[row]));
            let mut found: Vec<(u32, f32)> = found.collect();
            let order = |a: &(u32, f32), b: &(u32, f32)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1));
            expected.sort_by(order);
            found.sort_by(order);
            for ((token, loss), (expected_token, expected)) in found.iter().zip(&expected) {
                assert_eq!(token, expected_token);
                assert!((loss - expected).abs() < 1e-3, "{preset} {loss} {expected}");
            }
        }
    }
}

/// Questions that are asked in turn, and answered, are learnt with the logits that these answers had; and all at
/// once with the same as one by one.
#[test]
fn lessons_are_conversations_as_they_were_held() {
    let vlm = open().valid();
    let image = decode(embedded::SCENE.image, &Default::default()).expect("a picture");
    let tutor = vlm.tutor();
    let options = GenerationOptions {
        logits: true,
        ..vlm.generation_defaults()
    };
    for preset in ["dense", "reroute-pdrop@192", "reroute-pdrop-memory@128"] {
        let plan = vlm.plan(preset).expect("a preset");
        let mut held = Conversation::new(&vlm, plan.clone(), options.clone());
        let (mut exchanges, mut expected, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        for (turn, text) in ["find the red ring", "find a blue bar", "find the large one"]
            .into_iter()
            .enumerate()
        {
            let images = if turn == 0 {
                vec![image.clone()]
            } else {
                vec![]
            };
            let question = Question::about(images, text);
            let answer = held.ask(&question, |_| {}).expect("an answer");
            let mut content = vec![Content::Text(text.into())];
            if turn == 0 {
                content.insert(0, Content::Image);
            }
            let role = Role::User;
            exchanges.push((Message { role, content }, answer.text.clone()));
            tokens.extend(answer.tokens);
            expected.extend(answer.logits);
        }
        let visual = Visual::Image(image.clone());
        let shown = tutor.preprocessor().prepare(&visual).expect("a picture");
        let lesson = tutor
            .lesson(None, &exchanges, vec![shown])
            .expect("a lesson");
        let in_turn = |routing: Routing<'_, Flex>| {
            let found = vlm
                .answer_logits(&[&lesson], None, routing)
                .expect("logits");
            assert_eq!(found.tokens, tokens, "{preset}");
            found.logits.into_data().to_vec::<f32>().expect("floats")
        };
        let mut found = vec![in_turn((&plan).into())];
        if preset == "dense" {
            // A rule of one's own, which is never asked: turn by turn instead of at once.
            let scorer: Arc<dyn Scorer<Flex>> = Arc::new(Attention::default());
            found.push(in_turn(Routing {
                scorer: Some(scorer),
                ..(&plan).into()
            }));
        }
        for found in found {
            let expected = expected.iter().flatten();
            assert_eq!(found.len(), expected.clone().count());
            for (found, expected) in found.iter().zip(expected) {
                let most = 2e-3 * (1.0 + expected.abs());
                assert!(
                    (found - expected).abs() <= most,
                    "{preset}: {found} {expected}"
                );
            }
        }
    }
}

/// An answer that has the token of an image in it is learnt as any other, beside others, too.
#[test]
fn answers_may_name_the_token_of_an_image() {
    let vlm = open().valid();
    let image = decode(embedded::SCENE.image, &Default::default()).expect("a picture");
    let question = Question::about(vec![image], "find it");
    let slot = vlm.tokenizer().encode("<image>", false).expect("a token");
    assert_eq!(slot.len(), 1);
    let lessons = [[slot[0], 7, 8], [9, 7, 8]];
    let lesson = |answer: [u32; 3]| vlm.tutor().question(&question, &answer).expect("a lesson");
    let lessons = lessons.map(lesson);
    let found = vlm.answer_logits(&lessons.each_ref(), None, Schedule::dense());
    let found = found.expect("logits");
    for (index, lesson) in lessons.iter().enumerate() {
        let alone = vlm.answer_logits(&[lesson], None, Schedule::dense());
        let rows: Vec<usize> = (0..6).filter(|&row| found.lessons[row] == index).collect();
        assert_eq!(rows.len(), 3);
        let start = rows[0];
        let found = found.logits.clone().narrow(0, start, 3).into_data();
        let alone = alone.expect("logits").logits.into_data();
        found.assert_approx_eq::<f32>(&alone, Tolerance::rel_abs(1e-4, 1e-4));
    }
}

/// Without a question there is nothing to learn.
#[test]
fn a_lesson_has_an_answer() {
    let refused = open().tutor().lesson(None, &[], Vec::new());
    assert!(refused.is_err());
}
