//! A colour profile that is a bomb. Alone in its program, because it measures the heap.

use std::io::{Cursor, Write};

use flate2::write::ZlibEncoder;
use flate2::{Compression, Crc};
use image::{ImageFormat, RgbImage};
use peak_alloc::PeakAlloc;
use vision_encoder::{DecodeLimits, decode};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// Bytes of the signature and of the first chunk.
const HEAD: usize = 8 + 25;

/// A picture of one pixel whose colour profile unpacks to so many bytes.
fn with_profile(bytes: usize) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    let image = RgbImage::from_pixel(1, 1, image::Rgb([1, 2, 3]));
    image.write_to(&mut file, ImageFormat::Png).expect("a PNG");
    let mut file = file.into_inner();
    let mut body = ZlibEncoder::new(b"iCCPname\0\0".to_vec(), Compression::fast());
    for _ in 0..bytes >> 20 {
        body.write_all(&[0; 1 << 20]).expect("packed");
    }
    let body = body.finish().expect("packed");
    let mut crc = Crc::new();
    crc.update(&body);
    let length = (body.len() as u32 - 4).to_be_bytes();
    let chunk = [&length[..], &body, &crc.sum().to_be_bytes()].concat();
    file.splice(HEAD..HEAD, chunk);
    file
}

#[test]
fn a_colour_profile_takes_no_more_than_a_share_of_the_limit() {
    for (unpacked, most) in [(1 << 20, 8 << 20), (400 << 20, 160 << 20)] {
        let file = with_profile(unpacked);
        HEAP.reset_peak_usage();
        let before = HEAP.current_usage();
        let image = decode(&file, &DecodeLimits::default()).expect("an image");
        let bytes = HEAP.peak_usage() - before;
        assert_eq!(image.data(), [1, 2, 3]);
        assert!(bytes < most, "{bytes} bytes for {unpacked}");
    }
}
