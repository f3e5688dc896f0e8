//! What is passed to a model that does not belong together is refused, and nothing panics.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use burn_flex::Flex;
use llava::{Llava, LlavaConfig, LlavaHfConfig};
use reducers::encoder::CdPruner;
use reducers::{Keep, Positions, ReducerError, Rest};
use reroute::{KeptRows, RerouteError};
use reroute_family::{
    EncoderStep, FamilyError, FamilyModel, KeptTokens, KeptVisuals, Modality, Pictures,
    PixelTensors, Sample, VisualTokens, kept_rows, prompt, see,
};
use serde_json::json;
use vision_encoder::{Grid, VisionError, VisionOutput};

const IMAGE: u32 = 3;
const TOKENS: usize = 16;
const HIDDEN: usize = 32;

fn device() -> Device<Flex> {
    Default::default()
}

fn model() -> Llava<Flex> {
    let config = json!({
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 40,
            "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7,
        },
        "text_config": {
            "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 40,
            "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64,
        },
        "image_token_index": IMAGE,
    });
    let config: LlavaHfConfig = serde_json::from_value(config).expect("parses");
    let config: LlavaConfig = config.resolve().expect("resolves");
    Llava::new(&config, &device()).expect("a model")
}

fn images(count: usize) -> PixelTensors<Flex> {
    PixelTensors::images(Pictures::Fixed(Tensor::ones([count, 3, 28, 28], &device())))
}

fn tokens(count: usize, width: usize) -> VisionOutput<Flex> {
    VisionOutput {
        tokens: Tensor::ones([width, count], &device()),
        deepstack: Vec::new(),
    }
}

fn sample() -> Sample {
    Sample::from([vec![1], vec![IMAGE; TOKENS], vec![2]].concat())
}

#[test]
fn pictures_that_are_none_or_of_another_kind() {
    let error = see(&model(), images(0), None, Default::default()).unwrap_err();
    assert!(
        matches!(error, FamilyError::Vision(VisionError::NoImages)),
        "{error}"
    );
    let (t, h, w) = (1, 2, 2);
    let patches = Pictures::Patches(Tensor::ones([12, 4], &device()), vec![Grid { t, h, w }]);
    for pixels in [
        PixelTensors::images(patches.clone()),
        PixelTensors {
            images: None,
            videos: Some(patches),
        },
    ] {
        let error = see(&model(), pixels, None, Default::default()).unwrap_err();
        assert!(matches!(error, FamilyError::WrongPixels { .. }), "{error}");
    }
    // Nothing to see is nothing seen.
    let seen = see(&model(), PixelTensors::default(), None, Default::default()).unwrap();
    assert!(seen.images.is_none() && seen.videos.is_none() && seen.kept.is_none());
}

#[test]
fn questions_that_are_not_one_for_each_picture() {
    let reducer = CdPruner::default();
    let step = EncoderStep {
        reducer: Arc::new(reducer.clone()),
        keep: Keep::Count(4),
        rest: Rest::Drop,
        positions: Positions::Gap,
    };
    for given in [0, 1, 3] {
        let question = Tensor::ones([HIDDEN, 2], &device());
        let questions = [vec![question; given], Vec::new()];
        let error = see(&model(), images(2), Some(&step), questions).unwrap_err();
        let named = matches!(error, FamilyError::Questions { questions, pictures: 2 } if questions == given);
        assert!(named, "{given}: {error}");
    }
}

#[test]
fn shares_that_are_none() {
    let reducer = CdPruner::default();
    for keep in [
        Keep::Ratio(f64::NAN),
        Keep::Ratio(-1.0),
        Keep::Rounded(7.0),
        Keep::Raised(f64::INFINITY),
        Keep::Count(0),
    ] {
        let step = EncoderStep {
            reducer: Arc::new(reducer.clone()),
            keep,
            rest: Rest::Drop,
            positions: Positions::Gap,
        };
        let questions = [vec![Tensor::ones([HIDDEN, 2], &device())], Vec::new()];
        let error = see(&model(), images(1), Some(&step), questions).unwrap_err();
        let named = matches!(error, FamilyError::Reducer(ReducerError::EncoderKeep));
        assert!(named, "{keep:?}: {error}");
    }
}

/// As `tokens` of another width, and with features of DeepStack.
#[test]
fn tokens_of_another_model_do_not_follow() {
    let seen = |hidden, layers: usize| VisualTokens {
        images: Some(VisionOutput {
            deepstack: vec![tokens(TOKENS, hidden).tokens; layers],
            ..tokens(TOKENS, hidden)
        }),
        ..VisualTokens::default()
    };
    for other in [seen(HIDDEN + 1, 0), seen(HIDDEN, 1)] {
        let error = seen(HIDDEN, 0).followed_by(other).unwrap_err();
        assert!(matches!(error, FamilyError::OtherTokens), "{error}");
    }
    let both = seen(HIDDEN, 1).followed_by(seen(HIDDEN, 1));
    let both = both.expect("of one model").images.expect("images");
    assert_eq!(both.deepstack[0].dims(), [HIDDEN, 2 * TOKENS]);
}

#[test]
fn slots_tokens_and_samples_of_other_numbers() {
    let model = model();
    let samples = [sample()];
    let all = kept_rows(model.config(), &samples, None);
    for given in [0, TOKENS - 1, TOKENS + 1] {
        let images = tokens(given, HIDDEN);
        let images = (given > 0).then_some(&images);
        let error = prompt(&model, &samples, &all, images, None).unwrap_err();
        let named = matches!(error, FamilyError::VisualTokens { modality: Modality::Image, slots: TOKENS, tokens } if tokens == given);
        assert!(named, "{given}: {error}");
    }
    let images = tokens(TOKENS, HIDDEN);
    for kept in [Vec::new(), vec![all[0].clone(); 2]] {
        let error = prompt(&model, &samples, &kept, Some(&images), None).unwrap_err();
        assert!(
            matches!(error, FamilyError::Samples { samples: 1, .. }),
            "{error}"
        );
    }
    for rows in [vec![0, 99], vec![2, 1]] {
        let kept = KeptRows {
            rows,
            ..KeptRows::all(0)
        };
        let error = prompt(&model, &samples, &[kept], Some(&images), None).unwrap_err();
        assert!(
            matches!(error, FamilyError::Reroute(RerouteError::Prompt(_))),
            "{error}"
        );
    }
    assert!(
        prompt(
            &model,
            &samples,
            &all,
            Some(&tokens(TOKENS, HIDDEN + 1)),
            None
        )
        .is_err()
    );
    assert!(prompt(&model, &[], &[], None, None).is_err());
    assert!(prompt(&model, &[Sample::default()], &all, None, None).is_err());
}

/// Salience of fewer tokens than are kept is no salience.
#[test]
fn what_a_reduction_says_it_kept_is_not_believed() {
    let model = model();
    let samples = [sample()];
    let kept = KeptVisuals {
        images: vec![KeptTokens {
            tokens: TOKENS,
            places: (0..TOKENS).map(Some).collect(),
            salience: Some(vec![1.0; 3]),
        }],
        ..Default::default()
    };
    let rows = kept_rows(model.config(), &samples, Some(&kept));
    assert_eq!(rows[0].rows.len(), TOKENS + 2);
    assert_eq!(rows[0].salience, None);
}
