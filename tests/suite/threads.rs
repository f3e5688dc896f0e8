//! Tensors that threads share. On GPU backends this stands on `cubecl.toml`: without it about half of
//! the rounds were wrong on software Vulkan.

use std::sync::mpsc::channel;
use std::thread;

use burn::tensor::{Tensor, TensorData};
use reroute_cli::backend::{Backend, Device};

const SIDE: usize = 64;
const ROUNDS: usize = 50;

fn filled(value: f32) -> Tensor<Backend, 2> {
    let data = TensorData::new(vec![value; SIDE * SIDE], [SIDE, SIDE]);
    Tensor::from_data(data, &Device::default())
}

/// The kernels that read the tensor are queued when the first thread drops it and fills others, which
/// may get its memory.
#[test]
fn a_tensor_stays_what_it_was_for_the_thread_that_it_was_given_to() {
    let (give, given) = channel::<Tensor<Backend, 2>>();
    let (say_queued, queued) = channel();
    let (say_filled, others_filled) = channel::<()>();
    let worker = thread::spawn(move || {
        let one = Tensor::<Backend, 2>::eye(SIDE, &Device::default());
        let mut results = Vec::new();
        for tensor in given {
            let product = (tensor * 3.0 + 1.0).matmul(one.clone());
            // Another product, so that nothing waits for more to fuse with the first.
            drop(product.clone().matmul(one.clone()));
            say_queued.send(()).expect("the giver waits");
            others_filled.recv().expect("the giver is there");
            results.push(product.into_data().to_vec::<f32>().expect("floats"));
        }
        results
    });
    for _ in 0..ROUNDS {
        let tensor = filled(7.0);
        // It is in the device's memory.
        tensor.clone().add_scalar(0.0).into_data();
        give.send(tensor).expect("the worker waits");
        queued.recv().expect("the worker is there");
        // Filled one after the other, and kept meanwhile.
        let others = [100.0, 101.0, 102.0, 103.0].map(filled);
        for other in &others {
            other.clone().add_scalar(1.0).into_data();
        }
        say_filled.send(()).expect("the worker waits");
    }
    drop(give);
    let results = worker.join().expect("the worker has not failed");
    assert_eq!(results.len(), ROUNDS);
    let right = |result: &&Vec<f32>| result.iter().all(|&value| value == 22.0);
    assert_eq!(results.iter().filter(right).count(), ROUNDS);
}
