//! What must hold for every method.

use proptest::prelude::*;
use reducers::ReducerError;
use reducers::encoder::{
    CdPruner, DivPrune, EncoderShape, FasterVlm, HiPrune, PruMerge, Tap, VScan, VisPruner,
    VisionZip,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::support::{CLIP, Method, Picture, QWEN};

/// Methods, whether they need a class token, and whether a picture may say how many tokens it keeps.
fn methods() -> [(Method, bool, bool); 10] {
    let adaptive = PruMerge {
        adaptive: true,
        ..PruMerge::plus()
    };
    [
        (Box::new(VisionZip::default()), false, false),
        (Box::new(DivPrune::default()), false, false),
        (Box::new(HiPrune::default()), false, false),
        (Box::new(VScan::default()), false, false),
        (Box::new(CdPruner::default()), false, false),
        (Box::new(FasterVlm::default()), true, false),
        (Box::new(VisPruner::default()), true, false),
        (Box::new(PruMerge::plus()), true, false),
        (Box::new(PruMerge::default()), true, true),
        (Box::new(adaptive), true, true),
    ]
}

/// Methods that work behind an encoder.
fn methods_of(encoder: EncoderShape) -> impl Iterator<Item = (Method, bool)> {
    let works = move |needs_class: bool| encoder.class_token || !needs_class;
    let methods = methods().into_iter().filter(move |method| works(method.1));
    methods.map(|(method, _, adaptive)| (method, adaptive))
}

fn pictures() -> impl Strategy<Value = (Picture, usize)> {
    let tall_or_wide = (1_usize..13, 1_usize..13);
    (tall_or_wide, any::<[bool; 2]>(), any::<u64>(), 0.0..1.0).prop_map(
        |((rows, columns), [class_token, coarse], seed, share)| {
            let encoder = if class_token { CLIP } else { QWEN };
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
            let left = picture.left(&*method, keep);
            if adaptive {
                prop_assert!((1..=keep).contains(&left.len()));
            } else {
                prop_assert_eq!(left.len(), keep);
            }
            prop_assert!(left.keys().flatten().all(|&place| place < picture.tokens()));
            prop_assert!(left.values().flatten().all(|value| value.is_finite()));
            prop_assert_eq!(&left, &picture.left(&*method, keep));
        }
    }

    #[test]
    fn to_keep_all_is_to_change_nothing((picture, _) in pictures()) {
        let tokens = picture.tokens();
        let features = picture.tap(Tap::Features).columns();
        for (method, adaptive) in methods_of(picture.encoder) {
            if !adaptive {
                let left = picture.left(&*method, tokens);
                let found: Vec<Vec<f64>> = left.values().cloned().collect();
                prop_assert!(left.keys().copied().eq((0..tokens).map(Some)));
                prop_assert_eq!(found, features.clone());
            }
        }
    }
}

/// Wherever it is in what a method decides by.
#[test]
fn nan_is_refused() {
    for encoder in [CLIP, QWEN] {
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
    for encoder in [CLIP, QWEN] {
        for (method, adaptive) in methods_of(encoder) {
            for value in [0.0, 0.25] {
                let mut picture = Picture::random([3, 4], encoder, 0);
                for tap in method.needs(&encoder).unwrap() {
                    let mut shown = picture.tap(tap);
                    shown.values.fill(value);
                    picture.shown.insert(tap, shown);
                }
                let left = picture.left(&*method, 5);
                assert!(left.len() == 5 || adaptive);
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
