//! What an answer names: boxes and points in any of the notations that models have.

use super::BoundingBox;

/// The end of the keys of a box and of a point in JSON.
const KEY_END: &str = "_2d\"";

/// What stands around a label before its boxes: tags, or special tokens.
const LABEL_MARKS: [[&str; 2]; 2] = [
    ["<ref>", "</ref>"],
    ["<|object_ref_start|>", "<|object_ref_end|>"],
];

/// A place in a picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Place {
    /// A box.
    Box(BoundingBox),
    /// A point `[x, y]`.
    Point([f64; 2]),
}

impl Place {
    /// The box, if it is one.
    pub fn as_box(self) -> Option<BoundingBox> {
        match self {
            Self::Box(corners) => Some(corners),
            Self::Point(_) => None,
        }
    }

    fn boxed([x1, y1, x2, y2]: [f64; 4]) -> Self {
        Self::Box([x1.min(x2), y1.min(y2), x1.max(x2), y1.max(y2)])
    }
}

/// Something that an answer names, where it is in units of the answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// What the answer calls it.
    pub label: Option<String>,
    /// Where it is.
    pub place: Place,
}

/// Finds the first box in an answer, and orders its corners: see [`parse_places`].
pub fn parse_box(answer: &str) -> Option<BoundingBox> {
    let first = |places: Vec<Named>| places.into_iter().find_map(|named| named.place.as_box());
    first(entries(answer)).or_else(|| first(groups_alone(answer)))
}

/// Finds all boxes and points in an answer, in its order, and orders the corners of boxes. Of these
/// notations, the first that it has counts:
///
/// 1. JSON objects with a key `"bbox_2d"` (four numbers in brackets) or `"point_2d"` (two), and
///    perhaps `"label"`. Of a list that is cut off, the complete objects.
/// 2. four numbers in brackets,
/// 3. four numbers in parentheses,
/// 4. two points in parentheses one after the other.
///
/// In the last three, boxes may follow their label: `<ref>the cup</ref>`, or the same between
/// `<|object_ref_start|>` and `<|object_ref_end|>`. Numbers are decimal, optionally negative, without
/// exponents.
pub fn parse_places(answer: &str) -> Vec<Named> {
    let entries = entries(answer);
    match entries.is_empty() {
        true => groups_alone(answer),
        false => entries,
    }
}

/// Objects of a JSON list, whatever stands around it.
fn entries(answer: &str) -> Vec<Named> {
    // Where a key begins, where it ends, and whether its value is a box.
    let keys = answer.match_indices(KEY_END).filter_map(|(at, _)| {
        let (before, end) = (&answer[..at], at + KEY_END.len());
        let of = |key: &str| before.ends_with(key).then(|| at - key.len());
        let key = of("\"bbox").map(|start| (start, end, true));
        key.or_else(|| of("\"point").map(|start| (start, end, false)))
    });
    let keys: Vec<(usize, usize, bool)> = keys.collect();
    let (mut entries, mut closed) = (Vec::new(), Vec::new());
    // Where the entry before ends.
    let mut done = 0;
    for (index, &(start, end, is_box)) in keys.iter().enumerate() {
        let next = keys.get(index + 1).map_or(answer.len(), |key| key.0);
        let value = &answer[end..next];
        let found = match is_box {
            true => groups::<4>(value, ['[', ']'])
                .next()
                .map(|group| (Place::boxed(group.numbers), group.end)),
            false => groups::<2>(value, ['[', ']'])
                .next()
                .map(|group| (Place::Point(group.numbers), group.end)),
        };
        let Some((place, length)) = found else {
            continue;
        };
        let behind = &answer[end + length..next];
        let (label, close) = rest_of_object(behind);
        let label = label.or_else(|| {
            let before = &answer[done..start];
            rest_of_object(&before[before.rfind('{')? + 1..]).0
        });
        done = end + length + close.unwrap_or(0);
        entries.push(Named { label, place });
        closed.push(close.is_some());
    }
    if closed.contains(&true) && closed.last() == Some(&false) {
        entries.pop();
    }
    entries
}

/// Reads on inside of a JSON object: the text under `"label"`, and where the object ends, if it does.
fn rest_of_object(text: &str) -> (Option<String>, Option<usize>) {
    let (mut at, mut depth) = (0, 0usize);
    let (mut label, mut is_label) = (None, false);
    while let Some(c) = text[at..].chars().next() {
        match c {
            '"' => {
                let strings = serde_json::Deserializer::from_str(&text[at..]);
                let mut strings = strings.into_iter::<String>();
                let Some(Ok(string)) = strings.next() else {
                    // Cut off.
                    return (label, None);
                };
                at += strings.byte_offset();
                let is_key = text[at..].trim_start().starts_with(':');
                if is_label && depth == 0 {
                    label = label.or(Some(string.clone()));
                }
                is_label = is_key && string == "label";
                continue;
            }
            '{' => depth += 1,
            '}' if depth == 0 => return (label, Some(at + 1)),
            '}' => depth -= 1,
            ',' => is_label = false,
            _ => {}
        }
        at += c.len_utf8();
    }
    (label, None)
}

/// Boxes that are written as nothing but numbers.
fn groups_alone(answer: &str) -> Vec<Named> {
    let mut boxes: Vec<Group<4>> = groups(answer, ['[', ']']).collect();
    if boxes.is_empty() {
        boxes = groups(answer, ['(', ')']).collect();
    }
    if boxes.is_empty() {
        boxes = pairs(answer);
    }
    let mut labels = labels(answer).into_iter().peekable();
    let mut label = None;
    let named = |group: Group<4>| {
        while let Some((_, text)) = labels.next_if(|(end, _)| *end <= group.start) {
            label = Some(text);
        }
        Named {
            label: label.clone(),
            place: Place::boxed(group.numbers),
        }
    };
    boxes.into_iter().map(named).collect()
}

/// Marked labels, and where each ends, in order.
fn labels(answer: &str) -> Vec<(usize, String)> {
    let of = |[open, close]: [&str; 2]| {
        let parts = answer.match_indices(open).filter_map(move |(at, _)| {
            let start = at + open.len();
            let text = &answer[start..];
            let text = &text[..text.find(open).unwrap_or(text.len())];
            let text = &text[..text.find(close)?];
            Some((start + text.len(), text.trim().to_string()))
        });
        parts.collect::<Vec<_>>()
    };
    let mut labels: Vec<(usize, String)> = LABEL_MARKS.into_iter().flat_map(of).collect();
    labels.sort_by_key(|(end, _)| *end);
    labels
}

/// Numbers between brackets, and where both stand.
#[derive(Clone, Copy)]
struct Group<const N: usize> {
    numbers: [f64; N],
    start: usize,
    end: usize,
}

/// All groups of so many numbers.
fn groups<const N: usize>(
    text: &str,
    [open, close]: [char; 2],
) -> impl Iterator<Item = Group<N>> + '_ {
    text.match_indices(open).filter_map(move |(start, _)| {
        let rest = &text[start + open.len_utf8()..];
        let rest = &rest[..rest.find(open).unwrap_or(rest.len())];
        let inside = &rest[..rest.find(close)?];
        Some(Group {
            numbers: numbers(inside)?,
            start,
            end: start + open.len_utf8() + inside.len() + close.len_utf8(),
        })
    })
}

/// Points `(x1,y1),(x2,y2)` with no more than a comma between them, two by two.
fn pairs(answer: &str) -> Vec<Group<4>> {
    let (mut pairs, mut first) = (Vec::new(), None);
    for second in groups::<2>(answer, ['(', ')']) {
        let before = first.replace(second);
        let Some(Group {
            numbers,
            start,
            end,
        }) = before
        else {
            continue;
        };
        if matches!(answer[end..second.start].trim(), "" | ",") {
            let ([x1, y1], [x2, y2]) = (numbers, second.numbers);
            pairs.push(Group {
                numbers: [x1, y1, x2, y2],
                start,
                end: second.end,
            });
            first = None;
        }
    }
    pairs
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

    fn named(answer: &str) -> Vec<(Option<String>, Place)> {
        let places = parse_places(answer).into_iter();
        places.map(|named| (named.label, named.place)).collect()
    }

    fn expected<const N: usize>(places: [(&str, Place); N]) -> Vec<(Option<String>, Place)> {
        let label = |label: &str| (!label.is_empty()).then(|| label.to_string());
        places
            .into_iter()
            .map(|(text, place)| (label(text), place))
            .collect()
    }

    #[test]
    fn a_json_list_has_every_entry_with_its_label() {
        let (a, b) = (
            Place::Box([1.0, 2.0, 3.0, 4.0]),
            Place::Box([5.0, 6.0, 7.0, 8.0]),
        );
        let point = Place::Point([9.0, 10.0]);
        let list = "```json\n[\n\t{\"bbox_2d\": [1, 2, 3, 4], \"label\": \"cup\"},\n\t\
                    {\"bbox_2d\": [7, 8, 5, 6], \"label\": \"a \\\"big\\\" {cup}\"},\n\t\
                    {\"point_2d\": [9, 10], \"label\": \"tip\"}\n]\n```";
        let all = [("cup", a), ("a \"big\" {cup}", b), ("tip", point)];
        assert_eq!(named(list), expected(all));
        assert_eq!(parse_box(list), a.as_box());
        for (answer, places) in [
            // The label first, or none, or another text beside it.
            (
                "[{\"label\": \"x\", \"bbox_2d\": [1, 2, 3, 4]}, {\"label\": \"y\", \"bbox_2d\": [5, 6, 7, 8]}]",
                expected([("x", a), ("y", b)]).as_slice(),
            ),
            (
                "{\"bbox_2d\": [1, 2, 3, 4]}\n{\"bbox_2d\": [5, 6, 7, 8], \"label\": \"y\"}",
                &expected([("", a), ("y", b)]),
            ),
            (
                "[{\"bbox_2d\": [1, 2, 3, 4], \"of\": {\"label\": \"z\"}, \"label\": \"x\"}]",
                &expected([("x", a)]),
            ),
            (
                "[{\"bbox_2d\": [1, 2, 3, 4], \"is\": \"label\", \"as\": \"x\"}]",
                &expected([("", a)]),
            ),
            // An entry without a place is none.
            (
                "[{\"bbox_2d\": null, \"label\": \"x\"}, {\"bbox_2d\": [5, 6, 7, 8], \"label\": \"y\"}]",
                &expected([("y", b)]),
            ),
            ("[{\"point_2d\": [9, 10]}]", &expected([("", point)])),
        ] {
            assert_eq!(named(answer), places, "{answer}");
        }
    }

    #[test]
    fn of_a_list_that_is_cut_off_the_complete_entries_count() {
        let whole = "[{\"bbox_2d\": [1, 2, 3, 4], \"label\": \"x\"}, {\"bbox_2d\": [5, 6, 7, 8], \"label\": \"y\"}]";
        let first = Place::Box([1.0, 2.0, 3.0, 4.0]);
        let one = whole.find('}').expect("an entry ends") + 1;
        let two = whole.rfind('}').expect("an entry ends") + 1;
        let box_ends = whole.find("4]").expect("a box ends") + 2;
        for end in 0..=whole.len() {
            let found = named(&whole[..end]);
            let count = match end {
                // What little there is of a single entry.
                _ if end < box_ends => 0,
                _ if end < two => 1,
                _ => 2,
            };
            assert_eq!(found.len(), count, "{}", &whole[..end]);
            if end >= one {
                assert_eq!(found[0], (Some("x".into()), first));
            }
        }
    }

    #[test]
    fn marked_labels_belong_to_the_boxes_behind_them() {
        let (a, b) = (
            Place::Box([1.0, 2.0, 3.0, 4.0]),
            Place::Box([5.0, 6.0, 7.0, 8.0]),
        );
        let c = Place::Box([0.0, 1.0, 9.0, 9.0]);
        for (answer, places) in [
            (
                "<ref>a cup</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box> and <ref>it</ref><box>(0,1),(9,9)</box>",
                expected([("a cup", a), ("a cup", b), ("it", c)]),
            ),
            (
                "<|object_ref_start|>a cup<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>\
                 <|object_ref_start|>it<|object_ref_end|><|box_start|>(5,6),(7,8)<|box_end|><|im_end|>",
                expected([("a cup", a), ("it", b)]),
            ),
            (
                "<|box_start|>(1,2),(3,4)<|box_end|><|box_start|>(5,6),(7,",
                expected([("", a)]),
            ),
            (
                "a cup(1,2),(3,4) and (5,6),(7,8)",
                expected([("", a), ("", b)]),
            ),
            (
                "[1, 2, 3, 4] and [5, 6, 7, 8]",
                expected([("", a), ("", b)]),
            ),
            ("<ref>a cup</ref>[1, 2, 3, 4]", expected([("a cup", a)])),
            ("<ref>a cup(1,2),(3,4)", expected([("", a)])),
        ] {
            assert_eq!(named(answer), places, "{answer}");
        }
    }
}
