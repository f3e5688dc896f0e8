//! The shared building blocks against their formulas, in f64.

use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_autodiff::Autodiff;
use proptest::prelude::*;
use reroute_layers::{
    Cached, CausalMask, EmbeddingConfig, LayerNormConfig, Linear, LinearConfig, RmsNormConfig,
    Rotary, VocabularyConfig, attention, gelu_tanh, quick_gelu, silu, silu_product, write_rows,
};

use crate::support::{Backend, Device, Random, cases, distance, values};

const TOLERANCE: f64 = 1e-5;

fn tensor<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<Backend, D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::default())
}

/// Sizes of one attention: `[kv_heads, group, head_dim, queries, keys]`.
type Sizes = [usize; 5];

/// Attention of query `i` over keys `0 ..= keys - queries + i` (causal) or all keys, one number at
/// a time; laid out as the library lays it out.
fn naive_attention(q: &[f32], k: &[f32], v: &[f32], sizes: Sizes, causal: bool) -> Vec<f64> {
    let [kv_heads, group, head_dim, queries, keys] = sizes;
    let heads = kv_heads * group;
    let at = |x: &[f32], head: usize, channel: usize, row: usize, rows: usize| {
        f64::from(x[(head * head_dim + channel) * rows + row])
    };
    let mut output = vec![0.0; heads * head_dim * queries];
    for (head, query) in (0..heads).flat_map(|h| (0..queries).map(move |q| (h, q))) {
        let kv = head / group;
        let visible = if causal {
            keys - queries + query + 1
        } else {
            keys
        };
        let logit = |key: usize| -> f64 {
            let product = |c| at(q, head, c, query, queries) * at(k, kv, c, key, keys);
            (0..head_dim).map(product).sum::<f64>() / (head_dim as f64).sqrt()
        };
        let weights: Vec<f64> = (0..visible).map(|key| logit(key).exp()).collect();
        let total: f64 = weights.iter().sum();
        for channel in 0..head_dim {
            let weighed = |(key, weight): (usize, &f64)| weight * at(v, kv, channel, key, keys);
            output[(head * head_dim + channel) * queries + query] =
                weights.iter().enumerate().map(weighed).sum::<f64>() / total;
        }
    }
    output
}

fn check_attention(sizes: Sizes, causal: bool, seed: u64) {
    let [kv_heads, group, head_dim, queries, keys] = sizes;
    let mut random = Random::new(seed);
    let q = random.vector(kv_heads * group * head_dim * queries);
    let k = random.vector(kv_heads * head_dim * keys);
    let v = random.vector(kv_heads * head_dim * keys);
    let mask = CausalMask::new(keys, &Device::default());
    let actual = attention(
        tensor(&q, [kv_heads, group, head_dim, queries]).mul_scalar(3.0),
        tensor(&k, [kv_heads, head_dim, keys]),
        tensor(&v, [kv_heads, head_dim, keys]),
        causal.then_some(&mask),
    );
    assert_eq!(actual.dims(), [kv_heads * group * head_dim, queries]);
    let q: Vec<f32> = q.iter().map(|x| x * 3.0).collect();
    let expected = naive_attention(&q, &k, &v, sizes, causal);
    let difference = distance(&values(actual), &expected);
    assert!(
        difference < TOLERANCE,
        "{sizes:?}, causal {causal}: {difference}"
    );
}

/// Queries are worked on in blocks of 128 rows: lengths at, next to and across the block's edge,
/// with and without keys that stand before the first query.
#[test]
fn attention_is_the_formula_around_the_block_size() {
    for queries in [1, 2, 127, 128, 129, 300] {
        for earlier in [0, 1, 5, 130] {
            for causal in [true, false] {
                check_attention(
                    [2, 2, 8, queries, queries + earlier],
                    causal,
                    queries as u64,
                );
            }
        }
    }
}

/// Without a mask, queries may outnumber keys.
/// With many heads and keys a block has fewer queries: 48 of 64 heads over 1100 keys.
#[test]
fn attention_is_the_formula_in_smaller_blocks() {
    for causal in [false, true] {
        check_attention([16, 4, 2, 100, 1100], causal, 1);
    }
}

#[test]
fn attention_without_a_mask_takes_any_number_of_keys() {
    for (queries, keys) in [(129, 1), (3, 2), (1, 300)] {
        check_attention([1, 4, 8, queries, keys], false, 1);
    }
}

/// A mask made for more keys than there are serves shorter prompts: it is aligned to the last key.
#[test]
fn a_longer_mask_changes_nothing() {
    let mut random = Random::new(5);
    let x = random.vector(8 * 140);
    let run = |longest: usize| {
        let mask = CausalMask::new(longest, &Device::default());
        let (query, key) = (tensor(&x, [1, 1, 8, 140]), tensor(&x, [1, 8, 140]));
        values(attention(query, key.clone(), key, Some(&mask)))
    };
    assert_eq!(run(140), run(1000));
}

/// Logits far apart neither overflow nor lose the row: the softmax subtracts its maximum.
#[test]
fn attention_survives_large_logits() {
    let query = tensor(&[1e4, 1e4, -1e4, -1e4], [1, 1, 2, 2]);
    let key = tensor(&[1e4, -1e4, 1e4, -1e4], [1, 2, 2]);
    let value = tensor(&[1.0, 2.0, 3.0, 4.0], [1, 2, 2]);
    let mask = CausalMask::new(2, &Device::default());
    let output = values(attention(query, key, value, Some(&mask)));
    assert!(output.iter().all(|x| x.is_finite()), "{output:?}");
    assert_eq!(output[0], 1.0);
    assert_eq!(output[2], 3.0);
}

proptest! {
    #![proptest_config(cases(64))]

    /// Any number of heads, groups and channels.
    #[test]
    fn attention_is_the_formula(
        kv_heads in 1..4usize,
        group in 1..4usize,
        half in 1..9usize,
        queries in 1..40usize,
        earlier in 0..20usize,
        causal in any::<bool>(),
        seed in any::<u64>(),
    ) {
        check_attention([kv_heads, group, 2 * half, queries, queries + earlier], causal, seed);
    }

    /// Channel `i` and channel `i + head_dim / 2` of every head turn together by the row's angle.
    #[test]
    fn rotary_turns_pairs_of_channels(
        heads in 1..5usize,
        half in 1..9usize,
        rows in 1..20usize,
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let angles: Vec<f32> = random.vector(half * rows).iter().map(|x| x * 20.0).collect();
        let x = random.vector(heads * 2 * half * rows);
        let rotary = Rotary::from_angles(tensor(&angles, [half, rows]), DType::F32);
        let turned = values(rotary.apply(tensor(&x, [heads * 2 * half, rows])));
        let at = |head: usize, channel: usize, row: usize| (head * 2 * half + channel) * rows + row;
        let mut expected = vec![0.0; x.len()];
        for (head, i, row) in (0..heads)
            .flat_map(|h| (0..half).map(move |i| (h, i)))
            .flat_map(|(h, i)| (0..rows).map(move |r| (h, i, r)))
        {
            let (sin, cos) = f64::from(angles[i * rows + row]).sin_cos();
            let (a, b) = (at(head, i, row), at(head, i + half, row));
            let (xa, xb) = (f64::from(x[a]), f64::from(x[b]));
            expected[a] = xa * cos - xb * sin;
            expected[b] = xb * cos + xa * sin;
        }
        let difference = distance(&turned, &expected);
        assert!(difference < TOLERANCE, "{difference}");

        let rows: Vec<i64> = (0..rows as i64).rev().step_by(2).collect();
        let kept = Tensor::<Backend, 1, Int>::from_data(&rows[..], &Device::default());
        let x = tensor(&x, [heads * 2 * half, expected.len() / (heads * 2 * half)]);
        let of_kept = rotary.select(kept.clone()).apply(x.clone().select(1, kept.clone()));
        assert_eq!(values(of_kept), values(rotary.apply(x).select(1, kept)));
    }

    /// Every column on its own, with weights, and per head in the three-dimensional form.
    #[test]
    fn norms_are_their_formulas(
        heads in 1..4usize,
        features in 1..40usize,
        rows in 1..9usize,
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let x: Vec<f32> = random.vector(heads * features * rows).iter().map(|x| x + 0.5).collect();
        let (weight, bias) = (random.vector(features), random.vector(features));
        let device = Device::default();
        let mut rms = RmsNormConfig { features, epsilon: 1e-3 }.init::<Backend>(&device);
        rms.weight = rms.weight.map(|_| tensor(&weight, [features]));
        let mut layer = LayerNormConfig { features, epsilon: 1e-3 }.init::<Backend>(&device);
        layer.weight = layer.weight.map(|_| tensor(&weight, [features]));
        layer.bias = layer.bias.map(|_| tensor(&bias, [features]));

        let at = |head: usize, i: usize, row: usize| (head * features + i) * rows + row;
        let (mut by_rms, mut by_layer) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        for (head, row) in (0..heads).flat_map(|h| (0..rows).map(move |r| (h, r))) {
            let column: Vec<f64> = (0..features).map(|i| f64::from(x[at(head, i, row)])).collect();
            let mean_of = |f: &dyn Fn(f64) -> f64| {
                column.iter().map(|&x| f(x)).sum::<f64>() / features as f64
            };
            let mean = mean_of(&|x| x);
            let rms = (mean_of(&|x| x * x) + 1e-3).sqrt();
            let deviation = (mean_of(&|x| (x - mean) * (x - mean)) + 1e-3).sqrt();
            for i in 0..features {
                let (w, b) = (f64::from(weight[i]), f64::from(bias[i]));
                by_rms[at(head, i, row)] = column[i] / rms * w;
                by_layer[at(head, i, row)] = (column[i] - mean) / deviation * w + b;
            }
        }
        let difference =
            distance(&values(rms.forward(tensor(&x, [heads, features, rows]))), &by_rms);
        assert!(difference < TOLERANCE, "RMS norm: {difference}");
        let first_head = features * rows;
        let normed = layer.forward(tensor(&x[..first_head], [features, rows]));
        let difference = distance(&values(normed), &by_layer[..first_head]);
        assert!(difference < TOLERANCE, "layer norm: {difference}");
    }

    /// One row takes another way through the product than several: same numbers.
    #[test]
    fn linear_is_its_formula(
        input in 1..40usize,
        output in 1..40usize,
        rows in 1..9usize,
        bias in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let config = LinearConfig::new(input, output).with_bias(bias);
        let linear = config.init::<Backend>(&Device::default());
        let weight = values(linear.weight.val());
        let biases = linear.bias.as_ref().map_or(vec![0.0; output], |bias| values(bias.val()));
        let x = random.vector(input * rows);
        let product = |(out, row): (usize, usize)| {
            let term = |i: usize| f64::from(weight[out * input + i]) * f64::from(x[i * rows + row]);
            (0..input).map(term).sum::<f64>() + f64::from(biases[out])
        };
        let expected: Vec<f64> =
            (0..output).flat_map(|out| (0..rows).map(move |row| (out, row))).map(product).collect();
        let actual = linear.forward(tensor(&x, [input, rows]));
        assert_eq!(actual.dims(), [output, rows]);
        let difference = distance(&values(actual), &expected);
        assert!(difference < TOLERANCE, "{difference}");
    }
}

/// From where nothing comes through to where all does, and where `e^x` overflows.
#[test]
fn activations_are_their_formulas() {
    let x: Vec<f32> = (-60..=60)
        .map(|i| i as f32 / 4.0)
        .chain([-1e4, -100.0, 100.0, 1e4])
        .collect();
    let expected = |beta: f64| -> Vec<f64> {
        x.iter()
            .map(|&x| f64::from(x))
            .map(|x| x / (1.0 + (-beta * x).exp()))
            .collect()
    };
    let close = |actual: Vec<f32>, expected: Vec<f64>| {
        for (actual, expected) in actual.iter().zip(expected) {
            let difference = (f64::from(*actual) - expected).abs();
            assert!(
                difference <= 1e-6 * expected.abs().max(1.0),
                "{actual} is not {expected}"
            );
        }
    };
    let input = tensor(&x, [5, x.len() / 5]);
    close(values(silu(input.clone())), expected(1.0));
    close(values(quick_gelu(input)), expected(1.702));
}

/// What a backend may run as a loop of its own is what it is as operations, which is how it runs on a backend
/// that nothing is known of: with few rows and many, in parts of larger tensors, in half precision.
#[test]
fn loops_are_the_operations_that_they_stand_for() {
    // In half precision operations round their intermediate results, loops the last one.
    let types = [(DType::F32, 2e-6), (DType::F16, 4e-3), (DType::BF16, 3e-2)];
    for ((dtype, tolerance), rows) in types
        .iter()
        .flat_map(|t| [1, 2, 15, 16, 40].map(|r| (t, r)))
    {
        let (loops, operations) = (
            every_block::<Backend>(rows, *dtype),
            every_block::<Autodiff<Autodiff<Backend>>>(rows, *dtype),
        );
        for ((name, x), (_, expected)) in loops.into_iter().zip(operations) {
            let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
            let difference = distance(&x, &expected);
            assert!(
                difference <= *tolerance,
                "{name}, {rows} rows of {dtype:?}: {difference}"
            );
        }
    }
}

/// Weights of half precision larger than what is widened at a time.
#[test]
fn a_large_product_in_half_precision_is_that_of_the_same_numbers_in_f32() {
    let (output, input) = (2100, 4096);
    let mut random = Random::new(3);
    let weight = tensor(&random.vector(output * input), [output, input]);
    let x = tensor(&random.vector(input * 2), [input, 2]);
    for (dtype, tolerance) in [(DType::F16, 1e-3), (DType::BF16, 8e-3)] {
        let (weight, x) = (weight.clone().cast(dtype), x.clone().cast(dtype));
        let (wide, wide_x) = (weight.clone().cast(DType::F32), x.clone().cast(DType::F32));
        let expected = values(wide.matmul(wide_x)).into_iter().map(f64::from);
        let linear = Linear {
            weight: weight.into(),
            bias: None,
            adapter: None,
        };
        let y = values(linear.forward(x).cast(DType::F32));
        let difference = distance(&y, &expected.collect::<Vec<_>>());
        assert!(difference <= tolerance, "{dtype:?}: {difference}");
    }
}

/// The outputs of the building blocks that have loops, by name.
fn every_block<B: burn::tensor::backend::Backend<Device = Device>>(
    rows: usize,
    dtype: DType,
) -> Vec<(&'static str, Vec<f32>)> {
    let device = Device::default();
    let mut random = Random::new(rows as u64);
    let mut matrix = |features: usize, rows: usize| {
        let data = TensorData::new(random.vector(features * rows), [features, rows]);
        Tensor::<B, 2>::from_data(data, (&device, DType::F32)).cast(dtype)
    };
    let (x, wide) = (matrix(24, rows), matrix(24, rows + 3));
    let part = wide.clone().narrow(1, 2, rows);
    let mut rms = RmsNormConfig {
        features: 24,
        epsilon: 1e-5,
    }
    .init::<B>(&device);
    rms.weight = rms.weight.map(|_| matrix(24, 1).reshape([24]));
    let mut layer = LayerNormConfig {
        features: 24,
        epsilon: 1e-5,
    }
    .init::<B>(&device);
    layer.weight = layer.weight.map(|_| matrix(24, 1).reshape([24]));
    layer.bias = layer.bias.map(|_| matrix(24, 1).reshape([24]));
    let linear = Linear {
        weight: matrix(70, 24).into(),
        bias: None,
        adapter: None,
    };
    let mut vocabulary = VocabularyConfig {
        block: 7,
        ..VocabularyConfig::new(11, 24)
    }
    .init::<B>(&device);
    let weights = vocabulary.weight.into_iter();
    vocabulary.weight = weights
        .map(|weight| matrix(weight.dims()[0], 24).into())
        .collect();
    let rotary = Rotary::from_angles(matrix(6, rows).cast(DType::F32), dtype);
    let heads = |x: &Tensor<B, 2>| x.clone().reshape([2, 12, rows]);
    let cache = wide.clone().reshape([2, 12, rows + 3]);
    let float = |x: Tensor<B, 2>| {
        assert_eq!(x.dtype(), dtype);
        x.cast(DType::F32).into_data().to_vec().expect("f32")
    };
    let flat = |x: Tensor<B, 3>| float(x.reshape([24, rows + 3]));
    // What a cache holds, of which the last rows are room.
    let over = |kept: DType| {
        let mask = CausalMask::new(rows, &device);
        let query = heads(&x).reshape([2, 1, 12, rows]);
        let keys = Cached::of(cache.clone(), kept);
        assert_eq!(keys.dtype(), kept);
        let values = keys.clone().narrow(0, rows);
        let keys = keys.narrow(0, rows);
        float(attention(query, keys, values, Some(&mask)))
    };
    vec![
        ("silu", float(silu(part.clone()))),
        ("silu product", float(silu_product(x.clone(), part.clone()))),
        ("quick gelu", float(quick_gelu(x.clone()))),
        ("gelu", float(gelu_tanh(x.clone()))),
        ("rms", float(rms.forward(part.clone()))),
        ("layer", float(layer.forward(x.clone()))),
        ("linear", float(linear.forward(part.clone()))),
        ("logits", float(vocabulary.logits(part.clone()))),
        ("rotary", float(rotary.apply(part.clone()))),
        ("attention", {
            let mask = CausalMask::new(rows, &device);
            let query = heads(&x).reshape([2, 1, 12, rows]);
            float(attention(query, heads(&x), heads(&part), Some(&mask)))
        }),
        ("attention over f16", over(DType::F16)),
        ("attention over bf16", over(DType::BF16)),
        ("attention over bytes", over(DType::I8)),
        ("bytes", {
            let spare = Cached::of(heads(&x), DType::I8).zeros(3);
            let bytes = Cached::of(heads(&part), DType::I8);
            let bytes = bytes.followed_by(spare).unwrap();
            let bytes = bytes.write(2, Cached::of(heads(&x), DType::I8)).unwrap();
            flat(bytes.widened(dtype))
        }),
        (
            "write",
            flat(write_rows(cache.clone(), 1, heads(&x)).unwrap()),
        ),
        ("write a part", {
            let part = cache.clone().narrow(2, 0, rows);
            flat(write_rows(cache.clone(), 3, part).unwrap())
        }),
    ]
}

/// A column per id, in the order of the ids.
#[test]
fn embeddings_are_columns() {
    let config = EmbeddingConfig {
        entries: 5,
        features: 3,
    };
    let embedding = config.init::<Backend>(&Device::default());
    let table = values(embedding.weight.val());
    let ids = Tensor::<Backend, 1, Int>::from_data([4, 0, 4], &Device::default());
    let columns = values(embedding.forward(ids).transpose());
    assert_eq!(columns, [&table[12..], &table[..3], &table[12..]].concat());
}

/// However many blocks a table has: ids find their vectors, and every token its logit.
#[test]
fn a_vocabulary_in_blocks_is_one_table() {
    let device = Device::default();
    for block in [1, 3, 4, 11, 12] {
        let config = VocabularyConfig {
            block,
            ..VocabularyConfig::new(11, 3)
        };
        let vocabulary = config.init::<Backend>(&device);
        assert_eq!(vocabulary.weight.len(), 11usize.div_ceil(block));
        let blocks = vocabulary.weight.iter().map(|weight| weight.val());
        let table = values(Tensor::cat(blocks.collect(), 0));

        let ids = [10, 0, 5, 5, 3, 9];
        let columns = values(vocabulary.embed(&ids).unwrap().transpose());
        let expected = ids.map(|id| &table[id as usize * 3..][..3]).concat();
        assert_eq!(columns, expected, "blocks of {block}");

        let hidden = [0.5, -1.0, 2.0, 1.5, 0.25, -0.75];
        let logits = values(vocabulary.logits(tensor(&hidden, [3, 2])));
        for (at, logit) in logits.into_iter().enumerate() {
            let (row, token) = (at / 11, at % 11);
            let dot = |feature: usize| table[token * 3 + feature] * hidden[feature * 2 + row];
            let expected: f32 = (0..3).map(dot).sum();
            assert!((logit - expected).abs() < 1e-6, "{logit} is not {expected}");
        }
    }
}

/// Qwen2.5-VL-7B: no block is larger than what every WebGPU device binds.
#[test]
fn blocks_of_a_large_vocabulary_can_be_bound() {
    for (entries, features) in [(152_064, 3584), (32_000, 4096), (400, 64), (3, 1 << 30)] {
        let config = VocabularyConfig::new(entries, features);
        let fits = config.block * features * 4 <= 128 << 20;
        assert!(fits || config.block == 1);
        let blocks = entries.div_ceil(config.block);
        let least = (entries * features * 4).div_ceil(128 << 20);
        assert!(blocks <= 2 * least, "{blocks} blocks, {least} would do");
    }
}
