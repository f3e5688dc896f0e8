//! How a picture is to be turned: where Pillow's `ImageOps.exif_transpose` looks for it, and as it
//! reads it. EXIF goes before XMP, whatever it says.

use std::io::Read;

use flate2::read::ZlibDecoder;
use image::ImageFormat;
use image::metadata::Orientation;

use crate::jpeg;

/// EXIF's number for the orientation.
const TAG: u16 = 0x0112;
/// Longest text that a PNG file may compress, in bytes.
const MAX_TEXT: u64 = 1 << 20;

/// The orientation that a file asks for; none where what it says makes no sense.
pub(crate) fn find(bytes: &[u8], format: ImageFormat) -> Orientation {
    let notes = match format {
        ImageFormat::Jpeg => of_jpeg(bytes),
        ImageFormat::Png => of_png(bytes),
        _ => of_webp(bytes),
    };
    let exif = notes.exif.or(notes.raw_profile);
    let number = match exif.and_then(|exif| in_exif(&exif)) {
        Some(number) => number,
        None => notes.xmp.and_then(|xmp| in_xmp(&xmp)),
    };
    number
        .and_then(Orientation::from_exif)
        .unwrap_or(Orientation::NoTransforms)
}

/// The parts of a file that may name the orientation; of several of a kind, the last.
#[derive(Default)]
struct Notes {
    exif: Option<Vec<u8>>,
    /// EXIF as ImageMagick keeps it in PNG files.
    raw_profile: Option<Vec<u8>>,
    xmp: Option<Vec<u8>>,
}

// Containers ------------------------------------------------------------------------------------

/// EXIF may be spread over several segments. What follows the picture's own data is not looked at.
fn of_jpeg(bytes: &[u8]) -> Notes {
    let mut notes = Notes::default();
    let before = jpeg::segments(bytes).take_while(|(marker, _)| *marker != 0xda);
    for (_, body) in before.filter(|(marker, _)| *marker == 0xe1) {
        if let Some(more) = body.strip_prefix(b"Exif\0\0") {
            match &mut notes.exif {
                Some(exif) => exif.extend(more),
                None => notes.exif = Some(body.to_vec()),
            }
        } else if let Some(xmp) = body.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0") {
            notes.xmp = Some(xmp.to_vec());
        }
    }
    notes
}

fn of_png(bytes: &[u8]) -> Notes {
    let mut notes = Notes::default();
    let mut rest = bytes.get(8..).unwrap_or_default();
    while let Some((&length, after)) = rest.split_first_chunk()
        && let Some((kind, after)) = after.split_first_chunk::<4>()
        && let Some((body, after)) =
            after.split_at_checked(u32::from_be_bytes(length).try_into().unwrap_or(usize::MAX))
    {
        match kind {
            b"eXIf" => notes.exif = Some(body.to_vec()),
            b"tEXt" | b"zTXt" | b"iTXt" => {
                let text = split(body).and_then(|(key, rest)| Some((key, png_text(kind, rest)?)));
                match text {
                    Some((b"exif", text)) if kind == b"tEXt" => notes.exif = Some(text),
                    Some((b"Raw profile type exif", text)) => notes.raw_profile = profile(&text),
                    Some((b"XML:com.adobe.xmp", text)) => notes.xmp = Some(text),
                    _ => {}
                }
            }
            b"IEND" => break,
            _ => {}
        }
        // Behind the checksum.
        rest = after.get(4..).unwrap_or_default();
    }
    notes
}

/// What comes behind the key of a chunk of text.
fn png_text(kind: &[u8; 4], rest: &[u8]) -> Option<Vec<u8>> {
    let (is_compressed, text) = match (kind, rest) {
        (b"tEXt", text) => (false, text),
        (b"zTXt", [0, text @ ..]) => (true, text),
        (b"iTXt", [flag, method, rest @ ..]) if *flag == 0 || *method == 0 => {
            let (_language, rest) = split(rest)?;
            let (_translated_key, text) = split(rest)?;
            (*flag != 0, text)
        }
        _ => return None,
    };
    if !is_compressed {
        return Some(text.to_vec());
    }
    let mut inflated = Vec::new();
    let mut limited = ZlibDecoder::new(text).take(MAX_TEXT);
    limited.read_to_end(&mut inflated).ok()?;
    Some(inflated)
}

/// Splits at the first zero byte.
fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|&byte| byte == 0)?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

/// ImageMagick's profiles: an empty line, the kind, the length, and hexadecimal digits.
fn profile(text: &[u8]) -> Option<Vec<u8>> {
    let lines = text.split(|&byte| byte == b'\n').skip(3).flatten();
    let digits = lines.filter(|byte| !byte.is_ascii_whitespace());
    let digits = digits.map(|&byte| char::from(byte).to_digit(16).map(|digit| digit as u8));
    let digits: Vec<u8> = digits.collect::<Option<_>>()?;
    let (pairs, odd) = digits.as_chunks();
    odd.is_empty()
        .then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

/// Only extended files have metadata, and say which.
fn of_webp(bytes: &[u8]) -> Notes {
    const EXIF: u8 = 1 << 3;
    const XMP: u8 = 1 << 2;
    let mut notes = Notes::default();
    let mut flags = 0;
    let mut rest = bytes.get(12..).unwrap_or_default();
    while let Some((kind, after)) = rest.split_first_chunk::<4>()
        && let Some((&length, after)) = after.split_first_chunk()
        && let length = u32::from_le_bytes(length) as usize
        && let Some(body) = after.get(..length)
    {
        match kind {
            b"VP8X" => flags = body.first().copied().unwrap_or(0),
            b"EXIF" if flags & EXIF != 0 && notes.exif.is_none() => {
                notes.exif = Some(body.to_vec());
            }
            b"XMP " if flags & XMP != 0 && notes.xmp.is_none() => notes.xmp = Some(body.to_vec()),
            _ => {}
        }
        // Chunks begin at even places.
        rest = after.get(length + length % 2..).unwrap_or_default();
    }
    notes
}

// Contents --------------------------------------------------------------------------------------

/// The orientation in EXIF: `None` if it is not there, `Some(None)` if it is no number from 0 to 255.
fn in_exif(exif: &[u8]) -> Option<Option<u8>> {
    let head = b"Exif\0\0";
    let tiff = exif.strip_prefix(head).unwrap_or(exif);
    let tiff = Tiff::new(tiff.strip_prefix(head).unwrap_or(tiff))?;
    let start = tiff.u32(4)? as usize;
    let entries = usize::from(tiff.u16(start)?);
    let entries = (0..entries).map(|entry| start.checked_add(2 + entry * 12));
    // The first of several counts that can be read.
    let found = entries.map_while(|at| {
        let at = at?;
        Some((tiff.u16(at)? == TAG).then(|| tiff.value(at)).flatten())
    });
    found.flatten().next()
}

/// A TIFF file, in which EXIF lies.
struct Tiff<'a> {
    bytes: &'a [u8],
    is_little_endian: bool,
}

impl<'a> Tiff<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let is_little_endian = match bytes.first_chunk()? {
            b"II\x2a\0" | b"II\0\x2a" => true,
            b"MM\0\x2a" | b"MM\x2a\0" => false,
            _ => return None,
        };
        Some(Self {
            bytes,
            is_little_endian,
        })
    }

    /// The value of the entry at this place: `None` if there is none, or it cannot be read.
    fn value(&self, at: usize) -> Option<Option<u8>> {
        let (kind, count) = (self.u16(at + 2)?, self.u32(at + 4)? as usize);
        let size = match kind {
            1 | 2 | 6 | 7 => 1,
            3 | 8 => 2,
            4 | 9 | 11 | 13 => 4,
            5 | 10 | 12 | 16 => 8,
            _ => return None,
        };
        let bytes = count.checked_mul(size).filter(|&bytes| bytes > 0)?;
        let at = match bytes <= 4 {
            true => at + 8,
            false => self.u32(at + 8)? as usize,
        };
        self.bytes.get(at..at.checked_add(bytes)?)?;
        let number = match kind {
            3 | 8 => u32::from(self.u16(at)?).into(),
            4 | 9 | 13 => self.u32(at)?.into(),
            5 | 10 => f64::from(self.u32(at)?) / f64::from(self.u32(at + 4)?),
            6 => f64::from(*self.bytes.get(at)?),
            11 => f32::from_bits(self.u32(at)?).into(),
            12 => f64::from_bits(self.u64(at)?),
            16 => self.u64(at)? as f64,
            // Bytes and text are no numbers.
            _ => return Some(None),
        };
        let whole = number as u8;
        Some((f64::from(whole) == number).then_some(whole))
    }

    fn take<const BYTES: usize>(&self, at: usize) -> Option<[u8; BYTES]> {
        let bytes = self.bytes.get(at..at.checked_add(BYTES)?)?;
        let mut bytes: [u8; BYTES] = bytes.try_into().ok()?;
        if self.is_little_endian {
            bytes.reverse();
        }
        Some(bytes)
    }

    fn u16(&self, at: usize) -> Option<u16> {
        self.take(at).map(u16::from_be_bytes)
    }

    fn u32(&self, at: usize) -> Option<u32> {
        self.take(at).map(u32::from_be_bytes)
    }

    fn u64(&self, at: usize) -> Option<u64> {
        self.take(at).map(u64::from_be_bytes)
    }
}

/// The first digit of `tiff:Orientation="6"` or `<tiff:Orientation>6<`.
fn in_xmp(xmp: &[u8]) -> Option<u8> {
    const NAME: &[u8] = b"tiff:Orientation";
    let places = xmp.windows(NAME.len()).enumerate();
    let mut places = places.filter(|(_, found)| *found == NAME);
    places.find_map(|(at, _)| match xmp.get(at + NAME.len()..)? {
        [b'=', b'"', digit @ b'0'..=b'9', ..] | [b'>', digit @ b'0'..=b'9', ..] => {
            Some(digit - b'0')
        }
        _ => None,
    })
}
