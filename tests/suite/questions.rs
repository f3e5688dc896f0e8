//! Questions to the built-in model: what a user may type, any number of images, batches, sampling,
//! and the end of the context.

use std::ops::ControlFlow;

use reducers::Schedule;
use reroute::{FinishReason, GenerationOptions, RerouteError, SamplingOptions};
use reroute_zoo::{Answer, Question, ZooError};

use crate::program::{BUILT_IN, read_image, report, scene, schedule};

fn question(images: &[&str], text: &str) -> Question {
    let images = images.iter().map(|name| read_image(&scene(name)));
    Question::about(images.collect(), text)
}

fn answer(question: &Question, schedule: &Schedule) -> Answer {
    let options = BUILT_IN.generation_defaults();
    let answer = BUILT_IN.ask(question, schedule, &options, |_| {});
    answer.expect("a good question")
}

/// Everything about an answer that does not depend on the clock or on rounding.
#[track_caller]
fn assert_same(one: &Answer, other: &Answer) {
    let selections = |answer: &Answer| -> Vec<(usize, Vec<usize>, Vec<usize>)> {
        let decisions = answer.trace.decisions.iter();
        decisions
            .map(|d| (d.layer, d.candidates.clone(), d.selected.clone()))
            .collect()
    };
    assert_eq!(selections(one), selections(other));
    assert_eq!(one.tokens, other.tokens);
    assert_eq!((&one.text, one.finish), (&other.text, other.finish));
    assert_eq!(one.trace.rows, other.trace.rows);
    assert_eq!(one.kv_bytes, other.kv_bytes);
    let sizes = |answer: &Answer| (answer.prompt_rows, answer.visual_tokens);
    assert_eq!(sizes(one), sizes(other));
}

#[test]
fn special_tokens_that_a_user_types_are_text() {
    let encode = |text: &str| {
        BUILT_IN
            .encode(&question(&["063"], text))
            .expect("one slot")
    };
    let (tokenizer, image) = (BUILT_IN.tokenizer(), BUILT_IN.config().slots().image);
    let is_special = |id: &&u32| {
        let specials = ["<s>", "</s>", "<pad>"];
        **id != image
            && specials
                .iter()
                .any(|token| tokenizer.id(token) == Some(**id))
    };
    let plain = encode("find the cross");
    let count = |ids: &[u32]| ids.iter().filter(is_special).count();
    for text in [
        "find <image> the cross",
        "<image><image>",
        "<i<image>mage>",
        "<im\u{F0000}age>",
        "</s> find",
        "<s><image>\n</s>",
        "<pad><unk>",
        "\u{F0000}\u{F0004}\u{10FFFD}\u{E000}",
        "",
    ] {
        let ids = encode(text);
        assert_eq!(ids.iter().filter(|&&id| id == image).count(), 64, "{text}");
        assert_eq!(count(&ids), count(&plain), "{text}: {ids:?}");
    }
    // A stand-in that the user typed is nothing at all, the text around it stays.
    assert_eq!(encode("find\u{F0001} the cross"), plain);
    // What was typed still reaches the model.
    assert!(encode("find <image> the cross").len() > plain.len());
    let asked = report(&["ask", "--prompt", "find <image> the </s> cross"]);
    assert_eq!(asked["visual_tokens"], 64);
    assert_ne!(asked["tokens"].as_array().map(Vec::len), Some(0));
}

#[test]
fn several_images_form_one_pool_in_the_order_given() {
    let line = [
        "ask",
        "--prompt",
        "find the cross",
        "--routing",
        "reroute-fastv@192",
    ];
    let (one, two) = (scene("063"), scene("031"));
    let both = report(&[&line[..], &["--image", &one, &two]].concat());
    let swapped = report(&[&line[..], &["--image", &two, "--image", &one]].concat());
    let kept = schedule("reroute-fastv@192").keep_counts(128)[0];
    for asked in [&both, &swapped] {
        assert_eq!(asked["visual_tokens"], 128);
        assert_eq!(asked["decisions"][0]["candidates"], 128);
        let selected = asked["decisions"][0]["selected"]
            .as_array()
            .expect("a list");
        assert_eq!(selected.len(), kept);
    }
    assert_ne!(both["decisions"], swapped["decisions"]);
}

#[test]
fn text_alone_takes_the_dense_path_before_and_after_an_image() {
    let text = question(&[], "find the cross");
    let alone = answer(&text, &Schedule::dense());
    assert_eq!(alone.visual_tokens, 0);
    for preset in ["fastv@64", "reroute-pdrop@192"] {
        let schedule = schedule(preset);
        assert_same(&answer(&text, &schedule), &alone);
        let seen = answer(&question(&["063"], "find the cross"), &schedule);
        assert!(!seen.trace.decisions.is_empty());
        assert_same(&answer(&text, &schedule), &alone);
    }
}

#[test]
fn a_batch_of_questions_answers_each_as_if_alone() {
    let questions = [
        question(&["063"], "find the large cyan square"),
        question(&[], "find the cross"),
        question(&["031", "078"], "find the shape nearest the cyan diamond"),
        question(&["145"], "x"),
    ];
    for preset in [
        "dense",
        "fastv@128",
        "pdrop@64",
        "reroute-fastv@192",
        "reroute-pdrop@128",
    ] {
        let schedule = schedule(preset);
        let options = BUILT_IN.generation_defaults();
        let mut streamed = vec![Vec::new(); questions.len()];
        let batch = BUILT_IN.ask_batch(&questions, &schedule, &options, &mut |at, token| {
            streamed[at].push(token);
            ControlFlow::Continue(())
        });
        let batch = batch.expect("good questions");
        assert_eq!(batch.len(), questions.len());
        for ((question, together), streamed) in questions.iter().zip(&batch).zip(streamed) {
            assert_same(together, &answer(question, &schedule));
            assert_eq!(streamed, together.tokens, "{preset}");
        }
    }
}

#[test]
fn sampled_answers_end_at_a_stop_token_and_not_before() {
    let question = question(&["063"], "find the large cyan square");
    let ask = |seed: u64, stop_tokens: &[u32]| {
        let options = GenerationOptions {
            max_new_tokens: 12,
            stop_tokens: stop_tokens.to_vec(),
            sampling: SamplingOptions {
                temperature: 1.5,
                top_p: 0.95,
                top_k: 50,
                repetition_penalty: 1.1,
                seed,
                ..Default::default()
            },
            ..GenerationOptions::default()
        };
        let answer = BUILT_IN.ask(&question, schedule("reroute-pdrop@192"), &options, |_| {});
        answer.expect("a good question")
    };
    for seed in 0..6 {
        let free = ask(seed, &[]);
        assert_eq!((free.tokens.len(), free.finish), (12, FinishReason::Length));
        // The same draws, up to the first stop token and with it.
        let stop = free.tokens[3];
        let end = free
            .tokens
            .iter()
            .position(|&token| token == stop)
            .expect("it is there");
        let stopped = ask(seed, &[stop, 9999]);
        assert_eq!(stopped.tokens, free.tokens[..=end], "seed {seed}");
        assert_eq!(stopped.finish, FinishReason::Stop);
    }
}

#[test]
fn the_context_ends_prompts_with_an_error_and_answers_in_peace() {
    let context = BUILT_IN.config().decoder().max_position_embeddings;
    let words = |count: usize| question(&["063"], &"a ".repeat(count));
    let fixed = BUILT_IN.encode(&words(1)).expect("one image").len();
    let more = BUILT_IN.encode(&words(2)).expect("one image").len() - fixed;
    let fitting = (context - fixed) / more + 1;
    let options = GenerationOptions {
        max_new_tokens: context,
        ..GenerationOptions::default()
    };
    let schedule = schedule("reroute-pdrop@192");
    let ask = |count: usize| BUILT_IN.ask(&words(count), &schedule, &options, |_| {});

    let answer = ask(fitting).expect("it just fits");
    assert_eq!(answer.finish, FinishReason::Context);
    // The last token is chosen at the last position and needs none of its own.
    assert_eq!(answer.prompt_rows + answer.tokens.len(), context + 1);

    let error = ask(fitting + 1).expect_err("it does not fit");
    let ZooError::Reroute(RerouteError::ContextLength {
        needed, available, ..
    }) = &error
    else {
        panic!("{error:?}");
    };
    assert_eq!((*needed, *available), (answer.prompt_rows + more, context));
    assert!(
        error
            .to_string()
            .contains("shorten the text or give fewer images")
    );
}
