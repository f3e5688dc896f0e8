//! Names and shapes of the tensors of every family, from its `config.json`, as the hub has them.

use anyhow::Context;
use serde_json::Value;

/// A tensor of random values.
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub fill: Fill,
}

/// What a tensor is filled with.
#[derive(Clone, Copy)]
pub enum Fill {
    /// The scale of a norm.
    Ones,
    /// Between plus and minus this: activations keep about their size.
    Uniform(f32),
}

/// Largest bias, and largest value of embeddings.
const SMALL: f32 = 0.05;

impl Tensor {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The tensors below one name.
struct Tensors<'a> {
    list: &'a mut Vec<Tensor>,
    prefix: String,
}

impl Tensors<'_> {
    fn below(&mut self, name: &str) -> Tensors<'_> {
        Tensors {
            prefix: format!("{}{name}.", self.prefix),
            list: self.list,
        }
    }

    fn add(&mut self, name: &str, shape: &[usize], fill: Fill) {
        self.list.push(Tensor {
            name: format!("{}{name}", self.prefix),
            shape: shape.to_vec(),
            fill,
        });
    }

    /// A matrix whose last axes are summed over.
    fn weight(&mut self, name: &str, shape: &[usize]) {
        let inputs: usize = shape.iter().skip(1).product();
        self.add(
            &format!("{name}.weight"),
            shape,
            Fill::Uniform((3.0 / inputs as f32).sqrt()),
        );
    }

    fn bias(&mut self, name: &str, outputs: usize) {
        self.add(&format!("{name}.bias"), &[outputs], Fill::Uniform(SMALL));
    }

    fn linear(&mut self, name: &str, [outputs, inputs]: [usize; 2]) {
        self.weight(name, &[outputs, inputs]);
        self.bias(name, outputs);
    }

    fn rms_norm(&mut self, name: &str, size: usize) {
        self.add(&format!("{name}.weight"), &[size], Fill::Ones);
    }

    fn layer_norm(&mut self, name: &str, size: usize) {
        self.rms_norm(name, size);
        self.bias(name, size);
    }

    fn table(&mut self, name: &str, rows: usize, columns: usize) {
        self.add(
            &format!("{name}.weight"),
            &[rows, columns],
            Fill::Uniform(SMALL),
        );
    }
}

/// How decoders differ.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Attention {
    Plain,
    /// Queries, keys and values have biases.
    Biased,
    /// Queries and keys are normalised.
    Normed,
}

pub fn llava(config: &Value) -> anyhow::Result<Vec<Tensor>> {
    let (text, vision) = (&config["text_config"], &config["vision_config"]);
    let mut list = Vec::new();
    let mut model = Tensors {
        list: &mut list,
        prefix: String::new(),
    };
    let hidden = size(vision, "hidden_size")?;
    let intermediate = size(vision, "intermediate_size")?;
    let patch = size(vision, "patch_size")?;
    let grid = size(vision, "image_size")? / patch;

    let mut tower = model.below("vision_tower.vision_model");
    tower.add(
        "embeddings.class_embedding",
        &[hidden],
        Fill::Uniform(SMALL),
    );
    tower.weight("embeddings.patch_embedding", &[hidden, 3, patch, patch]);
    tower.table("embeddings.position_embedding", grid * grid + 1, hidden);
    tower.layer_norm("pre_layrnorm", hidden); // The hub's spelling.
    tower.layer_norm("post_layernorm", hidden);
    for layer in 0..size(vision, "num_hidden_layers")? {
        let mut layer = tower.below(&format!("encoder.layers.{layer}"));
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            layer.linear(&format!("self_attn.{name}"), [hidden, hidden]);
        }
        layer.layer_norm("layer_norm1", hidden);
        layer.layer_norm("layer_norm2", hidden);
        layer.linear("mlp.fc1", [intermediate, hidden]);
        layer.linear("mlp.fc2", [hidden, intermediate]);
    }
    let text_hidden = size(text, "hidden_size")?;
    model.linear("multi_modal_projector.linear_1", [text_hidden, hidden]);
    model.linear("multi_modal_projector.linear_2", [text_hidden, text_hidden]);
    decoder(
        &mut model.below("language_model.model"),
        text,
        Attention::Plain,
    )?;
    model.weight(
        "language_model.lm_head",
        &[size(text, "vocab_size")?, text_hidden],
    );
    Ok(list)
}

pub fn qwen2_vl(config: &Value) -> anyhow::Result<Vec<Tensor>> {
    let vision = &config["vision_config"];
    let mut list = Vec::new();
    let mut model = Tensors {
        list: &mut list,
        prefix: String::new(),
    };
    let hidden = size(vision, "embed_dim")?;
    let intermediate = hidden * size(vision, "mlp_ratio")?;
    let mut tower = model.below("visual");
    patch_embedding(&mut tower, vision, hidden)?;
    for block in 0..size(vision, "depth")? {
        let mut block = tower.below(&format!("blocks.{block}"));
        attention(&mut block, hidden);
        block.layer_norm("norm1", hidden);
        block.layer_norm("norm2", hidden);
        block.linear("mlp.fc1", [intermediate, hidden]);
        block.linear("mlp.fc2", [hidden, intermediate]);
    }
    tower.layer_norm("merger.ln_q", hidden);
    let merged = hidden * size(vision, "spatial_merge_size")?.pow(2);
    tower.linear("merger.mlp.0", [merged, merged]);
    tower.linear("merger.mlp.2", [size(vision, "hidden_size")?, merged]);
    decoder(&mut model.below("model"), config, Attention::Biased)?;
    head(&mut model, config)?;
    Ok(list)
}

pub fn qwen2_5_vl(config: &Value) -> anyhow::Result<Vec<Tensor>> {
    let vision = &config["vision_config"];
    let mut list = Vec::new();
    let mut model = Tensors {
        list: &mut list,
        prefix: String::new(),
    };
    let hidden = size(vision, "hidden_size")?;
    let intermediate = size(vision, "intermediate_size")?;
    let mut tower = model.below("visual");
    patch_embedding(&mut tower, vision, hidden)?;
    for block in 0..size(vision, "depth")? {
        let mut block = tower.below(&format!("blocks.{block}"));
        attention(&mut block, hidden);
        block.rms_norm("norm1", hidden);
        block.rms_norm("norm2", hidden);
        block.linear("mlp.gate_proj", [intermediate, hidden]);
        block.linear("mlp.up_proj", [intermediate, hidden]);
        block.linear("mlp.down_proj", [hidden, intermediate]);
    }
    tower.rms_norm("merger.ln_q", hidden);
    let merged = hidden * size(vision, "spatial_merge_size")?.pow(2);
    tower.linear("merger.mlp.0", [merged, merged]);
    tower.linear("merger.mlp.2", [size(vision, "out_hidden_size")?, merged]);
    decoder(&mut model.below("model"), config, Attention::Biased)?;
    head(&mut model, config)?;
    Ok(list)
}

pub fn qwen3_vl(config: &Value) -> anyhow::Result<Vec<Tensor>> {
    let (text, vision) = (&config["text_config"], &config["vision_config"]);
    let mut list = Vec::new();
    let mut model = Tensors {
        list: &mut list,
        prefix: String::new(),
    };
    let hidden = size(vision, "hidden_size")?;
    let intermediate = size(vision, "intermediate_size")?;
    let mut tower = model.below("model.visual");
    patch_embedding(&mut tower, vision, hidden)?;
    tower.bias("patch_embed.proj", hidden);
    tower.table(
        "pos_embed",
        size(vision, "num_position_embeddings")?,
        hidden,
    );
    for block in 0..size(vision, "depth")? {
        let mut block = tower.below(&format!("blocks.{block}"));
        attention(&mut block, hidden);
        block.layer_norm("norm1", hidden);
        block.layer_norm("norm2", hidden);
        block.linear("mlp.linear_fc1", [intermediate, hidden]);
        block.linear("mlp.linear_fc2", [hidden, intermediate]);
    }
    let merged = hidden * size(vision, "spatial_merge_size")?.pow(2);
    let out = size(vision, "out_hidden_size")?;
    let mut merger = |name: &str, normed: usize| {
        let mut merger = tower.below(name);
        merger.layer_norm("norm", normed);
        merger.linear("linear_fc1", [merged, merged]);
        merger.linear("linear_fc2", [out, merged]);
    };
    merger("merger", hidden);
    let taps = vision["deepstack_visual_indexes"]
        .as_array()
        .map_or(0, Vec::len);
    (0..taps).for_each(|tap| merger(&format!("deepstack_merger_list.{tap}"), merged));
    decoder(
        &mut model.below("model.language_model"),
        text,
        Attention::Normed,
    )?;
    if config["tie_word_embeddings"] != true {
        head(&mut model, text)?;
    }
    Ok(list)
}

fn patch_embedding(tower: &mut Tensors, vision: &Value, hidden: usize) -> anyhow::Result<()> {
    let (patch, frames) = (
        size(vision, "patch_size")?,
        size(vision, "temporal_patch_size")?,
    );
    tower.weight("patch_embed.proj", &[hidden, 3, frames, patch, patch]);
    Ok(())
}

fn attention(block: &mut Tensors, hidden: usize) {
    block.linear("attn.qkv", [3 * hidden, hidden]);
    block.linear("attn.proj", [hidden, hidden]);
}

fn decoder(model: &mut Tensors, text: &Value, kind: Attention) -> anyhow::Result<()> {
    let hidden = size(text, "hidden_size")?;
    let intermediate = size(text, "intermediate_size")?;
    let heads = size(text, "num_attention_heads")?;
    let head_dim = size(text, "head_dim").unwrap_or(hidden / heads);
    let (q, kv) = (
        heads * head_dim,
        size(text, "num_key_value_heads")? * head_dim,
    );
    model.table("embed_tokens", size(text, "vocab_size")?, hidden);
    for layer in 0..size(text, "num_hidden_layers")? {
        let mut layer = model.below(&format!("layers.{layer}"));
        for (name, outputs) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
            layer.weight(&format!("self_attn.{name}"), &[outputs, hidden]);
            if kind == Attention::Biased {
                layer.bias(&format!("self_attn.{name}"), outputs);
            }
        }
        if kind == Attention::Normed {
            layer.rms_norm("self_attn.q_norm", head_dim);
            layer.rms_norm("self_attn.k_norm", head_dim);
        }
        layer.weight("self_attn.o_proj", &[hidden, q]);
        layer.weight("mlp.gate_proj", &[intermediate, hidden]);
        layer.weight("mlp.up_proj", &[intermediate, hidden]);
        layer.weight("mlp.down_proj", &[hidden, intermediate]);
        layer.rms_norm("input_layernorm", hidden);
        layer.rms_norm("post_attention_layernorm", hidden);
    }
    model.rms_norm("norm", hidden);
    Ok(())
}

/// The head, unless the embedding table takes its place.
fn head(model: &mut Tensors, text: &Value) -> anyhow::Result<()> {
    if text["tie_word_embeddings"] != true {
        model.weight(
            "lm_head",
            &[size(text, "vocab_size")?, size(text, "hidden_size")?],
        );
    }
    Ok(())
}

fn size(config: &Value, key: &str) -> anyhow::Result<usize> {
    let size = config[key]
        .as_u64()
        .and_then(|size| usize::try_from(size).ok());
    size.with_context(|| format!("config.json has no {key}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::Path;

    use safetensors::SafeTensors;

    use super::*;

    type Shapes = fn(&Value) -> anyhow::Result<Vec<Tensor>>;

    #[test]
    fn every_family_has_the_tensors_that_transformers_wrote() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        let families: [(&str, Shapes); 4] = [
            ("llava", llava),
            ("qwen2vl", qwen2_vl),
            ("qwen25vl", qwen2_5_vl),
            ("qwen3vl", qwen3_vl),
        ];
        for (family, shapes) in families {
            let folder = fixtures.join(family).join("ckpt");
            let config = fs::read_to_string(folder.join("config.json")).unwrap();
            let made = shapes(&serde_json::from_str(&config).unwrap()).unwrap();
            let made: BTreeMap<_, _> = made.into_iter().map(|t| (t.name, t.shape)).collect();
            let weights = fs::read(folder.join("model.safetensors")).unwrap();
            let weights = SafeTensors::deserialize(&weights).unwrap();
            let stored = weights
                .iter()
                .map(|(name, t)| (name.to_owned(), t.shape().to_vec()));
            assert_eq!(made, stored.collect(), "{family}");
        }
    }
}
