//! Grounding: from an expression to a prompt, from an answer to a box.

pub use reroute_family::{BoundingBox, BoxUnits, GroundingFormat};

/// The key of a box in the JSON of Qwen2.5-VL and Qwen3-VL.
const JSON_KEY: &str = "\"bbox_2d\"";

/// Finds the first box in an answer, and orders its corners. In this order of preference: four
/// numbers in brackets after the key `"bbox_2d"`, four in brackets anywhere, four in parentheses,
/// two points in parentheses one after the other.
///
/// Numbers are decimal, optionally negative, without exponents.
pub fn parse_box(answer: &str) -> Option<BoundingBox> {
    let after_key = answer.split_once(JSON_KEY).map_or("", |(_, after)| after);
    let [x1, y1, x2, y2] = group(after_key, '[', ']')
        .or_else(|| group(answer, '[', ']'))
        .or_else(|| group(answer, '(', ')'))
        .or_else(|| points(answer))?;
    Some([x1.min(x2), y1.min(y2), x1.max(x2), y1.max(y2)])
}

/// The first group of four numbers.
fn group(answer: &str, open: char, close: char) -> Option<[f64; 4]> {
    answer
        .split(open)
        .skip(1)
        .find_map(|rest| numbers(rest.split_once(close)?.0))
}

/// The first two points `(x1,y1),(x2,y2)` with no more than a comma between them.
fn points(answer: &str) -> Option<[f64; 4]> {
    let groups = answer.split('(').skip(1);
    let mut groups = groups.map(|rest| {
        let (inside, between) = rest.split_once(')')?;
        Some((numbers::<2>(inside)?, matches!(between.trim(), "" | ",")))
    });
    let mut first = groups.next()?;
    groups.find_map(
        |second| match (std::mem::replace(&mut first, second), second) {
            (Some(([x1, y1], true)), Some(([x2, y2], _))) => Some([x1, y1, x2, y2]),
            _ => None,
        },
    )
}

/// Exactly `N` numbers with commas between them.
fn numbers<const N: usize>(text: &str) -> Option<[f64; N]> {
    let numbers: Vec<f64> = text.split(',').map(number).collect::<Option<_>>()?;
    numbers.try_into().ok()
}

fn number(text: &str) -> Option<f64> {
    let text = text.trim();
    let digits = text.strip_prefix('-').unwrap_or(text);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let decimal = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let number: f64 = (decimal(whole) && decimal(fraction)).then(|| text.parse().ok())??;
    number.is_finite().then_some(number)
}

/// Intersection over union of two boxes in the same units.
pub fn iou(a: &BoundingBox, b: &BoundingBox) -> f64 {
    let side = |low: f64, high: f64| (high - low).max(0.0);
    let area = |b: &BoundingBox| side(b[0], b[2]) * side(b[1], b[3]);
    let width = side(a[0].max(b[0]), a[2].min(b[2]));
    let height = side(a[1].max(b[1]), a[3].min(b[3]));
    let shared = width * height;
    let all = area(a) + area(b) - shared;
    if all > 0.0 { shared / all } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_are_found_where_answers_put_them() {
        let cases = [
            ("[0.1, 0.2, 0.3, 0.4]", Some([0.1, 0.2, 0.3, 0.4])),
            ("It is at [0.1,0.2,0.3,0.4].", Some([0.1, 0.2, 0.3, 0.4])),
            ("(0.1, 0.2, 0.3, 0.4)", Some([0.1, 0.2, 0.3, 0.4])),
            (
                "{\"bbox_2d\": [10, 20, 30, 40]}",
                Some([10.0, 20.0, 30.0, 40.0]),
            ),
            (
                "[1, 2] then [0.5, 0.6, 0.1, 0.2]",
                Some([0.1, 0.2, 0.5, 0.6]),
            ),
            ("[[1, 2, 3, 4]]", Some([1.0, 2.0, 3.0, 4.0])),
            ("[-0.5, 0, 1, 1]", Some([-0.5, 0.0, 1.0, 1.0])),
            ("[1e3, 0, 1, 1]", None),
            ("[0.1, 0.2, 0.3]", None),
            ("[0.1, 0.2, 0.3, 0.4", None),
            ("[nan, inf, 0, 0]", None),
            ("[1., 2, 3, 4]", None),
            ("(176,106),(232,160)", Some([176.0, 106.0, 232.0, 160.0])),
            (
                "the eyes on a giraffe(176,106),(232,160) and a leaf(1,2),(3,4)",
                Some([176.0, 106.0, 232.0, 160.0]),
            ),
            (
                "<|box_start|>(232,106),(176,160)<|box_end|>",
                Some([176.0, 106.0, 232.0, 160.0]),
            ),
            ("(5, 6) (7, 8)", Some([5.0, 6.0, 7.0, 8.0])),
            ("(1,2) is near (3,4), (5,6)", Some([3.0, 4.0, 5.0, 6.0])),
            ("(1,2),(3,4,5)", None),
            ("(1,2)", None),
            (
                "```json\n[\n\t{\"bbox_2d\": [341, 258, 397, 360], \"label\": \"cup\"},\n\t\
                 {\"bbox_2d\": [1, 2, 3, 4], \"label\": \"cup\"}\n]\n```",
                Some([341.0, 258.0, 397.0, 360.0]),
            ),
            (
                "{\"label\": \"[9, 9, 9, 9]\", \"bbox_2d\": [1, 2, 3, 4]}",
                Some([1.0, 2.0, 3.0, 4.0]),
            ),
            ("{\"bbox_2d\": [1, 2, 3", None),
            ("[1, 2, 3, 4] \"bbox_2d\"", Some([1.0, 2.0, 3.0, 4.0])),
            ("no box", None),
            ("", None),
        ];
        for (answer, expected) in cases {
            assert_eq!(parse_box(answer), expected, "{answer}");
        }
    }

    #[test]
    fn numbers_too_large_for_a_box() {
        let digits = "9".repeat(400);
        assert_eq!(parse_box(&format!("[0, 0, 1, {digits}]")), None);
        assert_eq!(parse_box(&format!("(0,0),(1,{digits})")), None);
    }

    #[test]
    fn boxes_in_pixels_of_the_image_as_given() {
        let (resized, original) = ([420.0, 280.0], [640.0, 427.0]);
        let half = [0.0, 0.0, 320.0, 213.5];
        for (units, answered) in [
            (BoxUnits::Normalized, [0.0, 0.0, 0.5, 0.5]),
            (BoxUnits::Thousandths, [0.0, 0.0, 500.0, 500.0]),
            (BoxUnits::ResizedPixels, [0.0, 0.0, 210.0, 140.0]),
        ] {
            assert_eq!(units.to_pixels(answered, resized, original), half);
        }
        let beyond = [-10.0, 5.0, 2000.0, 1001.0];
        let pixels = BoxUnits::Thousandths.to_pixels(beyond, resized, original);
        assert_eq!(pixels, [0.0, 0.005 * 427.0, 640.0, 427.0]);
    }

    #[test]
    fn iou_of_boxes() {
        let unit = [0.0, 0.0, 1.0, 1.0];
        assert_eq!(iou(&unit, &unit), 1.0);
        assert_eq!(iou(&unit, &[0.5, 0.0, 1.5, 1.0]), 1.0 / 3.0);
        assert_eq!(iou(&unit, &[2.0, 2.0, 3.0, 3.0]), 0.0);
        assert_eq!(iou(&[0.0; 4], &[0.0; 4]), 0.0);
    }
}
