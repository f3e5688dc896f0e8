//! Decoding image files: the pixels that Pillow sees, and a typed error for everything else.
use std::time::{Duration, Instant};

use proptest::prelude::*;
use safetensors::SafeTensors;
use vision_encoder::{DecodeLimits, RgbImage, VisionError, decode};

use crate::support;

fn decoded(bytes: &[u8]) -> Result<RgbImage, VisionError> {
    decode(bytes, &DecodeLimits::default())
}

/// Names of all encoded files, in order.
fn names() -> Vec<String> {
    let entries = std::fs::read_dir(support::path("files")).expect("a folder");
    let names = entries.map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<String> = names
        .map(|name| name.into_string().expect("ASCII"))
        .collect();
    names.sort();
    assert!(names.len() > 30);
    names
}

fn file(name: &str) -> Vec<u8> {
    support::bytes(&format!("files/{name}"))
}

// What is read ----------------------------------------------------------------------------------

#[test]
fn files_decode_to_the_pixels_of_pillow() {
    let bytes = support::bytes("decoded.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    assert_eq!(tensors.names().len(), names().len());
    for name in names() {
        let expected = support::image(&tensors, &name);
        let found = decoded(&file(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let size = |image: &RgbImage| (image.width(), image.height());
        assert_eq!(size(&found), size(&expected), "{name}");
        assert!(found == expected, "{name}");
    }
}

/// Files in a safetensors file, and the pixels that they decode to.
fn decodes_as_recorded(fixture: &str, least: usize) {
    let bytes = std::fs::read(support::fixtures().join(fixture)).expect("fixtures");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let names = tensors.names();
    let names: Vec<&str> = (names.iter().filter_map(|name| name.strip_prefix("file."))).collect();
    assert!(names.len() > least);
    for name in names {
        let expected = support::image(&tensors, &format!("pixels.{name}"));
        let file = tensors.tensor(&format!("file.{name}")).expect(name);
        let found = decoded(file.data()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(found == expected, "{name}");
    }
}

/// Pillow's `exif_transpose` finds it in EXIF of any number type, in XMP, and wherever these lie.
#[test]
fn pictures_are_turned_as_pillow_turns_them() {
    decodes_as_recorded("orientation.safetensors", 70);
}

/// Every way to store colour, baseline and progressive, whole and after a few scans.
#[test]
fn jpeg_files_decode_to_the_pixels_of_libjpeg_turbo() {
    decodes_as_recorded("jpeg.safetensors", 80);
}

// What is refused -------------------------------------------------------------------------------

/// A PNG chunk with its checksum.
fn chunk(kind: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let checked = [kind, body].concat();
    let mut crc = u32::MAX;
    for byte in &checked {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
        }
    }
    let length = (body.len() as u32).to_be_bytes();
    [&length, &checked[..], &(!crc).to_be_bytes()].concat()
}

/// The start of an RGB PNG that claims a size and holds next to nothing.
fn png_claiming(width: u32, height: u32) -> Vec<u8> {
    let size = [width.to_be_bytes(), height.to_be_bytes()].concat();
    let header = [&size[..], &[8, 2, 0, 0, 0]].concat();
    [
        b"\x89PNG\r\n\x1a\n".to_vec(),
        chunk(b"IHDR", &header),
        chunk(b"IDAT", &[0x78, 0x9c, 0x03, 0, 0, 0, 0, 1]),
        chunk(b"IEND", &[]),
    ]
    .concat()
}

/// A JPEG file with another size in its frame header.
fn jpeg_claiming(width: u16, height: u16) -> Vec<u8> {
    let mut bytes = file("full_colour.jpg");
    let frame = bytes.windows(2).position(|pair| pair == [0xff, 0xc0]);
    let frame = frame.expect("a baseline frame");
    bytes[frame + 5..frame + 7].copy_from_slice(&height.to_be_bytes());
    bytes[frame + 7..frame + 9].copy_from_slice(&width.to_be_bytes());
    bytes
}

/// A lossless WebP file with another size in its header.
fn webp_claiming(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = file("lossless.webp");
    let data = bytes.windows(4).position(|tag| tag == b"VP8L");
    let size = data.expect("lossless data") + 9;
    let claimed = (width - 1) | (height - 1) << 14;
    bytes[size..size + 4].copy_from_slice(&claimed.to_le_bytes());
    bytes
}

/// A PNG with more chunks before those of a kind.
fn png_with(bytes: &[u8], kind: &[u8; 4], added: &[Vec<u8>]) -> Vec<u8> {
    let at = bytes.windows(4).position(|found| found == kind);
    let (before, after) = bytes.split_at(at.expect("the chunk") - 4);
    [before, &added.concat(), after].concat()
}

/// The size is refused from the header: nothing of it is allocated.
#[test]
fn a_claimed_size_beyond_the_limit_is_refused_from_the_header() {
    for (bytes, claimed) in [
        (png_claiming(30_000, 30_000), (30_000, 30_000)),
        (png_claiming(8000, 8001), (8000, 8001)),
        (png_claiming(1, 64_000_001), (1, 64_000_001)),
        (jpeg_claiming(65_000, 65_000), (65_000, 65_000)),
        (webp_claiming(16_383, 16_383), (16_383, 16_383)),
    ] {
        assert!(bytes.len() < 1000);
        let start = Instant::now();
        match decoded(&bytes) {
            Err(VisionError::TooLarge {
                width,
                height,
                max_pixels,
            }) => {
                assert_eq!(
                    (width, height, max_pixels),
                    (claimed.0, claimed.1, 64_000_000)
                );
            }
            other => panic!("{claimed:?}: {other:?}"),
        }
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}

/// Few pixels in very many rows take the time of many pixels.
#[test]
fn a_side_beyond_the_limit_is_refused_from_the_header() {
    for (width, height) in [(1, 64_000_000), (65_536, 1)] {
        let found = decoded(&png_claiming(width, height)).expect_err("refused");
        let text = found.to_string();
        assert!(matches!(found, VisionError::TooLong { .. }), "{text}");
        assert!(text.contains("65535"), "{text}");
    }
    let limits = |max_side| DecodeLimits {
        max_side,
        ..DecodeLimits::default()
    };
    let nine_by_six = file("rgb.png");
    assert!(decode(&nine_by_six, &limits(9)).is_ok());
    assert!(decode(&nine_by_six, &limits(8)).is_err());
}

/// The PNG decoder refuses the row before anyone sees the size.
#[test]
fn a_row_beyond_the_limit_on_bytes_is_not_called_damage() {
    let found = decoded(&png_claiming(i32::MAX as u32, 1)).expect_err("refused");
    let text = found.to_string();
    assert!(matches!(found, VisionError::TooManyBytes { .. }), "{text}");
    assert!(
        text.contains("536870912") && !text.contains("damaged"),
        "{text}"
    );
}

/// Of an animated PNG the picture that programs without animation show, whatever the others hold.
#[test]
fn the_first_picture_of_an_animation_is_read() {
    let still = file("rgb.png");
    let frame = |sequence: u32| {
        let numbers = [sequence, 9, 6, 0, 0].map(u32::to_be_bytes).concat();
        chunk(b"fcTL", &[&numbers[..], &[0, 1, 0, 1, 0, 0]].concat())
    };
    let control = chunk(b"acTL", &[2_u32, 0].map(u32::to_be_bytes).concat());
    let animated = png_with(&still, b"IDAT", &[control, frame(0)]);
    let second = chunk(b"fdAT", &[&2_u32.to_be_bytes()[..], b"no pixels"].concat());
    let animated = png_with(&animated, b"IEND", &[frame(1), second]);
    let (found, expected) = (decoded(&animated), decoded(&still));
    assert!(found.expect("a picture") == expected.expect("a picture"));
}

#[test]
fn the_limit_on_pixels_is_exact() {
    let limits = |max_pixels| DecodeLimits {
        max_pixels,
        ..DecodeLimits::default()
    };
    for name in ["rgb.png", "lossless.webp"] {
        let bytes = file(name);
        assert!(decode(&bytes, &limits(54)).is_ok(), "{name}");
        let found = decode(&bytes, &limits(53));
        assert!(
            matches!(
                found,
                Err(VisionError::TooLarge {
                    width: 9,
                    height: 6,
                    max_pixels: 53
                })
            ),
            "{name}: {found:?}"
        );
    }
    let bytes = file("full_colour.jpg");
    assert!(decode(&bytes, &limits(23 * 17)).is_ok());
    assert!(decode(&bytes, &limits(23 * 17 - 1)).is_err());
}

/// 16 bits and transparency make eight bytes of a pixel.
#[test]
fn the_limit_on_bytes_counts_what_decoding_allocates() {
    let limits = |max_bytes| DecodeLimits {
        max_bytes,
        ..DecodeLimits::default()
    };
    for name in names() {
        let bytes = file(&name);
        assert!(decode(&bytes, &limits(1 << 20)).is_ok(), "{name}");
        assert!(decode(&bytes, &limits(2)).is_err(), "{name}");
    }
    let wide = decode(&file("rgba_16_bits.png"), &limits(6 * 5 * 8 - 1));
    assert!(matches!(
        wide,
        Err(VisionError::TooManyBytes { max_bytes: 239 })
    ));
}

#[test]
fn what_is_no_image_is_a_format_error() {
    let gif =
        b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;";
    for bytes in [
        &b""[..],
        b"\x89PNG",
        b"a text file\n",
        b"<svg xmlns=\"http://www.w3.org/2000/svg\"/>",
        b"RIFF\x04\0\0\0WAVE",
        b"BM\0\0\0\0",
        gif,
        &[0; 100],
    ] {
        assert!(
            matches!(decoded(bytes), Err(VisionError::Format)),
            "{bytes:?}"
        );
    }
}

/// A cut-off file is never an image, wherever it is cut.
#[test]
fn truncated_files_are_errors() {
    for name in names() {
        let bytes = file(&name);
        // The last bytes of a file may carry nothing: PNG's end chunk, WebP's padding and metadata,
        // the second image of an animation.
        let tail = match name.as_str() {
            "animated.webp" => bytes.len() / 2,
            "orientation_6.webp" => 48,
            // What the arithmetic decoder has not yet asked for reads as zeros.
            "lossy.webp" => 4,
            _ if name.ends_with(".png") => 12 + 4,
            _ if name.ends_with(".jpg") => 0,
            _ => 2,
        };
        for length in 0..bytes.len() - tail {
            match decoded(&bytes[..length]) {
                Err(VisionError::Decode { .. } | VisionError::Format) => {}
                other => panic!("{name}, {length} of {}: {:?}", bytes.len(), other.err()),
            }
        }
    }
}

#[test]
fn a_broken_jpeg_is_an_error() {
    let bytes = file("full_colour.jpg");
    // Without its Huffman tables, no value can be read.
    let table = bytes.windows(2).position(|pair| pair == [0xff, 0xc4]);
    let mut broken = bytes.clone();
    broken[table.expect("a table") + 1] = 0xfe;
    for broken in [broken, bytes[..3].to_vec(), b"\xff\xd8\xff\xd9".to_vec()] {
        match decoded(&broken) {
            Err(error @ VisionError::Decode { .. }) => {
                assert!(error.to_string().contains("damaged"), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A height of 0 may stand for one that a later marker gives (DNL): Pillow refuses such files, too.
#[test]
fn a_jpeg_without_a_size_is_an_error() {
    for (width, height) in [(0, 16), (16, 0), (0, 0)] {
        let found = decoded(&jpeg_claiming(width, height));
        assert!(
            matches!(found, Err(VisionError::Decode { .. })),
            "{found:?}"
        );
    }
}

#[test]
fn a_wrong_checksum_is_an_error() {
    let mut bytes = file("rgb.png");
    let data = bytes.windows(4).position(|kind| kind == b"IDAT");
    bytes[data.expect("data") + 8] ^= 1;
    assert!(matches!(decoded(&bytes), Err(VisionError::Decode { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_bytes_never_panic(
        start in prop::sample::select(vec![
            &b""[..], b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR", b"\xff\xd8\xff",
            b"\xff\xd8\xff\xe0", b"RIFF\x40\0\0\0WEBP", b"RIFF\x40\0\0\0WEBPVP8L",
        ]),
        rest in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let limits = DecodeLimits { max_pixels: 1 << 20, max_bytes: 1 << 24, ..DecodeLimits::default() };
        let _ = decode(&[start, &rest].concat(), &limits);
    }

    #[test]
    fn damaged_files_never_panic_and_respect_the_limits(
        index: prop::sample::Index,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let names = names();
        let mut bytes = file(&names[index.index(names.len())]);
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let limits = DecodeLimits { max_pixels: 1 << 16, max_bytes: 1 << 22, ..DecodeLimits::default() };
        if let Ok(image) = decode(&bytes, &limits) {
            prop_assert!(image.width() * image.height() <= 1 << 16);
            prop_assert_eq!(image.data().len(), image.width() * image.height() * 3);
        }
    }
}
