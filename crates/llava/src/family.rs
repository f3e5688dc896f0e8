use std::sync::Arc;

use reducers::encoder::{EncoderShape, Tower};
use reroute::DecoderConfig;
use reroute_checkpoint::{CONFIG_MAX_BYTES, Folder, NameTable};
use reroute_family::{
    BoxUnits, Dialect, FamilyConfig, FamilyError, GroundingFormat, ImageOptions, LayerMemory,
    Modality, ModelType, Preprocessor, Sample, SlotTokens,
};
use vision_encoder::vit::VitKind;

use crate::names::names;
use crate::preprocess::read;
use crate::{LlavaConfig, LlavaHfConfig, LlavaPreprocessor};

/// The prompt that LLaVA-1.5 was trained on for referring expressions (arXiv 2310.03744, Table 9); the
/// answer is `[0.12, 0.34, 0.56, 0.78]`.
const GROUNDING_PROMPT: &str = "Bounding box coordinates are specified in the format (top-left x, \
    top-left y, bottom-right x, bottom-right y). All values are floating point numbers bounded \
    between 0 and 1. Please provide the bounding box coordinate of the region this sentence \
    describes: {expression}";

/// How prompts of LLaVA-1.5 are written.
pub const DIALECT: Dialect = Dialect {
    template: include_str!("templates/llava.jinja"),
    image: "<image>\n",
    video: "",
    time: None,
};

impl FamilyConfig for LlavaConfig {
    fn model_types() -> &'static [ModelType] {
        &[ModelType {
            name: "llava",
            title: "LLaVA-1.5",
            checkpoint: "llava-hf/llava-1.5-7b-hf",
        }]
    }

    fn open(folder: &Folder) -> Result<Self, FamilyError> {
        let config: LlavaHfConfig = folder.read_json("config.json", CONFIG_MAX_BYTES)?;
        let mut config = config.resolve()?;
        if config.vision.kind == VitKind::Dinov2 {
            // The size that it sees is the preprocessor's; its positions are interpolated.
            if let Ok([height, width]) = read(folder).map(|squares| squares.output_size())
                && height == width
            {
                config.vision = config.vision.with_image_size(height)?;
            }
        }
        config.check_length()?;
        Ok(config)
    }

    fn decoder(&self) -> &DecoderConfig {
        &self.text
    }

    fn encoder(&self) -> EncoderShape {
        EncoderShape {
            num_layers: self.vision.num_layers,
            feature_layer: self.vision_layers.iter().copied().max().unwrap_or(0),
            num_heads: self.vision.num_heads,
            class_token: self.vision.class_token(),
            position_axes: 1,
            tower: match self.vision.kind {
                VitKind::Clip => Tower::Clip,
                _ => Tower::Other,
            },
        }
    }

    fn check_reducible(&self) -> Result<(), FamilyError> {
        self.check_grid()
    }

    fn slots(&self) -> SlotTokens {
        SlotTokens {
            image: self.image_token,
            video: None,
        }
    }

    fn names(&self) -> &'static NameTable {
        names(&self.vision)
    }

    fn tied_head(&self) -> &'static str {
        "language_model.lm_head.weight"
    }

    fn dialect(&self) -> Dialect {
        DIALECT
    }

    fn grounding(&self) -> GroundingFormat {
        GroundingFormat::new(GROUNDING_PROMPT, BoxUnits::Normalized)
    }

    fn preprocessor(
        &self,
        folder: &Folder,
        options: &ImageOptions,
    ) -> Result<Arc<dyn Preprocessor>, FamilyError> {
        Ok(Arc::new(LlavaPreprocessor::open(folder, self, options)?))
    }

    fn typical_visual_tokens(&self) -> usize {
        self.visual_tokens()
    }

    fn tower_memory(&self) -> LayerMemory {
        let vision = &self.vision;
        LayerMemory {
            input: 3 * vision.patch_size.pow(2),
            ..LayerMemory::vision(
                vision.num_heads,
                vision.hidden_size,
                vision.intermediate_size,
            )
        }
    }

    /// Every image has the same grid, so that samples need not say it; none if its tokens are not its
    /// patches.
    fn cells(&self, sample: &Sample, modality: Modality) -> Vec<[usize; 2]> {
        if !self.tokens_are_patches() {
            return Vec::new();
        }
        let is_slot = |id: &&u32| self.slots().modality(**id) == Some(modality);
        let side = self.vision.grid();
        let cells = sample.ids.iter().filter(is_slot).enumerate();
        cells
            .map(|(slot, _)| slot % (side * side))
            .map(|cell| [cell / side, cell % side])
            .collect()
    }
}
