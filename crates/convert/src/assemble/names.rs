//! What towers call their tensors: transformers' DINOv2, CLIP and SigLIP, and DINOv2 as its authors and timm have it.
//!
//! A tensor whose own name was lost is called after the module that uses it, and `weight`, `bias` or what is done
//! with it: `embeddings.add` is what the embeddings add, positions.

use reroute_checkpoint::{NameTable, Rule};

/// How a tower is named.
pub(super) struct Naming {
    /// As people call it.
    pub(super) title: &'static str,
    /// As `config.json` does.
    pub(super) model_type: &'static str,
    /// Weights of the patches: whatever is called so belongs to such a tower, and what stands before it before all
    /// its names.
    pub(super) patches: &'static [&'static str],
    /// The tower's names, of which the first is the hub's; modules are DINOv2's whatever the tower.
    pub(super) table: &'static NameTable,
    /// What its names begin with.
    parts: &'static [&'static str],
    /// What the hub writes before its names in a LLaVA.
    hub_prefix: &'static str,
    /// Class of the image processor, mean and standard deviation of its pixels.
    pub(super) processor: &'static str,
    pub(super) mean: [f64; 3],
    pub(super) std: [f64; 3],
    pub(super) class_token: bool,
    pub(super) layer_norm_eps: f64,
    pub(super) hidden_act: &'static str,
    /// The layer whose features LLaVA takes.
    pub(super) feature_layer: i64,
}

/// The sizes of a tower.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) hidden: usize,
    /// Rows of the first product of an MLP.
    pub(super) inner: usize,
    pub(super) patch: usize,
    pub(super) positions: usize,
    pub(super) layers: usize,
    /// Whether MLPs have gates.
    pub(super) is_swiglu: bool,
    /// Whether queries, keys and values have biases.
    pub(super) has_bias: bool,
}

/// A row of a table: a module, and what it is called.
macro_rules! rules {
    ($($module:literal: $($file:literal),+;)+) => {
        &[$(Rule { module: $module, file: &[$($file),+] }),+]
    };
}

static DINOV2: NameTable = NameTable {
    rules: rules![
        "embeddings.cls_token": "embeddings.cls_token", "cls_token";
        "embeddings.mask_token": "embeddings.mask_token", "mask_token";
        "embeddings.position_embeddings":
            "embeddings.position_embeddings", "pos_embed", "embeddings.add", "add";
        "embeddings.class": "embeddings.concat", "concat";
        "embeddings.patch_positions":
            "embeddings.reshape", "embeddings.resize", "reshape", "resize";
        "embeddings.patch_embeddings.projection.*":
            "embeddings.patch_embeddings.projection.*", "patch_embed.proj.*";
        "encoder.layer.{}.attention.qkv.*": "blocks.{}.attn.qkv.*";
        "encoder.layer.{}.attention.attention.query.*":
            "encoder.layer.{}.attention.attention.query.*", "encoder.layer.{}.attention.q_proj.*";
        "encoder.layer.{}.attention.attention.key.*":
            "encoder.layer.{}.attention.attention.key.*", "encoder.layer.{}.attention.k_proj.*";
        "encoder.layer.{}.attention.attention.value.*":
            "encoder.layer.{}.attention.attention.value.*", "encoder.layer.{}.attention.v_proj.*";
        "encoder.layer.{}.attention.output.dense.*":
            "encoder.layer.{}.attention.output.dense.*", "encoder.layer.{}.attention.o_proj.*",
            "blocks.{}.attn.proj.*";
        "encoder.layer.{}.norm1.*": "encoder.layer.{}.norm1.*", "blocks.{}.norm1.*";
        "encoder.layer.{}.norm2.*": "encoder.layer.{}.norm2.*", "blocks.{}.norm2.*";
        "encoder.layer.{}.layer_scale1.lambda1":
            "encoder.layer.{}.layer_scale1.lambda1", "encoder.layer.{}.layer_scale1.weight",
            "blocks.{}.ls1.gamma", "blocks.{}.ls1.weight";
        "encoder.layer.{}.layer_scale2.lambda1":
            "encoder.layer.{}.layer_scale2.lambda1", "encoder.layer.{}.layer_scale2.weight",
            "blocks.{}.ls2.gamma", "blocks.{}.ls2.weight";
        "encoder.layer.{}.mlp.fc1.*": "encoder.layer.{}.mlp.fc1.*", "blocks.{}.mlp.fc1.*";
        "encoder.layer.{}.mlp.fc2.*": "encoder.layer.{}.mlp.fc2.*", "blocks.{}.mlp.fc2.*";
        "encoder.layer.{}.mlp.weights_in.*":
            "encoder.layer.{}.mlp.weights_in.*", "blocks.{}.mlp.w12.*";
        "encoder.layer.{}.mlp.weights_out.*":
            "encoder.layer.{}.mlp.weights_out.*", "blocks.{}.mlp.w3.*";
        "layernorm.*": "layernorm.*", "norm.*";
    ],
    ignore: &[],
};

static CLIP: NameTable = NameTable {
    rules: rules![
        "embeddings.cls_token": "embeddings.class_embedding";
        "embeddings.position_embeddings": "embeddings.position_embedding.weight", "embeddings.add";
        "embeddings.class": "embeddings.concat";
        "embeddings.patch_embeddings.projection.*": "embeddings.patch_embedding.*";
        "encoder.layer.{}.attention.attention.query.*": "encoder.layers.{}.self_attn.q_proj.*";
        "encoder.layer.{}.attention.attention.key.*": "encoder.layers.{}.self_attn.k_proj.*";
        "encoder.layer.{}.attention.attention.value.*": "encoder.layers.{}.self_attn.v_proj.*";
        "encoder.layer.{}.attention.output.dense.*": "encoder.layers.{}.self_attn.out_proj.*";
        "encoder.layer.{}.norm1.*": "encoder.layers.{}.layer_norm1.*";
        "encoder.layer.{}.norm2.*": "encoder.layers.{}.layer_norm2.*";
        "encoder.layer.{}.mlp.fc1.*": "encoder.layers.{}.mlp.fc1.*";
        "encoder.layer.{}.mlp.fc2.*": "encoder.layers.{}.mlp.fc2.*";
        "pre_norm.*": "pre_layrnorm.*";
        "layernorm.*": "post_layernorm.*";
    ],
    ignore: &["embeddings.position_ids"],
};

static TOWERS: [Naming; 3] = [
    Naming {
        title: "DINOv2",
        model_type: "dinov2",
        patches: &[
            "embeddings.patch_embeddings.projection.weight",
            "patch_embed.proj.weight",
        ],
        table: &DINOV2,
        parts: &[
            "blocks",
            "cls_token",
            "embeddings",
            "encoder",
            "layernorm",
            "norm",
            "norm_pre",
            "patch_embed",
            "pos_embed",
            "reg_token",
            "register_tokens",
        ],
        hub_prefix: "vision_tower.",
        processor: "BitImageProcessor",
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
        class_token: true,
        layer_norm_eps: 1e-6,
        hidden_act: "gelu",
        feature_layer: -1,
    },
    Naming {
        title: "CLIP",
        model_type: "clip_vision_model",
        patches: &["embeddings.patch_embedding.weight"],
        table: &CLIP,
        parts: &["embeddings", "encoder", "post_layernorm", "pre_layrnorm"],
        hub_prefix: "vision_tower.vision_model.",
        processor: "CLIPImageProcessor",
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        std: [0.268_629_54, 0.261_302_58, 0.275_777_11],
        class_token: true,
        layer_norm_eps: 1e-5,
        hidden_act: "quick_gelu",
        feature_layer: -2,
    },
    Naming {
        title: "SigLIP",
        model_type: "siglip_vision_model",
        patches: &["embeddings.patch_embedding.weight"],
        table: &CLIP,
        parts: &["embeddings", "encoder", "post_layernorm"],
        hub_prefix: "vision_tower.vision_model.",
        processor: "SiglipImageProcessor",
        mean: [0.5; 3],
        std: [0.5; 3],
        class_token: false,
        layer_norm_eps: 1e-6,
        hidden_act: "gelu_pytorch_tanh",
        feature_layer: -1,
    },
];

/// What CLIP has and SigLIP has not.
const CLIP_S: &str = "pre_layrnorm.weight";

/// The towers that names are of: how each is named, and what stands before its names.
pub(super) fn recognise<'a>(
    names: impl Iterator<Item = &'a str> + Clone,
) -> Vec<(&'static Naming, String)> {
    let mut found: Vec<(&Naming, String)> = Vec::new();
    for name in names.clone() {
        for naming in &TOWERS {
            let prefix = naming.patches.iter().find_map(|end| name.strip_suffix(end));
            let Some(prefix) = prefix.filter(|it| it.is_empty() || it.ends_with('.')) else {
                continue;
            };
            let clip_s = format!("{prefix}{CLIP_S}");
            let is_clip = names.clone().any(|name| name == clip_s);
            let fits = match naming.title {
                "CLIP" => is_clip,
                "SigLIP" => !is_clip,
                _ => true,
            };
            if fits && !found.iter().any(|(_, known)| known == prefix) {
                found.push((naming, prefix.to_owned()));
            }
        }
    }
    found
}

/// What is said of names that are not known.
pub(super) const SUPPORTED: &str = "supported are towers of DINOv2 (without registers; names of transformers, of its \
     authors or of timm), CLIP and SigLIP (names of transformers)";

impl Naming {
    /// Whether a name is of the tower and of nothing beside it.
    pub(super) fn is_part(&self, name: &str) -> bool {
        name.split('.')
            .next()
            .is_some_and(|first| self.parts.contains(&first))
    }

    /// What the hub calls a tensor of the tower in a LLaVA.
    pub(super) fn hub_name(&self, module: &str) -> String {
        let name = self.table.file_name(module);
        format!("{}{}", self.hub_prefix, name.as_deref().unwrap_or(module))
    }

    /// All tensors of a tower, by module, and their shapes.
    pub(super) fn wanted(&self, sizes: &Sizes) -> Vec<(String, Vec<usize>)> {
        let Sizes {
            hidden,
            inner,
            patch,
            positions,
            ..
        } = *sizes;
        let is_dinov2 = self.model_type == "dinov2";
        let mut wanted = Vec::new();
        let mut add = |name: String, shape: &[usize]| wanted.push((name, shape.to_vec()));
        let embeddings = |name: &str| format!("embeddings.{name}");
        if is_dinov2 {
            add(embeddings("cls_token"), &[1, 1, hidden]);
            add(embeddings("mask_token"), &[1, hidden]);
            add(embeddings("position_embeddings"), &[1, positions, hidden]);
        } else {
            if self.class_token {
                add(embeddings("cls_token"), &[hidden]);
            }
            add(embeddings("position_embeddings"), &[positions, hidden]);
        }
        let patches = "patch_embeddings.projection";
        add(
            embeddings(&format!("{patches}.weight")),
            &[hidden, 3, patch, patch],
        );
        // CLIP's have no bias.
        if self.model_type != "clip_vision_model" {
            add(embeddings(&format!("{patches}.bias")), &[hidden]);
        } else {
            add("pre_norm.weight".into(), &[hidden]);
            add("pre_norm.bias".into(), &[hidden]);
        }
        let (up, down, out) = match sizes.is_swiglu {
            true => ("weights_in", "weights_out", inner / 2),
            false => ("fc1", "fc2", inner),
        };
        for layer in 0..sizes.layers {
            let mut pair = |name: &str, shape: &[usize], has_bias: bool| {
                let name = format!("encoder.layer.{layer}.{name}");
                if has_bias {
                    add(format!("{name}.bias"), &shape[..1]);
                }
                add(format!("{name}.weight"), shape);
            };
            for name in ["query", "key", "value"] {
                let name = format!("attention.attention.{name}");
                pair(&name, &[hidden, hidden], sizes.has_bias);
            }
            pair("attention.output.dense", &[hidden, hidden], true);
            pair("norm1", &[hidden], true);
            pair("norm2", &[hidden], true);
            pair(&format!("mlp.{up}"), &[inner, hidden], true);
            pair(&format!("mlp.{down}"), &[hidden, out], true);
            if is_dinov2 {
                for scale in ["layer_scale1", "layer_scale2"] {
                    add(format!("encoder.layer.{layer}.{scale}.lambda1"), &[hidden]);
                }
            }
        }
        add("layernorm.weight".into(), &[hidden]);
        add("layernorm.bias".into(), &[hidden]);
        wanted
    }
}

/// What a tensor is filled with that no features depend on, where the source has it not: the norm behind the
/// features, the stand-in for patches that are masked in training.
pub(super) fn default_of(module: &str) -> Option<f32> {
    match module {
        "layernorm.weight" => Some(1.0),
        "layernorm.bias" | "embeddings.mask_token" => Some(0.0),
        _ => None,
    }
}

/// Of queries, keys or values: which of the three, and the tensor that is all three in one.
pub(super) fn part_of(module: &str) -> Option<(usize, String)> {
    let parts = ["query", "key", "value"].into_iter().enumerate();
    let mut found = parts.filter_map(|(at, part)| {
        let part = format!("attention.attention.{part}.");
        module
            .contains(&part)
            .then(|| (at, module.replace(&part, "attention.qkv.")))
    });
    found.next()
}
