//! A model becomes a checkpoint again.

use std::path::Path;

use burn::module::Module;
use burn::tensor::DType;
use burn::tensor::backend::Backend;
use reroute_checkpoint::{Folder, Saved};

use crate::{Model, ModelConfig, ZooError};

/// How a model is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveOptions {
    /// Type of the weights that are floats, f32, f16 or bf16; that of the decoder if `None`.
    pub dtype: Option<DType>,
    /// Largest file of weights, in bytes of data; one larger tensor is a file, too.
    pub max_shard_bytes: u64,
}

/// Shards are as large as transformers has long written them.
impl Default for SaveOptions {
    fn default() -> Self {
        Self {
            dtype: None,
            max_shard_bytes: 5_000_000_000,
        }
    }
}

impl<B: Backend> Model<B> {
    /// Writes a checkpoint folder as transformers writes it: `model.safetensors`, or shards and their index,
    /// and beside it all that the folder `like` has beside its weights, which is the one that the model was
    /// opened from, or one of the same model. Its `config.json` says the type that is written.
    ///
    /// Weights have the names that the family's checkpoints have on the hub
    /// ([`FamilyConfig::file_name`](crate::FamilyConfig::file_name)), in the shapes that they have there; a tied
    /// head is not written. Weights of `like` that nothing here computes with, but transformers looks for (the
    /// norm behind a tower's features, SigLIP's head), are taken over.
    ///
    /// Weights in codes of fewer bits are written as they are, whatever the type of the others
    /// ([`coded_tensor`](reroute_checkpoint::coded_tensor)); transformers cannot open such a folder.
    ///
    /// Until everything is on the disk the folder is called `.NAME.partial-…`, beside `to`. A full disk, any
    /// other error or a kill leaves what is at `to` as it was: see
    /// [`Save::write`](reroute_checkpoint::Save::write). Only a checkpoint whose files all have a successor is
    /// replaced, or an empty folder.
    ///
    /// # Errors
    /// [`ZooError::Save`]; [`ZooError::OtherFamily`] if `like` describes another kind of model, or what
    /// [`ModelConfig::open`] says of it.
    pub fn save(
        &self,
        to: impl AsRef<Path>,
        like: &Folder,
        options: &SaveOptions,
    ) -> Result<Saved, ZooError> {
        let device = self.devices().into_iter().next().unwrap_or_default();
        let described = Self::new(&ModelConfig::open(like)?, &device)?;
        let dtype = options.dtype.unwrap_or_else(|| self.decoder().dtype());
        let _span = tracing::info_span!("saving", ?dtype).entered();
        let max_shard_bytes = options.max_shard_bytes;
        self.write_like(&described, like, to.as_ref(), dtype, max_shard_bytes)
    }
}
