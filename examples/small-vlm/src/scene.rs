//! Scenes of coloured shapes, and what can be asked about them: drawn anew from a seed whenever they are needed.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt, SeedableRng};
use reroute_zoo::RgbImage;

/// Width and height of a picture, in pixels.
pub const SIDE: usize = 112;
/// Names and values of the colours.
pub const COLOURS: [(&str, [u8; 3]); 8] = [
    ("red", [220, 40, 40]),
    ("green", [40, 170, 60]),
    ("blue", [50, 80, 220]),
    ("yellow", [235, 215, 50]),
    ("purple", [150, 60, 190]),
    ("cyan", [60, 200, 210]),
    ("orange", [240, 140, 30]),
    ("white", [240, 240, 240]),
];
/// Names of the shapes.
pub const SHAPES: [&str; 6] = ["circle", "square", "triangle", "diamond", "cross", "ring"];
/// Names of the sizes.
pub const SIZES: [&str; 2] = ["small", "large"];
/// Sides of objects of each size, in pixels. The largest box is 13 % of the picture.
const SIDES: [std::ops::Range<usize>; 2] = [18..24, 32..41];
/// Objects of a scene.
const OBJECTS: std::ops::RangeInclusive<usize> = 4..=6;
/// Pixels between the boxes of two objects.
const GAP: usize = 2;
/// Places that are tried for an object before the scene is begun anew.
const TRIES: usize = 60;
/// How much farther out than all others an object's middle is that is called the leftmost, in pixels.
const FARTHER: f64 = 4.0;
/// How many times farther the second nearest object is than the nearest.
const NEARER: f64 = 1.25;

/// What scenes are for. Those of different splits never have a seed in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// To learn from.
    Train,
    /// To measure on.
    Evaluation,
}

/// What an expression tells an object by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Its colour alone, or its shape: "the red shape", "the ring".
    Unique,
    /// Size, colour and shape: "the small purple ring".
    Attributes,
    /// Its size among those of its colour or shape: "the large circle".
    Size,
    /// Where it is among those of its colour, shape or size: "the leftmost red shape".
    Position,
    /// What it is nearest to: "the shape nearest the cyan diamond".
    Relation,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Unique,
        Self::Attributes,
        Self::Size,
        Self::Position,
        Self::Relation,
    ];

    /// What tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unique => "unique",
            Self::Attributes => "attributes",
            Self::Size => "size",
            Self::Position => "position",
            Self::Relation => "relation",
        }
    }
}

/// A shape in a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object {
    /// Of [`SIZES`].
    pub size: usize,
    /// Of [`COLOURS`].
    pub colour: usize,
    /// Of [`SHAPES`].
    pub shape: usize,
    /// First column, in pixels.
    pub left: usize,
    /// First row, in pixels.
    pub top: usize,
    /// Width and height, in pixels.
    pub side: usize,
}

impl Object {
    /// `x1, y1, x2, y2` in pixels.
    pub fn pixels(&self) -> [f64; 4] {
        let Self {
            left, top, side, ..
        } = *self;
        [left, top, left + side, top + side].map(|at| at as f64)
    }

    /// The same as shares of the picture's sides.
    pub fn shares(&self) -> [f64; 4] {
        self.pixels().map(|at| at / SIDE as f64)
    }

    /// Column and row of its middle, in pixels.
    fn middle(&self) -> [f64; 2] {
        let [x1, y1, x2, y2] = self.pixels();
        [(x1 + x2) / 2.0, (y1 + y2) / 2.0]
    }

    /// Whether it could be taken for another: of the same colour or shape.
    pub fn resembles(&self, other: &Self) -> bool {
        self.colour == other.colour || self.shape == other.shape
    }

    fn is_apart(&self, other: &Self) -> bool {
        let apart = |a: usize, b: usize| a + self.side + GAP < b || b + other.side + GAP < a;
        apart(self.left, other.left) || apart(self.top, other.top)
    }

    /// Whether the shape covers the middle of a pixel.
    fn covers(&self, column: usize, row: usize) -> bool {
        let half = self.side as f64 / 2.0;
        let [x, y] = self.middle();
        let (x, y) = ((column as f64 - x) / half, (row as f64 - y) / half);
        let distance = x.hypot(y);
        let edge = 1.0 + 0.5 / half;
        match SHAPES[self.shape] {
            "circle" => distance <= edge,
            "square" => true,
            // Its tip is at the top.
            "triangle" => x.abs() <= (y + 1.0) / 2.0,
            "diamond" => x.abs() + y.abs() <= 1.0,
            "cross" => x.abs().min(y.abs()) <= 1.0 / 3.0,
            _ => distance <= edge && distance >= 1.0 - 0.44f64.max(3.0 / half),
        }
    }
}

/// Something that can be asked about a scene.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sought {
    /// What to find.
    pub expression: String,
    /// What it tells the object by.
    pub kind: Kind,
    /// The object's place in the scene's list.
    pub target: usize,
}

/// A picture of shapes.
#[derive(Debug, Clone)]
pub struct Scene {
    /// What is in it.
    pub objects: Vec<Object>,
    /// Seed of the picture and of what is asked.
    seed: u64,
}

/// The generator of random numbers of a scene: even for one split, odd for the other.
fn generator(split: Split, seed: u32, index: u32) -> StdRng {
    let number = (u64::from(seed) << 32) | u64::from(index);
    // Multiplication by an odd number permutes the 63 bits.
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) << 1;
    StdRng::seed_from_u64(mixed | u64::from(split == Split::Evaluation))
}

impl Scene {
    /// The scene of a split, a seed and a number.
    pub fn new(split: Split, seed: u32, index: u32) -> Self {
        let mut rng = generator(split, seed, index);
        let count = rng.random_range(OBJECTS);
        loop {
            if let Some(objects) = objects(count, &mut rng) {
                let seed = rng.next_u64();
                return Self { objects, seed };
            }
        }
    }

    /// The picture: shapes on a ground with a slope of colour and noise.
    pub fn picture(&self) -> RgbImage {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let colour = |rng: &mut StdRng, range: std::ops::Range<i32>| {
            [(); 3].map(|()| rng.random_range(range.clone()) as f32)
        };
        let (base, down, across) = (
            colour(&mut rng, 20..110),
            colour(&mut rng, -30..31),
            colour(&mut rng, -30..31),
        );
        let mut pixels = Vec::with_capacity(SIDE * SIDE * 3);
        let share = |at: usize| at as f32 / (SIDE - 1) as f32;
        for row in 0..SIDE {
            for column in 0..SIDE {
                for channel in 0..3 {
                    let slope = share(row) * down[channel] + share(column) * across[channel];
                    let value = base[channel] + slope + 8.0 * normal(&mut rng);
                    pixels.push(value.clamp(0.0, 255.0) as u8);
                }
            }
        }
        for object in &self.objects {
            let paint = COLOURS[object.colour].1;
            let paint = paint.map(|value| {
                let value = i32::from(value) + rng.random_range(-15..16);
                value.clamp(0, 255) as u8
            });
            for row in object.top..=object.top + object.side {
                for column in object.left..=object.left + object.side {
                    if object.covers(column, row) {
                        let at = (row * SIDE + column) * 3;
                        pixels[at..at + 3].copy_from_slice(&paint);
                    }
                }
            }
        }
        RgbImage::new(SIDE, SIDE, pixels).expect("a picture has three bytes for each pixel")
    }

    /// Whether another object could be taken for this one.
    pub fn has_distractor(&self, target: usize) -> bool {
        let object = &self.objects[target];
        let others = self.objects.iter().enumerate();
        { others }.any(|(at, other)| at != target && other.resembles(object))
    }

    /// Everything that can be asked: of each expression exactly one object is meant.
    pub fn questions(&self) -> Vec<Sought> {
        let mut all = Vec::new();
        self.of_one_attribute(&mut all);
        self.of_attributes(&mut all);
        self.of_position(&mut all);
        self.of_relation(&mut all);
        all
    }

    /// Some of the questions, of every kind alike, without repetition while there are enough.
    pub fn some_questions(&self, count: usize, kinds: &[Kind]) -> Vec<Sought> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut left = self.questions();
        if left.iter().any(|sought| kinds.contains(&sought.kind)) {
            left.retain(|sought| kinds.contains(&sought.kind));
        }
        let mut chosen = Vec::new();
        while chosen.len() < count && !left.is_empty() {
            let kinds = Kind::ALL.into_iter();
            let kinds: Vec<Kind> = kinds
                .filter(|kind| left.iter().any(|sought| sought.kind == *kind))
                .collect();
            let kind = kinds.choose(&mut rng).copied();
            let of_kind: Vec<usize> = (0..left.len())
                .filter(|&at| Some(left[at].kind) == kind)
                .collect();
            if let Some(&at) = of_kind.choose(&mut rng) {
                chosen.push(left.swap_remove(at));
            }
        }
        chosen
    }

    /// The question that the scene is measured with: of any kind alike, if possible about an object that another
    /// could be taken for. `None` if nothing can be asked.
    pub fn question(&self) -> Option<Sought> {
        let questions = self.some_questions(usize::MAX, &Kind::ALL);
        let hard = { questions.iter() }.find(|sought| self.has_distractor(sought.target));
        hard.or(questions.first()).cloned()
    }

    /// The only object that is so.
    fn only(&self, is: impl Fn(&Object) -> bool) -> Option<usize> {
        let mut found = (0..self.objects.len()).filter(|&at| is(&self.objects[at]));
        found.next().filter(|_| found.next().is_none())
    }

    fn of_one_attribute(&self, all: &mut Vec<Sought>) {
        let mut add = |expression: String, kind, target: Option<usize>| {
            all.extend(target.map(|target| Sought {
                expression,
                kind,
                target,
            }));
        };
        let groups = groups();
        for group in groups.iter().filter(|group| group.size.is_none()) {
            let name = group.name();
            let only = self.only(|object| group.has(object));
            add(format!("the {name}"), Kind::Unique, only);
            if only.is_some() {
                continue;
            }
            for (size, word) in SIZES.iter().enumerate() {
                let only = self.only(|object| group.has(object) && object.size == size);
                add(format!("the {word} {name}"), Kind::Size, only);
            }
        }
    }

    fn of_attributes(&self, all: &mut Vec<Sought>) {
        for object in &self.objects {
            let what = |object: &Object| (object.size, object.colour, object.shape);
            let only = self.only(|other| what(other) == what(object));
            let words = (
                SIZES[object.size],
                COLOURS[object.colour].0,
                SHAPES[object.shape],
            );
            all.extend(only.map(|target| Sought {
                expression: format!("the {} {} {}", words.0, words.1, words.2),
                kind: Kind::Attributes,
                target,
            }));
        }
    }

    fn of_position(&self, all: &mut Vec<Sought>) {
        for (word, axis, sign) in [
            ("leftmost", 0, 1.0),
            ("rightmost", 0, -1.0),
            ("topmost", 1, 1.0),
            ("bottommost", 1, -1.0),
        ] {
            for group in groups() {
                let mut members: Vec<(f64, usize)> = { self.objects.iter().enumerate() }
                    .filter(|(_, object)| group.has(object))
                    .map(|(at, object)| (sign * object.middle()[axis], at))
                    .collect();
                members.sort_by(|a, b| a.0.total_cmp(&b.0));
                if let [first, second, ..] = members[..]
                    && second.0 - first.0 >= FARTHER
                {
                    all.push(Sought {
                        expression: format!("the {word} {}", group.name()),
                        kind: Kind::Position,
                        target: first.1,
                    });
                }
            }
        }
    }

    fn of_relation(&self, all: &mut Vec<Sought>) {
        for (at, anchor) in self.objects.iter().enumerate() {
            let what = |object: &Object| (object.colour, object.shape);
            if self.only(|other| what(other) == what(anchor)).is_none() {
                continue;
            }
            let [x, y] = anchor.middle();
            let mut others: Vec<(f64, usize)> = { self.objects.iter().enumerate() }
                .filter(|&(other, _)| other != at)
                .map(|(other, object)| {
                    let [u, v] = object.middle();
                    ((u - x).hypot(v - y), other)
                })
                .collect();
            others.sort_by(|a, b| a.0.total_cmp(&b.0));
            if let [nearest, second, ..] = others[..]
                && second.0 > NEARER * nearest.0
            {
                let (colour, shape) = (COLOURS[anchor.colour].0, SHAPES[anchor.shape]);
                all.push(Sought {
                    expression: format!("the shape nearest the {colour} {shape}"),
                    kind: Kind::Relation,
                    target: nearest.1,
                });
            }
        }
    }
}

/// Objects of one colour, of one shape, or of one size.
struct Group {
    size: Option<usize>,
    colour: Option<usize>,
    shape: Option<usize>,
}

fn groups() -> Vec<Group> {
    let none = || Group {
        size: None,
        colour: None,
        shape: None,
    };
    let sizes = (0..SIZES.len()).map(|size| Group {
        size: Some(size),
        ..none()
    });
    let colours = (0..COLOURS.len()).map(|colour| Group {
        colour: Some(colour),
        ..none()
    });
    let shapes = (0..SHAPES.len()).map(|shape| Group {
        shape: Some(shape),
        ..none()
    });
    sizes.chain(colours).chain(shapes).collect()
}

impl Group {
    fn has(&self, object: &Object) -> bool {
        let is = |wanted: Option<usize>, given| wanted.is_none_or(|wanted| wanted == given);
        is(self.size, object.size) && is(self.colour, object.colour) && is(self.shape, object.shape)
    }

    fn name(&self) -> String {
        match (self.size, self.colour, self.shape) {
            (Some(size), _, _) => format!("{} shape", SIZES[size]),
            (_, Some(colour), _) => format!("{} shape", COLOURS[colour].0),
            (_, _, shape) => shape.map_or("shape", |shape| SHAPES[shape]).into(),
        }
    }
}

/// So many objects side by side; most resemble an earlier one. `None` if there was no room.
fn objects(count: usize, rng: &mut StdRng) -> Option<Vec<Object>> {
    let mut objects: Vec<Object> = Vec::new();
    while objects.len() < count {
        let size = rng.random_range(0..SIZES.len());
        let mut colour = rng.random_range(0..COLOURS.len());
        let mut shape = rng.random_range(0..SHAPES.len());
        if let Some(earlier) = objects.choose(rng) {
            match rng.random_range(0..10) {
                0..3 => colour = earlier.colour,
                3..6 => shape = earlier.shape,
                _ => {}
            }
        }
        let side = rng.random_range(SIDES[size].clone());
        let mut place = || {
            let mut at = || rng.random_range(1..SIDE - side - 1);
            let object = Object {
                size,
                colour,
                shape,
                left: at(),
                top: at(),
                side,
            };
            let is_free = objects.iter().all(|other| object.is_apart(other));
            is_free.then_some(object)
        };
        let object = (0..TRIES).find_map(|_| place())?;
        objects.push(object);
    }
    Some(objects)
}

/// A number that is nearly normal: the sum of eight bytes.
fn normal(rng: &mut StdRng) -> f32 {
    let bytes = rng.next_u64().to_le_bytes();
    let sum: u32 = bytes.into_iter().map(u32::from).sum();
    (sum as f32 - 1020.0) / 209.03
}

#[cfg(test)]
mod tests;
