"""Times decoder layers in PyTorch, by the protocol of README.md."""

import json
import os
import statistics
import sys
import time

import torch
import transformers

TOKENS = 4

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def config(rows: int, sizes: dict) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        **sizes, max_position_embeddings=rows + TOKENS, attn_implementation="sdpa"
    )


def seconds(work):
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


@torch.inference_mode()
def main() -> None:
    sizes = json.loads(sys.stdin.readline())
    rows, dtype, runs_on = (sizes.pop(name) for name in ("rows", "dtype", "runs_on"))
    where = {"dtype": TYPES[dtype], "device": torch.device(runs_on)}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config(rows, sizes)).eval().to(**where)
    embeddings = 0.1 * torch.randn(1, rows, model.config.hidden_size, **where)
    token = torch.tensor([[1]], device=runs_on)

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
        "shape": {
            "rows": embeddings.shape[1],
            "dtype": next(name for name, kind in TYPES.items() if kind == model.dtype),
            "runs_on": model.device.type,
            **{name: getattr(model.config, name) for name in sizes},
        },
        "threads": torch.get_num_threads(),
        "first_seconds": first,
    }
    print(json.dumps(hello), flush=True)
    for _ in sys.stdin:
        prefill_seconds, token_seconds = measure()
        times = {"prefill_ms": prefill_seconds * 1e3, "decode_ms": token_seconds * 1e3}
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
