"""Times decoder layers of LLaVA-1.5-7B's shape in PyTorch, by the protocol of README.md."""

import json
import os
import statistics
import sys
import time

import torch
import transformers

TOKENS = 4


def config(toy: bool) -> transformers.LlamaConfig:
    hidden, mlp, heads = (64, 128, 4) if toy else (4096, 11008, 32)
    return transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )


def seconds(work):
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


@torch.inference_mode()
def main() -> None:
    toy = "--test" in sys.argv
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    settings = config(toy)
    model = transformers.LlamaForCausalLM(settings).eval()
    embeddings = 0.1 * torch.randn(1, 128 if toy else 640, settings.hidden_size)
    token = torch.tensor([[1]])

    def prefill():
        return model(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1).past_key_values

    def decode(cache):
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits

    def measure():
        prefill()  # Unmeasured: see README.md.
        prefill_seconds, cache = seconds(prefill)
        tokens = [seconds(lambda: decode(cache))[0] for _ in range(TOKENS)]
        return prefill_seconds, statistics.median(tokens)

    first, _ = seconds(measure)
    hello = {
        "peer": f"torch {torch.__version__}, transformers {transformers.__version__}, sdpa",
        "threads": torch.get_num_threads(),
        "rows": embeddings.shape[1],
        "layers": settings.num_hidden_layers,
        "hidden_size": settings.hidden_size,
        "first_seconds": first,
    }
    print(json.dumps(hello), flush=True)
    for _ in sys.stdin:
        prefill_seconds, token_seconds = measure()
        times = {"prefill_ms": prefill_seconds * 1e3, "decode_ms": token_seconds * 1e3}
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
