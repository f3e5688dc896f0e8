"""Times decoder layers in llama.cpp, by the protocol of README.md."""

import ctypes
import pathlib
import sys
import tempfile

import gguf
import llama_cpp
import numpy
from gguf.quants import quantize

from common import check, protocol, weights

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
    "q4": gguf.GGMLQuantizationType.Q4_0,
}

# What its files call what transformers calls otherwise.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

ERROR = 4


@llama_cpp.llama_log_callback
def complain(level, text, _):
    if level == ERROR:
        sys.stderr.buffer.write(text)


def renamed(name: str) -> str:
    for theirs, here in NAMES.items():
        name = name.replace(theirs, here)
    return name


def rearranged(name: str, numbers: numpy.ndarray, size: int) -> numpy.ndarray:
    """Rows of queries and keys in the order that the rotation wants: pairs side by side."""
    if "q_proj" not in name and "k_proj" not in name:
        return numbers
    halves = numbers.reshape(-1, 2, size // 2, numbers.shape[1])
    return halves.swapaxes(1, 2).reshape(numbers.shape)


class Part:
    """A file of a model in several: the first says what the model is, the others hold it."""

    def __init__(self, path: pathlib.Path, number: int):
        self.path = path
        self.writer = gguf.GGUFWriter(path, "llama")
        self.writer.add_uint16("split.no", number)

    def announce(self, name: str, size: tuple, kind) -> None:
        kind = kind if len(size) > 1 else TYPES["f32"]
        bytes_ = gguf.quant_shape_to_byte_shape(size, kind)
        self.writer.add_tensor_info(
            renamed(name), bytes_, numpy.dtype("uint8"), int(numpy.prod(bytes_)), kind
        )

    def begin(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()

    def write(self, numbers: numpy.ndarray, kind) -> None:
        kind = kind if numbers.ndim > 1 else TYPES["f32"]
        self.writer.write_tensor_data(quantize(numbers, kind))


class LlamaCpp:
    types = TYPES
    # Its flash attention takes keys and values in f16, whatever the weights are.
    bounds = {"f32": 5e-3}
    name = f"llama.cpp, llama-cpp-python {llama_cpp.__version__}"

    def __init__(self, shape, layers, numbers, embeddings):
        protocol.only_on_cpu(shape, "llama.cpp")
        self.given = shape
        self.kind = protocol.type_of(shape, TYPES, "llama.cpp")
        self.embeddings = embeddings
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.first = layers // 2
        llama_cpp.llama_log_set(complain, None)
        llama_cpp.llama_backend_init()
        self.write(layers, numbers)

    def write(self, layers: int, numbers) -> None:
        """The deeper layers lie in a file of their own."""
        folder = pathlib.Path(self.folder.name)
        parts = [Part(folder / f"{number}.gguf", number) for number in (1, 2)]
        deep = tuple(f"model.layers.{at}." for at in range(self.first, layers))
        sizes = list(weights.sizes(self.given, layers))
        for name, size in sizes:
            parts[name.startswith(deep)].announce(name, size, self.kind)
        for part in parts:
            part.begin()
        for name, values in numbers:
            values = rearranged(name, values, self.given["head_dim"])
            parts[name.startswith(deep)].write(values, self.kind)
        for part in parts:
            part.writer.close()
        for depth in (self.first, layers):
            self.describe(depth, len(list(weights.sizes(self.given, depth))))

    def path(self, depth: int) -> pathlib.Path:
        return pathlib.Path(self.folder.name) / f"{depth}-layers.gguf"

    def describe(self, depth: int, tensors: int) -> None:
        shape = self.given
        part = Part(self.path(depth), 0)
        part.writer.add_uint16("split.count", 2 if depth == self.first else 3)
        part.writer.add_int32("split.tensors.count", tensors)
        part.writer.add_block_count(depth)
        part.writer.add_context_length(shape["rows"] + 2 * protocol.TOKENS)
        part.writer.add_embedding_length(shape["hidden_size"])
        part.writer.add_feed_forward_length(shape["intermediate_size"])
        part.writer.add_head_count(shape["num_attention_heads"])
        part.writer.add_head_count_kv(shape["num_key_value_heads"])
        part.writer.add_key_length(shape["head_dim"])
        part.writer.add_value_length(shape["head_dim"])
        part.writer.add_rope_dimension_count(shape["head_dim"])
        part.writer.add_rope_freq_base(10000.0)
        part.writer.add_layer_norm_rms_eps(1e-6)
        part.writer.add_vocab_size(shape["vocab_size"])
        part.writer.add_tokenizer_model("none")
        part.begin()
        part.writer.close()

    def runner(self, layers: int) -> "Runner":
        folder = pathlib.Path(self.folder.name)
        count = 1 if layers == self.first else 2
        parts = [self.path(layers), *(folder / f"{at + 1}.gguf" for at in range(count))]
        return Runner(parts, self)

    def shape(self) -> dict:
        return self.given

    def facts(self) -> dict:
        return {"system": llama_cpp.llama_print_system_info().decode()}


class Runner:
    def __init__(self, parts: list, engine: LlamaCpp):
        shape = engine.given
        paths = [str(path).encode() for path in parts]
        paths = (ctypes.c_char_p * len(paths))(*paths)
        self.model = llama_cpp.llama_model_load_from_splits(
            paths, len(paths), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = shape["rows"] + 2 * protocol.TOKENS
        options.n_batch = options.n_ubatch = shape["rows"]
        options.n_threads = options.n_threads_batch = protocol.threads()
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            sys.exit("llama.cpp cannot run this model")
        self.vocabulary = shape["vocab_size"]
        self.prompt = batch(shape["rows"], shape["hidden_size"])
        size = engine.embeddings.nbytes
        ctypes.memmove(self.prompt.embd, engine.embeddings.ctypes.data, size)
        self.token = batch(1, 0)
        self.rows = 0

    def run(self, inputs, first: int):
        for row in range(inputs.n_tokens):
            inputs.pos[row] = first + row
        if llama_cpp.llama_decode(self.context, inputs) != 0:
            sys.exit("llama.cpp cannot run these rows")
        self.rows = first + inputs.n_tokens
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return numpy.ctypeslib.as_array(logits, (self.vocabulary,)).copy()

    def prefill(self):
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, False)
        return self.run(self.prompt, 0)

    def decode(self, token: int):
        self.token.token[0] = token
        return self.run(self.token, self.rows)


def batch(rows: int, hidden: int):
    """Rows of embeddings, or tokens if `hidden` is 0, of which the last one's logits are wanted."""
    inputs = llama_cpp.llama_batch_init(rows, hidden, 1)
    inputs.n_tokens = rows
    for row in range(rows):
        inputs.n_seq_id[row] = 1
        inputs.seq_id[row][0] = 0
        inputs.logits[row] = row + 1 == rows
    return inputs


if __name__ == "__main__":
    check.or_serve(LlamaCpp)
