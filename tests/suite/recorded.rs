//! Operations that an autodiff backend records as one step have the gradients of the operations that they
//! stand for, and of finite differences, whichever inputs are tracked and whatever is kept for the way back.

use burn::module::{Param, ParamId};
use burn::tensor::backend::{AutodiffBackend, Backend as AnyBackend};
use burn::tensor::{DType, Tensor, TensorData};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::strategy::BalancedCheckpointing;
use reroute_layers::{
    CausalMask, LayerNorm, Linear, LowRank, RmsNorm, Rotary, Scaling, Segment, Vocabulary, Weight,
    attention, attention_on_record, gelu_tanh, quick_gelu, silu, silu_product,
};

use crate::support::{Backend, Device, Random, alone, gap, values};

type Ad = Autodiff<Backend>;

/// Computes again on the way back what is cheap.
type Saving = Autodiff<Backend, BalancedCheckpointing>;

/// The outer one records the inner one's operations, of which it knows nothing.
type Operations = Autodiff<Autodiff<Backend>>;

/// How far gradients may be apart, as a share of the largest.
const TOLERANCE: f64 = 1e-5;

/// How far a finite difference in f32 may be from what the gradient says.
const NUMERIC: f64 = 3e-3;

/// Building blocks on some inputs, by their sizes.
#[derive(Debug, Clone, Copy)]
enum Block {
    /// `[out, in, rows]`, with a bias and an adapter of rank 2 in f32.
    Linear([usize; 3]),
    /// `[tokens, features, rows]`, in two blocks.
    Logits([usize; 3]),
    /// `[features, rows]`
    Rms([usize; 2]),
    /// `[features, rows]`
    Layer([usize; 2]),
    /// `[heads, head_dim, rows]`
    Rotary([usize; 3]),
    /// `[features, rows]`
    SiluProduct([usize; 2]),
    /// `[features, rows]`
    Activations([usize; 2]),
    /// `[kv_heads, group, head_dim, queries, keys]`
    Attention([usize; 5], bool),
    /// `[kv_heads, group, head_dim, rows]` in two segments of rows that do not see each other, one without its
    /// first three queries; recorded one by one, or all at once.
    Segments([usize; 4], bool),
}

impl Block {
    /// How many numbers its inputs have.
    fn inputs(self) -> Vec<usize> {
        match self {
            Self::Linear([output, input, rows]) => {
                vec![output * input, output, 2 * input, 2 * output, input * rows]
            }
            Self::Logits([tokens, features, rows]) => {
                let first = tokens.div_ceil(2) * features;
                vec![first, tokens * features - first, features * rows]
            }
            Self::Rms([features, rows]) => vec![features, features * rows],
            Self::Layer([features, rows]) => vec![features, features, features * rows],
            Self::Rotary([heads, head_dim, rows]) => vec![heads * head_dim * rows],
            Self::SiluProduct([features, rows]) => vec![features * rows; 2],
            Self::Activations([features, rows]) => vec![features * rows],
            Self::Attention([kv_heads, group, head_dim, queries, keys], _) => {
                let cache = kv_heads * head_dim * keys;
                vec![kv_heads * group * head_dim * queries, cache, cache]
            }
            Self::Segments([kv_heads, group, head_dim, rows], _) => {
                let cache = kv_heads * head_dim * rows;
                vec![kv_heads * group * head_dim * (rows - 3), cache, cache]
            }
        }
    }

    fn run<B: AnyBackend<Device = Device>>(self, inputs: &[Tensor<B, 1>]) -> Tensor<B, 1> {
        let (device, dtype) = (inputs[0].device(), inputs[0].dtype());
        let mut inputs = inputs.iter().cloned();
        let mut next = || inputs.next().expect("as many as there are");
        match self {
            Self::Linear([output, input, rows]) => {
                let linear = Linear {
                    weight: weight(next().reshape([output, input])),
                    bias: Some(parameter(next())),
                    adapter: Some(LowRank {
                        down: parameter(next().cast(DType::F32).reshape([2, input])),
                        up: parameter(next().cast(DType::F32).reshape([output, 2])),
                        gain: None,
                        dropout: 0.0,
                        scaling: Scaling {
                            alpha: 3.0,
                            rank_stabilized: false,
                        },
                    }),
                };
                flat(linear.forward(next().reshape([input, rows])))
            }
            Self::Logits([tokens, features, rows]) => {
                let height = tokens.div_ceil(2);
                let blocks = [height, tokens - height];
                let vocabulary = Vocabulary {
                    weight: blocks
                        .map(|tokens| weight(next().reshape([tokens, features])))
                        .into(),
                };
                flat(vocabulary.logits(next().reshape([features, rows])))
            }
            Self::Rms(shape) => {
                let (weight, epsilon) = (parameter(next()), 1e-3);
                flat(RmsNorm { weight, epsilon }.forward(next().reshape(shape)))
            }
            Self::Layer(shape) => {
                let norm = LayerNorm {
                    weight: parameter(next()),
                    bias: parameter(next()),
                    epsilon: 1e-3,
                };
                flat(norm.forward(next().reshape(shape)))
            }
            Self::Rotary([heads, head_dim, rows]) => {
                let angles = Random::new(3).vector(head_dim / 2 * rows);
                let data = TensorData::new(angles, [head_dim / 2, rows]);
                let angles = Tensor::from_data(data, (&device, DType::F32));
                let rotary = Rotary::from_angles(angles, dtype);
                flat(rotary.apply(next().reshape([heads * head_dim, rows])))
            }
            Self::SiluProduct(shape) => {
                flat(silu_product(next().reshape(shape), next().reshape(shape)))
            }
            Self::Activations(shape) => {
                // Far enough out to bend.
                let x = next().mul_scalar(4.0).reshape(shape);
                let all = [silu(x.clone()), quick_gelu(x.clone()), gelu_tanh(x)];
                flat(Tensor::cat(all.into(), 1))
            }
            Self::Attention([kv_heads, group, head_dim, queries, keys], causal) => {
                let mask = CausalMask::new(keys, &device);
                let query = next().reshape([kv_heads, group, head_dim, queries]);
                let [key, value] = [0; 2].map(|_| next().reshape([kv_heads, head_dim, keys]));
                flat(attention(query, key, value, causal.then_some(&mask)))
            }
            Self::Segments([kv_heads, group, head_dim, rows], at_once) => {
                let mask = CausalMask::new(rows, &device);
                let query = next().reshape([kv_heads, group, head_dim, rows - 3]);
                let [key, value] = [0; 2].map(|_| next().reshape([kv_heads, head_dim, rows]));
                let first = rows / 3;
                let segments = [(0..first, 0..first), (first..rows - 3, first..rows)];
                let segments = segments.map(|(queries, keys)| Segment { queries, keys });
                let recorded = match at_once {
                    true => attention_on_record((&query, &key, &value), segments.to_vec(), true),
                    false => None,
                };
                let each = segments.map(|Segment { queries, keys }| {
                    attention(
                        query.clone().narrow(3, queries.start, queries.len()),
                        key.clone().narrow(2, keys.start, keys.len()),
                        value.clone().narrow(2, keys.start, keys.len()),
                        Some(&mask),
                    )
                });
                flat(recorded.unwrap_or_else(|| Tensor::cat(each.to_vec(), 1)))
            }
        }
    }
}

/// Not a leaf: the tests track what it is made of.
fn parameter<B: AnyBackend, const D: usize>(value: Tensor<B, D>) -> Param<Tensor<B, D>> {
    Param::initialized(ParamId::new(), value)
}

fn weight<B: AnyBackend>(value: Tensor<B, 2>) -> Weight<B> {
    Weight::Float(parameter(value))
}

fn flat<B: AnyBackend>(x: Tensor<B, 2>) -> Tensor<B, 1> {
    let [features, rows] = x.dims();
    x.reshape([features * rows])
}

fn tensor<B: AnyBackend<Device = Device>>(numbers: &[f32], dtype: DType) -> Tensor<B, 1> {
    Tensor::<B, 1>::from_data(numbers, (&Device::default(), DType::F32)).cast(dtype)
}

/// The result, and the gradients of `weights · result` by every input; `None` for those that are not
/// tracked.
fn gradients<B: AutodiffBackend<Device = Device>>(
    block: Block,
    inputs: &[Vec<f32>],
    tracked: &[bool],
    dtype: DType,
) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
    let _alone = alone();
    let leaves: Vec<Tensor<B, 1>> = inputs
        .iter()
        .zip(tracked)
        .map(|(numbers, &tracked)| tensor(numbers, dtype).set_require_grad(tracked))
        .collect();
    // What is cheap to compute again stands on both sides, for a backend that does.
    let doubled: Vec<_> = leaves.iter().map(|x| x.clone().mul_scalar(2.0)).collect();
    let result = block.run(&doubled).mul_scalar(0.5);
    let count = result.dims()[0];
    let loss = (result.clone() * tensor(&weights(count), dtype)).sum();
    let gradients = loss.backward();
    let found = leaves.iter().map(|x| x.grad(&gradients).map(values));
    (values(result), found.collect())
}

fn weights(count: usize) -> Vec<f32> {
    Random::new(77).vector(count)
}

/// The same result in f32, without gradients.
fn without_gradients(block: Block, inputs: &[Vec<f32>]) -> Vec<f32> {
    let inputs: Vec<Tensor<Backend, 1>> = inputs
        .iter()
        .map(|x| tensor(x, DType::F32).mul_scalar(2.0))
        .collect();
    values(block.run(&inputs).mul_scalar(0.5))
}

/// `weights · result`, summed in f64.
fn loss(block: Block, inputs: &[Vec<f32>]) -> f64 {
    let result = without_gradients(block, inputs);
    let products = result.iter().zip(weights(result.len()));
    products.map(|(x, w)| f64::from(*x) * f64::from(w)).sum()
}

#[track_caller]
fn check(block: Block) {
    let mut random = Random::new(5);
    let inputs: Vec<Vec<f32>> = block
        .inputs()
        .into_iter()
        .map(|count| random.vector(count))
        .collect();
    let all = vec![true; inputs.len()];
    let (result, found) = gradients::<Ad>(block, &inputs, &all, DType::F32);
    let (_, saving) = gradients::<Saving>(block, &inputs, &all, DType::F32);
    assert_eq!(found, saving, "{block:?}");
    // The loop itself ran, which the operations are not to the bit.
    assert_eq!(result, without_gradients(block, &inputs), "{block:?}");
    let (expected, by_operations) = gradients::<Operations>(block, &inputs, &all, DType::F32);
    assert!(gap(&result, &expected) < TOLERANCE, "{block:?}");
    let found: Vec<Vec<f32>> = found.into_iter().map(|x| x.expect("tracked")).collect();
    for (at, (found, expected)) in found.iter().zip(by_operations).enumerate() {
        let difference = gap(found, &expected.expect("tracked"));
        assert!(
            difference < TOLERANCE,
            "{block:?}, input {at}: {difference}"
        );
    }

    for at in 0..inputs.len() {
        let tracked: Vec<bool> = (0..inputs.len()).map(|other| other == at).collect();
        for (_, alone) in [
            gradients::<Ad>(block, &inputs, &tracked, DType::F32),
            gradients::<Saving>(block, &inputs, &tracked, DType::F32),
        ] {
            for (other, alone) in alone.into_iter().enumerate() {
                let expected = (other == at).then(|| found[at].clone());
                assert_eq!(alone, expected, "{block:?}, input {other} with {at}");
            }
        }
        let direction = random.vector(inputs[at].len());
        let step = 4e-3;
        let moved = |sign: f32| {
            let mut inputs = inputs.clone();
            let moved = inputs[at].iter_mut().zip(&direction);
            moved.for_each(|(x, d)| *x += sign * step * d);
            loss(block, &inputs)
        };
        let change = (moved(1.0) - moved(-1.0)) / (2.0 * f64::from(step));
        let terms = found[at].iter().zip(&direction);
        let terms: Vec<f64> = terms.map(|(g, d)| f64::from(g * d)).collect();
        let size = terms.iter().map(|x| x * x).sum::<f64>().sqrt();
        let difference = (terms.iter().sum::<f64>() - change).abs() / size.max(1.0);
        assert!(difference < NUMERIC, "{block:?}, input {at}: {difference}");
    }
}

#[test]
fn linear_maps_give_gradients_to_all_that_they_have() {
    for sizes in [[1, 1, 1], [7, 5, 1], [33, 70, 3], [64, 48, 40]] {
        check(Block::Linear(sizes));
    }
    check(Block::Logits([11, 24, 1]));
    check(Block::Logits([40, 9, 17]));
}

#[test]
fn norms_rotation_and_activations_give_gradients() {
    for rows in [1, 3, 40] {
        check(Block::Rms([24, rows]));
        check(Block::Layer([24, rows]));
        check(Block::Rotary([3, 10, rows]));
        check(Block::SiluProduct([24, rows]));
        check(Block::Activations([24, rows]));
    }
}

/// Few queries and several blocks of them; keys that stand before the first query; groups of heads.
#[test]
fn attention_gives_gradients() {
    for causal in [false, true] {
        for sizes in [
            [1, 1, 4, 1, 1],
            [2, 2, 6, 3, 10],
            [2, 1, 8, 64, 64],
            [1, 3, 5, 130, 133],
        ] {
            check(Block::Attention(sizes, causal));
        }
    }
    check(Block::Segments([2, 2, 6, 50], false));
    check(Block::Segments([2, 2, 6, 50], true));
    check(Block::Segments([1, 1, 8, 220], true));
}

/// In half precision a step rounds once where operations round at each.
#[test]
fn gradients_in_half_precision_are_those_of_the_same_numbers() {
    let blocks = [
        Block::Linear([33, 40, 9]),
        Block::Rms([24, 9]),
        Block::Layer([24, 9]),
        Block::Rotary([3, 10, 9]),
        Block::SiluProduct([24, 9]),
        Block::Activations([24, 9]),
        Block::Attention([2, 2, 6, 20, 23], true),
        Block::Segments([2, 2, 6, 50], true),
    ];
    for (block, (dtype, tolerance)) in blocks
        .into_iter()
        .flat_map(|block| [(DType::F16, 6e-3), (DType::BF16, 4e-2)].map(|t| (block, t)))
    {
        let mut random = Random::new(5);
        let rounded = |count: usize| values(tensor::<Backend>(&random.vector(count), dtype));
        let inputs: Vec<Vec<f32>> = block.inputs().into_iter().map(rounded).collect();
        let all = vec![true; inputs.len()];
        let (_, found) = gradients::<Ad>(block, &inputs, &all, dtype);
        let (_, expected) = gradients::<Operations>(block, &inputs, &all, DType::F32);
        for (found, expected) in found.into_iter().zip(expected) {
            let difference = gap(&found.expect("tracked"), &expected.expect("tracked"));
            assert!(difference < tolerance, "{block:?}, {dtype:?}: {difference}");
        }
    }
}
