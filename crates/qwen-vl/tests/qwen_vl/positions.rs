//! M-RoPE positions, against the library and against a restatement that knows where inputs begin.

use proptest::prelude::*;
use reroute_family::{FamilyConfig, FamilyError, Modality, RowPositions, Sample};
use safetensors::SafeTensors;
use vision_encoder::Grid;
use vision_encoder::qwen::QwenGeneration;

use crate::fixture::{FAMILIES, config, floats, grids, integers, read};

const IMAGE: u32 = 349;
const VIDEO: u32 = 350;

/// Images and videos of each sample of a recorded prompt.
type Inputs = &'static [(usize, usize)];

/// Every sample of a recorded prompt, cut out of its padding, with its positions as recorded.
fn recorded(prompt: &str, inputs: &str, counts: Inputs) -> Vec<(Sample, Vec<i64>, Option<i64>)> {
    let files = [prompt, inputs].map(|name| read(&format!("{name}.safetensors")));
    let [outputs, inputs] =
        [&files[0], &files[1]].map(|file| SafeTensors::deserialize(file).unwrap());
    let ids = integers(&inputs, "in.input_ids");
    let mask = integers(&inputs, "in.attention_mask");
    let positions = integers(&outputs, "rope.position_ids");
    let deltas = integers(&outputs, "rope_deltas");
    let mut images = grids(&inputs, "in.image_grid_thw").into_iter();
    let mut videos = grids(&inputs, "in.video_grid_thw").into_iter();
    let mut seconds = [&outputs, &inputs]
        .into_iter()
        .flat_map(|file| floats(file, "in.second_per_grid_ts"));
    let total = ids.len();
    let rows = total / counts.len();
    let sample = |(index, &(of_images, of_videos)): (usize, &(usize, usize))| {
        let real = (index * rows..(index + 1) * rows).filter(|&at| mask.get(at) != Some(&0));
        let real: Vec<usize> = real.collect();
        let sample = Sample {
            ids: real.iter().map(|&at| ids[at] as u32).collect(),
            image_grids: images.by_ref().take(of_images).collect(),
            video_grids: videos.by_ref().take(of_videos).collect(),
            second_per_grid_ts: seconds.by_ref().take(of_videos).collect(),
        };
        let of_axis = |axis: usize| real.iter().map(move |at| axis * total + at);
        let expected = (0..3).flat_map(of_axis).map(|at| positions[at]);
        (sample, expected.collect(), deltas.get(index).copied())
    };
    counts.iter().enumerate().map(sample).collect()
}

#[test]
fn positions_are_those_of_the_library() {
    let cases: [(&str, &str, Inputs); 6] = [
        ("", "", &[(1, 0)]),
        ("two_images", "two_images", &[(2, 0)]),
        ("image_video", "image_video", &[(1, 1)]),
        ("text_only", "text_only", &[(0, 0)]),
        ("turns", "turns", &[(1, 0)]),
        ("batch", "batch", &[(1, 0), (1, 0)]),
    ];
    let paced: [(&str, &str, Inputs); 3] = [
        ("windows", "windows", &[(1, 0)]),
        ("image_video_half", "image_video", &[(1, 1)]),
        ("image_video_fraction", "image_video", &[(1, 1)]),
    ];
    for family in FAMILIES {
        let config = config(family);
        let more = if family == "qwen25vl" {
            &paced[..]
        } else {
            &[]
        };
        for (prompt, inputs, counts) in cases.iter().chain(more) {
            let file = |name: &str| match name {
                "" => format!("{family}/golden"),
                _ => format!("qwen_cases/{family}/{name}"),
            };
            for (sample, expected, delta) in recorded(&file(prompt), &file(inputs), counts) {
                let found = config.positions(&sample).unwrap();
                assert_eq!(found.axes.concat(), expected, "{family} {prompt}");
                if let Some(delta) = delta {
                    let found = found.next - sample.ids.len() as i64;
                    assert_eq!(found, delta, "{family} {prompt}");
                }
            }
        }
    }
}

/// A stretch of a prompt.
#[derive(Debug, Clone)]
enum Part {
    Text(usize),
    /// Height and width in visual tokens.
    Image([usize; 2]),
    /// The same, frames, and seconds per frame.
    Video([usize; 2], usize, f32),
}

fn part() -> impl Strategy<Value = Part> {
    let size = || [1..5usize, 1..5usize];
    prop_oneof![
        3 => (0..5usize).prop_map(Part::Text),
        2 => size().prop_map(Part::Image),
        2 => (size(), 1..5usize, 0.0..3f32).prop_map(|(size, frames, seconds)| Part::Video(size, frames, seconds)),
    ]
}

/// The prompt, and where every token of it stands.
fn restated(generation: QwenGeneration, parts: &[Part]) -> (Sample, Vec<[i64; 3]>) {
    let (mut sample, mut places) = (Sample::default(), Vec::new());
    let mut next = 0;
    let grid = |t: usize, [h, w]: [usize; 2]| Grid {
        t,
        h: 2 * h,
        w: 2 * w,
    };
    for part in parts {
        match *part {
            Part::Text(length) => {
                for _ in 0..length {
                    sample.ids.push(7);
                    places.push([next; 3]);
                    next += 1;
                }
            }
            Part::Image(size) => {
                sample.image_grids.push(grid(1, size));
                for token in 0..size[0] * size[1] {
                    let (y, x) = (token / size[1], token % size[1]);
                    sample.ids.push(IMAGE);
                    places.push([next, next + y as i64, next + x as i64]);
                }
                next += size[0].max(size[1]) as i64;
            }
            Part::Video(size, frames, seconds) => {
                sample.video_grids.push(grid(frames, size));
                sample.second_per_grid_ts.push(seconds);
                let longer = size[0].max(size[1]) as i64;
                for frame in 0..frames {
                    if generation == QwenGeneration::Qwen3 {
                        // Its time stamp.
                        sample.ids.push(9);
                        places.push([next; 3]);
                        next += 1;
                    }
                    let time = match generation {
                        QwenGeneration::Qwen2 => frame as i64,
                        QwenGeneration::Qwen2_5 => (frame as f32 * (2.0 * seconds)).floor() as i64,
                        QwenGeneration::Qwen3 => 0,
                    };
                    for token in 0..size[0] * size[1] {
                        let (y, x) = (token / size[1], token % size[1]);
                        sample.ids.push(VIDEO);
                        places.push([next + time, next + y as i64, next + x as i64]);
                    }
                    if generation == QwenGeneration::Qwen3 {
                        next += longer;
                    }
                }
                if generation != QwenGeneration::Qwen3 {
                    next += longer;
                }
            }
        }
    }
    (sample, places)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    /// Also where inputs follow one another without text.
    #[test]
    fn positions_of_any_mixture_equal_the_restatement(parts in prop::collection::vec(part(), 0..8)) {
        for family in FAMILIES {
            let config = config(family);
            let (sample, places) = restated(config.vision.generation, &parts);
            let RowPositions { axes, next } = config.positions(&sample).unwrap();
            let found: Vec<[i64; 3]> = (0..places.len()).map(|row| [0, 1, 2].map(|axis| axes[axis][row])).collect();
            prop_assert_eq!(&found, &places);
            let last = places.iter().flatten().max();
            prop_assert_eq!(next, last.map_or(0, |last| last + 1));
        }
    }

    #[test]
    fn slots_that_do_not_fit_are_errors(
        parts in prop::collection::vec(part(), 1..6),
        at in any::<prop::sample::Index>(),
        id in prop::sample::select(vec![IMAGE, VIDEO]),
    ) {
        for family in FAMILIES {
            let config = config(family);
            let (sample, _) = restated(config.vision.generation, &parts);
            let mut longer = sample.clone();
            longer.ids.insert(at.index(sample.ids.len() + 1), id);
            prop_assert!(config.positions(&longer).is_err());
            let visual: Vec<usize> = (0..sample.ids.len()).filter(|&row| sample.ids[row] >= IMAGE).collect();
            if !visual.is_empty() {
                let mut shorter = sample.clone();
                shorter.ids.remove(visual[at.index(visual.len())]);
                prop_assert!(config.positions(&shorter).is_err());
            }
        }
    }
}

fn one_video(t: usize, seconds: &[f32]) -> Sample {
    let tokens = if t < 100 { t } else { 1 };
    Sample {
        ids: vec![VIDEO; tokens],
        video_grids: vec![Grid { t, h: 2, w: 2 }],
        second_per_grid_ts: seconds.to_vec(),
        ..Default::default()
    }
}

/// The reference multiplies in f32 and rounds down.
#[test]
fn time_is_rounded_down() {
    let times = |seconds: &[f32]| {
        config("qwen25vl")
            .positions(&one_video(4, seconds))
            .unwrap()
            .axes[0]
            .clone()
    };
    assert_eq!(times(&[0.75]), [0, 1, 3, 4]);
    assert_eq!(times(&[0.0]), [0, 0, 0, 0]);
    assert_eq!(times(&[]), [0, 2, 4, 6]);
}

#[test]
fn refusals_say_what_does_not_fit() {
    let config = config("qwen25vl");
    let image = |ids: &[u32], grids: &[[usize; 3]]| {
        config
            .positions(&Sample {
                ids: ids.to_vec(),
                image_grids: grids.iter().map(|&[t, h, w]| Grid { t, h, w }).collect(),
                ..Default::default()
            })
            .unwrap_err()
    };
    for (error, message) in [
        (
            image(&[1, IMAGE, 2], &[[1, 2, 4]]),
            "1 image slots in a row from row 1 on, where an input of 2",
        ),
        (
            image(&[1, IMAGE, VIDEO], &[[1, 2, 4]]),
            "1 image slots in a row from row 1 on",
        ),
        (
            image(&[1, IMAGE, IMAGE], &[[1, 2, 2]]),
            "image slots from row 2 on for which there is no image",
        ),
        (
            image(&[1, IMAGE, 2], &[[1, 2, 2], [1, 2, 2]]),
            "too few image slots for 2 given",
        ),
        (
            image(&[IMAGE], &[[1, 3, 2]]),
            "multiples of 2 (spatial_merge_size)",
        ),
        (
            image(&[IMAGE], &[[0, 2, 2]]),
            "no whole number of visual tokens",
        ),
        (
            image(&[IMAGE], &[[usize::MAX; 3]]),
            "no whole number of visual tokens",
        ),
        (
            image(&[IMAGE], &[[4, usize::MAX - 1, 2]]),
            "no whole number of visual tokens",
        ),
    ] {
        assert!(error.to_string().contains(message), "{error}");
    }
    for seconds in [&[1.0, 1.0][..], &[f32::NAN], &[f32::INFINITY], &[-1.0]] {
        let error = config.positions(&one_video(2, seconds)).unwrap_err();
        assert!(
            matches!(error, FamilyError::SecondsPerGrid { videos: 1, .. }),
            "{error}"
        );
    }
}

/// No memory is asked for, and no time spent, for tokens that the prompt does not have.
#[test]
fn absurd_lengths_are_refused_at_once() {
    for family in FAMILIES {
        let error = config(family)
            .positions(&one_video(usize::MAX / 8, &[]))
            .unwrap_err();
        let named = matches!(
            error,
            FamilyError::Slots {
                modality: Modality::Video,
                ..
            } | FamilyError::TooFewSlots {
                modality: Modality::Video,
                ..
            }
        );
        assert!(named, "{error}");
    }
    let far = config("qwen25vl")
        .positions(&one_video(2, &[f32::MAX]))
        .unwrap();
    assert_eq!(far.next, i64::MAX);
}
