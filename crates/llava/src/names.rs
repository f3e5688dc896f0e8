use reroute_checkpoint::{NameTable, Rule};

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
                "vision_tower.*",
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

#[cfg(test)]
mod tests {
    use super::NAMES;

    /// What is written reads back, as the hub spells it.
    #[test]
    fn every_parameter_has_a_name_to_be_written_by() {
        for (path, name) in [
            (
                "language_model.lm_head.weight",
                "language_model.lm_head.weight",
            ),
            (
                "language_model.norm.gamma",
                "language_model.model.norm.gamma",
            ),
            (
                "multi_modal_projector.linear_1.bias",
                "multi_modal_projector.linear_1.bias",
            ),
            (
                "vision_tower.encoder.layers.3.mlp.fc1.weight",
                "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
            ),
        ] {
            assert_eq!(NAMES.file_name(path).as_deref(), Some(name));
            assert_eq!(NAMES.module_path(name).as_deref(), Some(path));
        }
    }

    /// Libraries have written the tower with and without `model`, with and without `vision_model`.
    #[test]
    fn the_tower_is_found_in_every_spelling() {
        for prefix in ["", "model."] {
            for inner in ["", "vision_model."] {
                let name = format!("{prefix}vision_tower.{inner}encoder.layers.3.mlp.fc1.weight");
                let path = NAMES.module_path(&name);
                let expected = "vision_tower.encoder.layers.3.mlp.fc1.weight";
                assert_eq!(path.as_deref(), Some(expected), "{name}");
            }
        }
    }
}
