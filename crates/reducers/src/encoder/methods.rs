//! The built-in reductions before the decoder, a file each. A new one is its file, its `mod` line and
//! its line in [`built_in!`] below; presets, files and tables follow from that.

mod average_pooling;
mod cdpruner;
mod divprune;
mod fastervlm;
mod hiprune;
mod nuwa;
mod prumerge;
mod random_tokens;
mod uniform_grid;
mod visionzip;
mod vispruner;
mod vscan;

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::{EncoderReducer, EncoderShape, Reduction, Seen, Tap};
use crate::{About, ReducerError};

pub use average_pooling::AveragePooling;
pub use cdpruner::CdPruner;
pub use divprune::DivPrune;
pub use fastervlm::FasterVlm;
pub use hiprune::HiPrune;
pub use nuwa::{Nuwa, Pillars, Salience};
pub use prumerge::PruMerge;
pub use random_tokens::RandomTokens;
pub use uniform_grid::UniformGrid;
pub use visionzip::VisionZip;
pub use vispruner::VisPruner;
pub use vscan::VScan;

/// What a built-in method says of itself, beside being an [`EncoderReducer`].
pub trait BuiltIn {
    /// What to know before comparing.
    const ABOUT: About;

    /// Checks the settings as far as no tower is needed for it: when a file is read, and before
    /// anything runs.
    ///
    /// # Errors
    /// [`ReducerError::Unsupported`] names the setting and what it may be.
    fn check(&self) -> Result<(), ReducerError> {
        Ok(())
    }

    /// Whether the rule has a meaning behind this tower.
    ///
    /// # Errors
    /// [`ReducerError::Unsupported`] says why not, and what works there.
    fn works_behind(&self, _encoder: &EncoderShape) -> Result<(), ReducerError> {
        Ok(())
    }
}

/// A method whose presets are made by the rule for all of them: at every budget, and rerouted.
pub(crate) struct InPresets {
    pub(crate) name: &'static str,
    pub(crate) rerouted: &'static str,
    pub(crate) about: About,
    pub(crate) method: fn() -> EncoderMethod,
}

/// One line a method: its name in files, messages and presets (in brackets what files called it once),
/// its type, and what is unlike that in its presets: `own` if a recipe of their own makes them.
macro_rules! built_in {
    ($($name:literal $([$old:literal])? $Type:ident $(=> $preset:tt)?;)*) => {
        /// The built-in reductions before the decoder, each with its settings: the data of a plan.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[expect(missing_docs, reason = "each is documented where it is defined")]
        #[non_exhaustive]
        pub enum EncoderMethod {
            $(#[serde(rename = $name $(, alias = $old)?)] $Type($Type),)*
        }

        impl EncoderMethod {
            /// The names of all, as files spell them.
            pub const NAMES: &[&str] = &[$($name),*];

            /// The method itself.
            pub fn reducer<B: Backend>(&self) -> &dyn EncoderReducer<B> {
                match self { $(Self::$Type(method) => method,)* }
            }

            /// Its name, as files spell it.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$Type(_) => $name,)* }
            }

            /// See [`BuiltIn::check`].
            ///
            /// # Errors
            /// [`ReducerError::Unsupported`] names the setting and what it may be.
            pub fn check(&self) -> Result<(), ReducerError> {
                match self { $(Self::$Type(method) => method.check(),)* }
            }

            /// See [`BuiltIn::works_behind`].
            ///
            /// # Errors
            /// [`ReducerError::Unsupported`] says why not, and what works there.
            pub fn works_behind(&self, encoder: &EncoderShape) -> Result<(), ReducerError> {
                match self { $(Self::$Type(method) => method.works_behind(encoder),)* }
            }

            /// Those whose presets are made by the rule for all.
            pub(crate) const IN_PRESETS: &[Option<InPresets>] =
                &[$(in_presets!($Type, $name $(, $preset)?)),*];
        }

        $(impl $Type {
            /// Its name in files and messages.
            pub const NAME: &'static str = $name;
        })*
    };
}

macro_rules! in_presets {
    ($Type:ident, $name:literal, own) => {
        None
    };
    ($Type:ident, $name:literal, ($preset:literal, $make:expr)) => {
        Some(InPresets {
            name: $preset,
            rerouted: concat!("reroute-", $preset),
            about: $Type::ABOUT,
            method: || EncoderMethod::$Type($make),
        })
    };
    ($Type:ident, $name:literal) => {
        in_presets!($Type, $name, ($name, $Type::default()))
    };
}

built_in! {
    "random-tokens" ["random"] RandomTokens;
    "uniform-grid" UniformGrid;
    "average-pooling" AveragePooling;
    "visionzip" ["vision-zip"] VisionZip;
    "fastervlm" ["faster-vlm"] FasterVlm;
    "vispruner" ["vis-pruner"] VisPruner;
    "divprune" ["div-prune"] DivPrune;
    "cdpruner" ["cd-pruner"] CdPruner;
    "prumerge" ["pru-merge"] PruMerge => ("prumerge-plus", PruMerge::plus());
    "hiprune" ["hi-prune"] HiPrune;
    "nuwa" Nuwa => own;
    "vscan" VScan => own;
}

impl<B: Backend> EncoderReducer<B> for EncoderMethod {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        self.check()?;
        self.reducer::<B>().needs(encoder)
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        self.reducer().reduce(seen, keep)
    }

    fn fingerprint(&self) -> Option<String> {
        Some(format!("{self:?}"))
    }
}
