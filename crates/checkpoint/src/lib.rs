//! Hugging Face checkpoints: from a folder of untrusted files to the parameters of a Burn module.
//!
//! Top-down:
//!
//! 1. [`Folder`]: files by name, on disk or embedded in the program, each read with a size limit;
//!    no name and no link leads out of the folder.
//! 2. [`Shards`]: which tensor lies where. All headers are checked before any weight is read.
//! 3. [`NameTable`]: the names a checkpoint may use, as data, and the module paths they stand for.
//! 4. [`load_into`]: compares names and shapes, reports *everything* that does not fit at once,
//!    then streams tensor after tensor into the module.
//! 5. [`read_adapter`], [`write_adapter`]: low-rank adapters in folders of their own, as PEFT keeps them.
//!
//! Files of others become what these know: [`Gguf`] pairs are shown as the [`Folder`] that they would be on Hugging
//! Face, [`Onnx`] says which tensors of a graph are where.
//!
//! Weights lie in safetensors files, or in one Burnpack file. safetensors are read: a file that
//! changes underneath is an error, and while loading, memory holds the parameters loaded so far plus
//! one block of file bytes. A Burnpack file is mapped by `burn-store`: parameters that it has in the
//! wanted type are not copied at all, the system reads them when they are used and may drop them when
//! memory is short. Nobody may cut such a file off while a program uses it, so [`WeightsFile`] writers
//! put a finished file in place by renaming it.
//!
//! [`Save`] goes the other way: a module becomes a folder, written beside the one that it replaces.
//!
//! Nothing here knows the maths of a model, and nothing here panics on a file.

mod adapter;
mod arranged;
mod burnpack;
mod codes;
mod companions;
mod convert;
mod error;
mod folder;
mod gguf;
mod header;
mod hub;
mod inventory;
mod load;
mod mapped;
mod mismatch;
mod names;
mod narrow;
mod onnx;
mod pieces;
mod plan;
mod processor;
mod quantised;
mod save;
mod sharding;
mod shards;
mod weights_file;

pub use adapter::{
    AdapterConfig, AdapterError, AdapterMismatch, LinearMap, NewAdapter, StoredAdapter,
    StoredChange, Targets, fits, read_adapter, write_adapter,
};
pub use codes::StoredCodes;
pub use companions::{CONFIG, Companions, dtype_of, forget_quantization, json_bytes, set_dtype};
pub use convert::{Layout, TensorError};
pub use error::CheckpointError;
pub use folder::{
    CONFIG_MAX_BYTES, Folder, INDEX_MAX_BYTES, TEMPLATE_MAX_BYTES, TOKENIZER_MAX_BYTES,
};
pub use gguf::{Gguf, GgufValue, template_with_images};
pub use hub::{cached_path, is_repository};
pub use load::{LoadOptions, LoadProgress, Loading, check_fit, load_into};
pub use mismatch::{Disagreement, Duplicate, IndexMismatch, Misshapen, ModuleMismatch, Unreadable};
pub use names::{NameTable, Rule};
pub use narrow::{Narrow, is_weight};
pub use onnx::{Onnx, OnnxInput, OnnxNode};
pub use processor::ProcessorSettings;
pub use quantised::own::{coded_tensor, codes_note, set_codes};
pub use reroute_kernels::Format as CodeFormat;
pub use safetensors::Dtype;
pub use save::{Save, SaveError, Saved};
pub use sharding::{shard_index, shard_name, split};
pub use shards::{CONVERTED_FROM, INDEX, Shards, TensorInfo};
pub use weights_file::{Format, LayoutError, NewTensor, WeightsFile};
