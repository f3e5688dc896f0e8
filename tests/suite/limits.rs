//! Where the context ends, and what else a decoder refuses.

use std::ops::ControlFlow;

use reducers::{Action, ReducerError, Schedule, Stage};
use reroute::{DecoderConfig, FinishReason, GenerationOptions, RerouteError, RopeConfig, generate};

use crate::support::{Backend, Sample, VOCAB, decoder, pack, values};

/// Positions of the model of these tests.
const CONTEXT: usize = 16;

fn config() -> DecoderConfig {
    DecoderConfig {
        vocab_size: VOCAB,
        hidden_size: 32,
        intermediate_size: 48,
        num_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        rms_norm_eps: 1e-5,
        qkv_bias: false,
        qk_norm: true,
        tie_word_embeddings: true,
        max_position_embeddings: CONTEXT,
        sliding_window: None,
        rope: RopeConfig::one_axis(1e4, 8),
    }
}

/// Visual rows but for the first and the last.
fn sample(rows: usize) -> Sample {
    let layout: Vec<bool> = (0..rows).map(|row| row > 0 && row + 1 < rows).collect();
    Sample::random(&layout, &config(), 1)
}

fn routed() -> Schedule {
    Schedule::new(Action::Reroute, false, vec![Stage::count(1, 2)]).unwrap()
}

#[test]
fn a_prompt_longer_than_the_context_is_a_typed_error() {
    let decoder = decoder::<Backend>(&config(), 0);
    for schedule in [Schedule::dense(), routed()] {
        let prefill = |rows| decoder.prefill(&pack(&[sample(rows)]), &schedule, Default::default());
        assert!(prefill(CONTEXT).is_ok());
        let error = prefill(CONTEXT + 1).unwrap_err();
        let named = matches!(
            error,
            RerouteError::ContextLength { needed, available, .. }
                if needed == CONTEXT + 1 && available == CONTEXT
        );
        assert!(named, "{error}");
    }
}

/// The last token is chosen by the last position and needs none of its own.
#[test]
fn generation_ends_with_the_context() {
    let decoder = decoder::<Backend>(&config(), 0);
    for rows in [CONTEXT - 3, CONTEXT - 1, CONTEXT] {
        let prompt = pack(&[sample(rows)]);
        let mut prefill = decoder
            .prefill(&prompt, &routed(), Default::default())
            .unwrap();
        let options = GenerationOptions {
            max_new_tokens: 100,
            ..Default::default()
        };
        let mut streamed = Vec::new();
        let mut on_token = |_, token| {
            streamed.push(token);
            ControlFlow::Continue(())
        };
        let (logits, cache) = (prefill.logits, &mut prefill.cache);
        let seen = [Vec::new()];
        let answers = generate(&decoder, logits, cache, &seen, &options, &mut on_token).unwrap();
        let answer = answers[0].as_ref().unwrap();
        assert_eq!(answer.finish, FinishReason::Context);
        assert_eq!(answer.tokens.len(), CONTEXT - rows + 1);
        assert_eq!(answer.tokens, streamed);
        assert_eq!(cache.next_position(0), CONTEXT as i64);
        let error = decoder.decode(&[(0, 1)], cache).unwrap_err();
        assert!(
            matches!(error, RerouteError::ContextLength { .. }),
            "{error}"
        );
    }
}

/// A step that is refused takes nothing.
#[test]
fn tokens_that_cannot_be_fed_leave_the_cache_as_it_was() {
    let decoder = decoder::<Backend>(&config(), 0);
    let prompt = pack(&[sample(CONTEXT - 2), sample(6)]);
    let prefill = decoder.prefill(&prompt, &routed(), Default::default());
    let mut cache = prefill.unwrap().cache;
    let before = cache.lengths(0);
    let error = decoder.decode(&[(1, 4), (0, 1), (0, 2), (0, 3)], &mut cache);
    let too_long = matches!(
        error,
        Err(RerouteError::ContextLength { needed, available: CONTEXT, .. }) if needed == CONTEXT + 1
    );
    assert!(too_long, "{error:?}");
    let error = decoder.decode(&[(0, 1), (0, VOCAB as u32)], &mut cache);
    let unknown = matches!(error, Err(RerouteError::TokenId { id, .. }) if id == VOCAB as u32);
    assert!(unknown, "{error:?}");
    assert_eq!(cache.lengths(0), before);
    assert_eq!(cache.next_position(0), CONTEXT as i64 - 2);
    decoder.decode(&[(0, 1), (0, 2)], &mut cache).unwrap();
}

/// In a batch, the sample that is at its end leaves the others to go on.
#[test]
fn a_sample_at_its_end_does_not_stop_the_batch() {
    let decoder = decoder::<Backend>(&config(), 0);
    let answer = |samples: &[Sample]| {
        let mut prefill = decoder
            .prefill(&pack(samples), &routed(), Default::default())
            .unwrap();
        let options = GenerationOptions {
            max_new_tokens: 8,
            logits: true,
            ..Default::default()
        };
        let seen = vec![Vec::new(); samples.len()];
        let mut ignore = |_, _| ControlFlow::Continue(());
        let (logits, cache) = (prefill.logits, &mut prefill.cache);
        let answers = generate(&decoder, logits, cache, &seen, &options, &mut ignore).unwrap();
        answers.into_iter().collect::<Result<Vec<_>, _>>().unwrap()
    };
    let both = answer(&[sample(CONTEXT - 2), sample(6)]);
    assert_eq!(both[0].finish, FinishReason::Context);
    assert_eq!(both[0].tokens.len(), 3);
    assert_eq!(both[1].finish, FinishReason::Length);
    assert_eq!(both[1].tokens.len(), 8);
    assert_eq!(both[1].tokens, answer(&[sample(6)])[0].tokens);
}

/// The plain model has no scores to complain about; its logits are refused when a token is chosen.
#[test]
fn nan_logits_are_an_error() {
    let decoder = decoder::<Backend>(&config(), 0);
    let mut poisoned = sample(6);
    poisoned.embeddings[2][0] = f32::NAN;
    let prompt = pack(&[sample(5), poisoned]);
    let mut prefill = decoder
        .prefill(&prompt, &Schedule::dense(), Default::default())
        .unwrap();
    let logits = values(prefill.logits.clone());
    assert!(logits[..VOCAB].iter().all(|x| x.is_finite()));
    assert!(logits[VOCAB..].iter().all(|x| x.is_nan()));
    let options = GenerationOptions {
        max_new_tokens: 1,
        ..Default::default()
    };
    let mut ignore = |_, _| ControlFlow::Continue(());
    let seen = [Vec::new(), Vec::new()];
    let (logits, cache) = (prefill.logits, &mut prefill.cache);
    let answers = generate(&decoder, logits, cache, &seen, &options, &mut ignore).unwrap();
    assert_eq!(answers[0].as_ref().unwrap().finish, FinishReason::Length);
    let error = answers[1].as_ref().unwrap_err();
    assert!(
        matches!(error, RerouteError::NotANumber { sample: 1, .. }),
        "{error}"
    );
}

/// A schedule made for a deeper model is refused before anything runs.
#[test]
fn a_decision_beyond_the_last_layer_is_an_error() {
    let decoder = decoder::<Backend>(&config(), 0);
    let schedule = Schedule::new(Action::Remove, false, vec![Stage::ratio(3, 0.5)]).unwrap();
    let error = decoder
        .prefill(&pack(&[sample(6)]), &schedule, Default::default())
        .unwrap_err();
    let named = matches!(
        error,
        RerouteError::Reducer(ReducerError::LayerDepth { layer: 3, .. })
    );
    assert!(named, "{error}");
}

/// Prompts that contradict themselves are described, not run.
#[test]
fn malformed_prompts_are_errors() {
    let decoder = decoder::<Backend>(&config(), 0);
    let refused = |change: &dyn Fn(&mut Sample)| {
        let mut sample = sample(6);
        change(&mut sample);
        let error = decoder
            .prefill(&pack(&[sample]), &routed(), Default::default())
            .unwrap_err();
        assert!(matches!(error, RerouteError::Prompt(_)), "{error}");
    };
    refused(&|sample| sample.layout.rows = 5);
    refused(&|sample| sample.layout.rows = 7);
    refused(&|sample| sample.layout.visual = vec![2, 1]);
    refused(&|sample| sample.layout.visual = vec![1, 1]);
    refused(&|sample| sample.layout.visual = vec![1, 9]);
    refused(&|sample| sample.layout.visual = vec![1, 5]);
    refused(&|sample| sample.positions.iter_mut().for_each(|p| p.push(0)));
    refused(&|sample| sample.embeddings.iter_mut().for_each(|e| e.push(0.0)));
}
