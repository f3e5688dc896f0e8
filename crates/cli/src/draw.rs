//! Pictures: boxes on photos, and which visual tokens a stage works on.

use std::path::Path;

use anyhow::{Context, bail};
use image::codecs::{jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder};
use image::{ExtendedColorType, ImageEncoder};
use noto_sans_mono_bitmap::{
    FontWeight, RasterHeight, RasterizedChar, get_raster, get_raster_width,
};
use reroute_zoo::TokenState;
use reroute_zoo::grounding::Place;
use vision_encoder::{Canvas, RgbImage, Window, resize_bicubic};

/// Colour of a found box.
pub(crate) const FOUND: [u8; 3] = [255, 45, 85];

/// Colour of the frame around tokens that came back.
const RETURNED: [u8; 3] = [52, 199, 89];

/// Why a picture is not drawn on.
pub(crate) const NO_GRID: &str = "the visual tokens of this model are not the patches of the picture \
    (vision_feature_select_strategy of config.json), so that there is nothing to draw on it; \
    `trace` tells what was selected";

/// Forms in which pictures are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Png,
    Jpeg,
    WebP,
}

/// Quality of JPEG files, of 100.
const JPEG_QUALITY: u8 = 95;

impl Format {
    /// By the end of a file's name; without one it is PNG.
    pub(crate) fn of(path: &Path) -> anyhow::Result<Self> {
        let Some(extension) = path.extension() else {
            return Ok(Self::Png);
        };
        match extension.to_ascii_lowercase().to_str() {
            Some("png") => Ok(Self::Png),
            Some("jpg" | "jpeg") => Ok(Self::Jpeg),
            Some("webp") => Ok(Self::WebP),
            _ => bail!(
                "cannot write {}: pictures are written as PNG, JPEG or WebP; let its name end in .png, .jpg \
                 or .webp",
                path.display()
            ),
        }
    }

    /// The bytes of the file.
    pub(crate) fn encode(self, picture: &RgbImage) -> anyhow::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let (width, height) = (picture.width() as u32, picture.height() as u32);
        let (data, colour) = (picture.data(), ExtendedColorType::Rgb8);
        let encoded = match self {
            Self::Png => PngEncoder::new(&mut bytes).write_image(data, width, height, colour),
            Self::Jpeg => JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY)
                .write_image(data, width, height, colour),
            Self::WebP => {
                WebPEncoder::new_lossless(&mut bytes).write_image(data, width, height, colour)
            }
        };
        encoded.with_context(|| format!("cannot encode the picture as {self:?}"))?;
        Ok(bytes)
    }
}

/// Draws the outline of a box given in pixels; parts outside the picture are left out.
pub(crate) fn rectangle(picture: &mut RgbImage, [x1, y1, x2, y2]: &[f64; 4], colour: [u8; 3]) {
    let thickness = thickness(picture);
    let sides = [
        [*x1, *y1, *x2, y1 + thickness],
        [*x1, y2 - thickness, *x2, *y2],
        [*x1, *y1, x1 + thickness, *y2],
        [x2 - thickness, *y1, *x2, *y2],
    ];
    for side in sides {
        fill(picture, side, |_| colour);
    }
}

/// Thickness of a line in pixels.
fn thickness(picture: &RgbImage) -> f64 {
    let longest = picture.width().max(picture.height());
    (longest as f64 / 160.0).max(1.0).round()
}

/// Draws a box or a point, given in pixels before the picture was enlarged by `scale`, and what it is
/// called.
pub(crate) fn found(picture: &mut RgbImage, place: Place, scale: f64, tag: Option<&str>) {
    let corner = match place {
        Place::Box(corners) => {
            let corners = corners.map(|at| at * scale);
            rectangle(picture, &corners, FOUND);
            [corners[0], corners[1]]
        }
        Place::Point(at) => {
            let [x, y] = at.map(|at| at * scale);
            let reach = 2.0 * thickness(picture);
            fill(
                picture,
                [x - reach, y - reach, x + reach, y + reach],
                |_| FOUND,
            );
            [x + reach, y - reach]
        }
    };
    if let Some(tag) = tag {
        write(picture, tag, corner);
    }
}

/// Height of a letter in pixels, before it is enlarged with the picture.
const LETTER: RasterHeight = RasterHeight::Size16;

/// Writes white letters on a box's colour, above a corner where there is room, else below it.
fn write(picture: &mut RgbImage, text: &str, [left, top]: [f64; 2]) {
    let letter = |c: char| get_raster(c, FontWeight::Regular, LETTER);
    let letters = text
        .chars()
        .filter_map(|c| letter(c).or_else(|| letter('\u{FFFD}')));
    let scale = (picture.width().max(picture.height()) / 1000).max(1);
    let wide = get_raster_width(FontWeight::Regular, LETTER) * scale;
    let high = LETTER.val() * scale;
    // No letter begins beyond the right edge.
    let letters: Vec<RasterizedChar> = letters.take(picture.width() / wide).collect();
    let room = |size: usize, needed: usize| size.saturating_sub(needed) as f64;
    let left = left.clamp(0.0, room(picture.width(), letters.len() * wide)) as usize;
    let above = top - high as f64;
    let top = if above >= 0.0 { above } else { top };
    let top = top.clamp(0.0, room(picture.height(), high)) as usize;
    for (at, letter) in letters.iter().enumerate() {
        for (y, line) in letter.rows().enumerate() {
            for (x, &light) in line.iter().enumerate() {
                let (x, y) = (left + at * wide + x * scale, top + y * scale);
                let mix = |colour: u8| {
                    let (colour, light) = (u16::from(colour), u16::from(light));
                    (colour + (255 - colour) * light / 255) as u8
                };
                let square = [x, y, x + scale, y + scale].map(|at| at as f64);
                fill(picture, square, |_| FOUND.map(mix));
            }
        }
    }
}

/// Paints the grid of visual tokens over the image as the model sees it: active tokens as they are,
/// deferred ones dark, returned ones framed.
pub(crate) fn tokens(
    view: &RgbImage,
    states: &[TokenState],
    columns: usize,
) -> anyhow::Result<RgbImage> {
    let scale = (448 / view.width()).max(1);
    let mut picture = enlarge(view, scale)?;
    let rows = states.len() / columns.max(1);
    let cell = |at: usize, count: usize, size: usize| (size * at) as f64 / count as f64;
    let (width, height) = (picture.width(), picture.height());
    for (token, state) in states.iter().enumerate() {
        let (row, column) = (token / columns, token % columns);
        let area = [
            cell(column, columns, width),
            cell(row, rows, height),
            cell(column + 1, columns, width),
            cell(row + 1, rows, height),
        ];
        match state {
            TokenState::Active => {}
            TokenState::Returned => rectangle(&mut picture, &area, RETURNED),
            TokenState::Deferred | TokenState::Removed | TokenState::Absent => {
                fill(&mut picture, area, darken);
            }
        }
    }
    Ok(picture)
}

/// Width of a picture on a contact sheet, and the space around it.
const SHEET_WIDTH: usize = 336;
const SHEET_GAP: usize = 12;

/// Digits as 3 × 5 pixels, row by row.
const DIGITS: [u16; 10] = [
    0b111_101_101_101_111,
    0b010_110_010_010_111,
    0b111_001_111_100_111,
    0b111_001_111_001_111,
    0b101_101_111_001_001,
    0b111_100_111_001_111,
    0b111_100_111_101_111,
    0b111_001_001_001_001,
    0b111_101_111_101_111,
    0b111_101_111_001_111,
];

/// Rows of pictures, scaled to one width and numbered from 1.
pub(crate) fn contact_sheet(rows: &[Vec<RgbImage>]) -> anyhow::Result<RgbImage> {
    let mut scaled = Vec::new();
    for row in rows {
        let row = row.iter().map(|picture| to_width(picture, SHEET_WIDTH));
        scaled.push(row.collect::<anyhow::Result<Vec<RgbImage>>>()?);
    }
    let label = 5 * SHEET_GAP;
    let columns = scaled.iter().map(Vec::len).max().unwrap_or(0);
    let heights = scaled.iter().map(|row| {
        let heights = row.iter().map(RgbImage::height);
        heights.max().unwrap_or(0) + SHEET_GAP
    });
    let heights: Vec<usize> = heights.collect();
    let width = label + columns * (SHEET_WIDTH + SHEET_GAP);
    let height = SHEET_GAP + heights.iter().sum::<usize>();
    let mut sheet = RgbImage::new(width, height, vec![255; width * height * 3])?;
    let mut top = SHEET_GAP;
    for (index, (row, height)) in scaled.iter().zip(heights).enumerate() {
        number(&mut sheet, index + 1, [SHEET_GAP, top]);
        for (column, picture) in row.iter().enumerate() {
            let left = label + column * (SHEET_WIDTH + SHEET_GAP);
            paste(&mut sheet, picture, [left, top]);
        }
        top += height;
    }
    Ok(sheet)
}

fn to_width(picture: &RgbImage, width: usize) -> anyhow::Result<RgbImage> {
    let height = (picture.height() * width).div_ceil(picture.width()).max(1);
    let (x, y) = (0..width, 0..height);
    Ok(resize_bicubic(
        &Canvas::of(picture),
        width,
        height,
        &Window { x, y },
    )?)
}

fn paste(sheet: &mut RgbImage, picture: &RgbImage, [left, top]: [usize; 2]) {
    let (wide, width) = (sheet.width(), picture.width());
    for (y, row) in picture.data().chunks_exact(width * 3).enumerate() {
        let start = ((top + y) * wide + left) * 3;
        sheet.data_mut()[start..start + row.len()].copy_from_slice(row);
    }
}

/// Writes a number, each pixel of a digit as a square.
fn number(sheet: &mut RgbImage, number: usize, [left, top]: [usize; 2]) {
    const SQUARE: usize = 5;
    for (place, digit) in number.to_string().bytes().enumerate() {
        let glyph = DIGITS[usize::from(digit - b'0')];
        for bit in 0..15 {
            if glyph >> (14 - bit) & 1 == 1 {
                let x = left + (place * 4 + bit % 3) * SQUARE;
                let y = top + bit / 3 * SQUARE;
                let square = [x, y, x + SQUARE, y + SQUARE];
                fill(sheet, square.map(|at| at as f64), |_| [0; 3]);
            }
        }
    }
}

/// Grey at a quarter of the brightness.
fn darken([r, g, b]: [u8; 3]) -> [u8; 3] {
    let grey = (u16::from(r) + u16::from(g) + u16::from(b)) / 12;
    [grey as u8; 3]
}

fn fill(picture: &mut RgbImage, [x1, y1, x2, y2]: [f64; 4], change: impl Fn([u8; 3]) -> [u8; 3]) {
    let (width, height) = (picture.width(), picture.height());
    let clip = |value: f64, size: usize| value.round().clamp(0.0, size as f64) as usize;
    let (left, right) = (clip(x1, width), clip(x2, width));
    for y in clip(y1, height)..clip(y2, height) {
        let row = &mut picture.data_mut()[y * width * 3..(y + 1) * width * 3];
        for pixel in row[left * 3..right.max(left) * 3].chunks_exact_mut(3) {
            let changed = change([pixel[0], pixel[1], pixel[2]]);
            pixel.copy_from_slice(&changed);
        }
    }
}

/// Every pixel becomes a square of `scale` pixels.
pub(crate) fn enlarge(view: &RgbImage, scale: usize) -> anyhow::Result<RgbImage> {
    let (width, height) = (view.width(), view.height());
    let mut data = Vec::with_capacity(width * height * 3 * scale * scale);
    for row in view.data().chunks_exact(width * 3) {
        let wide: Vec<u8> = row
            .chunks_exact(3)
            .flat_map(|pixel| std::iter::repeat_n(pixel, scale).flatten().copied())
            .collect();
        data.extend(std::iter::repeat_n(wide, scale).flatten());
    }
    Ok(RgbImage::new(width * scale, height * scale, data)?)
}
