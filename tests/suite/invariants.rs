//! What routing promises, each promise a test that carries its name.

use proptest::prelude::*;
use reducers::{
    Action, Cost, HiddenLayout, KvType, ReducerError, Schedule, Score, Stage, Waiting, top_k,
};
use reroute::{DecoderConfig, DecoderLayer, Prefill, RerouteError, RopeConfig};

use crate::reference::Reference;
use crate::support::{
    Backend, Case, Sample, VOCAB, any_action, case, cases, columns, decode, decoder, gap, pack,
    prefill_one, selections, unusual, values, zeroed,
};

/// Logits, hidden states, cache lengths and three decoding steps are the same to the bit.
fn assert_identical(case: &Case, mut a: Prefill<Backend>, mut b: Prefill<Backend>) {
    assert_eq!(a.trace.rows, b.trace.rows);
    assert_eq!(a.cache.lengths(0), b.cache.lengths(0));
    for (a, b) in a.hidden_states.iter().zip(&b.hidden_states) {
        assert_eq!(a.rows, b.rows);
        assert_eq!(columns(&a.values), columns(&b.values));
    }
    assert_eq!(values(a.logits.clone()), values(b.logits.clone()));
    let decoder = case.decoder();
    let tokens = [1, VOCAB as u32 - 1, 7];
    assert_eq!(
        decode(&decoder, &mut a, &tokens),
        decode(&decoder, &mut b, &tokens)
    );
}

/// The same decisions with everything kept.
fn keep_all(schedule: &Schedule) -> Schedule {
    let stages = schedule
        .stages()
        .iter()
        .map(|stage| Stage::ratio(stage.layer, 1.0));
    Schedule::new(schedule.action(), schedule.monotonic(), stages.collect()).unwrap()
}

/// The same stages under another action.
fn with_action(schedule: &Schedule, action: Action, monotonic: bool) -> Schedule {
    Schedule::new(action, monotonic, schedule.stages().to_vec()).unwrap()
}

/// A plain model of `layers` layers, for tests that need no other kind.
fn plain(layers: usize) -> DecoderConfig {
    DecoderConfig {
        vocab_size: VOCAB,
        hidden_size: 32,
        intermediate_size: 48,
        num_layers: layers,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        rms_norm_eps: 1e-5,
        qkv_bias: true,
        qk_norm: false,
        tie_word_embeddings: false,
        max_position_embeddings: 512,
        sliding_window: None,
        rope: RopeConfig::one_axis(1e4, 8),
    }
}

/// Three text rows, `visual` visual rows, four text rows.
fn around(visual: usize) -> Vec<bool> {
    [vec![false; 3], vec![true; visual], vec![false; 4]].concat()
}

proptest! {
    #![proptest_config(cases(64))]

    /// Deciding and keeping everything changes nothing.
    #[test]
    fn keep_ratio_one_is_the_plain_model_bit_for_bit(case in case(any_action())) {
        let (decoder, sample) = (case.decoder(), case.sample());
        let routed = prefill_one(&decoder, &sample, &keep_all(&case.schedule));
        assert!(routed.trace.decisions.iter().all(|d| d.selected == d.candidates));
        assert_identical(&case, routed, prefill_one(&decoder, &sample, &Schedule::dense()));
    }

    /// Deferred rows that never stand again might as well be gone.
    #[test]
    fn one_decision_remove_equals_reroute(case in case(any_action())) {
        let (decoder, sample) = (case.decoder(), case.sample());
        let stages = case.schedule.stages()[..1].to_vec();
        let [remove, reroute] = [Action::Remove, Action::Reroute].map(|action| {
            let schedule = Schedule::new(action, case.schedule.monotonic(), stages.clone());
            prefill_one(&decoder, &sample, &schedule.unwrap())
        });
        assert_eq!(remove.trace, reroute.trace);
        assert_identical(&case, remove, reroute);
    }

    /// Rows that are scattered after every layer are the rows that stay compact inside a stage
    /// (equivalence 9.3(a)).
    #[test]
    fn both_layouts_are_one_computation_bit_for_bit(case in unusual(any_action())) {
        let (decoder, sample) = (case.decoder(), case.sample());
        let [mut stagewise, mut per_layer] = [HiddenLayout::Stagewise, HiddenLayout::PerLayer].map(|layout| {
            let schedule = case.schedule.clone().with_layout(layout);
            prefill_one(&decoder, &sample, &schedule)
        });
        assert_eq!(stagewise.trace, per_layer.trace);
        // What only the scattered form shows: rows that wait, as they were.
        let active = stagewise.hidden_states.drain(..);
        for (active, all) in active.zip(per_layer.hidden_states.drain(..)) {
            let values = columns(&all.values);
            let of_row = |row: &usize| values[all.rows.binary_search(row).unwrap()].clone();
            let same: Vec<Vec<f32>> = active.rows.iter().map(of_row).collect();
            assert_eq!(same, columns(&active.values));
        }
        assert_identical(&case, stagewise, per_layer);
    }

    /// What a row that waited has drifted, against the slow reference's rows of both runs.
    #[test]
    fn drift_is_the_distance_from_what_a_row_would_have_become(case in case(Just(Action::Reroute))) {
        let (decoder, mut sample) = (case.decoder::<Backend>(), case.sample());
        sample.deepstack.clear();
        let reference = Reference::of(&decoder);
        let routed = reference.prefill(&sample, &case.schedule);
        prop_assume!(routed.decisions.iter().all(|decision| decision.margin > 1e-6));
        let dense = reference.prefill(&sample, &Schedule::dense());
        let drifts = decoder.drift(None, &pack(&[sample.clone()]), &case.schedule).unwrap();
        assert_eq!(drifts.len() + 1, routed.decisions.len());
        for (drift, before) in drifts.iter().zip(&routed.decisions) {
            let visual = sample.layout.visual.len();
            let waited = (0..visual).filter(|token| !before.selected.contains(token));
            assert!(drift.tokens.iter().copied().eq(waited));
            for (&token, &distance) in drift.tokens.iter().zip(&drift.distances) {
                let row = sample.layout.visual[token];
                let [routed, dense] =
                    [&routed, &dense].map(|run| &run.hidden_states[drift.layer - 1][row]);
                let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                let difference = length(&mut routed.iter().zip(dense).map(|(a, b)| a - b));
                let expected = difference / length(&mut dense.iter().copied());
                assert!((f64::from(distance) - expected).abs() < 1e-4 * expected.max(1.0));
            }
        }
    }

    /// Every layer works on every text row.
    #[test]
    fn text_rows_are_never_deferred(case in case(any_action())) {
        let sample = case.sample();
        let routed = prefill_one(&case.decoder::<Backend>(), &sample, &case.schedule);
        for (layer, output) in routed.hidden_states.iter().enumerate() {
            assert!(output.rows.is_sorted_by(|a, b| a < b));
            let is_text = |row: &&usize| sample.layout.visual.binary_search(row).is_err();
            let text: Vec<usize> = output.rows.iter().filter(is_text).copied().collect();
            assert_eq!(text, sample.text());
            assert_eq!(routed.trace.rows[layer], [output.rows.len()]);
        }
    }

    /// Changing any text row changes the answer, also when every layer is routed. A change that
    /// alters a selection would change the answer by that alone, so it is not counted.
    #[test]
    fn the_last_row_sees_every_text_row(case in case(any_action())) {
        let (decoder, sample) = (case.decoder::<Backend>(), case.sample());
        let mut stages = case.schedule.stages().to_vec();
        stages[0] = Stage::new(0, stages[0].keep);
        let schedule = Schedule::new(case.schedule.action(), false, stages).unwrap();
        let before = prefill_one(&decoder, &sample, &schedule);
        for row in sample.text() {
            let mut changed = sample.clone();
            changed.embeddings[row].iter_mut().for_each(|x| *x = 1e-1 - *x);
            let after = prefill_one(&decoder, &changed, &schedule);
            let same = selections(&before.trace.decisions) == selections(&after.trace.decisions);
            let moved = gap(&values(after.logits), &values(before.logits.clone()));
            assert!(!same || moved > 1e-6, "row {row}: {moved}");
        }
    }

    /// Causality. Under routing the last row decides which rows the layers work on, so a later row
    /// may change *whether* an earlier one is active, from the first decision on; it never changes
    /// what an active row computes: while the selections agree, every earlier hidden state is the
    /// same to the bit. Before the first decision, and in the plain model, nothing is conditional.
    #[test]
    fn changing_a_later_token_never_changes_earlier_hidden_states(
        case in case(any_action()),
        at in any::<prop::sample::Index>(),
        by in prop_oneof![Just(1e-3f32), Just(1.0)],
    ) {
        // A mean over the active visual rows is of later ones, too.
        prop_assume!(case.schedule.waiting() != Waiting::RideAlong);
        let (decoder, sample) = (case.decoder::<Backend>(), case.sample());
        let row = at.index(sample.layout.rows);
        let mut changed = sample.clone();
        changed.embeddings[row].iter_mut().for_each(|x| *x += by);
        let text = sample.layout.visual.binary_search(&row).is_err();
        for schedule in [Schedule::dense(), keep_all(&case.schedule), case.schedule.clone()] {
            let before = prefill_one(&decoder, &sample, &schedule);
            let after = prefill_one(&decoder, &changed, &schedule);
            for (layer, (before, after)) in
                before.hidden_states.iter().zip(&after.hidden_states).enumerate()
            {
                if before.rows != after.rows {
                    assert!(layer >= schedule.stages()[0].layer);
                    break;
                }
                let earlier = before.rows.partition_point(|&other| other < row);
                let (before, after) = (columns(&before.values), columns(&after.values));
                assert_eq!(before[..earlier], after[..earlier], "layer {layer}");
                assert!(!text || before[earlier] != after[earlier], "layer {layer}: no effect");
            }
        }
    }

    /// Every decision: who stood, how many were chosen, in which order, and why.
    #[test]
    fn selected_indices_are_ascending_unique_and_exactly_keep_count(case in case(any_action())) {
        let sample = case.sample();
        let routed = prefill_one(&case.decoder::<Backend>(), &sample, &case.schedule);
        let visual = sample.layout.visual.len();
        let counts = case.schedule.keep_counts(visual);
        assert_eq!(routed.trace.decisions.len(), counts.len());
        let mut previous: Vec<usize> = (0..visual).collect();
        for (stage, decision) in routed.trace.decisions.iter().enumerate() {
            assert_eq!(decision.layer, case.schedule.stages()[stage].layer);
            assert_eq!(decision.selected.len(), counts[stage]);
            assert!(decision.selected.is_sorted_by(|a, b| a < b));
            match case.schedule.action() {
                Action::Remove => assert_eq!(decision.candidates, previous),
                Action::Reroute => assert!(decision.candidates.iter().copied().eq(0..visual)),
            }
            assert!(decision.selected.iter().all(|t| decision.candidates.contains(t)));
            let returned: Vec<usize> =
                decision.selected.iter().filter(|t| !previous.contains(t)).copied().collect();
            assert_eq!(decision.returned, returned);
            let is_share = |s: &f32| (0.0..=1.0 + 1e-5).contains(s);
            assert!(decision.scores.iter().all(is_share));
            if !(case.schedule.monotonic() && case.schedule.action() == Action::Reroute) {
                let ranked = decision.remembered.as_ref().unwrap_or(&decision.scores);
                let best = top_k(ranked, counts[stage]).unwrap();
                let best: Vec<usize> = best.iter().map(|&i| decision.candidates[i]).collect();
                assert_eq!(decision.selected, best);
            }
            let rows: Vec<usize> = routed.hidden_states[decision.layer].rows.clone();
            let active = |token: &usize| rows.contains(&sample.layout.visual[*token]);
            assert!((0..visual).filter(active).eq(decision.selected.iter().copied()));
            previous = decision.selected.clone();
        }
    }

    /// Scores that are equal to the bit, because the keys of the decision layers are zero.
    #[test]
    fn ties_go_to_the_lower_index(case in case(Just(Action::Reroute))) {
        let decoder = case.decoder::<Backend>();
        let mute = |layer: &DecoderLayer<Backend>| {
            let mut layer = layer.clone();
            layer.self_attn = zeroed(layer.self_attn);
            layer
        };
        let layers = decoder.layers().iter().map(mute).collect();
        let decoder = decoder.with_layers(layers).unwrap();
        // The last row alone: it sees every key.
        let stages = case.schedule.stages().iter().map(|stage| stage.by(Score::default()));
        let schedule = Schedule::new(Action::Reroute, false, stages.collect()).unwrap();
        let routed = prefill_one(&decoder, &case.sample(), &schedule);
        for decision in &routed.trace.decisions {
            assert!(decision.scores.iter().all(|score| *score == decision.scores[0]));
            assert!(decision.selected.iter().copied().eq(0..decision.selected.len()));
        }
    }

    /// No order can be had from NaN, wherever it comes from; nothing is selected by accident.
    #[test]
    fn nan_scores_are_an_error(
        case in case(any_action()),
        at in any::<prop::sample::Index>(),
        poison in prop_oneof![Just(f32::NAN), Just(f32::INFINITY)],
    ) {
        let (decoder, mut sample) = (case.decoder::<Backend>(), case.sample());
        let row = at.index(sample.layout.rows);
        sample.embeddings[row][0] = poison;
        let error = decoder
            .prefill(&pack(&[sample]), &case.schedule, Default::default())
            .unwrap_err();
        let named = matches!(error, RerouteError::Reducer(ReducerError::NanScore { .. }));
        assert!(named, "{error}");
    }

    /// A layer's cache holds exactly the rows the layer worked on, then one more per token.
    #[test]
    fn cache_lengths_are_text_plus_keep_count(case in case(any_action())) {
        let (decoder, sample) = (case.decoder::<Backend>(), case.sample());
        let mut routed = prefill_one(&decoder, &sample, &case.schedule);
        let visual = case
            .schedule
            .visual_tokens_per_layer(case.config.num_layers, sample.layout.visual.len());
        let expected: Vec<usize> = visual.map(|v| v + sample.text().len()).collect();
        assert_eq!(routed.cache.lengths(0), expected);
        assert_eq!(routed.cache.next_position(0), sample.layout.next_position);
        decode(&decoder, &mut routed, &[3, 4]);
        let longer: Vec<usize> = expected.iter().map(|rows| rows + 2).collect();
        assert_eq!(routed.cache.lengths(0), longer);
        assert_eq!(routed.cache.next_position(0), sample.layout.next_position + 2);
    }

    /// The accounting of `reducers::cost` is what really is in memory.
    #[test]
    fn cache_bytes_equal_predicted_bytes(case in case(any_action())) {
        let sample = case.sample();
        let routed = prefill_one(&case.decoder::<Backend>(), &sample, &case.schedule);
        let (visual, text) = (sample.layout.visual.len(), sample.text().len());
        let cost = Cost::of(&case.config.shape(), &case.schedule, visual, text, KvType::F32);
        assert_eq!(routed.cache.bytes(0), cost.kv_bytes);
        assert_eq!(routed.cache.lengths(0), cost.rows);
    }

    /// A returned row comes back as it left, to the byte. The layer of the second decision is made
    /// an identity (its projections are zero), so its output shows what it was given.
    #[test]
    fn deferred_rows_are_untouched(
        config in crate::support::model(),
        layout in crate::support::layout(),
        [first, second] in [0..3usize, 1..4usize],
        ratio in 0.1..0.9f64,
        seed in any::<u64>(),
    ) {
        let second = (first + second).min(config.num_layers - 1);
        prop_assume!(first < second);
        let decoder = decoder::<Backend>(&config, seed);
        let sample = Sample::random(&layout, &config, seed);
        let mut layers = decoder.layers().to_vec();
        layers[second] = zeroed(layers[second].clone());
        let decoder = decoder.with_layers(layers).unwrap();
        let stages = vec![Stage::ratio(first, ratio), Stage::ratio(second, 1.0)];
        let schedule = Schedule::new(Action::Reroute, false, stages).unwrap();
        let routed = prefill_one(&decoder, &sample, &schedule);

        let left_as = match first {
            0 => sample.embeddings.clone(),
            _ => columns(&routed.hidden_states[first - 1].values),
        };
        let came_back = columns(&routed.hidden_states[second].values);
        let [left, back] = &routed.trace.decisions[..] else { panic!("two decisions") };
        assert_eq!(left.selected.len() + back.returned.len(), sample.layout.visual.len());
        for &token in &back.returned {
            let row = sample.layout.visual[token];
            assert_eq!(left_as[row], came_back[row], "row {row}");
        }
    }

    /// A token once dismissed ranks behind all others: it comes back only where there is room left.
    #[test]
    fn monotonic_schedules_only_pick_from_the_previous_selection(
        case in case(Just(Action::Reroute)),
    ) {
        let schedule = with_action(&case.schedule, Action::Reroute, true);
        let routed = prefill_one(&case.decoder::<Backend>(), &case.sample(), &schedule);
        for pair in routed.trace.decisions.windows(2) {
            let [before, after] = [&pair[0].selected, &pair[1].selected];
            match after.len() <= before.len() {
                true => assert!(after.iter().all(|token| before.contains(token))),
                false => assert!(before.iter().all(|token| after.contains(token))),
            }
        }
    }

    /// Routing keeps no state: an image prompt leaves nothing behind for the text that follows it.
    #[test]
    fn a_prompt_without_an_image_takes_the_dense_path(
        case in case(any_action()),
        rows in 1..12usize,
    ) {
        let decoder = case.decoder::<Backend>();
        let text = Sample::random(&vec![false; rows], &case.config, case.seed);
        let dense = prefill_one(&decoder, &text, &Schedule::dense());
        prefill_one(&decoder, &case.sample(), &case.schedule);
        let routed = prefill_one(&decoder, &text, &case.schedule);
        assert!(routed.trace.decisions.is_empty());
        assert_identical(&case, routed, dense);
    }
}

/// Each decision asks anew. An implementation that goes on with the scores of the first decision
/// (a bug the reference once had) selects the same tokens at every stage.
#[test]
fn stage_selections_differ_between_stages() {
    let stages = [1, 3, 4].map(|layer| Stage::count(layer, 8)).to_vec();
    let schedule = Schedule::new(Action::Reroute, false, stages).unwrap();
    for seed in 0..20 {
        let config = plain(5);
        let sample = Sample::random(&around(32), &config, seed);
        let routed = prefill_one(&decoder::<Backend>(&config, seed), &sample, &schedule);
        for pair in routed.trace.decisions.windows(2) {
            assert_ne!(pair[0].selected, pair[1].selected, "seed {seed}");
            assert!(!pair[1].returned.is_empty(), "seed {seed}");
            assert_ne!(pair[0].scores, pair[1].scores, "seed {seed}");
        }
    }
}

/// Monotonic rerouting is *not* removal: it scores among all rows, removal among the survivors, and
/// the mean over heads of probabilities with other denominators can rank otherwise.
#[test]
fn monotonic_rerouting_may_differ_from_removal() {
    let stages = vec![Stage::count(0, 24), Stage::count(2, 12), Stage::count(3, 4)];
    let selected = |action, seed| {
        let config = plain(4);
        let schedule = Schedule::new(action, true, stages.clone()).unwrap();
        let sample = Sample::random(&around(32), &config, seed);
        let routed = prefill_one(&decoder::<Backend>(&config, seed), &sample, &schedule);
        selections(&routed.trace.decisions)
    };
    let differs = |&seed: &u64| selected(Action::Remove, seed) != selected(Action::Reroute, seed);
    let count = (0..20).filter(differs).count();
    assert!((1..20).contains(&count), "{count} of 20");
}
