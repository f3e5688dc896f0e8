use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use burn::tensor::{DType, Tensor, TensorData};
pub use burn_flex::Flex;
use reducers::ReducerError;
use reducers::encoder::{
    EncoderReducer, EncoderShape, Reduction, Seen, Tap, Tower, Weights, reduce,
};

pub type Method = Box<dyn EncoderReducer<Flex>>;

/// The tokens of a reduction, by place, with their features.
pub type Kept = BTreeMap<Option<usize>, Vec<f64>>;

pub const CLIP: EncoderShape = EncoderShape {
    num_layers: 24,
    feature_layer: 23,
    num_heads: 4,
    class_token: true,
    position_axes: 1,
    tower: Tower::Clip,
};

pub const QWEN: EncoderShape = EncoderShape {
    num_layers: 32,
    feature_layer: 32,
    num_heads: 4,
    class_token: false,
    position_axes: 3,
    tower: Tower::QwenVl,
};

/// SigLIP, or its like.
pub const SIGLIP: EncoderShape = EncoderShape {
    class_token: false,
    tower: Tower::Other,
    ..CLIP
};

/// DINOv2, or its like.
pub const DINOV2: EncoderShape = EncoderShape {
    tower: Tower::Other,
    ..CLIP
};

/// Rows and columns of numbers, row by row.
#[derive(Debug, Clone)]
pub struct Matrix {
    pub shape: [usize; 2],
    pub values: Vec<f32>,
}

impl Matrix {
    pub fn column(&self, column: usize) -> Vec<f64> {
        let values = self.values[column..].iter().step_by(self.shape[1]);
        values.map(|&value| value.into()).collect()
    }

    pub fn columns(&self) -> Vec<Vec<f64>> {
        (0..self.shape[1]).map(|at| self.column(at)).collect()
    }

    pub fn tensor(&self) -> Tensor<Flex, 2> {
        let data = TensorData::new(self.values.clone(), self.shape);
        Tensor::from_data(data, (&Default::default(), DType::F32))
    }
}

/// A picture in which every tap shows something.
#[derive(Debug, Clone)]
pub struct Picture {
    pub grid: [usize; 2],
    pub encoder: EncoderShape,
    /// Overrides of what is otherwise random.
    pub shown: BTreeMap<Tap, Matrix>,
    pub seed: u64,
    /// Whether numbers come from a few values only, so that many are equal.
    pub coarse: bool,
}

pub const HIDDEN: usize = 16;

impl Picture {
    pub fn random(grid: [usize; 2], encoder: EncoderShape, seed: u64) -> Self {
        Self {
            grid,
            encoder,
            shown: BTreeMap::new(),
            seed,
            coarse: false,
        }
    }

    pub fn shows(mut self, tap: Tap, rows: &[&[f32]]) -> Self {
        let shape = [rows.len(), rows[0].len()];
        let values = rows.concat();
        self.shown.insert(tap, Matrix { shape, values });
        self
    }

    pub fn tokens(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    pub fn tap(&self, tap: Tap) -> Matrix {
        if let Some(shown) = self.shown.get(&tap) {
            return shown.clone();
        }
        let tokens = self.tokens();
        let shape = match tap {
            Tap::ClassToken | Tap::ClassQuery { .. } | Tap::ClassKey { .. } => [HIDDEN, 1],
            Tap::ClassAttention { .. } => [self.encoder.num_heads, tokens],
            Tap::ReceivedAttention { .. } => [1, tokens],
            Tap::Question => [HIDDEN + 8, 5],
            Tap::Embeddings => [HIDDEN + 8, tokens],
            _ => [HIDDEN, tokens],
        };
        let mut hasher = DefaultHasher::new();
        (self.seed, tap).hash(&mut hasher);
        let mut state = hasher.finish();
        let is_attention = matches!(
            tap,
            Tap::ClassAttention { .. } | Tap::ReceivedAttention { .. }
        );
        let values = (0..shape[0] * shape[1]).map(|_| {
            // Numerical Recipes' generator.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let uniform = (state >> 40) as f32 / (1_u64 << 24) as f32;
            let uniform = if self.coarse {
                (uniform * 4.0).floor() / 4.0
            } else {
                uniform
            };
            match is_attention {
                true => uniform.powi(4) / tokens as f32,
                false => 4.0 * uniform - 2.0,
            }
        });
        Matrix {
            values: values.collect(),
            shape,
        }
    }

    pub fn seen(&self, method: &dyn EncoderReducer<Flex>) -> Result<Seen<Flex>, ReducerError> {
        let taps = method.needs(&self.encoder)?.into_iter();
        Ok(Seen {
            grid: self.grid,
            taps: taps.map(|tap| (tap, self.tap(tap).tensor())).collect(),
            encoder: self.encoder,
        })
    }

    pub fn reduced(
        &self,
        method: &dyn EncoderReducer<Flex>,
        keep: usize,
    ) -> Result<Reduction<Flex>, ReducerError> {
        reduce(method, &self.seen(method)?, keep)
    }

    /// The tokens that a reduction makes of this picture, by plain loops.
    pub fn kept(&self, method: &dyn EncoderReducer<Flex>, keep: usize) -> Kept {
        let reduced = self.reduced(method, keep).unwrap();
        let mut sources = self.tap(Tap::Features).columns();
        sources.extend(self.tap(Tap::ClassToken).columns());
        let kept = reduced.places.len();
        let weights = match &reduced.weights {
            Weights::Unchanged => None,
            _ => Some(dense_weights(&reduced, sources.len())),
        };
        let token = |(at, &place): (usize, &Option<usize>)| {
            let Some(weights) = &weights else {
                return (place, sources[place.unwrap()].clone());
            };
            let mut token = vec![0.0; sources[0].len()];
            for (source, weight) in sources.iter().zip(weights[at..].iter().step_by(kept)) {
                let parts = token.iter_mut().zip(source);
                parts.for_each(|(sum, value)| *sum += f64::from(*weight) * value);
            }
            (place, token)
        };
        reduced.places.iter().enumerate().map(token).collect()
    }

    /// The cells of a selection.
    pub fn cells(&self, method: &dyn EncoderReducer<Flex>, keep: usize) -> Vec<usize> {
        let kept = self.kept(method, keep);
        kept.into_keys().map(Option::unwrap).collect()
    }
}

/// `[sources, kept]`, row by row.
pub fn dense_weights(reduction: &Reduction<Flex>, sources: usize) -> Vec<f32> {
    let sources = match &reduction.weights {
        // Without a class token, columns that nobody asks for.
        Weights::Dense(weights) => weights.dims()[0],
        _ => sources,
    };
    let unit = Tensor::eye(sources, &Default::default());
    let weights = reduction.apply(unit, None).unwrap();
    weights.into_data().to_vec().unwrap()
}

pub fn assert_same(found: &Kept, expected: &Kept, what: &str) {
    let places = |kept: &Kept| kept.keys().copied().collect::<Vec<_>>();
    assert_eq!(places(found), places(expected), "{what}");
    for (place, token) in found {
        for (found, expected) in token.iter().zip(&expected[place]) {
            let difference = (found - expected).abs();
            assert!(difference < 1e-5, "{what}, {place:?}: {found} {expected}");
        }
    }
}
