"""Times decoder layers in PyTorch, by the protocol of README.md."""

import torch
import transformers

from common import check, protocol

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def llama(shape: dict, layers: int) -> transformers.LlamaForCausalLM:
    """A decoder without numbers."""
    sizes = {
        name: shape[name] for name in shape if name not in ("rows", "dtype", "runs_on")
    }
    config = transformers.LlamaConfig(
        **{**sizes, "num_hidden_layers": layers},
        max_position_embeddings=shape["rows"] + 2 * protocol.TOKENS,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).eval()


class Torch:
    types = TYPES
    name = f"torch {torch.__version__}, transformers {transformers.__version__}, sdpa"

    def __init__(self, shape, layers, weights, embeddings):
        kind = protocol.type_of(shape, TYPES, "PyTorch")
        where = {"dtype": kind, "device": torch.device(shape["runs_on"])}
        torch.set_num_threads(protocol.threads())
        self.model = llama(shape, layers)
        self.given = shape
        numbers = {name: torch.from_numpy(it).to(**where) for name, it in weights}
        self.model.load_state_dict(numbers, assign=True)
        # No weight, and so not loaded.
        rotary = type(self.model.model.rotary_emb)(config=self.model.config)
        self.model.model.rotary_emb = rotary.to(where["device"])
        self.embeddings = torch.from_numpy(embeddings).to(**where)[None]

    def shape(self) -> dict:
        config = self.model.config
        return {
            **{name: getattr(config, name, None) for name in self.given},
            "rows": self.embeddings.shape[1],
            "dtype": next(name for name, it in TYPES.items() if it == self.model.dtype),
            "runs_on": self.model.device.type,
        }

    def facts(self) -> dict:
        return {"torch_threads": torch.get_num_threads()}

    def runner(self, layers: int) -> "Runner":
        """The first layers: weights are shared."""
        part = llama(self.given, layers)
        whole = self.model.model
        part.model.layers = torch.nn.ModuleList(whole.layers[:layers])
        for name in ("embed_tokens", "norm", "rotary_emb"):
            setattr(part.model, name, getattr(whole, name))
        part.lm_head = self.model.lm_head
        return Runner(part, self.embeddings)


class Runner:
    def __init__(self, model, embeddings):
        self.model = model
        self.embeddings = embeddings
        self.cache = None

    def run(self, **inputs):
        with torch.inference_mode():
            result = self.model(**inputs, use_cache=True, logits_to_keep=1)
        self.cache = result.past_key_values
        # On a device of its own this waits for the numbers.
        return result.logits[0, -1].float().cpu().numpy()

    def prefill(self):
        return self.run(inputs_embeds=self.embeddings)

    def decode(self, token: int):
        ids = torch.tensor([[token]], device=self.model.device)
        return self.run(input_ids=ids, past_key_values=self.cache)


if __name__ == "__main__":
    check.or_serve(Torch)
