//! How boxes and labels are written in what a model reads and answers.

use reroute_zoo::grounding::{BoundingBox, BoxNotation, BoxUnits, GroundingFormat};
use reroute_zoo::vision_encoder::Geometry;

/// A box in shares of what the model sees, as it writes it.
///
/// `resized` is the width and height of the image as the model sees it, in pixels.
pub(crate) fn written(
    format: &GroundingFormat,
    shares: BoundingBox,
    [width, height]: [f64; 2],
) -> String {
    let numbers: Vec<String> = match format.units {
        BoxUnits::Normalized => shares.iter().map(|x| format!("{x:.2}")).collect(),
        BoxUnits::Thousandths => shares.iter().map(|x| whole(x * 1000.0)).collect(),
        BoxUnits::ResizedPixels => {
            let sides = [width, height, width, height];
            let pixels = shares.iter().zip(sides);
            pixels.map(|(x, side)| whole(x * side)).collect()
        }
    };
    match format.notation {
        BoxNotation::Marks => {
            let [x1, y1, x2, y2] = [0, 1, 2, 3].map(|at| &numbers[at]);
            format!("<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>")
        }
        BoxNotation::Brackets | BoxNotation::Json => format!("[{}]", numbers.join(", ")),
    }
}

/// A label as the model writes it.
pub(crate) fn label(notation: BoxNotation, label: &str) -> String {
    match notation {
        BoxNotation::Marks => format!("<|object_ref_start|>{label}<|object_ref_end|>"),
        BoxNotation::Brackets | BoxNotation::Json => label.to_owned(),
    }
}

/// An answer that is nothing but a box.
pub(crate) fn alone(notation: BoxNotation, written: String, of: &str) -> String {
    match notation {
        BoxNotation::Json => {
            let of = serde_json::Value::from(of);
            format!("```json\n[\n\t{{\"bbox_2d\": {written}, \"label\": {of}}}\n]\n```")
        }
        BoxNotation::Marks => label(notation, of) + &written,
        BoxNotation::Brackets => written,
    }
}

fn whole(number: f64) -> String {
    format!("{:.0}", number.round())
}

/// A box in pixels of the picture as given, in shares of what the model sees of it; `None` if that is nothing.
pub(crate) fn seen(geometry: &Geometry, [x1, y1, x2, y2]: BoundingBox) -> Option<BoundingBox> {
    let (low, high) = (geometry.to_seen([x1, y1]), geometry.to_seen([x2, y2]));
    let [x1, y1] = low.map(|x| x.clamp(0.0, 1.0));
    let [x2, y2] = high.map(|x| x.clamp(0.0, 1.0));
    (x1 < x2 && y1 < y2).then_some([x1, y1, x2, y2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_are_in_units_of_the_model_after_resizing() {
        // 200 × 100 pixels, of which the model sees the middle half, 84 × 84 pixels large.
        let geometry = Geometry {
            original: [200, 100],
            offset: [50.0, 0.0],
            extent: [100.0, 100.0],
        };
        let shares = seen(&geometry, [75.0, 25.0, 180.0, 50.0]).expect("is seen");
        assert_eq!(shares, [0.25, 0.25, 1.0, 0.5]);
        assert_eq!(seen(&geometry, [0.0, 0.0, 50.0, 100.0]), None);
        let written = |notation, units| {
            let format = GroundingFormat::new("{expression}", units).written_as(notation);
            written(&format, shares, [84.0, 84.0])
        };
        let brackets = BoxNotation::Brackets;
        assert_eq!(
            written(brackets, BoxUnits::Normalized),
            "[0.25, 0.25, 1.00, 0.50]"
        );
        assert_eq!(
            written(brackets, BoxUnits::ResizedPixels),
            "[21, 21, 84, 42]"
        );
        assert_eq!(
            written(BoxNotation::Marks, BoxUnits::Thousandths),
            "<|box_start|>(250,250),(1000,500)<|box_end|>"
        );
        assert_eq!(
            alone(BoxNotation::Json, "[1, 2, 3, 4]".into(), "a \"cat\""),
            "```json\n[\n\t{\"bbox_2d\": [1, 2, 3, 4], \"label\": \"a \\\"cat\\\"\"}\n]\n```"
        );
    }
}
