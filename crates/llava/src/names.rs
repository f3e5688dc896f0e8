use checkpoint::{NameTable, Rule};

/// What checkpoints call the parameters of [`Llava`](crate::Llava), old spelling and new.
pub static NAMES: NameTable = NameTable {
    rules: &[
        Rule {
            module: "language_model.lm_head.*",
            file: &[
                "language_model.lm_head.*",
                "language_model.model.lm_head.*",
                "lm_head.*",
            ],
        },
        Rule {
            module: "language_model.*",
            file: &["language_model.model.*", "model.language_model.*"],
        },
        Rule {
            module: "multi_modal_projector.*",
            file: &["multi_modal_projector.*", "model.multi_modal_projector.*"],
        },
        Rule {
            module: "vision_tower.*",
            file: &[
                "vision_tower.vision_model.*",
                "model.vision_tower.vision_model.*",
                "model.vision_tower.*",
            ],
        },
    ],
    // Buffers that old libraries saved, and the norm of a class token that LLaVA does not use.
    ignore: &[
        "*.rotary_emb.inv_freq",
        "*.embeddings.position_ids",
        "*.post_layernorm.weight",
        "*.post_layernorm.bias",
    ],
};

/// The head that some checkpoints store although the embedding table takes its place.
pub const TIED_HEAD: &str = "language_model.lm_head.weight";
