"""A whole model in llama.cpp that answers about a photo, by the protocol of README.md.

The language model and the tower become GGUF files as llama.cpp's converter writes them, tensor by tensor, in a
temporary folder (TMPDIR says where), or in the one that is named as argument, where they stay and are found again.
Every answer is given by a process of its own.
"""

import ctypes
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

import gguf
import llama_cpp
import numpy
from gguf.quants import quantize
from llama_cpp import mtmd_cpp

from common import protocol
from llama_cpp_layer import TYPES, complain, rearranged

F16, F32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32

# What the image path asks for stands behind the bytes; the rest of the vocabulary is never written.
SPECIAL = [f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *SPECIAL]

ERROR = "llama.cpp cannot "


class Checkpoint:
    """A folder of Hugging Face with all weights in one file."""

    def __init__(self, folder: pathlib.Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.pixels = json.loads((folder / "preprocessor_config.json").read_text())
        self.path = folder / "model.safetensors"
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.header = json.loads(file.read(length))
        self.header.pop("__metadata__", None)
        self.start = 8 + length

    def read(self, name: str) -> numpy.ndarray:
        """Numbers of a tensor; those in bf16 as their bits."""
        info = self.header[name]
        start, end = info["data_offsets"]
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[info["dtype"]]
        with open(self.path, "rb") as file:
            file.seek(self.start + start)
            numbers = numpy.fromfile(file, kind, (end - start) // int(kind[2]))
        return numbers.reshape(info["shape"])


def stored(numbers: numpy.ndarray, kind) -> numpy.ndarray:
    """As GGUF stores them."""
    if numbers.dtype == numpy.uint16:
        if kind == gguf.GGMLQuantizationType.BF16:
            return numbers.view(numpy.uint8)
        numbers = (numbers.astype(numpy.uint32) << 16).view(numpy.float32)
    return quantize(numbers.astype(numpy.float32), kind)


def parts(name: str, shape: list) -> list:
    """What a tensor of the checkpoint becomes: names, shapes and how each is taken from its numbers."""
    if ".qkv." in name:
        third = shape[0] // 3
        cut = lambda at: lambda it: it[at * third : (at + 1) * third]
        return [
            (name.replace(".qkv.", f".{part}."), [third, *shape[1:]], cut(at))
            for at, part in enumerate("qkv")
        ]
    if len(shape) == 5:  # Two frames in time.
        rest = [*shape[:2], *shape[3:]]
        cut = lambda at: lambda it: numpy.ascontiguousarray(it[:, :, at])
        return [(name + end, rest, cut(at)) for at, end in enumerate(["", ".1"])]
    return [(name, shape, lambda it: it)]


def write(path: pathlib.Path, writer, names, checkpoint, chosen: list, kind, size=None) -> None:
    """The header, then one tensor after the other; with `size`, heads turn pairs side by side."""
    tensors = []
    for name in chosen:
        bare = name.removeprefix("language_model.").replace(".linear_1.", ".linear_0.")
        for part, shape, cut in parts(bare, checkpoint.header[name]["shape"]):
            stem, end = re.fullmatch(r"(.*?)(\.(?:weight|bias)(?:\.1)?)?", part).groups()
            stays = len(shape) == 1 or "position_embedding" in part
            known = names.get_name(stem) or sys.exit(f"no name for {name}")
            this = F32 if stays else kind
            bytes_ = gguf.quant_shape_to_byte_shape(shape, this)
            writer.add_tensor_info(
                known + (end or ""), bytes_, numpy.dtype("uint8"), int(numpy.prod(bytes_)), this
            )
            tensors.append((name, cut, this))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, cut, this in tensors:
        numbers = cut(checkpoint.read(name))
        if size:
            numbers = rearranged(name, numbers, size)
        writer.write_tensor_data(stored(numbers, this))
    writer.close()


def write_language(path: pathlib.Path, checkpoint: Checkpoint, kind) -> None:
    text = checkpoint.config.get("text_config", checkpoint.config)
    is_llama = "text_config" in checkpoint.config
    arch = gguf.MODEL_ARCH.LLAMA if is_llama else gguf.MODEL_ARCH.QWEN2VL
    layers, heads = text["num_hidden_layers"], text["num_attention_heads"]
    size = text["hidden_size"] // heads
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(layers)
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(text["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])
    if not is_llama:
        writer.add_rope_dimension_sections([*text["rope_scaling"]["mrope_section"], 0])
    rest = [f"[PAD{at}]" for at in range(len(TOKENS), text["vocab_size"])]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS + rest)
    writer.add_token_scores([0.0] * text["vocab_size"])
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * len(BYTES)
        + [kinds.CONTROL] * len(SPECIAL)
        + [kinds.UNUSED] * len(rest)
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(arch, layers)
    chosen = [it for it in checkpoint.header if re.search(r"(^|\.)(model|lm_head)\.", it)]
    chosen = [it for it in chosen if not it.startswith(("vision", "visual"))]
    write(path, writer, names, checkpoint, chosen, kind, size if is_llama else None)


def write_tower(path: pathlib.Path, checkpoint: Checkpoint) -> None:
    config, vision = checkpoint.config, checkpoint.config["vision_config"]
    is_llava = "text_config" in config
    layers = vision["num_hidden_layers"] if is_llava else vision["depth"]
    writer = gguf.GGUFWriter(None, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_image_mean(checkpoint.pixels["image_mean"])
    writer.add_vision_image_std(checkpoint.pixels["image_std"])
    if is_llava:
        # The layers behind the one whose output is taken are not in the file.
        layers += 1 + config["vision_feature_layer"]
        writer.add_clip_projector_type("mlp")
        writer.add_vision_image_size(vision["image_size"])
        writer.add_vision_projection_dim(vision["projection_dim"])
        writer.add_vision_head_count(vision["num_attention_heads"])
        writer.add_vision_attention_layernorm_eps(1e-5)
        writer.add_vision_use_gelu(False)
    else:
        writer.add_clip_projector_type("qwen2.5vl_merger")
        writer.add_vision_image_size(560)
        writer.add_vision_projection_dim(vision["out_hidden_size"])
        writer.add_vision_head_count(vision["num_heads"])
        writer.add_vision_attention_layernorm_eps(1e-6)
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)
    writer.add_vision_block_count(layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    chosen = [it for it in checkpoint.header if it.startswith(("vision", "visual", "multi"))]
    deep = re.compile(r"\.layers\.(\d+)\.")
    taken = lambda it: not is_llava or all(int(at) < layers for at in deep.findall(it))
    chosen = [it for it in chosen if taken(it) and "post_layernorm" not in it]
    write(path, writer, names, checkpoint, chosen, F16)


def demand(fine, what: str):
    return fine or sys.exit(ERROR + what)


def tokenized(sight, bitmap, count: int):
    """A prompt with the picture and `count` letters."""
    text = mtmd_cpp.mtmd_default_marker() + b"x" * count
    inputs = mtmd_cpp.mtmd_input_text(text, len(text), True, True)
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
    failed = mtmd_cpp.mtmd_tokenize(sight, chunks, ctypes.byref(inputs), bitmaps, 1)
    demand(failed == 0, "read the prompt")
    return chunks, mtmd_cpp.mtmd_helper_get_n_tokens(chunks)


def answer(job: dict) -> dict:
    """Loads everything, answers once, says what it took in seconds and bytes."""
    llama_cpp.llama_log_set(complain, None)
    mtmd_cpp.mtmd_log_set(complain, None)
    mtmd_cpp.mtmd_helper_log_set(complain, None)
    llama_cpp.llama_backend_init()
    rows = job["text_rows"] + job["visual_tokens"]
    started = time.perf_counter()
    options = llama_cpp.llama_model_default_params()
    options.use_mmap = False  # What is mapped is read while the first token is made.
    model = llama_cpp.llama_model_load_from_file(job["language"].encode(), options)
    demand(model, "load the language model")
    options = llama_cpp.llama_context_default_params()
    batch = options.n_batch
    options.n_ctx = rows + 2 * job["new_tokens"]
    options.n_threads = options.n_threads_batch = protocol.threads()
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = demand(llama_cpp.llama_init_from_model(model, options), "run this model")
    options = mtmd_cpp.mtmd_context_params_default()
    options.use_gpu = options.print_timings = options.warmup = False
    options.n_threads = protocol.threads()
    sight = mtmd_cpp.mtmd_init_from_file(job["tower"].encode(), model, options)
    demand(sight, "load the tower")
    loaded = time.perf_counter()

    bitmap = mtmd_cpp.mtmd_helper_bitmap_init_from_file(sight, job["image"].encode(), False)
    demand(bitmap, "read the picture")
    _, few = tokenized(sight, bitmap, 1)
    chunks, count = tokenized(sight, bitmap, 1 + rows - few)
    demand(count == rows, f"make a prompt of {rows} rows: it made {few} and {count}")
    past, vision, visual = llama_cpp.llama_pos(0), 0.0, 0
    prepared = time.perf_counter()
    for at in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, at)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            began = time.perf_counter()
            demand(mtmd_cpp.mtmd_encode_chunk(sight, chunk) == 0, "run the tower")
            vision += time.perf_counter() - began
            visual += mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
            seen = mtmd_cpp.mtmd_get_output_embd(sight)
            nothing = mtmd_cpp.mtmd_helper_post_decode_callback()
            failed = mtmd_cpp.mtmd_helper_decode_image_chunk(
                sight, context, chunk, seen, past, 0, batch, ctypes.byref(past), nothing, None
            )
        else:
            failed = mtmd_cpp.mtmd_helper_eval_chunk_single(
                sight, context, chunk, past, 0, batch, True, ctypes.byref(past)
            )
        demand(failed == 0, "run the prompt")
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    tokens = [best(context, words)]
    first = time.perf_counter()
    for _ in range(job["new_tokens"] - 1):
        token = (llama_cpp.llama_token * 1)(tokens[-1])
        one = llama_cpp.llama_batch_get_one(token, 1)
        demand(llama_cpp.llama_decode(context, one) == 0, "run a token")
        tokens.append(best(context, words))
    return {
        "loading": loaded - started,
        "vision": vision,
        "prefill": first - prepared - vision,
        "decode": time.perf_counter() - first,
        "tokens": len(tokens),
        "text_rows": rows - visual,
        "visual_tokens": visual,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def best(context, words: int) -> int:
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return int(numpy.ctypeslib.as_array(logits, (words,)).argmax())


def forget(path: str) -> None:
    """What the system remembers of a file: everybody loads from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def made(folder: pathlib.Path, job: dict) -> dict:
    """The files of a checkpoint, made unless they are there."""
    kind = protocol.type_of(job, TYPES, "llama.cpp")
    model = pathlib.Path(job["model"])
    files = {"language": f"{model.name}-{job['dtype']}.gguf", "tower": f"{model.name}-mmproj.gguf"}
    files = {name: folder / path for name, path in files.items()}
    for name, path in files.items():
        if not path.exists():
            part = path.with_suffix(".part")
            if name == "tower":
                write_tower(part, Checkpoint(model))
            else:
                write_language(part, Checkpoint(model), kind)
            part.rename(path)
    return {name: str(path) for name, path in files.items()}


def serve(answers, folder: pathlib.Path) -> None:
    job = json.loads(sys.stdin.readline())
    files = made(folder, job)
    hello = {
        "peer": f"llama.cpp, llama-cpp-python {llama_cpp.__version__}",
        "shape": job,
        "threads": protocol.threads(),
        "system": llama_cpp.llama_print_system_info().decode(),
        "file_bytes": {name: os.path.getsize(path) for name, path in files.items()},
    }
    print(json.dumps(hello), file=answers, flush=True)
    for _ in sys.stdin:
        for path in files.values():
            forget(path)
        line = json.dumps({**job, **files})
        child = [sys.executable, __file__, "--answer"]
        child = subprocess.run(child, input=line, stdout=subprocess.PIPE, text=True)
        if child.returncode:
            sys.exit(child.returncode)
        print(child.stdout.strip(), file=answers, flush=True)


if __name__ == "__main__":
    # Whatever else prints is no answer to anybody.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.argv[1:] == ["--answer"]:
        print(json.dumps(answer(json.loads(sys.stdin.read()))), file=answers, flush=True)
    elif sys.argv[1:]:
        serve(answers, pathlib.Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            serve(answers, pathlib.Path(folder))
