use std::fmt::Debug;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::encoder::{EncoderShape, Tap, Taps};
use reroute::{Decoder, DecoderConfig};
use reroute_checkpoint::{Folder, NameTable};
use reroute_layers::Linears;
use vision_encoder::Grid;

use crate::prompt::{Modality, RowPositions, Sample};
use crate::{
    Dialect, FamilyError, GroundingFormat, ImageOptions, LayerMemory, Pictures, Preprocessor,
};

/// A kind of models that a family has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelType {
    /// What `config.json` calls it (`model_type`).
    pub name: &'static str,
    /// What people call it.
    pub title: &'static str,
    /// A published checkpoint of it.
    pub checkpoint: &'static str,
}

/// The resolved configuration of a model: everything that is known of it before its weights are read.
pub trait FamilyConfig: Debug + Send + Sync {
    /// The models of this family.
    fn model_types() -> &'static [ModelType]
    where
        Self: Sized;

    /// Reads and checks `config.json`.
    fn open(folder: &Folder) -> Result<Self, FamilyError>
    where
        Self: Sized;

    /// The decoder.
    fn decoder(&self) -> &DecoderConfig;

    /// The vision tower as methods that reduce before the decoder know it.
    fn encoder(&self) -> EncoderShape;

    /// Whether methods before the decoder can work on the visual tokens.
    ///
    /// # Errors
    /// Tokens that stand in no grid.
    fn check_reducible(&self) -> Result<(), FamilyError> {
        Ok(())
    }

    /// The tokens that stand for visual tokens.
    fn slots(&self) -> SlotTokens;

    /// What checkpoints call the parameters of the model.
    fn names(&self) -> &'static NameTable;

    /// What a checkpoint of this model calls the parameter at a path of the network: for saving.
    fn file_name(&self, path: &str) -> Option<String> {
        self.names().file_name(path)
    }

    /// Path in the network of the head that checkpoints may store although the embedding table takes its
    /// place.
    fn tied_head(&self) -> &'static str;

    /// How prompts are written where the checkpoint does not say.
    fn dialect(&self) -> Dialect;

    /// How the model is asked for boxes where the checkpoint does not say.
    fn grounding(&self) -> GroundingFormat;

    /// Reads and checks the preprocessing of images and videos.
    fn preprocessor(
        &self,
        folder: &Folder,
        options: &ImageOptions,
    ) -> Result<Arc<dyn Preprocessor>, FamilyError>;

    /// Visual tokens of one image: as many as every image has, or as many as one of ordinary size.
    fn typical_visual_tokens(&self) -> usize;

    /// Patches along each side of the square that becomes one visual token.
    fn spatial_merge_size(&self) -> usize {
        1
    }

    /// Decoder layers that DeepStack features are added behind (arXiv 2406.04334).
    fn deepstack_layers(&self) -> usize {
        0
    }

    /// Numbers that a patch has in a layer of the vision tower.
    fn tower_memory(&self) -> LayerMemory;

    /// Where every row of a full prompt stands; by default the rows are counted.
    ///
    /// # Errors
    /// Slots and grids that do not belong together.
    fn positions(&self, sample: &Sample) -> Result<RowPositions, FamilyError> {
        Ok(RowPositions::counted(sample.ids.len()))
    }

    /// Whether the tokens of an answer stand where they would in a longer prompt that goes on behind them:
    /// then a conversation keeps their keys and values.
    fn keeps_answer(&self, _: &Sample) -> bool {
        true
    }

    /// Row and column in its picture of each visual token of an image or of a video, in the order of
    /// their slots; empty if a picture has no such grid. By default those of the grids of the sample, which
    /// samples of families whose images are all of one size need not have: they say it here.
    fn cells(&self, sample: &Sample, modality: Modality) -> Vec<[usize; 2]> {
        let merge = self.spatial_merge_size();
        let of_grid = |grid: &Grid| {
            let [height, width] = [grid.h / merge, grid.w / merge];
            let cells =
                (0..height.saturating_mul(width)).map(move |cell| [cell / width, cell % width]);
            (0..grid.t).flat_map(move |_| cells.clone())
        };
        let cells = sample.grids(modality).iter().flat_map(of_grid);
        // Whatever the grids say, a prompt has no more slots than rows.
        cells.take(sample.ids.len()).collect()
    }
}

/// The tokens that stand for visual tokens in a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotTokens {
    /// Of an image.
    pub image: u32,
    /// Of a video; `None` if the model takes none.
    pub video: Option<u32>,
}

impl SlotTokens {
    /// What a token is a slot of, `None` for text.
    pub fn modality(&self, id: u32) -> Option<Modality> {
        match id {
            _ if id == self.image => Some(Modality::Image),
            _ if Some(id) == self.video => Some(Modality::Video),
            _ => None,
        }
    }

    /// The slot token of a modality.
    pub fn of(&self, modality: Modality) -> Option<u32> {
        match modality {
            Modality::Image => Some(self.image),
            Modality::Video => self.video,
        }
    }

    /// All of them.
    pub fn all(&self) -> Vec<u32> {
        [Some(self.image), self.video]
            .into_iter()
            .flatten()
            .collect()
    }
}

/// The network of a family. Its fields are parameters called as [`FamilyConfig::names`] says.
pub trait FamilyModel<B: Backend>: Module<B> + Linears<B> {
    /// Its configuration.
    type Config: FamilyConfig;

    /// Builds the model; parameters are not made before they are loaded or used.
    fn new(config: &Self::Config, device: &B::Device) -> Result<Self, FamilyError>;

    /// The resolved configuration.
    fn config(&self) -> &Self::Config;

    /// The decoder.
    fn decoder(&self) -> &Decoder<B>;

    /// The decoder, to change how it is run.
    fn decoder_mut(&mut self) -> &mut Decoder<B>;

    /// What the vision tower shows of pictures: [`Tap::Features`], and whatever else is asked for.
    ///
    /// # Errors
    /// [`FamilyError::WrongPixels`] for pictures in another form than this tower takes.
    fn look(&self, pictures: Pictures<B>, taps: &[Tap]) -> Result<Look<B>, FamilyError>;

    /// Visual tokens of [`Tap::Features`]; `None` where those are visual tokens already.
    ///
    /// # Shapes
    /// - `features`: `[vision hidden_size, rows]`
    /// - returns `[hidden_size, rows]`
    fn project(&self, features: &Tensor<B, 2>) -> Option<Tensor<B, 2>>;
}

/// What a vision tower shows of images, or of videos, side by side.
#[derive(Debug, Clone)]
pub struct Look<B: Backend> {
    /// Time steps, rows and columns of tokens of each.
    pub grids: Vec<[usize; 3]>,
    /// What was asked for, and [`Tap::Features`].
    pub taps: Taps<B>,
    /// See [`reroute::Prompt::deepstack`].
    pub deepstack: Vec<Tensor<B, 2>>,
}

impl<B: Backend> Look<B> {
    /// Whether there are pictures, and the features are of as many tokens as these have.
    pub(crate) fn check(&self) -> Result<(), FamilyError> {
        let tokens = |grid: &[usize; 3]| grid.iter().copied().reduce(usize::saturating_mul);
        let tokens = self.grids.iter().filter_map(tokens);
        let tokens = tokens.fold(0, usize::saturating_add);
        let shown = self.taps.get(&Tap::Features).map_or(0, |x| x.dims()[1]);
        match tokens == shown && shown > 0 {
            true => Ok(()),
            false => Err(FamilyError::Look { shown, tokens }),
        }
    }
}
