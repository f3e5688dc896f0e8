//! What must hold for every method.

use burn::tensor::Tensor;
use proptest::prelude::*;
use reducers::ReducerError;
use reducers::encoder::{
    CdPruner, DivPrune, EncoderMethod, EncoderReducer, EncoderShape, FasterVlm, HiPrune, Nuwa,
    PruMerge, Reduction, Seen, Tap, VScan, VisPruner, VisionZip, Weights, reduce,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::support::{CLIP, DINOV2, Flex, Method, Picture, QWEN, SIGLIP};

const TOWERS: [EncoderShape; 4] = [CLIP, QWEN, SIGLIP, DINOV2];

/// Every built-in method that works behind an encoder, and whether the picture may say how many tokens
/// it keeps. Nüwa, which mixes whatever it keeps, has tests of its own.
fn methods_of(encoder: EncoderShape) -> impl Iterator<Item = (Method, bool)> {
    let by_name = EncoderMethod::NAMES.iter().map(|name| {
        let text = format!(r#"{{"{name}": {{}}}}"#);
        serde_json::from_str(&text).unwrap()
    });
    let adaptive = PruMerge {
        adaptive: true,
        ..PruMerge::plus()
    };
    let forms = [PruMerge::plus(), adaptive].map(EncoderMethod::PruMerge);
    let methods = by_name.chain(forms).filter(move |method: &EncoderMethod| {
        method.name() != Nuwa::NAME && method.works_behind(&encoder).is_ok()
    });
    methods.map(|method| {
        let adaptive = matches!(&method, EncoderMethod::PruMerge(method) if method.adaptive);
        (Box::new(method) as Method, adaptive)
    })
}

fn pictures() -> impl Strategy<Value = (Picture, usize)> {
    let tall_or_wide = (1_usize..13, 1_usize..13);
    let tower = prop::sample::select(TOWERS.to_vec());
    (tall_or_wide, tower, any::<bool>(), any::<u64>(), 0.0..1.0).prop_map(
        |((rows, columns), encoder, coarse, seed, share)| {
            let mut picture = Picture::random([rows, columns], encoder, seed);
            picture.coarse = coarse;
            (picture, 1 + (share * (rows * columns) as f64) as usize)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Exactly as many tokens as asked for, each at a place of its own, the same every time.
    #[test]
    fn counts_and_places((picture, keep) in pictures()) {
        for (method, adaptive) in methods_of(picture.encoder) {
            let kept = picture.kept(&*method, keep);
            if adaptive {
                prop_assert!((1..=keep).contains(&kept.len()));
            } else {
                prop_assert_eq!(kept.len(), keep);
            }
            prop_assert!(kept.keys().flatten().all(|&place| place < picture.tokens()));
            prop_assert!(kept.values().flatten().all(|value| value.is_finite()));
            prop_assert_eq!(&kept, &picture.kept(&*method, keep));
        }
    }

    #[test]
    fn to_keep_all_is_to_change_nothing((picture, _) in pictures()) {
        let tokens = picture.tokens();
        let features = picture.tap(Tap::Features).columns();
        for (method, adaptive) in methods_of(picture.encoder) {
            if !adaptive {
                let kept = picture.kept(&*method, tokens);
                let found: Vec<Vec<f64>> = kept.values().cloned().collect();
                prop_assert!(kept.keys().copied().eq((0..tokens).map(Some)));
                prop_assert_eq!(found, features.clone());
            }
        }
    }
}

/// Wherever it is in what a method decides by.
#[test]
fn nan_is_refused() {
    for encoder in TOWERS {
        for (method, _) in methods_of(encoder) {
            let mut picture = Picture::random([4, 5], encoder, 3);
            // The class token itself is kept unseen.
            let mut needs = method.needs(&encoder).unwrap();
            needs.retain(|&tap| tap != Tap::ClassToken);
            for tap in needs {
                let mut shown = picture.tap(tap);
                let last = shown.values.len() - 1;
                shown.values[last] = f32::NAN;
                picture.shown.insert(tap, shown);
                let error = picture.reduced(&*method, 7).unwrap_err();
                assert!(
                    matches!(error, ReducerError::NanScore { .. }),
                    "{tap:?}: {error}"
                );
                picture.shown.clear();
            }
        }
    }
}

/// Equal tokens, zero vectors: nothing to rank by, and still a reduction.
#[test]
fn flat_pictures() {
    for encoder in TOWERS {
        for (method, adaptive) in methods_of(encoder) {
            for value in [0.0, 0.25] {
                let mut picture = Picture::random([3, 4], encoder, 0);
                for tap in method.needs(&encoder).unwrap() {
                    let mut shown = picture.tap(tap);
                    shown.values.fill(value);
                    picture.shown.insert(tap, shown);
                }
                let kept = picture.kept(&*method, 5);
                assert!(kept.len() == 5 || adaptive);
            }
        }
    }
}

#[test]
fn settings_are_json_and_all_optional() {
    fn check<T: Serialize + DeserializeOwned + Default + PartialEq + std::fmt::Debug>(other: T) {
        assert_eq!(serde_json::from_str::<T>("{}").unwrap(), T::default());
        let text = serde_json::to_string(&other).unwrap();
        assert_eq!(serde_json::from_str::<T>(&text).unwrap(), other);
        assert!(serde_json::from_str::<T>(r#"{"unknown": 1}"#).is_err());
    }
    check(VisionZip {
        contextual: Some(3),
    });
    check(DivPrune::default());
    check(HiPrune {
        alpha: 0.3,
        object_layer: Some(4),
    });
    check(VScan {
        local_layer: Some(2),
    });
    check(CdPruner { negative: false });
    check(FasterVlm::default());
    check(VisPruner { important: 0.7 });
    check(PruMerge::plus());
}

/// Behind a tower that nothing was published for: CLIP's settings in proportion to the depth, and
/// where there is no class token, received attention for the class token's. Never Qwen-VL's.
#[test]
fn other_towers_get_clips_settings() {
    let deep = |encoder: EncoderShape| EncoderShape {
        num_layers: 27,
        feature_layer: 26,
        ..encoder
    };
    let attention = |encoder: &EncoderShape, layer| match encoder.class_token {
        true => Tap::ClassAttention { layer },
        false => Tap::ReceivedAttention { layer },
    };
    for encoder in [deep(SIGLIP), deep(DINOV2)] {
        let needs = |method: &dyn EncoderReducer<Flex>| method.needs(&encoder).unwrap();
        assert_eq!(
            needs(&VScan::default())[..2],
            [attention(&encoder, 27 * 5 / 24), attention(&encoder, 25)]
        );
        let middle = Tap::ReceivedAttention {
            layer: 27 * 9 / 24 - 1,
        };
        assert_eq!(needs(&HiPrune::default())[0], middle);
        let mean = Tap::MeanHidden {
            first: 18,
            last: 27,
        };
        assert_eq!(needs(&Nuwa::default()), [attention(&encoder, 25), mean]);
        assert_eq!(
            needs(&VisionZip::default()).contains(&Tap::ClassToken),
            encoder.class_token
        );
    }
    // 10 of 64 are contextual, whatever the picture's size.
    let picture = Picture::random([20, 20], SIGLIP, 3);
    let reduction = picture.reduced(&VisionZip::default(), 64).unwrap();
    let Weights::Parts(parts) = reduction.weights else {
        panic!("parts");
    };
    let mut sums = vec![0.0; 64];
    parts
        .iter()
        .for_each(|part| sums[part.token] += part.weight);
    assert_eq!(sums.iter().filter(|&&sum| sum > 1.5).count(), 10);
}

/// What pools and merges weighs in no more than there are tokens and neighbours to merge.
#[test]
fn parts_are_as_many_as_there_are_tokens() {
    for (method, most) in [
        ("average-pooling", 1),
        ("visionzip", 1),
        ("vscan", 1),
        ("prumerge", 33),
    ] {
        let method: EncoderMethod =
            serde_json::from_str(&format!(r#"{{"{method}": {{}}}}"#)).unwrap();
        let picture = Picture::random([16, 16], CLIP, 5);
        let reduction = picture.reduced(&method, 100).unwrap();
        let Weights::Parts(parts) = &reduction.weights else {
            panic!("{method:?}");
        };
        assert!(parts.len() <= 257 + (most - 1) * 100, "{method:?}");
    }
}

/// A reduction applied in half precision sums in single precision.
#[test]
fn many_small_parts_are_summed_in_f32() {
    use burn::tensor::FloatDType;
    let picture = Picture::random([40, 40], CLIP, 0);
    let reduction = picture
        .reduced(&EncoderMethod::AveragePooling(Default::default()), 1)
        .unwrap();
    let ones = Tensor::<Flex, 2>::ones([2, 1600], &Default::default()).cast(FloatDType::F16);
    let mean = reduction.apply(ones, None).unwrap().cast(FloatDType::F32);
    let mean: Vec<f32> = mean.into_data().to_vec().unwrap();
    assert_eq!(mean, [1.0, 1.0]);
}

/// Pictures without tokens, of other sizes than they say, or of heads that do not divide them.
#[test]
fn what_is_no_picture_is_refused() {
    let method = VisionZip::default();
    let whole = Picture::random([4, 5], CLIP, 3).seen(&method).unwrap();
    let refused = |seen: Seen<Flex>| {
        let error = reduce(&method, &seen, 7).unwrap_err();
        assert!(matches!(error, ReducerError::Picture { .. }), "{error}");
    };
    for grid in [[0, 5], [4, 0], [0, 0], [5, 5], [usize::MAX, 2]] {
        refused(Seen {
            grid,
            ..whole.clone()
        });
    }
    for num_heads in [0, 3] {
        let mut seen = whole.clone();
        seen.encoder.num_heads = num_heads;
        refused(seen);
    }
    assert!(reduce(&method, &whole, usize::MAX).is_ok());
}

/// What a reduction of one's own cannot be, and what it cannot be applied to.
#[test]
fn what_is_no_reduction_is_refused() {
    use reducers::encoder::Part;
    let refused = |reduction: Reduction<Flex>| {
        let features = Tensor::ones([2, 6], &Default::default());
        let error = reduction.apply(features, None).unwrap_err();
        assert!(matches!(error, ReducerError::Reduction { .. }), "{error}");
    };
    refused(Reduction::selection(vec![6]));
    refused(Reduction {
        places: vec![None],
        weights: Weights::Unchanged,
    });
    let part = Part {
        token: 1,
        source: 0,
        weight: 1.0,
    };
    refused(Reduction::of_parts(vec![Some(0)], vec![part]));
    refused(Reduction {
        places: vec![Some(0)],
        weights: Weights::Dense(Tensor::ones([5, 1], &Default::default())),
    });
}
