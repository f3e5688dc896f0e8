//! From samples and visual tokens to a packed prompt.

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_flex::Flex;
use qwen_vl::QwenVl;
use reroute::{Prompt, RerouteError};
use reroute_family::{FamilyError, FamilyModel, Modality, Sample, kept_rows};
use vision_encoder::{Grid, VisionOutput};

use crate::fixture::config;

const IMAGE: u32 = 349;
const VIDEO: u32 = 350;

fn device() -> Device<Flex> {
    Default::default()
}

fn model() -> QwenVl<Flex> {
    QwenVl::new(&config("qwen3vl"), &device()).unwrap()
}

/// Visual tokens all of whose features are `first`, `first + 1`, …; DeepStack adds 100 per layer.
fn output(first: usize, tokens: usize) -> VisionOutput<Flex> {
    let features = |add: usize| {
        let row: Vec<f32> = (0..tokens)
            .map(|token| (first + token + add) as f32)
            .collect();
        let row = TensorData::new(row, [1, tokens]);
        Tensor::<Flex, 2>::from_data(row, (&device(), DType::F32)).repeat_dim(0, 96)
    };
    VisionOutput {
        tokens: features(0),
        deepstack: vec![features(100), features(200), features(300)],
    }
}

fn prompt(
    model: &QwenVl<Flex>,
    samples: &[Sample],
    images: Option<&VisionOutput<Flex>>,
    videos: Option<&VisionOutput<Flex>>,
) -> Result<Prompt<Flex>, FamilyError> {
    let all = kept_rows(model.config(), samples, None);
    reroute_family::prompt(model, samples, &all, images, videos)
}

fn first_row(tensor: &Tensor<Flex, 2>) -> Vec<f32> {
    tensor.clone().narrow(0, 0, 1).into_data().to_vec().unwrap()
}

/// A video of two frames (split by text) before an image of two tokens; then an image alone; then text.
fn samples() -> Vec<Sample> {
    let grid = |t, w| Grid { t, h: 2, w };
    vec![
        Sample {
            ids: vec![7, VIDEO, 8, VIDEO, 9, IMAGE, IMAGE, 10],
            image_grids: vec![grid(1, 4)],
            video_grids: vec![grid(2, 2)],
            ..Default::default()
        },
        Sample {
            ids: vec![IMAGE, 11],
            image_grids: vec![grid(1, 2)],
            ..Default::default()
        },
        Sample {
            ids: vec![12, 13],
            ..Default::default()
        },
    ]
}

#[test]
fn slots_are_filled_in_order_from_images_and_videos() {
    let model = model();
    let (images, videos) = (output(10, 3), output(20, 2));
    let prompt = prompt(&model, &samples(), Some(&images), Some(&videos)).unwrap();
    let text = first_row(&model.decoder().embed(&[7, 8, 9, 10, 11, 12, 13]).unwrap());
    let [a, b, c, d, e, f, g] = text[..] else {
        panic!("{text:?}")
    };
    let expected = [a, 20., b, 21., c, 10., 11., d, 12., e, f, g];
    assert_eq!(first_row(&prompt.embeddings), expected);
    for (layer, features) in prompt.deepstack.iter().enumerate() {
        let add = 100. * (layer + 1) as f32;
        let visual = [20., 21., 10., 11., 12.].map(|feature| feature + add);
        assert_eq!(first_row(features), visual);
    }
    let visual: Vec<&[usize]> = prompt
        .samples
        .iter()
        .map(|sample| &sample.visual[..])
        .collect();
    assert_eq!(visual, [&[1, 3, 5, 6][..], &[0], &[]]);
    let rows: Vec<usize> = prompt.samples.iter().map(|sample| sample.rows).collect();
    assert_eq!(rows, [8, 2, 2]);
    let next: Vec<i64> = prompt
        .samples
        .iter()
        .map(|sample| sample.next_position)
        .collect();
    assert_eq!(next, [8, 2, 2]);
    let widths: Vec<i64> = prompt
        .positions
        .narrow(0, 2, 1)
        .into_data()
        .iter()
        .collect();
    assert_eq!(widths, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 1]);
}

#[test]
fn text_alone_has_no_deepstack_features() {
    let prompt = prompt(&model(), &samples()[2..], None, None).unwrap();
    assert!(prompt.deepstack.is_empty());
    assert_eq!(prompt.positions.dims(), [3, 2]);
}

#[test]
fn visual_tokens_of_other_inputs_are_refused() {
    let (images, videos) = (output(10, 3), output(20, 2));
    let error = prompt(&model(), &samples(), Some(&videos), Some(&videos)).unwrap_err();
    let named = matches!(
        error,
        FamilyError::VisualTokens {
            modality: Modality::Image,
            slots: 3,
            tokens: 2
        }
    );
    assert!(named, "{error}");
    let error = prompt(&model(), &samples(), Some(&images), None).unwrap_err();
    let named = matches!(
        error,
        FamilyError::VisualTokens {
            modality: Modality::Video,
            slots: 2,
            tokens: 0
        }
    );
    assert!(named, "{error}");
    let without_taps = VisionOutput {
        deepstack: Vec::new(),
        ..images
    };
    let error = prompt(&model(), &samples(), Some(&without_taps), Some(&videos)).unwrap_err();
    assert!(
        matches!(error, FamilyError::Reroute(RerouteError::Prompt(_))),
        "{error}"
    );
}

#[test]
fn ids_outside_the_vocabulary_and_empty_prompts_are_refused() {
    let sample = |ids: &[u32]| Sample {
        ids: ids.to_vec(),
        ..Default::default()
    };
    let error = prompt(&model(), &[sample(&[1, 384])], None, None).unwrap_err();
    let named = matches!(
        error,
        FamilyError::Reroute(RerouteError::TokenId {
            id: 384,
            vocab_size: 384
        })
    );
    assert!(named, "{error}");
    for samples in [&[][..], &[sample(&[])]] {
        assert!(prompt(&model(), samples, None, None).is_err());
    }
}
