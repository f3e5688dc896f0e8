//! Bad use of every public function is an error, and changes nothing.

use burn::tensor::{DType, Int, Tensor};
use reducers::{
    Action, Attention, DecisionView, HeadReduce, Heads, ReducerError, Schedule, Score, ScoreLayer,
    Scorer, Stage,
};
use reroute::{
    DecoderConfig, GenerationOptions, KeptRows, KvCache, Prompt, RerouteError, RopeConfig,
    RopeScaling, Router, generate, interleave,
};

use crate::support::{
    B, CONTEXT, DEVICE, HIDDEN, LAYERS, Random, VOCAB, cast, config, decoder, decoder_of, observed,
    prompt, schedule, values,
};

macro_rules! refused {
    ($result:expr, $error:pat) => {
        match $result {
            Err(error) => assert!(matches!(error, $error), "{error}"),
            Ok(_) => panic!("accepted: {}", stringify!($result)),
        }
    };
}

/// After a refusal the cache is what it was: the same token gives the same logits.
fn assert_intact(cache: &mut KvCache<B>, expected: &KvCache<B>) {
    assert_eq!(cache.lengths(0), expected.lengths(0));
    let decoder = decoder(1);
    let [a, b] = [cache, &mut expected.clone()]
        .map(|cache| values(decoder.decode(&[(0, 1)], cache).unwrap()));
    assert_eq!(a, b);
}

#[test]
fn a_step_that_cannot_be_taken() {
    let decoder = decoder(1);
    let before = observed(&decoder, &prompt(&[4, 2], 1), &Schedule::dense());
    let before = before.unwrap().cache;
    let mut cache = before.clone();
    refused!(decoder.decode(&[], &mut cache), RerouteError::NoTokens);
    refused!(
        decoder.decode(&[(0, 1), (2, 1)], &mut cache),
        RerouteError::Sample {
            sample: 2,
            samples: 2
        }
    );
    refused!(
        decoder.decode(&[(usize::MAX, 1)], &mut cache),
        RerouteError::Sample { .. }
    );
    refused!(
        decoder.decode(&[(0, 1), (1, VOCAB as u32)], &mut cache),
        RerouteError::TokenId { .. }
    );
    let long = vec![(1, 1); CONTEXT];
    refused!(
        decoder.decode(&long, &mut cache),
        RerouteError::ContextLength { .. }
    );
    assert_intact(&mut cache, &before);
}

#[test]
fn a_cache_of_absurd_size() {
    let most = usize::MAX;
    for (layers, samples) in [(most, 1), (1, most), (most, most), (most, 0), (0, most)] {
        refused!(
            KvCache::<B>::new(layers, samples),
            RerouteError::Cache { .. }
        );
    }
}

#[test]
fn a_cache_of_another_decoder() {
    let prompt = prompt(&[4], 1);
    let other = |change: &dyn Fn(&mut DecoderConfig)| {
        let mut config = config();
        change(&mut config);
        let decoder = decoder_of(&config, 1);
        observed(&decoder, &prompt, &schedule(Action::Reroute, &[(1, 2)]))
            .unwrap()
            .cache
    };
    let mine = decoder(1);
    let half = cast(decoder(1), DType::F16);
    let half = {
        let mut prompt = prompt.clone();
        prompt.embeddings = prompt.embeddings.cast(DType::F16);
        observed(&half, &prompt, &Schedule::dense()).unwrap().cache
    };
    for cache in [
        KvCache::new(LAYERS + 1, 1).unwrap(),
        KvCache::new(0, 1).unwrap(),
        other(&|config| config.num_layers = 2),
        other(&|config| config.num_key_value_heads = 4),
        other(&|config| {
            config.head_dim = 4;
            config.rope = RopeConfig::one_axis(1e4, 4);
        }),
        half,
    ] {
        let mut decoded = cache.clone();
        refused!(
            mine.decode(&[(0, 1)], &mut decoded),
            RerouteError::Cache { .. }
        );
        let resumed = mine.resume(cache, &prompt, &Schedule::dense(), Default::default());
        refused!(resumed, RerouteError::Cache { .. });
    }
    for samples in [0, 2] {
        let cache = KvCache::new(LAYERS, samples).unwrap();
        let resumed = mine.resume(cache, &prompt, &Schedule::dense(), Default::default());
        refused!(resumed, RerouteError::Cache { .. });
    }
}

#[test]
fn a_sample_that_is_not_there_or_has_been_cut() {
    let decoder = decoder(1);
    let cache = observed(&decoder, &prompt(&[4], 1), &Schedule::dense());
    let mut cache = cache.unwrap().cache;
    refused!(cache.truncate(1, 0), RerouteError::Sample { sample: 1, .. });
    assert_eq!(cache.lengths(1), [0; LAYERS]);
    assert_eq!(cache.bytes(1), [0; LAYERS]);
    assert_eq!((cache.rows(1), cache.next_position(1)), (0, 0));
    // Rows beyond the last: nothing to forget.
    cache.truncate(0, usize::MAX).unwrap();
    decoder.decode(&[(0, 1)], &mut cache).unwrap();
    cache.truncate(0, 5).unwrap();
    refused!(
        decoder.decode(&[(0, 1)], &mut cache),
        RerouteError::Truncated { sample: 0 }
    );
    let resumed = decoder.resume(
        cache,
        &prompt(&[4], 1),
        &Schedule::dense(),
        Default::default(),
    );
    let mut resumed = resumed.unwrap();
    let mut fresh = observed(&decoder, &prompt(&[4], 1), &Schedule::dense()).unwrap();
    let [a, b] = [&mut resumed, &mut fresh]
        .map(|turn| values(decoder.decode(&[(0, 2)], &mut turn.cache).unwrap()));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn prompts_that_contradict_themselves() {
    let decoder = decoder(1);
    let tried = |change: &dyn Fn(&mut Prompt<B>)| {
        let mut prompt = prompt(&[4, 3], 1);
        change(&mut prompt);
        let drift = decoder.drift(None, &prompt, &schedule(Action::Reroute, &[(1, 2)]));
        assert!(drift.is_err());
        let schedule = Schedule::dense();
        assert!(Router::new(&decoder, prompt.clone(), schedule.clone()).is_err());
        prompt.ranges();
        decoder.prefill(&prompt, &schedule, Default::default())
    };
    type Change<'a> = &'a dyn Fn(&mut Prompt<B>);
    let wrong: [Change<'_>; 15] = [
        &|prompt| prompt.samples.clear(),
        &|prompt| prompt.samples[0].rows = 0,
        &|prompt| prompt.samples[0].rows = usize::MAX,
        &|prompt| prompt.samples.iter_mut().for_each(|s| s.rows = usize::MAX),
        &|prompt| prompt.samples[0].rows += 1,
        &|prompt| drop(prompt.samples.pop()),
        &|prompt| prompt.samples[1].visual = vec![3, 2],
        &|prompt| prompt.samples[1].visual = vec![usize::MAX],
        &|prompt| prompt.samples[1].visual = vec![7],
        &|prompt| prompt.samples[1].salience = Some(vec![0.5]),
        &|prompt| prompt.samples[1].cells = vec![[0, 0]],
        &|prompt| prompt.samples[1].next_position = -1,
        &|prompt| prompt.embeddings = Random(0).tensor([HIDDEN + 1, 17], 1.0),
        &|prompt| prompt.positions = Tensor::<B, 2, Int>::zeros([2, 17], &DEVICE),
        &|prompt| prompt.deepstack = vec![Random(0).tensor([HIDDEN, 6], 1.0)],
    ];
    for change in wrong {
        refused!(tried(change), RerouteError::Prompt(_));
    }
    refused!(
        tried(&|prompt| {
            let features = Random(0).tensor([HIDDEN, 7], 1.0);
            prompt.deepstack = vec![features; LAYERS + 1];
        }),
        RerouteError::Prompt(_)
    );
    refused!(
        tried(&|prompt| prompt.samples[0].next_position = i64::MAX),
        RerouteError::ContextLength { .. }
    );
    for dtype in [DType::F16, DType::BF16] {
        refused!(
            tried(&|prompt| prompt.embeddings = prompt.embeddings.clone().cast(dtype)),
            RerouteError::Type { .. }
        );
        refused!(
            tried(&|prompt| {
                let features = Random(0).tensor([HIDDEN, 7], 1.0);
                prompt.deepstack = vec![features.cast(dtype)];
            }),
            RerouteError::Type { .. }
        );
    }
    let deep = schedule(Action::Remove, &[(LAYERS, 1)]);
    refused!(
        decoder.prefill(&prompt(&[4], 1), &deep, Default::default()),
        RerouteError::Reducer(ReducerError::LayerDepth { .. })
    );
    let missing = Attention {
        heads: HeadReduce::Only(Heads::new([0, 64]).unwrap()),
        ..Attention::default()
    };
    let stages = vec![Stage::count(1, 2).by(Score::Attention(missing))];
    let missing = Schedule::new(Action::Remove, false, stages).unwrap();
    refused!(
        decoder.prefill(&prompt(&[4], 1), &missing, Default::default()),
        RerouteError::Reducer(ReducerError::Head { head: 64, .. })
    );
    let stage = Stage::count(1, 2).with_stride(2);
    let strided = Schedule::new(Action::Remove, false, vec![stage]).unwrap();
    let mut blind = prompt(&[4], 1);
    blind.samples[0].cells.clear();
    refused!(
        decoder.prefill(&blind, &strided, Default::default()),
        RerouteError::Prompt(_)
    );
}

#[test]
fn embeddings_of_what_is_not_there() {
    let decoder = decoder(1);
    refused!(decoder.embed(&[]), RerouteError::NoTokens);
    refused!(
        decoder.embed(&[0, VOCAB as u32]),
        RerouteError::TokenId { .. }
    );
    refused!(decoder.embed(&[u32::MAX]), RerouteError::TokenId { .. });

    let visual = [Some(Random(1).tensor::<2>([HIDDEN, 2], 1.0))];
    let slot = |id: u32| (id == 9).then_some(0);
    assert!(decoder.embed_prompt(&[1, 9, 9, 2], &visual, slot).is_ok());
    for ids in [vec![], vec![1, 9], vec![9, 9, 9], vec![1]] {
        let embedded = decoder.embed_prompt(&ids, &visual, slot);
        refused!(embedded, RerouteError::Prompt(_));
    }
    let text = decoder.embed_prompt(&[99, 9, 9], &visual, slot);
    refused!(text, RerouteError::TokenId { id: 99, .. });
    for beyond in [1, 2, usize::MAX] {
        let source = |id: u32| (id == 9).then_some(beyond);
        let embedded = decoder.embed_prompt(&[1, 9], &visual, source);
        refused!(embedded, RerouteError::Prompt(_));
    }

    let some = |features, columns| Some(Random(1).tensor::<2>([features, columns], 1.0));
    let tried = |order: &[usize], sources: &[Option<Tensor<B, 2>>]| interleave(order, sources);
    refused!(tried(&[], &[]), RerouteError::Prompt(_));
    refused!(tried(&[0], &[]), RerouteError::Prompt(_));
    refused!(tried(&[1], &[some(4, 1)]), RerouteError::Prompt(_));
    refused!(tried(&[0], &[None]), RerouteError::Prompt(_));
    refused!(tried(&[0], &[some(4, 2)]), RerouteError::Prompt(_));
    refused!(
        tried(&[0, 1], &[some(4, 1), some(5, 1)]),
        RerouteError::Prompt(_)
    );
    let half = some(4, 1).map(|x| x.cast(DType::F16));
    refused!(tried(&[0, 1], &[some(4, 1), half]), RerouteError::Prompt(_));

    let kept = |rows: &[usize]| KeptRows {
        rows: rows.to_vec(),
        ..Default::default()
    };
    assert_eq!(kept(&[0, 0, 2]).of(&[5, 6, 7]).unwrap(), [5, 5, 7]);
    refused!(kept(&[0, 3]).of(&[5, 6, 7]), RerouteError::Prompt(_));
    refused!(kept(&[1, 0]).of(&[5, 6, 7]), RerouteError::Prompt(_));
    refused!(kept(&[0]).of::<u32>(&[]), RerouteError::Prompt(_));
}

#[test]
fn layers_and_heads_of_other_sizes() {
    let mine = decoder(1);
    refused!(mine.clone().with_layers(vec![]), RerouteError::Config(_));
    let change: [&dyn Fn(&mut DecoderConfig); 4] = [
        &|config| config.hidden_size = 24,
        &|config| config.intermediate_size = 24,
        &|config| config.num_key_value_heads = 1,
        &|config| config.num_attention_heads = 8,
    ];
    for change in change {
        let mut config = config();
        change(&mut config);
        let mut layers = mine.layers().to_vec();
        layers[2] = decoder_of(&config, 1).layers()[0].clone();
        let built = mine.clone().with_layers(layers);
        refused!(built, RerouteError::Layer { layer: 2, .. });
    }
    let states = |features, rows| Random(1).tensor::<2>([features, rows], 1.0);
    assert!(mine.logits(states(HIDDEN, 2)).is_ok());
    refused!(mine.logits(states(HIDDEN + 1, 2)), RerouteError::Prompt(_));
}

#[test]
fn configurations_that_make_no_sense() {
    let tried = |change: &dyn Fn(&mut DecoderConfig)| {
        let mut config = config();
        change(&mut config);
        config.rope.axes();
        config.init::<B>(&DEVICE)
    };
    let llama3 = |low_freq_factor, high_freq_factor, trained| RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: trained,
    };
    for scaling in [
        RopeScaling::Linear { factor: 0.0 },
        RopeScaling::Linear { factor: f64::NAN },
        llama3(4.0, 1.0, 8),
        llama3(1.0, 1.0, 8),
        llama3(1.0, 4.0, 0),
        llama3(f64::INFINITY, 4.0, 8),
    ] {
        let built = tried(&|config| config.rope.scaling = scaling);
        refused!(built, RerouteError::Config(_));
    }
    for theta in [0.0, -1.0, f64::NAN, 1e300, 1e-300] {
        refused!(
            tried(&|config| config.rope.theta = theta),
            RerouteError::Config(_)
        );
    }
    for axis in [3, usize::MAX] {
        refused!(
            tried(&|config| config.rope.axis_of_frequency[1] = axis),
            RerouteError::Config(_)
        );
    }
    refused!(
        tried(&|config| config.num_layers = 0),
        RerouteError::Config(_)
    );
}

/// Scores for other rows than those that were shown.
struct Miscounted(usize);

impl Scorer<B> for Miscounted {
    fn score(&self, _: &dyn DecisionView<B>) -> Result<Tensor<B, 1>, ReducerError> {
        Ok(Tensor::zeros([self.0], &DEVICE))
    }
}

#[test]
fn a_scorer_that_cannot_count() {
    let (decoder, prompt) = (decoder(1), prompt(&[4], 1));
    let schedule = schedule(Action::Reroute, &[(1, 2)]);
    for given in [1, 8, 10] {
        let cache = KvCache::new(LAYERS, 1).unwrap();
        let scorer = Miscounted(given);
        let options = Default::default();
        let routed = decoder.resume_by(Some(&scorer), cache, &prompt, &schedule, options);
        refused!(routed, RerouteError::Scores { expected: 9, .. });
    }
}

/// A row that is not at the decision has no query, in whichever layer.
#[test]
fn a_scorer_that_asks_for_rows_that_are_not_there() {
    struct Beyond(ScoreLayer, bool);
    impl Scorer<B> for Beyond {
        fn score(&self, view: &dyn DecisionView<B>) -> Result<Tensor<B, 1>, ReducerError> {
            let rows = view.rows();
            for row in [rows, usize::MAX] {
                let found = view.queries(self.0, &[0, row], self.1);
                assert!(matches!(found, Err(ReducerError::Row { .. })));
            }
            view.queries(self.0, &[rows], self.1)?;
            Ok(Tensor::zeros([rows], &DEVICE))
        }
    }
    let (decoder, prompt) = (decoder(1), prompt(&[4], 1));
    let schedule = schedule(Action::Reroute, &[(1, 2)]);
    for layer in [ScoreLayer::This, ScoreLayer::Previous] {
        for rope in [false, true] {
            let (cache, options) = (KvCache::new(LAYERS, 1).unwrap(), Default::default());
            let scorer = Beyond(layer, rope);
            let routed = decoder.resume_by(Some(&scorer), cache, &prompt, &schedule, options);
            refused!(
                routed,
                RerouteError::Reducer(ReducerError::Row { row: 9, rows: 9 })
            );
        }
    }
}

/// Scores of all samples are read at once, whatever type a rule computes in.
#[test]
fn a_scorer_of_another_type() {
    struct Counted(Option<DType>);
    impl Scorer<B> for Counted {
        fn score(&self, view: &dyn DecisionView<B>) -> Result<Tensor<B, 1>, ReducerError> {
            let rows = Tensor::<B, 1, Int>::arange(0..view.rows() as i64, &DEVICE).float();
            let half = self.0.filter(|_| view.candidates().len() == 4);
            Ok(half.map_or(rows.clone(), |dtype| rows.cast(dtype)))
        }
    }
    let (decoder, prompt) = (decoder(1), prompt(&[4, 5], 1));
    let schedule = schedule(Action::Reroute, &[(1, 2)]);
    let routed = |dtype| {
        let (cache, options) = (KvCache::new(LAYERS, 2).unwrap(), Default::default());
        let scorer = Counted(dtype);
        let routed = decoder.resume_by(Some(&scorer), cache, &prompt, &schedule, options);
        values(routed.unwrap().logits)
    };
    assert_eq!(routed(Some(DType::F16)), routed(None));
}

#[test]
fn hidden_states_of_another_type() {
    let (decoder, prompt) = (decoder(1), prompt(&[4], 1));
    let schedule = schedule(Action::Reroute, &[(1, 2)]);
    let states = prompt.embeddings.clone().cast(DType::F64);
    refused!(decoder.logits(states.clone()), RerouteError::Type { .. });
    let mut router = Router::new(&decoder, prompt.clone(), schedule.clone()).unwrap();
    let nothing = KvCache::new(LAYERS, 1).unwrap();
    let entered = router.enter(1, states, &nothing, None);
    refused!(entered, RerouteError::Type { .. });
}

#[test]
fn a_router_that_is_entered_wrongly() {
    let (decoder, prompt) = (decoder(1), prompt(&[4], 1));
    let schedule = schedule(Action::Reroute, &[(1, 2)]);
    let mut router = Router::new(&decoder, prompt.clone(), schedule.clone()).unwrap();
    let nothing = KvCache::new(LAYERS, 1).unwrap();
    for shape in [[HIDDEN, 8], [HIDDEN + 1, 9]] {
        let states = Random(1).tensor(shape, 1.0);
        let entered = router.enter(1, states, &nothing, None);
        refused!(entered, RerouteError::Prompt(_));
    }
    let states = prompt.embeddings.clone();
    for layer in [LAYERS, usize::MAX] {
        let entered = router.enter(layer, states.clone(), &nothing, None);
        refused!(entered, RerouteError::Prompt(_));
    }
    for foreign in [KvCache::new(LAYERS - 1, 1), KvCache::new(LAYERS, 2)] {
        let entered = router.enter(1, states.clone(), &foreign.unwrap(), None);
        refused!(entered, RerouteError::Cache { .. });
    }
    let routed = router.enter(1, states, &nothing, None);
    assert_eq!(routed.unwrap().keys.dims()[1], 7);
}

#[test]
fn generation_with_what_does_not_belong_together() {
    let decoder = decoder(1);
    let prefill = observed(&decoder, &prompt(&[4, 2], 1), &Schedule::dense()).unwrap();
    let options = GenerationOptions::default();
    let tried = |logits: [usize; 2], prompts: usize, cache: &KvCache<B>| {
        let go_on = &mut |_, _| std::ops::ControlFlow::Continue(());
        let logits = Random(1).tensor(logits, 1.0);
        let prompts = vec![Vec::new(); prompts];
        let mut cache = cache.clone();
        generate(&decoder, logits, &mut cache, &prompts, &options, go_on)
    };
    let cache = &prefill.cache;
    assert!(tried([2, VOCAB], 2, cache).is_ok());
    refused!(tried([1, VOCAB], 2, cache), RerouteError::Prompt(_));
    refused!(tried([2, VOCAB + 1], 2, cache), RerouteError::Prompt(_));
    refused!(tried([2, VOCAB], 1, cache), RerouteError::Prompt(_));
    refused!(
        tried([2, VOCAB], 2, &KvCache::new(LAYERS, 1).unwrap()),
        RerouteError::Prompt(_)
    );
    refused!(
        tried([1, VOCAB], 1, &KvCache::new(2, 1).unwrap()),
        RerouteError::Cache { .. }
    );
}
