//! Against published code, as `fixtures/make_encoder_methods.py` restates it.

use std::collections::BTreeMap;

use reducers::encoder::{DivPrune, HiPrune, PruMerge, Tap, VisionZip};
use safetensors::SafeTensors;

use super::support::{CLIP, Kept, Matrix, Method, Picture, QWEN, assert_same};

const FIXTURE: &[u8] = include_bytes!("../../fixtures/encoder_methods.safetensors");

/// Shape and numbers of a tensor.
fn load(name: &str) -> (Vec<usize>, Vec<f32>) {
    let fixture = SafeTensors::deserialize(FIXTURE).unwrap();
    let tensor = fixture.tensor(name).unwrap();
    let number = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
    let values = tensor.data().chunks(4).map(number).collect();
    (tensor.shape().to_vec(), values)
}

fn matrix(name: &str) -> Matrix {
    let (shape, values) = load(name);
    Matrix {
        shape: [shape[0], shape[1]],
        values,
    }
}

/// The class token's attention to patches, `[heads, patches]`, and what every patch receives.
fn attention(name: &str, class_token: bool) -> [Matrix; 2] {
    let (shape, values) = load(name);
    let (heads, rows) = (shape[0], shape[1]);
    let first = usize::from(class_token);
    let class = values
        .chunks(rows * rows)
        .flat_map(|head| &head[first..rows]);
    let received = (first..rows).map(|key| {
        let total: f64 = values[key..]
            .iter()
            .step_by(rows)
            .map(|&p| f64::from(p))
            .sum();
        (total / heads as f64) as f32
    });
    [
        Matrix {
            shape: [heads, rows - first],
            values: class.copied().collect(),
        },
        Matrix {
            shape: [1, rows - first],
            values: received.collect(),
        },
    ]
}

fn picture(case: &str) -> Picture {
    let (grid, encoder) = match case {
        "clip" => ([8, 8], CLIP),
        _ => ([5, 7], QWEN),
    };
    let mut picture = Picture::random(grid, encoder, 0);
    let shown = &mut picture.shown;
    let (last, middle) = if case == "clip" { (22, 8) } else { (31, 15) };
    let [class, received] = attention(&format!("{case}.attention"), encoder.class_token);
    let [_, earlier] = attention(&format!("{case}.shallow_attention"), encoder.class_token);
    shown.insert(Tap::ClassAttention { layer: last }, class);
    shown.insert(Tap::ReceivedAttention { layer: last }, received);
    shown.insert(Tap::ReceivedAttention { layer: middle }, earlier);
    shown.insert(Tap::Features, matrix(&format!("{case}.features")));
    shown.insert(Tap::Embeddings, matrix(&format!("{case}.embeddings")));
    for layer in [last, 23] {
        shown.insert(Tap::Keys { layer }, matrix(&format!("{case}.keys")));
    }
    if case == "clip" {
        shown.insert(Tap::ClassToken, matrix("clip.class_token"));
        shown.insert(Tap::ClassQuery { layer: 23 }, matrix("clip.query"));
        shown.insert(Tap::ClassKey { layer: 23 }, matrix("clip.class_key"));
    }
    picture
}

fn released(name: &str, picture: &Picture) -> Kept {
    let fixture = SafeTensors::deserialize(FIXTURE).unwrap();
    let places = fixture.tensor(&format!("{name}.places")).unwrap();
    let places = places.data().chunks(4).map(|bytes| {
        let place = i32::from_le_bytes(bytes.try_into().unwrap());
        usize::try_from(place).ok()
    });
    let tokens = match fixture.tensor(&format!("{name}.tokens")) {
        Ok(_) => matrix(&format!("{name}.tokens")).columns(),
        // A selection: the features of the places.
        Err(_) => {
            let features = picture.tap(Tap::Features);
            places
                .clone()
                .map(|place| features.column(place.unwrap()))
                .collect()
        }
    };
    places.zip(tokens).collect::<BTreeMap<_, _>>()
}

#[test]
fn tokens_are_those_of_published_code() {
    let plus = PruMerge {
        adaptive: true,
        ..PruMerge::plus()
    };
    let cases: [(&str, &str, &[usize], Method); 8] = [
        (
            "vision_zip",
            "clip",
            &[13, 32],
            Box::new(VisionZip::default()),
        ),
        (
            "vision_zip",
            "qwen",
            &[8, 20],
            Box::new(VisionZip::default()),
        ),
        ("div_prune", "clip", &[6, 30], Box::new(DivPrune::default())),
        ("div_prune", "qwen", &[9], Box::new(DivPrune::default())),
        ("pru_merge", "clip", &[64], Box::new(PruMerge::default())),
        ("pru_merge_plus", "clip", &[64], Box::new(plus)),
        ("hi_prune", "clip", &[20, 60], Box::new(HiPrune::default())),
        ("hi_prune", "qwen", &[28], Box::new(HiPrune::default())),
    ];
    for (method, case, keeps, reducer) in cases {
        let picture = picture(case);
        for keep in keeps {
            let name = format!("{method}.{case}.{keep}");
            let expected = released(&name, &picture);
            assert_same(&picture.kept(&*reducer, *keep), &expected, &name);
        }
    }
}
