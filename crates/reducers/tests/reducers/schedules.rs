//! The released schedules and their budget-matched corrections: keep counts and true averages at
//! 576 visual tokens.

use reducers::ReducerError;
use reducers::encoder::{EncoderShape, Tower};
use reducers::presets::find;

/// A preset at a depth, the counts it keeps of 576 tokens, and the average it truly has, as
/// printed.
type Row = (&'static str, usize, &'static [usize], f64);

const LLAVA: usize = 32;
const QWEN: usize = 28;

fn check(rows: &[Row]) {
    for &(name, num_layers, counts, average) in rows {
        let schedule = find(name).unwrap().schedule(num_layers).unwrap();
        assert_eq!(
            schedule.keep_counts(576),
            counts,
            "{name} in {num_layers} layers"
        );
        let found = schedule.average_tokens(num_layers, 576);
        assert!(
            (found - average).abs() <= 0.005 + 1e-9,
            "{name} in {num_layers} layers: {found} is not {average}"
        );
    }
}

#[test]
fn released_schedules() {
    check(&[
        ("fastv@192", LLAVA, &[152], 191.75),
        ("pdrop@192", LLAVA, &[343, 204, 122, 72], 191.34),
        ("reroute-fastv@192", LLAVA, &[152; 4], 191.75),
        ("reroute-pdrop@192", LLAVA, &[259, 259, 129, 64], 191.47),
        ("fastv@128", LLAVA, &[81], 127.41),
        ("pdrop@128", LLAVA, &[263, 120, 54, 25], 127.63),
        ("reroute-fastv@128", LLAVA, &[81; 4], 127.41),
        ("reroute-pdrop@128", LLAVA, &[152, 152, 76, 38], 127.44),
        ("fastv@64", LLAVA, &[11], 63.97),
        ("pdrop@64", LLAVA, &[160, 53, 18, 6], 80.44),
        ("reroute-fastv@64", LLAVA, &[11; 4], 63.97),
        ("reroute-pdrop@64", LLAVA, &[80, 80, 40, 20], 84.13),
        ("fastv@192", QWEN, &[152], 197.43),
        ("pdrop@192", QWEN, &[343, 204, 122, 72], 192.21),
        ("reroute-fastv@192", QWEN, &[152; 4], 197.43),
        ("reroute-pdrop@192", QWEN, &[259, 259, 129, 64], 193.43),
        ("fastv@128", QWEN, &[81], 134.04),
        ("pdrop@128", QWEN, &[263, 120, 54, 25], 129.36),
        ("reroute-fastv@128", QWEN, &[81; 4], 134.04),
        ("reroute-pdrop@128", QWEN, &[152, 152, 76, 38], 130.71),
        ("fastv@64", QWEN, &[11], 71.54),
        ("pdrop@64", QWEN, &[160, 53, 18, 6], 83.46),
        ("reroute-fastv@64", QWEN, &[11; 4], 71.54),
        ("reroute-pdrop@64", QWEN, &[80, 80, 40, 20], 88.29),
    ]);
}

#[test]
fn exact_schedules() {
    check(&[
        ("fastv@64-exact", LLAVA, &[11], 63.97),
        ("reroute-fastv@64-exact", LLAVA, &[11; 4], 63.97),
        ("pdrop@64-exact", LLAVA, &[124, 26, 5, 1], 63.41),
        ("reroute-pdrop@64-exact", LLAVA, &[46, 46, 23, 11], 63.53),
        ("fastv@192-exact", QWEN, &[145], 191.18),
        ("reroute-fastv@192-exact", QWEN, &[145; 4], 191.18),
        ("pdrop@192-exact", QWEN, &[342, 203, 121, 72], 191.57),
        (
            "reroute-pdrop@192-exact",
            QWEN,
            &[256, 256, 128, 64],
            192.00,
        ),
        ("fastv@128-exact", QWEN, &[74], 127.79),
        ("reroute-fastv@128-exact", QWEN, &[74; 4], 127.79),
        ("pdrop@128-exact", QWEN, &[260, 117, 53, 24], 127.64),
        ("reroute-pdrop@128-exact", QWEN, &[147, 147, 73, 36], 127.43),
        ("fastv@64-exact", QWEN, &[2], 63.50),
        ("reroute-fastv@64-exact", QWEN, &[2; 4], 63.50),
        ("pdrop@64-exact", QWEN, &[112, 21, 4, 1], 63.68),
        ("reroute-pdrop@64-exact", QWEN, &[38, 38, 19, 9], 63.39),
    ]);
}

/// The released ratios at 192 and 128 tokens are solutions rounded to four digits, so solving keeps
/// the same counts.
#[test]
fn exact_and_released_agree_on_llava_at_192_and_128() {
    for method in ["fastv", "pdrop", "reroute-fastv", "reroute-pdrop"] {
        for budget in [192, 128] {
            let counts = |name: &str| {
                find(name)
                    .unwrap()
                    .schedule(LLAVA)
                    .unwrap()
                    .keep_counts(576)
            };
            let (released, exact) = (
                counts(&format!("{method}@{budget}")),
                counts(&format!("{method}@{budget}-exact")),
            );
            assert_eq!(released, exact, "{method}@{budget}");
        }
    }
}

/// The unknown behind each solved schedule, to five digits.
#[test]
fn solved_ratios() {
    use reducers::Profile::{Geometric, Pyramid, Uniform};
    for (profile, layers, num_layers, budget, expected) in [
        (Uniform, &[3][..], LLAVA, 192.0, 0.26437),
        (Uniform, &[3], LLAVA, 128.0, 0.14176),
        (Uniform, &[3], LLAVA, 64.0, 0.01916),
        (Geometric, &[2, 7, 15, 23], LLAVA, 192.0, 0.59651),
        (Geometric, &[2, 7, 15, 23], LLAVA, 128.0, 0.45696),
        (Geometric, &[2, 7, 15, 23], LLAVA, 64.0, 0.21621),
        (Pyramid, &[2, 7, 15, 23], LLAVA, 192.0, 0.45022),
        (Pyramid, &[2, 7, 15, 23], LLAVA, 128.0, 0.26551),
        (Pyramid, &[2, 7, 15, 23], LLAVA, 64.0, 0.08081),
        (Uniform, &[3], QWEN, 192.0, 0.25333),
        (Uniform, &[3], QWEN, 128.0, 0.12889),
        (Uniform, &[3], QWEN, 64.0, 0.00444),
    ] {
        let ratios = reducers::budget::solve(profile, layers, num_layers, budget / 576.0).unwrap();
        assert!(
            (ratios[0] - expected).abs() <= 0.5e-5 + 1e-9,
            "{profile:?} {budget}: {}",
            ratios[0]
        );
    }
}

/// Schedules of the original papers, written as schedules of our own.
#[test]
fn original_papers() {
    use reducers::{Action, Schedule, Stage};
    let pdrop =
        [(8, 0.5), (16, 0.25), (24, 0.125)].map(|(layer, ratio)| Stage::ratio(layer, ratio));
    let pdrop = Schedule::new(Action::Remove, false, pdrop.into()).unwrap();
    assert_eq!(pdrop.keep_counts(576), [288, 144, 72]);
    assert_eq!(pdrop.average_tokens(LLAVA, 576), 270.0);
    let fastv = Schedule::new(Action::Remove, false, vec![Stage::ratio(2, 0.5)]).unwrap();
    assert_eq!(fastv.average_tokens(LLAVA, 576), 306.0);
}

/// The presets of the original papers, at the depth and tokens that they were published for.
#[test]
fn original_presets() {
    check(&[
        ("fastv-original@306", LLAVA, &[288], 306.0),
        ("pdrop-original@270", LLAVA, &[288, 144, 72], 270.0),
    ]);
    let encoder = |class_token| EncoderShape {
        num_layers: 24,
        feature_layer: 23,
        num_heads: 16,
        class_token,
        position_axes: if class_token { 1 } else { 3 },
        tower: if class_token {
            Tower::Clip
        } else {
            Tower::QwenVl
        },
    };
    let plan = |name: &str, num_layers, class_token| {
        let preset = find(name).unwrap();
        preset.plan(num_layers, &encoder(class_token)).unwrap()
    };
    // Nüwa's tables: tokens of stage 1 and 2, and their average.
    for (name, entering, selected, average) in [
        ("nuwa@64", 112, 16, 64.0),
        ("nuwa@128", 224, 32, 128.0),
        ("nuwa@192", 336, 48, 192.0),
    ] {
        let plan = plan(name, LLAVA, true);
        assert_eq!(plan.entering(576), entering);
        assert_eq!(plan.schedule.stages()[0].layer, 16);
        assert_eq!(plan.schedule.keep_counts(entering), [selected]);
        assert_eq!(plan.average_tokens(LLAVA, 576), average);
    }
    for (name, entering, selected, average) in [
        ("nuwa@144", 202, 84, 147.2),
        ("nuwa@288", 346, 228, 291.2),
        ("nuwa@432", 490, 343, 421.8),
    ] {
        let plan = plan(name, QWEN, false);
        assert_eq!(plan.entering(576), entering);
        assert_eq!(plan.schedule.stages()[0].layer, 15);
        assert_eq!(plan.schedule.keep_counts(entering), [selected]);
        assert!((plan.average_tokens(QWEN, 576) - average).abs() < 0.06);
    }
    // The others' tables.
    let vscan = plan("vscan@64", LLAVA, true);
    assert_eq!(vscan.entering(576), 96);
    assert_eq!(vscan.schedule.keep_counts(96), [32]);
    assert_eq!(plan("visionzip@128", LLAVA, true).entering(576), 128);
    let sparse = plan("sparsevlm@192", LLAVA, true);
    assert_eq!(sparse.schedule.keep_counts(576), [300, 200, 110]);
    assert_eq!(
        plan("dart@128", LLAVA, true).schedule.keep_counts(576),
        [132]
    );
    let refused = find("fastervlm@64").unwrap().plan(QWEN, &encoder(false));
    assert!(matches!(refused, Err(ReducerError::Unsupported { .. })));
}
