//! Training of the built-in model, and maps for its tokens that wait.

mod calibrate;
mod lessons;
#[cfg(feature = "collective")]
mod peers;
mod recompute;
mod run;

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::backend::Autodiff;
use burn_flex::Flex;
use reroute_finetune::data::{BoxIn, Example, Exchange, ImageSource, Piece, Place};
use reroute_zoo::{OpenOptions, Vlm, embedded};

type Ad = Autodiff<Flex>;

/// All runs of a process draw from one generator, that of the backend.
static GENERATOR: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open() -> Vlm<Ad> {
    let (folder, options) = (embedded::checkpoint(), OpenOptions::default());
    Vlm::open(&folder, &options, &Default::default()).expect("the built-in model")
}

/// What is asked for in the built-in scene by other words.
fn example(line: usize, words: &str) -> Example {
    let corners = [30.0 + line as f64, 40.0, 60.0, 80.0 + line as f64];
    Example {
        source: Place {
            file: "made.jsonl".into(),
            line,
            entry: false,
        },
        images: vec![ImageSource::Bytes(embedded::SCENE.image.to_vec())],
        system: None,
        exchanges: vec![Exchange {
            question: vec![Piece::Image(0), Piece::Label(words.into())],
            answer: vec![Piece::Box {
                corners,
                image: 0,
                unit: BoxIn::Pixels,
            }],
        }],
    }
}
