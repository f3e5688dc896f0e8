//! Reference outputs of other implementations, and how ours are compared with them.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend as AnyBackend;
use burn::tensor::{DType, Tensor, TensorData};
use reroute_cli::backend::{Backend, Device};
use reroute_zoo::{Folder, OpenOptions, Pictures, PixelTensors, TensorInputs, TensorOutputs, Vlm};
use safetensors::SafeTensors;
use vision_encoder::Grid;
use vision_encoder::{DecodeLimits, RgbImage, decode};

/// f32 against f64 alone moves these logits by 3e-5 to 1.6e-4 (standard deviation 3).
pub const HIDDEN: f32 = 3e-4;
pub const ROUTED_LOGITS: f32 = 5e-4;
pub const SCORES: f32 = 1e-5;

/// A path below `tests/fixtures`.
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(path)
}

/// Opens `tests/fixtures/FAMILY/ckpt`.
pub fn open(family: &str) -> Vlm<Backend> {
    open_as(family, DType::F32)
}

/// The same on another backend, or with weights of another type.
pub fn open_as<B: AnyBackend<Device = Device>>(family: &str, dtype: DType) -> Vlm<B> {
    open_at(&format!("{family}/ckpt"), dtype)
}

/// Opens a checkpoint below `tests/fixtures`.
pub fn open_at<B: AnyBackend<Device = Device>>(path: &str, dtype: DType) -> Vlm<B> {
    let folder = Folder::open(fixture(path)).expect("the fixture is complete");
    let options = OpenOptions {
        dtype,
        ..OpenOptions::default()
    };
    let vlm = Vlm::open(&folder, &options, &Device::default());
    vlm.unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A picture below `tests/fixtures`.
pub fn picture(path: &str) -> RgbImage {
    let file = std::fs::read(fixture(path)).expect("the fixture is complete");
    decode(&file, &DecodeLimits::default()).expect("a good picture")
}

/// A file of reference tensors.
pub struct Reference(Vec<u8>);

impl Reference {
    /// `tests/fixtures/PATH.safetensors`
    pub fn open(path: &str) -> Self {
        let path = fixture(path).with_extension("safetensors");
        let missing = |error| panic!("{}: {error}", path.display());
        Self(std::fs::read(&path).unwrap_or_else(missing))
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).expect("the fixture is a safetensors file")
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        let tensors = self.tensors();
        let view = tensors.tensor(name);
        let view = view.unwrap_or_else(|_| panic!("{name} is in the fixture"));
        view.shape().to_vec()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let tensors = self.tensors();
        let view = tensors.tensor(name);
        let view = view.unwrap_or_else(|_| panic!("{name} is in the fixture"));
        view.data().to_vec()
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name);
        let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        bytes.chunks_exact(4).map(value).collect()
    }

    pub fn integers(&self, name: &str) -> Vec<i64> {
        let bytes = self.bytes(name);
        let value = |b: &[u8]| i64::from_le_bytes(std::array::from_fn(|i| b[i]));
        bytes.chunks_exact(8).map(value).collect()
    }

    pub fn indices(&self, name: &str) -> Vec<usize> {
        self.integers(name)
            .into_iter()
            .map(|i| i as usize)
            .collect()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.integers(name).into_iter().map(|i| i as u32).collect()
    }

    /// `in.input_ids`, one list per sample, without what `in.attention_mask` hides.
    pub fn samples(&self) -> Vec<Vec<u32>> {
        let length = self.shape("in.input_ids")[1];
        let (ids, mask) = (self.ids("in.input_ids"), self.mask());
        let samples = ids.chunks(length).zip(mask.chunks(length));
        let sample = |(ids, mask): (&[u32], &[bool])| {
            let pairs = ids.iter().zip(mask).filter(|(_, attended)| **attended);
            pairs.map(|(&id, _)| id).collect()
        };
        samples.map(sample).collect()
    }

    /// `in.attention_mask`; everything, if there is none.
    fn mask(&self) -> Vec<bool> {
        match self.has("in.attention_mask") {
            true => self
                .ids("in.attention_mask")
                .iter()
                .map(|&attended| attended != 0)
                .collect(),
            false => vec![true; self.shape("in.input_ids").iter().product()],
        }
    }

    /// Everything `in.*`.
    pub fn inputs(&self) -> TensorInputs<Backend> {
        let seconds = "in.second_per_grid_ts";
        TensorInputs {
            samples: self.samples(),
            pixels: self.pixels(),
            second_per_grid_ts: match self.has(seconds) {
                true => self.floats(seconds),
                false => Vec::new(),
            },
        }
    }

    fn pixels(&self) -> PixelTensors<Backend> {
        let device = Device::default();
        if self.has("in.pixel_values") && self.shape("in.pixel_values").len() == 4 {
            let (values, shape) = (
                self.floats("in.pixel_values"),
                self.shape("in.pixel_values"),
            );
            let data = TensorData::new(values, shape);
            let pixels = Tensor::from_data(data, (&device, DType::F32));
            return PixelTensors::images(Pictures::Fixed(pixels));
        }
        let patches = |pixels: &str, grids: &str| {
            self.has(pixels).then(|| {
                let data = TensorData::new(self.floats(pixels), self.shape(pixels));
                let values: Tensor<Backend, 2> = Tensor::from_data(data, (&device, DType::F32));
                Pictures::Patches(values.transpose(), self.grids(grids))
            })
        };
        PixelTensors {
            images: patches("in.pixel_values", "in.image_grid_thw"),
            videos: patches("in.pixel_values_videos", "in.video_grid_thw"),
        }
    }

    pub fn grids(&self, name: &str) -> Vec<Grid> {
        let grid = |thw: &[usize]| Grid {
            t: thw[0],
            h: thw[1],
            w: thw[2],
        };
        self.indices(name).chunks_exact(3).map(grid).collect()
    }
}

/// Values of a feature-major tensor, row by row.
pub fn rows(tensor: &Tensor<Backend, 2>) -> Vec<f32> {
    values(tensor.clone().transpose())
}

pub fn values<const D: usize>(tensor: Tensor<Backend, D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().into_vec().expect("f32")
}

/// Names the worst element, so that a failure says where to look.
#[track_caller]
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    let errors = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let worst = errors.enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((at, error)) = worst {
        let (a, b) = (found[at], expected[at]);
        assert!(
            error <= tolerance,
            "{what}: {a} instead of {b} at {at}, off by {error:e}"
        );
    }
}

/// Scores, selections, logits and tokens of a routed prompt of one sample.
#[track_caller]
pub fn assert_routed(what: &str, out: &TensorOutputs<Backend>, reference: &Reference) {
    for decision in &out.trace.decisions {
        let at = |part: &str| format!("routing.{}.{part}", decision.layer);
        let scores = reference.floats(&at("scores"));
        assert_close(
            &format!("{what} {}", at("scores")),
            &decision.scores,
            &scores,
            SCORES,
        );
        // The reference numbers the candidates, which under removal are the survivors.
        let selected = reference.indices(&at("selected"));
        let selected: Vec<usize> = selected.iter().map(|&i| decision.candidates[i]).collect();
        assert_eq!(decision.selected, selected, "{what} {}", at("selected"));
    }
    let close = |name: &str, found: &[f32]| {
        let what = format!("{what} {name}");
        assert_close(&what, found, &reference.floats(name), ROUTED_LOGITS);
    };
    close("logits", &values(out.logits.clone()));
    assert_eq!(
        out.generations[0].tokens,
        reference.ids("decode.ids"),
        "{what}"
    );
    close("decode.logits", &out.generations[0].logits.concat());
}

/// Positions and rope delta of every sample, exactly.
#[track_caller]
pub fn assert_positions(what: &str, out: &TensorOutputs<Backend>, reference: &Reference) {
    let found: Vec<i64> = out.prompt.positions.to_data().iter::<i64>().collect();
    // Padding has positions too, which mean nothing.
    let mask = reference.mask();
    let padded = reference.integers("rope.position_ids");
    let rows = padded
        .chunks(mask.len())
        .flat_map(|axis| axis.iter().zip(&mask));
    let expected: Vec<i64> = rows
        .filter(|(_, attended)| **attended)
        .map(|(&p, _)| p)
        .collect();
    assert_eq!(found, expected, "{what}: positions");
    let delta = |sample: &reroute::SampleLayout| sample.next_position - sample.rows as i64;
    let deltas: Vec<i64> = out.prompt.samples.iter().map(delta).collect();
    assert_eq!(
        deltas,
        reference.integers("rope_deltas"),
        "{what}: rope deltas"
    );
}
