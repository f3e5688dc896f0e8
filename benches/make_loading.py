#!/usr/bin/env python3
"""Random checkpoints of 2 GB of layers of LLaMA-7B's shapes, for the loading times of docs/checkpoints.md.

    pip install gguf==0.19.0 numpy
    python3 benches/make_loading.py DIR

Writes DIR/{bf16,fp8,q8_0,q4_k}: safetensors, safetensors with FP8 in blocks of 128 x 128, and GGUF.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

WIDTH, INNER = 4096, 11008
SHAPES = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH),
          "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
RANDOM = np.random.default_rng(0)


def noise(count):
    return RANDOM.integers(0, 256, count, dtype=np.uint8)


def safetensors(folder, layers, fp8):
    header, parts, at = {}, [], 0
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            tensors = {f"{layer}.{name}.weight": ("F8_E4M3" if fp8 else "BF16", [rows, columns], 1 if fp8 else 2)}
            if fp8:
                tensors[f"{layer}.{name}.weight_scale_inv"] = ("F32", [rows // 128, columns // 128], 4)
            for tensor, (dtype, shape, size) in tensors.items():
                length = shape[0] * shape[1] * size
                header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + length]}
                parts.append((dtype, length))
                at += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for dtype, length in parts:
            match dtype:
                case "F32":
                    file.write(RANDOM.random(length // 4, np.float32).tobytes())
                case "BF16":
                    file.write((noise(length).view(np.uint16) & 0xBFFF).tobytes())
                case _:
                    file.write((noise(length) & 0xBF).tobytes())
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}} if fp8 else {}
    (folder / "config.json").write_text(json.dumps(config))


def gguf(folder, layers, kind):
    folder.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(folder / "model.gguf", "llama")
    for key, value in {"context_length": 4096, "embedding_length": WIDTH, "feed_forward_length": INNER,
                       "block_count": layers, "attention.head_count": 32}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "a"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 0.0, 0.0, -1.0])
    writer.add_tensor("token_embd.weight", np.zeros((4, WIDTH), np.float16))
    size, length = GGML_QUANT_SIZES[kind]
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            blocks = noise(rows * columns // size * length).reshape(-1, length)
            for at in [0, 2] if kind == Type.Q4_K else [0]:
                # Scales that are finite.
                blocks[:, at + 1] &= 0x3B
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks.reshape(rows, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    folder = Path(sys.argv[1])
    safetensors(folder / "bf16", 5, fp8=False)
    safetensors(folder / "fp8", 10, fp8=True)
    gguf(folder / "q8_0", 9, Type.Q8_0)
    gguf(folder / "q4_k", 18, Type.Q4_K)


if __name__ == "__main__":
    main()
