//! What scenes keep to, whatever their seed.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

/// Whether an expression means an object, read word by word and by no code of the generator.
fn meant(expression: &str, scene: &Scene) -> Vec<usize> {
    let words: Vec<&str> = expression.split(' ').collect();
    let (words, anchor) = match words[..] {
        ["the", "shape", "nearest", "the", colour, shape] => (vec![], Some([colour, shape])),
        _ => (words[1..].to_vec(), None),
    };
    let has = |object: &Object, word: &str| match word {
        "shape" => true,
        "small" => object.side < 28,
        "large" => object.side > 28,
        _ => COLOURS[object.colour].0 == word || SHAPES[object.shape] == word,
    };
    let middle = |object: &Object| {
        let half = object.side as f64 / 2.0;
        [object.left as f64 + half, object.top as f64 + half]
    };
    let least = |among: Vec<usize>, of: &dyn Fn(&Object) -> f64| -> Vec<usize> {
        let value = |at: &usize| of(&scene.objects[*at]);
        let least = among.iter().map(value).fold(f64::INFINITY, f64::min);
        among.into_iter().filter(|at| value(at) == least).collect()
    };
    let all = 0..scene.objects.len();
    if let Some(words) = anchor {
        let is = |at: &usize| words.iter().all(|word| has(&scene.objects[*at], word));
        let anchors: Vec<usize> = all.clone().filter(is).collect();
        assert_eq!(anchors.len(), 1, "{expression}");
        let [x, y] = middle(&scene.objects[anchors[0]]);
        let others = all.filter(|at| *at != anchors[0]).collect();
        return least(others, &|object| {
            let [u, v] = middle(object);
            (u - x).hypot(v - y)
        });
    }
    let (ends, words): (Vec<&str>, Vec<&str>) =
        words.into_iter().partition(|word| word.ends_with("most"));
    let is = |at: &usize| words.iter().all(|word| has(&scene.objects[*at], word));
    let among = all.filter(is).collect();
    match ends.first() {
        Some(&"leftmost") => least(among, &|object| middle(object)[0]),
        Some(&"rightmost") => least(among, &|object| -middle(object)[0]),
        Some(&"topmost") => least(among, &|object| middle(object)[1]),
        Some(&"bottommost") => least(among, &|object| -middle(object)[1]),
        _ => among,
    }
}

proptest! {
    #[test]
    fn every_expression_means_one_object(seed in 0u32..1 << 31, index in any::<u32>()) {
        let scene = Scene::new(Split::Train, seed, index);
        for sought in scene.questions() {
            prop_assert_eq!(meant(&sought.expression, &scene), [sought.target], "{:?}", sought);
        }
    }

    #[test]
    fn objects_lie_apart_and_within(seed in 0u32..1 << 31, index in any::<u32>()) {
        let scene = Scene::new(Split::Evaluation, seed, index);
        prop_assert!(scene.objects.len() >= 4);
        for (at, object) in scene.objects.iter().enumerate() {
            let [x1, y1, x2, y2] = object.shares();
            prop_assert!(x1 > 0.0 && y1 > 0.0 && x2 < 1.0 && y2 < 1.0);
            prop_assert!((x2 - x1) * (y2 - y1) <= 0.15);
            for other in &scene.objects[at + 1..] {
                let apart = |a: [f64; 4], b: [f64; 4]| a[2] < b[0] || a[3] < b[1];
                let boxes = (object.pixels(), other.pixels());
                prop_assert!(apart(boxes.0, boxes.1) || apart(boxes.1, boxes.0));
            }
        }
    }

    #[test]
    fn a_seed_is_a_scene(seed in 0u32..1 << 31, index in any::<u32>()) {
        let scenes = [(); 2].map(|()| Scene::new(Split::Train, seed, index));
        prop_assert_eq!(&scenes[0].objects, &scenes[1].objects);
        prop_assert_eq!(scenes[0].picture(), scenes[1].picture());
        prop_assert_eq!(scenes[0].question(), scenes[1].question());
    }

    #[test]
    fn splits_and_seeds_share_no_generator(
        seeds in prop::array::uniform2(0u32..1 << 31),
        indices in prop::array::uniform2(any::<u32>()),
    ) {
        let first = |split, at: usize| generator(split, seeds[at], indices[at]).next_u64();
        prop_assert_ne!(first(Split::Train, 0), first(Split::Evaluation, 1));
        if (seeds[0], indices[0]) != (seeds[1], indices[1]) {
            prop_assert_ne!(first(Split::Train, 0), first(Split::Train, 1));
        }
    }
}

/// What is asked of the scenes that models are measured on.
#[test]
fn scenes_are_hard() {
    let scenes = (0..500).map(|index| Scene::new(Split::Evaluation, 0, index));
    let asked: Vec<(Scene, Sought)> = scenes
        .filter_map(|scene| scene.question().map(|sought| (scene, sought)))
        .collect();
    assert!(asked.len() > 495);
    let hard = asked
        .iter()
        .filter(|(scene, sought)| scene.has_distractor(sought.target));
    assert!(hard.count() * 10 >= asked.len() * 7);
    for kind in Kind::ALL {
        let of_kind = asked
            .iter()
            .filter(|(_, sought)| sought.kind == kind)
            .count();
        assert!(of_kind >= 25, "{kind:?}: {of_kind}");
    }
    let pictures: HashSet<Vec<u8>> = { asked.iter() }
        .map(|(scene, _)| scene.picture().data().to_vec())
        .collect();
    assert_eq!(pictures.len(), asked.len());
}

#[test]
fn kinds_are_asked_for() {
    let kinds = [Kind::Position];
    let scene = Scene::new(Split::Train, 0, 0);
    let questions = scene.some_questions(5, &kinds);
    assert!(questions.iter().all(|sought| kinds.contains(&sought.kind)));
    let expressions: HashSet<&String> = questions.iter().map(|q| &q.expression).collect();
    assert_eq!(expressions.len(), questions.len());
}

/// Each shape covers what its name says, within its box.
#[test]
fn shapes_are_drawn() {
    let count = |shape: &str| {
        let object = Object {
            size: 1,
            colour: 0,
            shape: SHAPES.iter().position(|name| *name == shape).unwrap_or(0),
            left: 10,
            top: 20,
            side: 40,
        };
        let covered = (20..=60).flat_map(|row| (10..=50).map(move |column| (column, row)));
        let covered = covered.filter(|&(column, row)| object.covers(column, row));
        covered.count() as f64 / 1681.0
    };
    let close = |shape, share: f64| (count(shape) - share).abs() < 0.03;
    let quarter = std::f64::consts::FRAC_PI_4;
    assert!(close("square", 1.0) && close("circle", quarter));
    assert!(close("triangle", 0.5) && close("diamond", 0.5));
    assert!(close("cross", 5.0 / 9.0), "{}", count("cross"));
    assert!(close("ring", quarter * (1.0 - 0.56f64.powi(2))));
}
