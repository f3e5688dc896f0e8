use reroute_checkpoint::{NameTable, Rule};

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
