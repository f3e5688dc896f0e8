//! Boxes as the release of Reroute reads and divides them, faults included.

use reroute_zoo::grounding::{BoundingBox, BoxUnits};

/// The box that the release reads out of an answer, in shares of the picture: the first four numbers in brackets,
/// else in parentheses, else zeros. Pixels are divided by the size of the picture **as given**, though they are
/// pixels of the resized one. Where no number is larger than 1, nothing is divided; corners stay in the order in which
/// they were written.
pub fn release_box(answer: &str, units: BoxUnits, picture: [usize; 2]) -> BoundingBox {
    let numbers = first_four(answer, '[', ']').or_else(|| first_four(answer, '(', ')'));
    let [x1, y1, x2, y2] = numbers.unwrap_or_default();
    // Shares, whatever the units are.
    let are_shares = [x1, y1, x2, y2].iter().all(|&at| at <= 1.0);
    let [width, height] = match units {
        BoxUnits::Thousandths if !are_shares => [1000.0, 1000.0],
        BoxUnits::ResizedPixels if !are_shares => picture.map(|side| side as f64),
        _ => [1.0, 1.0],
    };
    [x1 / width, y1 / height, x2 / width, y2 / height]
}

/// The first four numbers in brackets, as the harness's pattern has them: no exponents, no blank before a comma but in
/// front of the closing bracket.
fn first_four(text: &str, open: char, close: char) -> Option<[f64; 4]> {
    let mut starts = text.match_indices(open);
    starts.find_map(|(at, _)| {
        let rest = &text[at + open.len_utf8()..];
        let parts: Vec<&str> = rest[..rest.find(close)?].split(',').collect();
        let [a, b, c, d] = parts[..] else {
            return None;
        };
        Some([
            number(a.trim_start())?,
            number(b.trim_start())?,
            number(c.trim_start())?,
            number(d.trim())?,
        ])
    })
}

fn number(text: &str) -> Option<f64> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let decimal = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    (decimal(whole) && decimal(fraction)).then(|| text.parse().ok())?
}

/// Intersection over union as the harness computes it, which knows no order of corners; 0 where it would divide by 0.
pub fn harness_iou(truth: &BoundingBox, found: &BoundingBox) -> f64 {
    let width = truth[2].min(found[2]) - truth[0].max(found[0]);
    let height = truth[3].min(found[3]) - truth[1].max(found[1]);
    let shared = width.max(0.0) * height.max(0.0);
    let area = |corners: &BoundingBox| (corners[2] - corners[0]) * (corners[3] - corners[1]);
    let all = area(truth) + area(found) - shared;
    let iou = shared / all;
    if iou.is_finite() { iou } else { 0.0 }
}
