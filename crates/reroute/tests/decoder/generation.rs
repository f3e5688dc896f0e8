//! How generation starts, goes on and ends.

use std::ops::ControlFlow;

use burn::tensor::DType;
use reducers::Schedule;
use reroute::{
    Decoder, DecoderLayer, FinishReason, Generation, GenerationOptions, Place, Prompt,
    RerouteError, generate,
};

use crate::support::{B, LAYERS, cast, decoder, observed, prompt, values};

type Answers = Vec<Result<Generation, RerouteError>>;

fn answers(
    decoder: &Decoder<B>,
    prompt: &Prompt<B>,
    options: &GenerationOptions,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> Answers {
    let mut prefill = observed(decoder, prompt, &Schedule::dense()).unwrap();
    let seen = vec![Vec::new(); prompt.samples.len()];
    let (logits, cache) = (prefill.logits, &mut prefill.cache);
    generate(decoder, logits, cache, &seen, options, on_token).unwrap()
}

fn go_on(_: usize, _: u32) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn no_token_asked_for_is_an_answer_of_full_length() {
    let options = GenerationOptions {
        max_new_tokens: 0,
        ..Default::default()
    };
    let mut never = |_, _| panic!("no token was asked for");
    for answer in answers(&decoder(1), &prompt(&[3, 4], 1), &options, &mut never) {
        let answer = answer.unwrap();
        assert_eq!(answer.finish, FinishReason::Length);
        assert!(answer.tokens.is_empty());
    }
    // Who says nothing gets an answer.
    let default = answers(
        &decoder(1),
        &prompt(&[3], 1),
        &GenerationOptions::default(),
        &mut go_on,
    );
    assert!(!default[0].as_ref().unwrap().tokens.is_empty());
}

#[test]
fn after_a_break_nobody_is_called_again() {
    let options = GenerationOptions {
        max_new_tokens: 5,
        ..Default::default()
    };
    for stop_at in 1..=6 {
        let mut calls = Vec::new();
        let mut stop = |sample, token| {
            calls.push((sample, token));
            match calls.len() == stop_at {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let answers = answers(&decoder(1), &prompt(&[3, 4, 0], 1), &options, &mut stop);
        assert_eq!(calls.len(), stop_at);
        for (sample, answer) in answers.into_iter().enumerate() {
            let answer = answer.unwrap();
            let of_sample = calls.iter().filter(|call| call.0 == sample);
            assert!(of_sample.map(|call| call.1).eq(answer.tokens));
            assert_eq!(answer.finish, FinishReason::Cancelled);
        }
    }
}

/// A sample that has ended before keeps its reason.
#[test]
fn a_break_does_not_change_how_others_ended() {
    let (decoder, prompt) = (decoder(1), prompt(&[3, 4], 1));
    let mut first = None;
    let mut options = GenerationOptions {
        max_new_tokens: 4,
        ..Default::default()
    };
    let free = answers(&decoder, &prompt, &options, &mut go_on);
    options.stop_tokens = vec![free[0].as_ref().unwrap().tokens[0]];
    let mut stop = |sample, _| {
        first.get_or_insert(sample);
        match sample {
            1 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    };
    let answers = answers(&decoder, &prompt, &options, &mut stop);
    assert_eq!(answers[0].as_ref().unwrap().finish, FinishReason::Stop);
    assert_eq!(answers[1].as_ref().unwrap().finish, FinishReason::Cancelled);
}

#[test]
fn one_sample_without_numbers_fails_alone() {
    let (decoder, mut batch) = (decoder(1), prompt(&[3, 4, 5], 1));
    let options = GenerationOptions {
        max_new_tokens: 6,
        logits: true,
        ..Default::default()
    };
    let healthy = answers(&decoder, &batch, &options, &mut go_on);
    let bad = batch.ranges()[1].clone();
    let rows = batch.embeddings.clone();
    let nan = rows.clone().narrow(1, bad.start, 1) * f32::NAN;
    batch.embeddings = rows.slice_assign([0..16, bad.start..bad.start + 1], nan);
    let mut called = Vec::new();
    let mut on_token = |sample, _| {
        called.push(sample);
        ControlFlow::Continue(())
    };
    let answers = answers(&decoder, &batch, &options, &mut on_token);
    for sample in [0, 2] {
        let [answer, expected] = [&answers, &healthy].map(|all| all[sample].as_ref().unwrap());
        assert_eq!(answer.tokens, expected.tokens);
        assert_eq!(answer.finish, FinishReason::Length);
    }
    assert!(!called.contains(&1));
    let error = answers[1].as_ref().unwrap_err();
    let place = Place::Input;
    let named =
        matches!(error, RerouteError::NotANumber { sample: 1, place: p, .. } if *p == place);
    assert!(named, "{error}");
    assert!(!error.to_string().contains("--dtype"), "{error}");
}

/// The decoder with a weight of one layer multiplied, in half precision.
fn overflowing(at: usize, change: impl Fn(&mut DecoderLayer<B>)) -> Decoder<B> {
    let decoder = decoder(1);
    let mut layers = decoder.layers().to_vec();
    change(&mut layers[at]);
    cast(decoder.with_layers(layers).unwrap(), DType::F16)
}

/// Numbers beyond 65504 are found in the layer that makes them, and the remedy is named.
#[test]
fn an_overflow_is_found_in_its_layer() {
    let mut half = prompt(&[3], 1);
    half.embeddings = half.embeddings.cast(DType::F16);
    let place = |decoder: &Decoder<B>| {
        let answer = answers(decoder, &half, &Default::default(), &mut go_on).remove(0);
        let error = answer.unwrap_err();
        assert!(error.to_string().contains("--dtype bf16 or f32"), "{error}");
        match error {
            RerouteError::NotANumber { place, dtype, .. } => {
                assert_eq!(dtype, DType::F16);
                place
            }
            other => panic!("{other}"),
        }
    };
    for layer in 0..LAYERS {
        let output = overflowing(layer, |layer| {
            let weight = &mut layer.mlp.down_proj.weight;
            *weight = (weight.val() * 4e4).into();
        });
        assert_eq!(place(&output), Place::Layer(layer));
        let keys = overflowing(layer, |layer| {
            let weight = &mut layer.self_attn.v_proj.weight;
            *weight = (weight.val() * 6e4).into();
        });
        assert_eq!(place(&keys), Place::Layer(layer));
    }
    let healthy = cast(decoder(1), DType::F16);
    let answer = answers(&healthy, &half, &Default::default(), &mut go_on).remove(0);
    assert!(answer.is_ok());
}

/// Before the penalty, which changes what is drawn.
#[test]
fn logits_are_those_that_were_drawn_from() {
    let options = GenerationOptions {
        max_new_tokens: 3,
        logits: true,
        sampling: reroute::SamplingOptions {
            repetition_penalty: 2.0,
            ..Default::default()
        },
        ..Default::default()
    };
    let (decoder, prompt) = (decoder(1), prompt(&[3], 1));
    let answer = answers(&decoder, &prompt, &options, &mut go_on).remove(0);
    let answer = answer.unwrap();
    let prefill = observed(&decoder, &prompt, &Schedule::dense()).unwrap();
    assert_eq!(answer.logits[0], values(prefill.logits));
    assert_eq!(answer.logits.len(), 3);
}
