//! Small pictures whose answer can be worked out on paper.

use std::f32::consts::{LN_2, PI};

use reducers::ReducerError;
use reducers::encoder::{
    CdPruner, DivPrune, EncoderReducer, EncoderShape, FasterVlm, HiPrune, PruMerge, Tap, VScan,
    VisPruner, VisionZip,
};

use super::support::{CLIP, Flex, Kept, Picture, QWEN, assert_same, dense_weights};

/// Tokens of one feature each, by place.
fn kept(tokens: &[(Option<usize>, f64)]) -> Kept {
    let token = |&(place, value)| (place, vec![value]);
    tokens.iter().map(token).collect()
}

fn one_headed(encoder: EncoderShape) -> EncoderShape {
    EncoderShape {
        num_heads: 1,
        ..encoder
    }
}

#[test]
fn vision_zip_adds_the_mean_of_those_like_a_target() {
    let layer = 31;
    let picture = Picture::random([1, 6], one_headed(QWEN), 0)
        .shows(Tap::Features, &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
        .shows(
            Tap::ReceivedAttention { layer },
            &[&[0.1, 0.9, 0.2, 0.3, 0.2, 0.1]],
        )
        .shows(
            Tap::Keys { layer },
            &[
                &[1.0, 7.0, 1.0, 0.0, 0.2, 0.0],
                &[0.0, 7.0, 0.1, 1.0, 1.0, -1.0],
            ],
        );
    let method = VisionZip {
        contextual: Some(2),
    };
    // Token 1 is dominant. Of 0, 2, 3, 4, 5 every second is a target, the first two of them: 0 and 3.
    // Tokens 2 and 5 are like 0, token 4 is like 3.
    let expected = [
        (Some(0), 1.0 + (3.0 + 6.0) / 2.0),
        (Some(1), 2.0),
        (Some(3), 4.0 + 5.0),
    ];
    assert_same(&picture.kept(&method, 3), &kept(&expected), "three of six");
}

/// 54 + 10, 108 + 20, 162 + 30, the class token among the first.
#[test]
fn vision_zip_divides_budgets_as_published() {
    let picture = Picture::random([24, 24], CLIP, 1);
    for (keep, contextual) in [(64, 10), (128, 20), (192, 30)] {
        let reduced = picture.reduced(&VisionZip::default(), keep).unwrap();
        let weights = dense_weights(&reduced, 24 * 24 + 1);
        let kept = reduced.places.len();
        let sum = |token: usize| weights[token..].iter().step_by(kept).sum::<f32>();
        let sums: Vec<f32> = (0..kept).map(sum).collect();
        // A token with others merged in weighs twice.
        let merged = sums.iter().filter(|&&sum| sum > 1.5).count();
        assert_eq!((sums.len(), merged), (keep, contextual));
    }
}

#[test]
fn div_prune_goes_from_farthest_to_farthest() {
    let degrees = [0.0_f32, 10.0, 90.0, 180.0].map(|degrees| degrees * PI / 180.0);
    let picture = Picture::random([2, 2], QWEN, 0).shows(
        Tap::Embeddings,
        &[&degrees.map(f32::cos), &degrees.map(f32::sin)],
    );
    let method = DivPrune::default();
    assert_eq!(picture.cells(&method, 1), [3]); // its nearest is at 90 degrees
    assert_eq!(picture.cells(&method, 2), [0, 3]);
    assert_eq!(picture.cells(&method, 3), [0, 2, 3]);
}

#[test]
fn pru_merge_adds_weighted_neighbours_and_sums_up_the_rest() {
    let layer = 23;
    // Attention: exponentials 1, 2, 1/2 and 1 for the class token, of 4.5.
    let picture = Picture::random([1, 3], CLIP, 0)
        .shows(Tap::Features, &[&[10.0, 20.0, 30.0]])
        .shows(Tap::ClassQuery { layer }, &[&[1.0]])
        .shows(Tap::ClassKey { layer }, &[&[0.0]])
        .shows(Tap::Keys { layer }, &[&[0.0, LN_2, -LN_2]]);
    let method = PruMerge {
        adaptive: false,
        neighbours: 1,
        ..PruMerge::default()
    };
    // Token 1 is like token 0 (cosine 0) rather than like token 2 (cosine -1).
    let expected = [
        (None, 10.0 / 4.5 + 30.0 * 0.5 / 4.5),
        (Some(1), 20.0 + 10.0 / 4.5),
    ];
    assert_same(&picture.kept(&method, 2), &kept(&expected), "two of three");
    let all = [(None, 10.0 / 4.5 + 20.0 * 2.0 / 4.5 + 30.0 * 0.5 / 4.5)];
    assert_same(&picture.kept(&method, 1), &kept(&all), "one of three");
}

#[test]
fn hi_prune_wraps_at_the_end_of_a_row_and_stops_at_the_end_of_the_picture() {
    let picture = |anchor: usize| {
        let mut middle = [0.0; 9];
        middle[anchor] = 1.0;
        Picture::random([3, 3], QWEN, 0).shows(Tap::ReceivedAttention { layer: 15 }, &[&middle])
    };
    let method = HiPrune {
        alpha: 1.0,
        ..HiPrune::default()
    };
    assert_eq!(picture(3).cells(&method, 5), [0, 2, 3, 4, 6]);
    let last = picture(8)
        .shows(
            Tap::ReceivedAttention { layer: 31 },
            &[&[0.1, 0.9, 0.2, 0.2, 0.0, 0.9, 0.0, 0.9, 0.9]],
        )
        .cells(&method, 5);
    assert_eq!(last, [1, 2, 5, 7, 8]); // 2 and 3 are equal
}

#[test]
fn faster_vlm_prefers_the_first_of_equals() {
    let picture = Picture::random([2, 3], CLIP, 0).shows(
        Tap::ClassAttention { layer: 22 },
        &[
            &[0.0, 0.2, 0.1, 0.3, 0.0, 0.2],
            &[0.2, 0.0, 0.1, 0.3, 0.2, 0.0],
        ],
    );
    assert_eq!(picture.cells(&FasterVlm::default(), 1), [3]);
    assert_eq!(picture.cells(&FasterVlm::default(), 3), [0, 1, 3]);
}

#[test]
fn vis_pruner_drops_duplicates_at_even_places() {
    let picture = Picture::random([1, 5], CLIP, 0)
        .shows(
            Tap::ClassAttention { layer: 22 },
            &[&[0.5, 0.4, 0.3, 0.2, 0.1]],
        )
        .shows(
            Tap::Features,
            &[&[1.0, 1.0, 0.0, -1.0, 1.0], &[1.0, 0.1, 1.0, 0.5, 0.0]],
        );
    // Token 0 is important. Of 1, 2, 3, 4 the first and third may go; 1 is like 4.
    let method = VisPruner { important: 0.25 };
    assert_eq!(picture.cells(&method, 4), [0, 2, 3, 4]);
    assert_eq!(picture.cells(&VisPruner { important: 0.4 }, 3), [0, 2, 4]);
}

#[test]
fn vscan_takes_half_by_windows_and_averages_the_rest() {
    let picture = Picture::random([1, 8], QWEN, 0)
        .shows(
            Tap::ReceivedAttention { layer: 7 },
            &[&[0.9, 0.8, 0.7, 0.0, 0.1, 0.3, 0.2, 0.1]],
        )
        .shows(
            Tap::ReceivedAttention { layer: 31 },
            &[&[0.9, 0.1, 0.2, 0.3, 0.8, 0.9, 0.0, 0.0]],
        )
        .shows(Tap::Features, &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
        .shows(
            Tap::Embeddings,
            &[
                &[1.0, 1.0, 1.0, 0.0, 0.0, -1.0, 0.1, -1.0],
                &[0.0, 0.1, 0.2, 1.0, -1.0, 0.0, 1.0, 0.1],
            ],
        );
    // Two windows of one row each give 0 and 5, the last layer 4 and 3. Tokens 1 and 2 are like 0,
    // 6 is like 3, 7 is like 5.
    let expected = [
        (Some(0), (1.0 + 2.0 + 3.0) / 3.0),
        (Some(3), (4.0 + 7.0) / 2.0),
        (Some(4), 5.0),
        (Some(5), (6.0 + 8.0) / 2.0),
    ];
    assert_same(
        &picture.kept(&VScan::default(), 4),
        &kept(&expected),
        "four of eight",
    );
}

#[test]
fn cd_pruner_asks_the_question() {
    let picture = |question: f32| {
        Picture::random([1, 3], QWEN, 0)
            .shows(Tap::Embeddings, &[&[1.0, 0.9, 0.0], &[0.0, 0.1, 1.0]])
            .shows(Tap::Question, &[&[question], &[0.0]])
    };
    // As released, the first token is the most relevant to a question that points away from it, and
    // the last, though unlike it, has nothing to say.
    let released = CdPruner::default();
    assert_eq!(picture(-1.0).cells(&released, 2), [0, 1]);
    assert_eq!(picture(1.0).cells(&released, 2), [1, 2]);
    let plain = CdPruner { negative: false };
    assert_eq!(picture(1.0).cells(&plain, 2), [0, 1]);
    // A question that tells no token from another leaves diversity alone.
    assert_eq!(picture(0.0).cells(&released, 2), [0, 2]);
}

#[test]
fn what_does_not_work_is_refused() {
    let needs = |method: &dyn EncoderReducer<Flex>, encoder| {
        let error = method.needs(&encoder).unwrap_err();
        assert!(matches!(error, ReducerError::Unsupported { .. }), "{error}");
        error.to_string()
    };
    assert!(needs(&FasterVlm::default(), QWEN).contains("no class token"));
    assert!(needs(&VisPruner::default(), QWEN).contains("no class token"));
    assert!(needs(&PruMerge::default(), QWEN).contains("no class token"));
    assert!(needs(&VisPruner { important: 1.5 }, CLIP).contains("from 0 to 1"));
    for alpha in [-0.1, f64::NAN, f64::INFINITY] {
        let method = HiPrune {
            alpha,
            ..HiPrune::default()
        };
        assert!(needs(&method, CLIP).contains("from 0 to 1"));
    }
    let method = HiPrune {
        object_layer: Some(24),
        ..HiPrune::default()
    };
    assert!(needs(&method, CLIP).contains("24 layers"));
    let method = VScan {
        local_layer: Some(32),
    };
    assert!(needs(&method, QWEN).contains("32 layers"));
}
