//! Time per decoded token at lengths up to 4096, on a small decoder: it must not grow from growing the cache.

use std::time::Instant;

use burn::tensor::{Distribution, Int, Tensor, TensorData};
use burn_flex::{Flex, FlexDevice};
use reducers::Schedule;
use reroute::*;

type B = Flex;

fn main() {
    let which = std::env::args().nth(1).unwrap();
    let upto: usize = std::env::args().nth(2).unwrap().parse().unwrap();
    let (hidden, inner, layers, heads, head_dim) = match which.as_str() {
        "toy" => (64, 128, 6, 4, 16),
        "small" => (256, 704, 8, 8, 32),
        _ => (2048, 5504, 2, 32, 64),
    };
    let config = DecoderConfig {
        vocab_size: 1000,
        hidden_size: hidden,
        intermediate_size: inner,
        num_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim,
        rms_norm_eps: 1e-5,
        qkv_bias: false,
        qk_norm: false,
        tie_word_embeddings: false,
        max_position_embeddings: 8192,
        sliding_window: None,
        rope: RopeConfig::one_axis(1e4, head_dim),
    };
    let device = FlexDevice;
    let decoder = config.init::<B>(&device).unwrap();
    let rows = 640;
    let prompt = Prompt {
        embeddings: Tensor::<B, 2>::random([hidden, rows], Distribution::Normal(0.0, 0.1), &device),
        positions: Tensor::<B, 2, Int>::from_data(
            TensorData::new((0..rows as i64).collect::<Vec<_>>(), [1, rows]),
            &device,
        ),
        deepstack: vec![],
        samples: vec![SampleLayout {
            rows,
            visual: (5..581).collect(),
            next_position: rows as i64,
            salience: None,
            cells: vec![],
        }],
    };
    let mut prefills = Vec::new();
    let mut cache = None;
    for _ in 0..7 {
        let started = Instant::now();
        let prefill = decoder
            .prefill(&prompt, &Schedule::dense(), Default::default())
            .unwrap();
        prefill.logits.into_data();
        prefills.push(started.elapsed().as_secs_f64() * 1e3);
        cache = Some(prefill.cache);
    }
    prefills.sort_by(f64::total_cmp);
    println!(
        "{which} prefill least {:.2} median {:.2} ms",
        prefills[0], prefills[3]
    );
    let mut cache = cache.unwrap();
    let mut times = Vec::new();
    for at in rows..upto {
        let started = Instant::now();
        decoder.decode(&[(0, 7)], &mut cache).unwrap().into_data();
        times.push(started.elapsed().as_secs_f64() * 1e3);
        if (at + 1) % 512 == 0 {
            let mean = times.iter().sum::<f64>() / times.len() as f64;
            let most = times.iter().copied().fold(0.0, f64::max);
            times.sort_by(f64::total_cmp);
            println!(
                "{which} to {}: mean {mean:.3} median {:.3} most {most:.2} ms",
                at + 1,
                times[times.len() / 2]
            );
            times.clear();
        }
    }
}
