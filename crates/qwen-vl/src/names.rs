use reroute_checkpoint::{NameTable, Rule};
use vision_encoder::qwen::QwenGeneration;

/// A rule for parameters of the vision tower, below `visual` as the hub's Qwen2-VL and Qwen2.5-VL have it,
/// or below `model.visual` as Qwen3-VL and whatever current libraries save.
macro_rules! visual {
    ($module:literal: $($file:literal),+) => {
        Rule {
            module: concat!("visual.", $module),
            file: &[$(concat!("visual.", $file), concat!("model.visual.", $file)),+],
        }
    };
}

/// What checkpoints call the parameters of [`QwenVl`](crate::QwenVl), old spelling and new.
pub static NAMES: NameTable = NameTable {
    rules: &[
        visual!("patch_embed.*": "patch_embed.proj.*"),
        visual!("blocks.{}.mlp.gate.*": "blocks.{}.mlp.gate_proj.*"),
        visual!("blocks.{}.mlp.fc1.*": "blocks.{}.mlp.up_proj.*", "blocks.{}.mlp.linear_fc1.*"),
        visual!("blocks.{}.mlp.fc2.*": "blocks.{}.mlp.down_proj.*", "blocks.{}.mlp.linear_fc2.*"),
        visual!("merger.norm.*": "merger.ln_q.*", "merger.norm.*"),
        visual!("merger.fc1.*": "merger.mlp.0.*", "merger.linear_fc1.*"),
        visual!("merger.fc2.*": "merger.mlp.2.*", "merger.linear_fc2.*"),
        visual!("deepstack_merger_list.{}.fc1.*": "deepstack_merger_list.{}.linear_fc1.*"),
        visual!("deepstack_merger_list.{}.fc2.*": "deepstack_merger_list.{}.linear_fc2.*"),
        visual!("*": "*"),
        Rule {
            module: "language_model.lm_head.*",
            file: &["lm_head.*"],
        },
        Rule {
            module: "language_model.*",
            file: &["model.language_model.*", "model.*"],
        },
    ],
    // Buffers that old libraries saved.
    ignore: &["*.rotary_emb.inv_freq", "*.rotary_pos_emb.inv_freq"],
};

/// What the hub's checkpoints of a generation call the parameter at a path of [`QwenVl`](crate::QwenVl):
/// the other way round than [`NAMES`], for saving.
pub fn file_name(generation: QwenGeneration, path: &str) -> Option<String> {
    let tables = match generation {
        QwenGeneration::Qwen2 => [None, Some(&WRITTEN_2)],
        QwenGeneration::Qwen2_5 => [Some(&WRITTEN_2_5), Some(&WRITTEN_2)],
        QwenGeneration::Qwen3 => [None, Some(&WRITTEN_3)],
    };
    let mut tables = tables.into_iter().flatten();
    tables.find_map(|table| table.file_name(path))
}

/// A rule of one spelling.
macro_rules! written {
    ($($module:literal: $file:literal,)+) => {
        NameTable {
            rules: &[$(Rule { module: $module, file: &[$file] }),+],
            ignore: &[],
        }
    };
}

static WRITTEN_2: NameTable = written! {
    "visual.patch_embed.*": "visual.patch_embed.proj.*",
    "visual.merger.norm.*": "visual.merger.ln_q.*",
    "visual.merger.fc1.*": "visual.merger.mlp.0.*",
    "visual.merger.fc2.*": "visual.merger.mlp.2.*",
    "visual.*": "visual.*",
    "language_model.lm_head.*": "lm_head.*",
    "language_model.*": "model.*",
};

/// Where it differs from Qwen2-VL.
static WRITTEN_2_5: NameTable = written! {
    "visual.blocks.{}.mlp.gate.*": "visual.blocks.{}.mlp.gate_proj.*",
    "visual.blocks.{}.mlp.fc1.*": "visual.blocks.{}.mlp.up_proj.*",
    "visual.blocks.{}.mlp.fc2.*": "visual.blocks.{}.mlp.down_proj.*",
};

static WRITTEN_3: NameTable = written! {
    "visual.patch_embed.*": "model.visual.patch_embed.proj.*",
    "visual.blocks.{}.mlp.fc1.*": "model.visual.blocks.{}.mlp.linear_fc1.*",
    "visual.blocks.{}.mlp.fc2.*": "model.visual.blocks.{}.mlp.linear_fc2.*",
    "visual.merger.fc1.*": "model.visual.merger.linear_fc1.*",
    "visual.merger.fc2.*": "model.visual.merger.linear_fc2.*",
    "visual.deepstack_merger_list.{}.fc1.*": "model.visual.deepstack_merger_list.{}.linear_fc1.*",
    "visual.deepstack_merger_list.{}.fc2.*": "model.visual.deepstack_merger_list.{}.linear_fc2.*",
    "visual.*": "model.visual.*",
    "language_model.lm_head.*": "lm_head.*",
    "language_model.*": "model.language_model.*",
};
