//! Reads what `fixtures/make_pillow.py` wrote.

use std::fs;
use std::path::PathBuf;

use safetensors::SafeTensors;
use vision_encoder::RgbImage;

/// The folder of all fixtures.
pub fn fixtures() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures"]
        .iter()
        .collect()
}

/// A file in `fixtures/pillow`.
pub fn path(name: &str) -> PathBuf {
    fixtures().join("pillow").join(name)
}

/// The bytes of a file in `fixtures/pillow`.
pub fn bytes(name: &str) -> Vec<u8> {
    fs::read(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// An image `[height, width, 3]` of a safetensors file.
pub fn image(tensors: &SafeTensors, name: &str) -> RgbImage {
    let tensor = tensors.tensor(name).expect(name);
    let &[height, width, 3] = tensor.shape() else {
        panic!("{name} is no image")
    };
    RgbImage::new(width, height, tensor.data().to_vec()).expect(name)
}
