/// Where a picture is in what a model sees of it: the way back from places in an answer to places in
/// the picture as given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Geometry {
    /// Width and height as given, in pixels.
    pub original: [usize; 2],
    /// Left and upper edge of what the model sees, in pixels of the picture as given: positive where
    /// a crop hides its ends, negative where it was padded.
    pub offset: [f64; 2],
    /// Width and height of what the model sees, in pixels of the picture as given.
    pub extent: [f64; 2],
}

impl Geometry {
    /// Of a picture that is seen whole, whatever its size becomes.
    pub fn whole(original: [usize; 2]) -> Self {
        Self {
            original,
            offset: [0.0; 2],
            extent: original.map(|side| side as f64),
        }
    }

    /// A point in shares of what the model sees, in pixels of the picture as given.
    pub fn to_original(&self, [x, y]: [f64; 2]) -> [f64; 2] {
        let ([left, top], [width, height]) = (self.offset, self.extent);
        [left + x * width, top + y * height]
    }

    /// A point in pixels of the picture as given, in shares of what the model sees.
    pub fn to_seen(&self, [x, y]: [f64; 2]) -> [f64; 2] {
        let ([left, top], [width, height]) = (self.offset, self.extent);
        [(x - left) / width, (y - top) / height]
    }

    /// What of a box lies in the picture; both are `x1, y1, x2, y2` with ordered corners, in pixels of
    /// the picture as given. `None` if it lies wholly outside.
    pub fn within(&self, [x1, y1, x2, y2]: [f64; 4]) -> Option<[f64; 4]> {
        let [width, height] = self.original.map(|side| side as f64);
        let side = |low: f64, high: f64, end: f64| {
            let part = [low.clamp(0.0, end), high.clamp(0.0, end)];
            let touches = low <= end && high >= 0.0;
            // A box that has an area does not have a line for its part.
            (touches && (part[0] < part[1] || low == high)).then_some(part)
        };
        let ([x1, x2], [y1, y2]) = (side(x1, x2, width)?, side(y1, y2, height)?);
        Some([x1, y1, x2, y2])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_go_there_and_back() {
        let cropped = Geometry {
            original: [1600, 400],
            offset: [600.0, 0.0],
            extent: [400.0, 400.0],
        };
        assert_eq!(cropped.to_original([0.25, 0.5]), [700.0, 200.0]);
        assert_eq!(cropped.to_seen([700.0, 200.0]), [0.25, 0.5]);
        let whole = Geometry::whole([90, 59]);
        assert_eq!(whole.to_original([0.5, 0.25]), [45.0, 14.75]);
    }

    #[test]
    fn of_a_box_the_part_within_the_picture_counts() {
        let picture = Geometry::whole([100, 60]);
        for (given, expected) in [
            ([10.0, 10.0, 20.0, 20.0], Some([10.0, 10.0, 20.0, 20.0])),
            ([-10.0, 10.0, 200.0, 70.0], Some([0.0, 10.0, 100.0, 60.0])),
            ([-10.0, 10.0, -5.0, 20.0], None),
            ([10.0, 61.0, 20.0, 70.0], None),
            // Beside the picture: it would become a line.
            ([100.0, 10.0, 120.0, 20.0], None),
            ([-5.0, 10.0, 0.0, 20.0], None),
            // A line that was answered is one.
            ([100.0, 10.0, 100.0, 20.0], Some([100.0, 10.0, 100.0, 20.0])),
            ([101.0, 10.0, 101.0, 20.0], None),
        ] {
            assert_eq!(picture.within(given), expected, "{given:?}");
        }
    }
}
