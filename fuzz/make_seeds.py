#!/usr/bin/env python3
"""Small valid files of every form, from which the fuzzer starts: fuzz/corpus/TARGET/seed-NAME.

    pip install gguf==0.19.0 numpy onnx safetensors
    python3 fuzz/make_seeds.py

Files of a target that takes several stand one behind the other, each behind its length in four bytes; one that is not
there has none. What the fuzzer has found beside them is left alone.
"""

import base64
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import onnx
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, quants
from gguf.constants import GGML_QUANT_SIZES
from safetensors.numpy import save

OUT = Path(__file__).resolve().parent / "corpus"
FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
WIDTH, HEADS, ROWS = 16, 2, 40
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def put(target, name, data):
    folder = OUT / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"seed-{name}").write_bytes(data)


def several(*files):
    return b"".join(struct.pack("<I", len(data)) + data for data in files)


def as_json(value):
    return json.dumps(value, separators=(",", ":")).encode()


def gguf(architecture, keys, tensors):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        writer = GGUFWriter(path, architecture)
        for key, value in keys.items():
            match value:
                case bool():
                    writer.add_bool(key, value)
                case int():
                    writer.add_uint32(key, value)
                case float():
                    writer.add_float32(key, value)
                case str():
                    writer.add_string(key, value)
                case _:
                    writer.add_array(key, value)
        for name, (data, kind) in tensors.items():
            plain = kind in (None, Type.F32, Type.F16)
            writer.add_tensor(name, data, raw_dtype=None if plain else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def zeros(*shape):
    return np.zeros(shape, np.float16), None


def pieces():
    """SentencePiece's kind."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "b", "▁a", "ab", "▁ab"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 6
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [float(-place) for place in range(len(tokens))], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
    }


def words(rule):
    """Byte-level BPE."""
    tokens = ["a", "b", "Ġ", "Ġa", "ab", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>",
              "<|vision_start|>", "<|vision_end|>"]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 5 + [3] * 6, "tokenizer.ggml.merges": ["Ġ a", "a b"],
        "tokenizer.ggml.eos_token_id": 6,
    }


def language(architecture, vocabulary, **more):
    keys = {"context_length": 64, "embedding_length": WIDTH, "feed_forward_length": WIDTH, "block_count": 1,
            "attention.head_count": HEADS, "attention.head_count_kv": 1,
            "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0} | more
    keys = {f"{architecture}.{key}": value for key, value in keys.items()} | vocabulary
    head = WIDTH // HEADS
    tensors = {"token_embd.weight": zeros(ROWS, WIDTH), "output_norm.weight": zeros(WIDTH)}
    for name, rows in [("attn_q", WIDTH), ("attn_k", head), ("attn_v", head), ("attn_output", WIDTH),
                       ("ffn_gate", WIDTH), ("ffn_up", WIDTH), ("ffn_down", WIDTH)]:
        tensors[f"blk.0.{name}.weight"] = zeros(rows, WIDTH)
    for name in ["attn_norm", "ffn_norm"]:
        tensors[f"blk.0.{name}.weight"] = zeros(WIDTH)
    return gguf(architecture, keys, tensors)


def tower(projector, **more):
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": projector, "clip.vision.image_size": 8,
            "clip.vision.patch_size": 4, "clip.vision.embedding_length": WIDTH,
            "clip.vision.feed_forward_length": 2 * WIDTH, "clip.vision.block_count": 1,
            "clip.vision.projection_dim": WIDTH, "clip.vision.attention.head_count": HEADS,
            "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.image_mean": [0.5, 0.5, 0.5],
            "clip.vision.image_std": [0.5, 0.5, 0.5]} | more
    tensors = {"v.patch_embd.weight": zeros(WIDTH, 3, 4, 4)}
    if projector == "mlp":
        tensors |= {"v.class_embd": zeros(WIDTH), "v.position_embd.weight": zeros(5, WIDTH),
                    "v.pre_ln.weight": zeros(WIDTH), "v.pre_ln.bias": zeros(WIDTH)}
        merged = WIDTH
    else:
        tensors |= {"v.patch_embd.weight.1": zeros(WIDTH, 3, 4, 4), "v.post_ln.weight": zeros(WIDTH)}
        merged = 4 * WIDTH
    if projector == "qwen3vl_merger":
        tensors |= {"v.position_embd.weight": zeros(4, WIDTH), "v.blk.0.attn_qkv.weight": zeros(3 * WIDTH, WIDTH),
                    "v.deepstack.0.norm.weight": zeros(merged), "v.patch_embd.bias": zeros(WIDTH)}
    else:
        tensors |= {f"v.blk.0.attn_{part}.weight": zeros(WIDTH, WIDTH) for part in "qkv"}
    tensors |= {"v.blk.0.attn_out.weight": zeros(WIDTH, WIDTH), "v.blk.0.ffn_up.weight": zeros(2 * WIDTH, WIDTH),
                "v.blk.0.ffn_down.weight": zeros(WIDTH, 2 * WIDTH), "v.blk.0.ln1.weight": zeros(WIDTH),
                "mm.0.weight": zeros(merged, merged), "mm.0.bias": zeros(merged), "mm.2.weight": zeros(WIDTH, merged)}
    return gguf("clip", keys, tensors)


def blocks():
    tensors = {}
    for kind in [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q4_K,
                 Type.Q5_K, Type.Q6_K]:
        size, length = GGML_QUANT_SIZES[kind]
        data = np.zeros((2, 256 // size * length), np.uint8)
        if kind in (Type.F32, Type.F16, Type.BF16):
            data = quants.quantize(np.zeros((2, 256), np.float32), kind)
        tensors[kind.name] = (data, kind)
    return gguf("llama", {"a": 1, "b": [1.0, 2.0], "c": ["x", ""], "d": -1.5}, tensors)


def models():
    sections = {"rope.dimension_sections": [1, 1, 2, 0]}
    window = {"clip.vision.n_wa_pattern": 1, "clip.use_silu": True}
    put("model", "llava", several(language("llama", pieces()), tower("mlp")))
    put("model", "llava-qwen2", several(language("qwen2", words("qwen2")), tower("mlp")))
    put("model", "qwen2vl", several(language("qwen2vl", words("qwen2"), **sections), tower("qwen2vl_merger")))
    put("model", "qwen25vl", several(language("qwen2vl", words("qwen2"), **sections), tower("qwen2.5vl_merger", **window)))
    put("model", "qwen3vl", several(language("qwen3vl", words("qwen2"), **sections, **{"attention.key_length": 8}),
                                    tower("qwen3vl_merger")))
    put("model", "alone", several(language("llama", pieces())))
    put("gguf", "blocks", blocks())
    put("gguf", "tower", tower("mlp"))
    put("tokenizer", "pieces", gguf("llama", pieces(), {}))
    for rule in ["qwen2", "llama-bpe", "gpt-2", "smollm"]:
        put("tokenizer", rule, gguf("llama", words(rule), {}))


def graphs():
    tensor = onnx.numpy_helper.from_array
    weight = lambda name, *shape: tensor(np.zeros(shape, np.float32), name)
    make = onnx.helper.make_node
    nodes = [
        make("MatMul", ["x", "onnx::MatMul_1"], ["a"], name="/blocks.0/attn/qkv/MatMul"),
        make("Add", ["a", "blocks.0.attn.qkv.bias"], ["b"], name="/blocks.0/attn/qkv/Add"),
        make("Constant", [], ["c"], value=weight("c", 2), name="/Constant"),
        make("Gelu", ["b"], ["y"], approximate="tanh", name="/blocks.0/mlp/act/Gelu"),
    ]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 4]) for name in "xy"]
    weights = [weight("onnx::MatMul_1", 4, 4), weight("blocks.0.attn.qkv.bias", 4),
               onnx.helper.make_tensor("floats", onnx.TensorProto.FLOAT, [2], [1.0, 2.0]),
               tensor(np.zeros(3, np.float16), "half"), tensor(np.zeros(3, np.int64), "shape")]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    model = onnx.helper.make_model(graph)
    put("onnx", "small", model.SerializeToString())
    outside = graph.initializer[0]
    onnx.external_data_helper.set_external_data(outside, "b.bin", 0, 64)
    outside.ClearField("raw_data")
    put("onnx", "outside", onnx.helper.make_model(graph).SerializeToString())


def checkpoints():
    plain = save({"a.weight": np.zeros((4, 8), np.float32), "b": np.zeros(3, np.float16)})
    put("safetensors", "plain", several(b"", plain))
    packed = {
        "a.qweight": np.zeros((32, 4), np.int32), "a.qzeros": np.zeros((1, 4), np.int32),
        "a.scales": np.zeros((1, 32), np.float16),
    }
    awq = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}}
    put("safetensors", "awq", several(as_json(awq), save(packed)))
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    packed = {
        "a.qweight": np.zeros((4, 32), np.int32), "a.qzeros": np.zeros((1, 4), np.int32),
        "a.scales": np.zeros((1, 32), np.float16), "a.g_idx": np.zeros(32, np.int32),
    }
    put("safetensors", "gptq", several(as_json(gptq), save(packed)))
    weights = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}}
    packing = {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
                                       "config_groups": {"group_0": weights | {"targets": ["Linear"]}}}}
    packed = {"a.weight_packed": np.zeros((2, 4), np.int32), "a.weight_scale": np.zeros((2, 1), np.float16),
              "a.weight_shape": np.array([2, 32], np.int64)}
    put("safetensors", "compressed", several(as_json(packing), save(packed)))
    own = {"quantization_config": {"quant_method": "reroute", "formats": ["int4", "int8"]}}
    codes = {"a.weight": np.full((2, 36), 1, np.uint8), "b.weight": np.zeros((2, 72), np.uint8),
             "c.weight": np.zeros((2, 36), np.uint8)}
    notes = {"codes.a.weight": "int8 30", "codes.b.weight": "int4 70", "codes.c.weight": "Q8_0 32"}
    put("safetensors", "codes", several(as_json(own), save(codes, notes)))
    codes["a.weight"][1, :4] = 255  # NaN
    put("safetensors", "codes-nan", several(as_json(own), save(codes, notes)))
    eight = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}
    header = {"a.weight": {"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [0, 8]},
              "a.weight_scale_inv": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]}}
    header = as_json(header)
    header += b" " * (-len(header) % 8)
    put("safetensors", "fp8", several(as_json(eight), struct.pack("<Q", len(header)) + header + bytes(16)))


def adapters():
    sides = {f"base_model.model.{path}.lora_{side}.weight": np.zeros(shape, np.float32)
             for path in ["a.q_proj", "b.0.q_proj"] for side, shape in [("A", (2, 8)), ("B", (8, 2))]}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    put("adapter", "list", several(as_json(config), save(sides)))
    config |= {"target_modules": "^(?!.*visual).*q_proj$", "use_rslora": True, "rank_pattern": {"b.*": 2},
               "alpha_pattern": {"a": 1}}
    put("adapter", "expression", several(as_json(config), save(sides)))
    dora = sides | {f"base_model.model.{path}.lora_magnitude_vector": np.zeros(8, np.float32)
                    for path in ["a.q_proj", "b.0.q_proj"]}
    put("adapter", "dora", several(as_json(config | {"use_dora": True, "modules_to_save": ["norm"]}), save(dora)))


def processors():
    for family in ["llava", "qwen2vl", "qwen25vl", "qwen3vl"]:
        folder = FIXTURES / family / "ckpt"
        read = lambda name: (folder / name).read_bytes() if (folder / name).exists() else b""
        config, settings = (as_json(json.loads(read(name))) for name in ["config.json", "preprocessor_config.json"])
        put("processor", family, several(config, settings))
        put("processor", f"{family}-5", several(config, b"", as_json({"image_processor": json.loads(settings)})))


def templates():
    for path in sorted((FIXTURES / "tokenizers" / "templates").glob("*.jinja")):
        put("template", path.stem, several(path.read_bytes()))
    chat = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{{ eos_token }}{% endfor %}"
    put("template", "texts", several(b"", as_json({"chat_template": chat, "eos_token": {"content": "</s>"}})))


def requests():
    picture = (FIXTURES / "scenes" / "000.webp").read_bytes()
    url = "data:image/webp;base64," + base64.b64encode(picture).decode()
    image = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
    frame = url.partition(",")[2]
    video = {"type": "video_url", "video_url": {"url": f"data:video/webp;base64,{frame},{frame}", "fps": 2}}
    text = {"type": "text", "text": "find the cross"}
    say = lambda content, role="user": {"role": role, "content": content}
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "presence_penalty": 0.5,
                "frequency_penalty": -0.5, "logit_bias": {"5": -100}, "seed": 7, "n": 2, "logprobs": True,
                "top_logprobs": 3, "stop": ["x", "y"], "max_completion_tokens": 9}
    streamed = {"stream": True, "stream_options": {"include_usage": True}, "model": "built-in"}
    plan = {"routing": {"stages": [{"layer": 2, "keep_ratio": 0.5}]}, "trace": True, "grounding": True}
    elsewhere = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "user": "x"}
    put("request", "text", as_json({"messages": [say("hello")]}))
    put("request", "image", as_json({"messages": [say("be brief", "system"), say([image, text])]} | sampling))
    put("request", "video", as_json({"messages": [say([video, text])]} | streamed))
    put("request", "turns", as_json({"messages": [say([text]), say("there", "assistant"), say([text])]} | plan))
    put("request", "elsewhere", as_json({"messages": [say("x")], "routing": "reroute-pdrop@128"} | elsewhere))
    far = [{"type": "image_url", "image_url": address} for address in ("https://example.com/a.png", "file:///etc/passwd")]
    put("request", "far", as_json({"messages": [say(far)]}))


def main():
    requests()
    models()
    graphs()
    checkpoints()
    adapters()
    processors()
    templates()


if __name__ == "__main__":
    main()
