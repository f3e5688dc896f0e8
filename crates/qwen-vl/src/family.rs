use std::sync::Arc;

use reducers::encoder::{EncoderShape, Tower};
use reroute::DecoderConfig;
use reroute_checkpoint::{CONFIG_MAX_BYTES, Folder, NameTable};
use reroute_family::{
    BoxNotation, BoxUnits, Dialect, FamilyConfig, FamilyError, GroundingFormat, ImageOptions,
    LayerMemory, ModelType, Preprocessor, RowPositions, Sample, SlotTokens,
};
use vision_encoder::qwen::QwenGeneration;

use crate::{NAMES, QwenVlConfig, QwenVlHfConfig, QwenVlPreprocessor};

/// The wording of Qwen-VL's demonstration, whose way to write boxes Qwen2-VL keeps (arXiv 2409.12191,
/// section 2.2); for Qwen2-VL itself no wording is published. The answer is `(120,340),(560,780)`, once
/// the special tokens around it are gone.
const QWEN2_GROUNDING: &str = "Generate the bounding box of {expression}";

/// What Qwen2.5-VL and Qwen3-VL are asked in their published examples of spatial understanding; the
/// answer is `[{"bbox_2d": [72, 145, 341, 334], "label": "cat"}]`.
const JSON_GROUNDING: &str =
    "Locate {expression} in this image and output the bbox coordinates in JSON format.";

/// How prompts of Qwen2-VL and Qwen2.5-VL are written.
pub const QWEN2_DIALECT: Dialect = Dialect {
    template: include_str!("templates/qwen2-vl.jinja"),
    image: "<|vision_start|><|image_pad|><|vision_end|>",
    video: "<|vision_start|><|video_pad|><|vision_end|>",
    time: None,
};

/// How prompts of Qwen3-VL are written.
pub const QWEN3_DIALECT: Dialect = Dialect {
    template: include_str!("templates/qwen3-vl.jinja"),
    time: Some("<{seconds} seconds>"),
    ..QWEN2_DIALECT
};

impl FamilyConfig for QwenVlConfig {
    fn model_types() -> &'static [ModelType] {
        &[
            ModelType {
                name: "qwen2_vl",
                title: "Qwen2-VL",
                checkpoint: "Qwen/Qwen2-VL-7B-Instruct",
            },
            ModelType {
                name: "qwen2_5_vl",
                title: "Qwen2.5-VL",
                checkpoint: "Qwen/Qwen2.5-VL-7B-Instruct",
            },
            ModelType {
                name: "qwen3_vl",
                title: "Qwen3-VL",
                checkpoint: "Qwen/Qwen3-VL-8B-Instruct",
            },
        ]
    }

    fn open(folder: &Folder) -> Result<Self, FamilyError> {
        let config: QwenVlHfConfig = folder.read_json("config.json", CONFIG_MAX_BYTES)?;
        config.resolve()
    }

    fn decoder(&self) -> &DecoderConfig {
        &self.text
    }

    fn encoder(&self) -> EncoderShape {
        EncoderShape {
            num_layers: self.vision.num_layers,
            feature_layer: self.vision.num_layers,
            num_heads: self.vision.num_heads,
            class_token: false,
            position_axes: 3,
            tower: Tower::QwenVl,
        }
    }

    fn slots(&self) -> SlotTokens {
        SlotTokens {
            image: self.image_token,
            video: Some(self.video_token),
        }
    }

    fn names(&self) -> &'static NameTable {
        &NAMES
    }

    /// Generations write other names.
    fn file_name(&self, path: &str) -> Option<String> {
        crate::file_name(self.vision.generation, path)
    }

    fn tied_head(&self) -> &'static str {
        "language_model.lm_head.weight"
    }

    fn dialect(&self) -> Dialect {
        match self.vision.generation {
            QwenGeneration::Qwen2 | QwenGeneration::Qwen2_5 => QWEN2_DIALECT,
            QwenGeneration::Qwen3 => QWEN3_DIALECT,
        }
    }

    fn grounding(&self) -> GroundingFormat {
        let (prompt, units, notation) = match self.vision.generation {
            QwenGeneration::Qwen2 => (QWEN2_GROUNDING, BoxUnits::Thousandths, BoxNotation::Marks),
            QwenGeneration::Qwen2_5 => (JSON_GROUNDING, BoxUnits::ResizedPixels, BoxNotation::Json),
            QwenGeneration::Qwen3 => (JSON_GROUNDING, BoxUnits::Thousandths, BoxNotation::Json),
        };
        GroundingFormat::new(prompt, units).written_as(notation)
    }

    fn preprocessor(
        &self,
        folder: &Folder,
        options: &ImageOptions,
    ) -> Result<Arc<dyn Preprocessor>, FamilyError> {
        Ok(Arc::new(QwenVlPreprocessor::open(folder, self, options)?))
    }

    /// Those of a picture of 672 × 672 pixels.
    fn typical_visual_tokens(&self) -> usize {
        let cell = self.vision.patch_size * self.vision.spatial_merge_size;
        (672 / cell).pow(2)
    }

    fn spatial_merge_size(&self) -> usize {
        self.vision.spatial_merge_size
    }

    fn deepstack_layers(&self) -> usize {
        self.vision.deepstack_layers.len()
    }

    fn tower_memory(&self) -> LayerMemory {
        let vision = &self.vision;
        let hidden = vision.hidden_size;
        let layer = LayerMemory::vision(vision.num_heads, hidden, vision.intermediate_size);
        let has_windows = vision.generation == QwenGeneration::Qwen2_5;
        // Visual tokens for the decoder's first layers.
        let merged = vision.output_size / vision.spatial_merge_size.pow(2);
        LayerMemory {
            held: layer.held + vision.deepstack_layers.len() * merged,
            projected: 3 * hidden,
            // Queries, keys and values as they are projected, and window by window.
            copies: 6 * hidden,
            in_place: if has_windows { 0 } else { 3 * hidden },
            gated: has_windows,
            input: vision.patch_features(),
            ..layer
        }
    }

    fn positions(&self, sample: &Sample) -> Result<RowPositions, FamilyError> {
        self.mrope(sample)
    }

    /// After a video the text goes on behind its longer side, but an answer behind its last moment (as in
    /// transformers).
    fn keeps_answer(&self, sample: &Sample) -> bool {
        sample.video_grids.is_empty()
    }
}
