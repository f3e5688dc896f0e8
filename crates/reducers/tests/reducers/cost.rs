//! Costs at 576 visual and 64 text tokens, to the printed digits: operations in units of 10¹²,
//! caches in MiB (2²⁰).

use reducers::presets::find;
use reducers::{Action, Cost, DecoderShape, KvType, Schedule, Stage};

const LLAVA_1_5_7B: DecoderShape = DecoderShape {
    num_layers: 32,
    hidden_size: 4096,
    num_attention_heads: 32,
    num_key_value_heads: 32,
    head_dim: 128,
    intermediate_size: 11008,
};

const QWEN2_5_VL_7B: DecoderShape = DecoderShape {
    num_layers: 28,
    hidden_size: 3584,
    num_attention_heads: 28,
    num_key_value_heads: 4,
    head_dim: 128,
    intermediate_size: 18944,
};

/// Preset; layers, share of dense in percent, reference scorer, lean scorer; cache in all, cache of
/// visual tokens.
type Row = (&'static str, f64, f64, f64, f64, f64, f64);

/// Asserts that `found` is `printed` rounded to `digits` decimals (either way at a half).
fn assert_printed(found: f64, printed: f64, digits: i32, what: &str) {
    let half = 0.5 * 10_f64.powi(-digits);
    assert!(
        (found - printed).abs() <= half + 1e-9,
        "{what}: {found} is not {printed}"
    );
}

/// What the reference implementation would spend on all decisions of a schedule.
fn reference_scorer(shape: &DecoderShape, schedule: &Schedule) -> f64 {
    let per_layer = schedule.visual_tokens_per_layer(shape.num_layers.into(), 576);
    let per_layer: Vec<usize> = per_layer.collect();
    let before = |layer: usize| per_layer[layer - 1];
    let pool = |stage: &Stage| match schedule.action() {
        Action::Remove => before(stage.layer) + 64,
        Action::Reroute => 640,
    };
    schedule
        .stages()
        .iter()
        .map(|stage| shape.reference_scorer_flops(pool(stage)))
        .sum()
}

/// Floating-point operations of all layers, as papers count them.
fn published(cost: &Cost) -> f64 {
    cost.published_layer_flops.iter().sum()
}

fn check(shape: &DecoderShape, name: &str, schedule: &Schedule, row: Row) {
    let (_, layers, share, reference, lean, cache, visual_cache) = row;
    let cost = Cost::of(shape, schedule, 576, 64, KvType::F16);
    let dense = Cost::of(shape, &Schedule::dense(), 576, 64, KvType::F16);
    let mib = |cost: &Cost| cost.total_kv_bytes() as f64 / (1 << 20) as f64;

    assert_printed(
        published(&cost) / 1e12,
        layers,
        3,
        &format!("{name}, layers"),
    );
    let found = 100.0 * published(&cost) / published(&dense);
    assert_printed(found, share, 1, &format!("{name}, share of dense"));
    assert_printed(
        reference_scorer(shape, schedule) / 1e12,
        reference,
        4,
        &format!("{name}, reference scorer"),
    );
    assert_printed(
        cost.total_scorer_flops() / 1e12,
        lean,
        4,
        &format!("{name}, scorer"),
    );
    assert_printed(mib(&cost), cache, 2, &format!("{name}, cache"));
    let visual_only = Cost::of(shape, schedule, 576, 0, KvType::F16);
    assert_printed(
        mib(&visual_only),
        visual_cache,
        2,
        &format!("{name}, visual cache"),
    );

    let average = schedule.average_tokens(shape.num_layers.into(), 576);
    assert_printed(
        cost.average_tokens(),
        average,
        9,
        &format!("{name}, average tokens"),
    );
}

fn check_presets(shape: &DecoderShape, rows: &[Row]) {
    for &row in rows {
        let schedule = find(row.0)
            .unwrap()
            .schedule(shape.num_layers.into())
            .unwrap();
        check(shape, row.0, &schedule, row);
    }
}

#[test]
fn llava_1_5_7b() {
    check_presets(
        &LLAVA_1_5_7B,
        &[
            ("dense", 8.504, 100.0, 0.0, 0.0, 320.00, 288.00),
            ("fastv@192", 3.355, 39.4, 0.0463, 0.0142, 127.88, 95.88),
            ("pdrop@192", 3.351, 39.4, 0.1063, 0.0169, 127.67, 95.67),
            (
                "reroute-fastv@192",
                3.355,
                39.4,
                0.1852,
                0.0569,
                127.88,
                95.88,
            ),
            (
                "reroute-pdrop@192",
                3.352,
                39.4,
                0.1852,
                0.0535,
                127.73,
                95.73,
            ),
            ("fastv@128", 2.509, 29.5, 0.0463, 0.0166, 95.70, 63.70),
            ("pdrop@128", 2.512, 29.5, 0.0898, 0.0185, 95.81, 63.81),
            (
                "reroute-fastv@128",
                2.509,
                29.5,
                0.1852,
                0.0665,
                95.70,
                63.70,
            ),
            (
                "reroute-pdrop@128",
                2.507,
                29.5,
                0.1852,
                0.0633,
                95.72,
                63.72,
            ),
            ("fastv@64", 1.680, 19.8, 0.0463, 0.0190, 63.98, 31.98),
            ("pdrop@64", 1.892, 22.2, 0.0753, 0.0191, 72.22, 40.22),
            (
                "reroute-fastv@64",
                1.680,
                19.8,
                0.1852,
                0.0759,
                63.98,
                31.98,
            ),
            (
                "reroute-pdrop@64",
                1.939,
                22.8,
                0.1852,
                0.0699,
                74.06,
                42.06,
            ),
        ],
    );
}

/// The corrected schedules at 64 tokens: layers, share of dense and caches are published nowhere
/// else.
#[test]
fn llava_1_5_7b_exact() {
    for (name, layers, share, cache) in [
        ("pdrop@64-exact", 1.669, 19.6, 63.70),
        ("reroute-pdrop@64-exact", 1.670, 19.6, 63.77),
    ] {
        let schedule = find(name).unwrap().schedule(32).unwrap();
        let cost = Cost::of(&LLAVA_1_5_7B, &schedule, 576, 64, KvType::F16);
        let reference = reference_scorer(&LLAVA_1_5_7B, &schedule) / 1e12;
        let lean = cost.total_scorer_flops() / 1e12;
        check(
            &LLAVA_1_5_7B,
            name,
            &schedule,
            (name, layers, share, reference, lean, cache, cache - 32.0),
        );
    }
}

#[test]
fn llava_1_5_7b_original_papers() {
    let pdrop = [(8, 288), (16, 144), (24, 72)].map(|(layer, count)| Stage::count(layer, count));
    let fastv = [Stage::ratio(2, 0.5)];
    for (stages, row) in [
        (
            &pdrop[..],
            ("PyramidDrop", 4.404, 51.8, 0.0853, 0.0169, 167.00, 135.00),
        ),
        (
            &fastv[..],
            ("FastV", 4.867, 57.2, 0.0463, 0.0097, 185.00, 153.00),
        ),
    ] {
        let schedule = Schedule::new(Action::Remove, false, stages.to_vec()).unwrap();
        check(&LLAVA_1_5_7B, row.0, &schedule, row);
    }
}

#[test]
fn qwen2_5_vl_7b() {
    check_presets(
        &QWEN2_5_VL_7B,
        &[
            ("dense", 8.517, 100.0, 0.0, 0.0, 35.00, 31.50),
            ("fastv@192", 3.446, 40.5, 0.0217, 0.0016, 14.30, 10.80),
            ("pdrop@192", 3.378, 39.7, 0.0490, 0.0019, 14.01, 10.51),
            (
                "reroute-fastv@192",
                3.446,
                40.5,
                0.0869,
                0.0062,
                14.30,
                10.80,
            ),
            (
                "reroute-pdrop@192",
                3.393,
                39.8,
                0.0869,
                0.0059,
                14.08,
                10.58,
            ),
            ("fastv@128", 2.610, 30.6, 0.0217, 0.0018, 10.83, 7.33),
            ("pdrop@128", 2.547, 29.9, 0.0413, 0.0020, 10.57, 7.07),
            (
                "reroute-fastv@128",
                2.610,
                30.6,
                0.0869,
                0.0073,
                10.83,
                7.33,
            ),
            (
                "reroute-pdrop@128",
                2.563,
                30.1,
                0.0869,
                0.0069,
                10.65,
                7.15,
            ),
            ("fastv@64", 1.788, 21.0, 0.0217, 0.0021, 7.41, 3.91),
            ("pdrop@64", 1.942, 22.8, 0.0347, 0.0021, 8.06, 4.56),
            ("reroute-fastv@64", 1.788, 21.0, 0.0869, 0.0083, 7.41, 3.91),
            ("reroute-pdrop@64", 2.004, 23.5, 0.0869, 0.0077, 8.33, 4.83),
        ],
    );
}

#[test]
fn a_ceiling_includes_the_decisions() {
    let dense = Cost::of(&LLAVA_1_5_7B, &Schedule::dense(), 576, 64, KvType::F16);
    let schedule = find("reroute-pdrop@192").unwrap().schedule(32).unwrap();
    let routed = Cost::of(&LLAVA_1_5_7B, &schedule, 576, 64, KvType::F16);
    assert_printed(
        dense.published_flops() / routed.published_flops(),
        8.504 / (3.352 + 0.0535),
        2,
        "ceiling, as papers count",
    );
    // One row goes all the way through the last layer, however many there are.
    let tera = |rows: usize, layer: f64| {
        let last = LLAVA_1_5_7B.partial_layer_flops(rows, 1, rows);
        (last - LLAVA_1_5_7B.layer_flops(rows)) / 1e12 + layer
    };
    let last = *routed.rows.last().expect("layers");
    assert_printed(
        routed.speedup_ceiling(&dense),
        tera(640, 8.504) / tera(last, 3.352 + 0.0535),
        2,
        "ceiling",
    );
}

/// What a decision costs is what its rule computes: keys of the rows that do not go on always,
/// products of asking rows for attention, cosines to pivots for duplication, nothing for chance.
#[test]
fn decisions_cost_what_their_rule_computes() {
    use reducers::{Attention, Duplication, Keep, Query, Random, Score, ScoreLayer};
    let shape = &LLAVA_1_5_7B;
    let cost = |score: Score| {
        let stage = Stage::new(3, Keep::Count(76)).by(score);
        let schedule = Schedule::new(Action::Remove, false, vec![stage]).unwrap();
        Cost::of(shape, &schedule, 576, 64, KvType::F16).total_scorer_flops()
    };
    let (d, width) = (4096.0, 4096.0);
    let keys = 2.0 * 500.0 * d * width;
    let row = 2.0 * 640.0 * width;
    let attention = |query, layer| {
        Score::Attention(Attention {
            query,
            layer,
            ..Attention::default()
        })
    };
    let (this, previous) = (ScoreLayer::This, ScoreLayer::Previous);
    let raters = 2.0 * 576.0 * 64.0 * d;
    for (score, expected) in [
        (Score::default(), keys + row),
        (Score::Random(Random::default()), keys),
        (Score::Encoder, keys),
        (
            Score::Duplication(Duplication::default()),
            keys + 2.0 * 8.0 * 576.0 * d,
        ),
        (
            attention(Query::LastMean(3), this),
            keys + 3.0 * row + 2.0 * 2.0 * d * width,
        ),
        (attention(Query::LastMean(3), previous), keys + 3.0 * row),
        (
            attention(Query::Raters, previous),
            keys + 64.0 * row + raters,
        ),
    ] {
        assert_eq!(cost(score), expected, "{score:?}");
    }
}

/// Numbers as large as a user may type have a cost, and no overflow.
#[test]
fn absurd_numbers_are_only_large() {
    let schedule = find("reroute-pdrop@64").unwrap().schedule(32).unwrap();
    let most = usize::MAX;
    let cost = Cost::of(&LLAVA_1_5_7B, &schedule, most, most, KvType::F32);
    assert!(cost.total_flops().is_finite());
    assert_eq!(cost.total_kv_bytes(), u64::MAX);
    assert!(schedule.average_tokens(32, most) > 0.0);
    assert!(cost.average_tokens().is_finite());
    let deepest = DecoderShape {
        num_layers: u16::MAX,
        ..LLAVA_1_5_7B
    };
    let mut cost = Cost::of(&deepest, &schedule, most, most, KvType::F32);
    cost.text_tokens = most;
    assert_eq!(cost.average_tokens(), 0.0);
}

/// The types in the order of their bytes; a scale for each head and row of keys, and of values.
#[test]
fn bytes_of_the_cache_are_those_of_its_numbers_and_scales() {
    let numbers = 2 * 10 * 4 * 128;
    let scales = 2 * 10 * 4 * 4;
    let bytes = KvType::ALL.map(|kv| QWEN2_5_VL_7B.kv_bytes(10, kv));
    assert_eq!(
        bytes,
        [4 * numbers, 2 * numbers, 2 * numbers, numbers + scales]
    );
    assert_eq!(
        KvType::ALL.map(|kv| kv.to_string()),
        ["f32", "f16", "bf16", "int8"]
    );
}
