//! What llama.cpp calls tensors (`gguf-py/gguf/constants.py`), and what Hugging Face does.

use crate::{NameTable, Rule};

/// Rules of one spelling each.
macro_rules! names {
    ($($file:literal => $module:literal),+ $(,)?) => {
        NameTable {
            rules: &[$(Rule { module: $module, file: &[$file] }),+],
            ignore: &[],
        }
    };
}

/// Language models, whose names begin with `model.` or `lm_head.` here.
pub(super) static LANGUAGE: NameTable = names! {
    "token_embd.*" => "model.embed_tokens.*",
    "output_norm.*" => "model.norm.*",
    "output.*" => "lm_head.*",
    "blk.{}.attn_norm.*" => "model.layers.{}.input_layernorm.*",
    "blk.{}.attn_q.*" => "model.layers.{}.self_attn.q_proj.*",
    "blk.{}.attn_k.*" => "model.layers.{}.self_attn.k_proj.*",
    "blk.{}.attn_v.*" => "model.layers.{}.self_attn.v_proj.*",
    "blk.{}.attn_output.*" => "model.layers.{}.self_attn.o_proj.*",
    "blk.{}.attn_q_norm.*" => "model.layers.{}.self_attn.q_norm.*",
    "blk.{}.attn_k_norm.*" => "model.layers.{}.self_attn.k_norm.*",
    "blk.{}.ffn_norm.*" => "model.layers.{}.post_attention_layernorm.*",
    "blk.{}.ffn_gate.*" => "model.layers.{}.mlp.gate_proj.*",
    "blk.{}.ffn_up.*" => "model.layers.{}.mlp.up_proj.*",
    "blk.{}.ffn_down.*" => "model.layers.{}.mlp.down_proj.*",
};

/// LLaVA's tower and projector.
pub(super) static LLAVA: NameTable = names! {
    "v.class_embd" => "vision_tower.vision_model.embeddings.class_embedding",
    "v.patch_embd.*" => "vision_tower.vision_model.embeddings.patch_embedding.*",
    "v.position_embd.*" => "vision_tower.vision_model.embeddings.position_embedding.*",
    "v.pre_ln.*" => "vision_tower.vision_model.pre_layrnorm.*",
    "v.blk.{}.ln1.*" => "vision_tower.vision_model.encoder.layers.{}.layer_norm1.*",
    "v.blk.{}.ln2.*" => "vision_tower.vision_model.encoder.layers.{}.layer_norm2.*",
    "v.blk.{}.attn_q.*" => "vision_tower.vision_model.encoder.layers.{}.self_attn.q_proj.*",
    "v.blk.{}.attn_k.*" => "vision_tower.vision_model.encoder.layers.{}.self_attn.k_proj.*",
    "v.blk.{}.attn_v.*" => "vision_tower.vision_model.encoder.layers.{}.self_attn.v_proj.*",
    "v.blk.{}.attn_out.*" => "vision_tower.vision_model.encoder.layers.{}.self_attn.out_proj.*",
    "v.blk.{}.ffn_up.*" => "vision_tower.vision_model.encoder.layers.{}.mlp.fc1.*",
    "v.blk.{}.ffn_down.*" => "vision_tower.vision_model.encoder.layers.{}.mlp.fc2.*",
    "mm.0.*" => "multi_modal_projector.linear_1.*",
    "mm.2.*" => "multi_modal_projector.linear_2.*",
};

/// The tower of Qwen2-VL.
pub(super) static QWEN2: NameTable = names! {
    "v.patch_embd.*" => "visual.patch_embed.proj.*",
    "v.blk.{}.ln1.*" => "visual.blocks.{}.norm1.*",
    "v.blk.{}.ln2.*" => "visual.blocks.{}.norm2.*",
    "v.blk.{}.attn_qkv.*" => "visual.blocks.{}.attn.qkv.*",
    "v.blk.{}.attn_out.*" => "visual.blocks.{}.attn.proj.*",
    "v.blk.{}.ffn_up.*" => "visual.blocks.{}.mlp.fc1.*",
    "v.blk.{}.ffn_down.*" => "visual.blocks.{}.mlp.fc2.*",
    "v.post_ln.*" => "visual.merger.ln_q.*",
    "mm.0.*" => "visual.merger.mlp.0.*",
    "mm.2.*" => "visual.merger.mlp.2.*",
};

/// The same where Qwen2.5-VL differs.
pub(super) static QWEN2_5: NameTable = names! {
    "v.blk.{}.ffn_gate.*" => "visual.blocks.{}.mlp.gate_proj.*",
    "v.blk.{}.ffn_up.*" => "visual.blocks.{}.mlp.up_proj.*",
    "v.blk.{}.ffn_down.*" => "visual.blocks.{}.mlp.down_proj.*",
};

/// The tower of Qwen3-VL. `v.deepstack.{}` are counted by their layer there, and in their order here.
pub(super) static QWEN3: NameTable = names! {
    "v.patch_embd.*" => "model.visual.patch_embed.proj.*",
    "v.position_embd.*" => "model.visual.pos_embed.*",
    "v.blk.{}.ln1.*" => "model.visual.blocks.{}.norm1.*",
    "v.blk.{}.ln2.*" => "model.visual.blocks.{}.norm2.*",
    "v.blk.{}.attn_qkv.*" => "model.visual.blocks.{}.attn.qkv.*",
    "v.blk.{}.attn_out.*" => "model.visual.blocks.{}.attn.proj.*",
    "v.blk.{}.ffn_up.*" => "model.visual.blocks.{}.mlp.linear_fc1.*",
    "v.blk.{}.ffn_down.*" => "model.visual.blocks.{}.mlp.linear_fc2.*",
    "v.deepstack.{}.norm.*" => "model.visual.deepstack_merger_list.{}.norm.*",
    "v.deepstack.{}.fc1.*" => "model.visual.deepstack_merger_list.{}.linear_fc1.*",
    "v.deepstack.{}.fc2.*" => "model.visual.deepstack_merger_list.{}.linear_fc2.*",
    "v.post_ln.*" => "model.visual.merger.norm.*",
    "mm.0.*" => "model.visual.merger.linear_fc1.*",
    "mm.2.*" => "model.visual.merger.linear_fc2.*",
};
