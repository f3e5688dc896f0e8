//! A photo of a large camera. Alone in its program, because it measures the heap.

use std::io::Cursor;
use std::time::{Duration, Instant};

use image::{ExtendedColorType, ImageEncoder, codecs::jpeg::JpegEncoder};
use peak_alloc::PeakAlloc;
use vision_encoder::qwen::{QwenGeneration, QwenPreprocessorConfig, QwenVisionConfig};
use vision_encoder::{DecodeLimits, decode};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

const WIDTH: usize = 8256;
const HEIGHT: usize = 5504;

/// A slope to the right, another downwards, and fine stripes.
fn photo() -> Vec<u8> {
    let rows = (0..HEIGHT).flat_map(|y| {
        (0..WIDTH).flat_map(move |x| [x * 255 / WIDTH, y * 255 / HEIGHT, x / 3 % 2 * 255])
    });
    let pixels: Vec<u8> = rows.map(|value| value as u8).collect();
    let mut file = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut file, 90)
        .write_image(
            &pixels,
            WIDTH as u32,
            HEIGHT as u32,
            ExtendedColorType::Rgb8,
        )
        .expect("a JPEG");
    file.into_inner()
}

#[test]
fn a_photo_of_46_megapixels_is_decoded_and_preprocessed_in_little_memory_and_time() {
    let file = photo();
    let start = Instant::now();
    HEAP.reset_peak_usage();
    let before = HEAP.current_usage();
    let image = decode(&file, &DecodeLimits::default()).expect("an image");
    let (decoding, decoded) = (start.elapsed(), HEAP.peak_usage() - before);
    // The pixels, and no second copy of them.
    let pixels = WIDTH * HEIGHT * 3;
    assert!(decoded < pixels * 3 / 2, "{decoded} bytes");

    let tower = QwenVisionConfig::default().resolve(QwenGeneration::Qwen2_5);
    let published = r#"{"min_pixels": 3136, "max_pixels": 12845056}"#;
    let published: QwenPreprocessorConfig = serde_json::from_str(published).expect("parses");
    let preprocessor = published.resolve(None, &tower.expect("a tower"));
    HEAP.reset_peak_usage();
    let (before, start) = (HEAP.current_usage(), Instant::now());
    let pixels = preprocessor
        .expect("resolves")
        .image(&image)
        .expect("pixels");
    let (resizing, bytes) = (start.elapsed(), HEAP.peak_usage() - before);

    assert_eq!(pixels.original, [WIDTH, HEIGHT]);
    assert_eq!(pixels.resized, [1204, 812]);
    assert_eq!(pixels.unbounded, [4368, 2912]);
    assert_eq!(pixels.grid.tokens(2), 1247);
    let result = pixels.data.len() * size_of::<f32>();
    assert!(bytes < result + (16 << 20), "{bytes} bytes for {result}");
    let times = format!("{decoding:?} to decode, {resizing:?} to preprocess");
    assert!(decoding + resizing < Duration::from_secs(30), "{times}");
    println!("{times}; {decoded} and {bytes} bytes");
}
