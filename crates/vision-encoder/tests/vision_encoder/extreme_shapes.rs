//! Images of extreme shapes cost little. Alone in its program, because it measures the heap.

use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;
use vision_encoder::{RgbImage, VitPreprocessorConfig};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// A resized 1×30000 image would have 10⁸ rows, and a padded one 9·10⁸ pixels: neither may exist.
#[test]
fn thirty_thousand_to_one_is_preprocessed_in_little_memory_and_time() {
    let config = r#"{"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}"#;
    let config: VitPreprocessorConfig = serde_json::from_str(config).expect("parses");
    let preprocessor = config.resolve().expect("resolves");
    for (width, height) in [(1, 30_000), (30_000, 1)] {
        let data = (0..width * height * 3).map(|i| (i % 251) as u8).collect();
        let image = RgbImage::new(width, height, data).expect("an image");
        for pad in [false, true] {
            let preprocessor = preprocessor.clone().with_pad_to_square(pad);
            HEAP.reset_peak_usage();
            let before = HEAP.current_usage();
            let start = Instant::now();
            let pixels = preprocessor.preprocess(&image).expect("pixels");
            let (time, bytes) = (start.elapsed(), HEAP.peak_usage() - before);
            assert_eq!([pixels.height, pixels.width], [336, 336]);
            let case = format!("{width}×{height}, padding {pad}: {time:?}, {bytes} bytes");
            // Far above what it takes, far below what the whole picture would.
            assert!(bytes < 64 << 20, "{case}");
            assert!(time < Duration::from_secs(5), "{case}");
        }
    }
}
