"""Times decoder layers in OpenVINO, by the protocol of README.md."""

import collections
import gc
import pathlib
import tempfile

import numpy
import openvino
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo

from common import check, protocol

EPSILON = 1e-6

THETA = 10000.0

# An `int8` scale for all numbers of a row that is quantised.
WHOLE_ROW = str(2**64 - 1)


def quantised(hint: str, *groups: str) -> list[dict]:
    """What activations of quantised weights may be computed in; the fastest is taken."""
    return [
        {"INFERENCE_PRECISION_HINT": hint, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
        for group in groups
    ]


# Caches of keys and values are what the plugin makes of them (u8), those of f32 apart.
SETTINGS = {
    "f32": [{"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}],
    "bf16": [{"INFERENCE_PRECISION_HINT": "bf16"}],
    "int8": quantised("bf16", "32", "128", WHOLE_ROW) + quantised("f32", "32", "128"),
    "q4": quantised("bf16", "32", "64") + quantised("f32", "32", "64"),
}


def floats(*values: float):
    return op.constant(numpy.array(values, dtype=numpy.float32))


def whole(*values: int):
    return op.constant(numpy.array(values, dtype=numpy.int64))


def one(value):
    """Of no dimension."""
    return op.constant(numpy.array(value))


class Graph:
    """A LLaMA as exporters write it, which is what the plugin's fusions look for."""

    def __init__(self, shape: dict, layers: int, numbers: dict):
        self.shape = shape
        self.layers = layers
        self.numbers = numbers
        self.assigned = []
        hidden = shape["hidden_size"]
        self.embeddings = op.parameter([-1, -1, hidden], numpy.float32)
        self.positions = op.parameter([-1, -1], numpy.int64)
        self.beams = op.parameter([-1], numpy.int32)
        self.inputs = {
            "inputs_embeds": self.embeddings,
            "position_ids": self.positions,
            "beam_idx": self.beams,
        }
        for name, node in self.inputs.items():
            node.output(0).set_names({name})

    def weight(self, name: str):
        numbers = self.numbers[name]
        if self.shape["dtype"] == "bf16" and numbers.ndim > 1:
            return op.convert(op.constant(numbers, dtype=openvino.Type.bf16), "f32")
        return op.constant(numbers, shared_memory=True, name=name)

    def product(self, x, name: str):
        return op.matmul(x, self.weight(name), False, True)

    def norm(self, x, name: str):
        squares = op.reduce_mean(op.power(x, floats(2.0)), whole(-1), True)
        scale = op.divide(floats(1.0), op.sqrt(op.add(squares, floats(EPSILON))))
        return op.multiply(self.weight(name), op.multiply(x, scale))

    def rotations(self):
        """Cosines and sines `[1, 1, rows, head_dim]`."""
        size = self.shape["head_dim"]
        powers = numpy.arange(0, size, 2, dtype=numpy.float32) / size
        steps = op.constant((1.0 / THETA**powers)[None, :, None])
        positions = op.convert(op.unsqueeze(self.positions, whole(1)), "f32")
        angles = op.transpose(op.matmul(steps, positions, False, False), [0, 2, 1])
        angles = op.concat([angles, angles], -1)
        return [op.unsqueeze(of(angles), whole(1)) for of in (op.cos, op.sin)]

    def heads(self, x, heads: int):
        split = op.reshape(x, whole(0, 0, heads, self.shape["head_dim"]), True)
        return op.transpose(split, whole(0, 2, 1, 3))

    def rotate(self, x, cos, sin):
        half = self.shape["head_dim"] // 2
        first = op.slice(x, whole(0), whole(half), whole(1), whole(3))
        second = op.slice(x, whole(half), whole(2**31 - 1), whole(1), whole(3))
        turned = op.concat([op.multiply(second, floats(-1.0)), first], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def cached(self, x, heads: int, name: str):
        """A cache and what is new, one after the other."""
        size = [-1, heads, -1, self.shape["head_dim"]]
        info = VariableInfo()
        info.data_shape = openvino.PartialShape(size)
        info.data_type = openvino.Type.f32
        info.variable_id = name
        variable = Variable(info)
        empty = op.constant(numpy.zeros([1, heads, 0, size[-1]], dtype=numpy.float32))
        past = op.read_value(empty, variable)
        past = op.gather(past, self.beams, whole(0))
        both = op.concat([past, x], -2)
        self.assigned.append(op.assign(both, variable))
        return both

    def repeated(self, x, heads: int):
        """Keys or values, once for every head of queries."""
        groups = self.shape["num_attention_heads"] // heads
        if groups == 1:
            return x
        size = self.shape["head_dim"]
        rows = op.gather(op.shape_of(x), whole(2), whole(0))
        many = op.concat([whole(1, heads, groups), rows, whole(size)], 0)
        x = op.broadcast(
            op.unsqueeze(x, whole(2)), many, broadcast_spec="BIDIRECTIONAL"
        )
        return op.reshape(x, whole(0, heads * groups, -1, size), True)

    def attention(self, x, at: str, rotations, mask):
        heads, few = (
            self.shape[f"num_{what}_heads"] for what in ("attention", "key_value")
        )
        queries = self.heads(self.product(x, f"{at}.q_proj.weight"), heads)
        keys = self.heads(self.product(x, f"{at}.k_proj.weight"), few)
        values = self.heads(self.product(x, f"{at}.v_proj.weight"), few)
        queries, keys = (self.rotate(it, *rotations) for it in (queries, keys))
        keys = self.repeated(self.cached(keys, few, f"{at}.keys"), few)
        values = self.repeated(self.cached(values, few, f"{at}.values"), few)
        scale = one(numpy.float32(self.shape["head_dim"] ** -0.5))
        mixed = op.scaled_dot_product_attention(queries, keys, values, mask, scale)
        mixed = op.transpose(mixed, whole(0, 2, 1, 3))
        mixed = op.reshape(mixed, whole(0, 0, heads * self.shape["head_dim"]), True)
        return self.product(mixed, f"{at}.o_proj.weight")

    def perceptron(self, x, at: str):
        gate = self.product(x, f"{at}.gate_proj.weight")
        gate = op.multiply(gate, op.sigmoid(gate))
        up = self.product(x, f"{at}.up_proj.weight")
        return self.product(op.multiply(gate, up), f"{at}.down_proj.weight")

    def mask(self):
        """What no row may look at: rows after it."""
        last = op.reduce_max(self.positions, whole(0, 1), False)
        count = op.add(last, one(numpy.int64(1)))
        keys = op.range(one(numpy.int64(0)), count, one(numpy.int64(1)), "i64")
        keys = op.unsqueeze(keys, whole(0, 1, 2))
        later = op.greater(keys, op.unsqueeze(self.positions, whole(1, 3)))
        return op.select(later, one(numpy.float32(-65504)), one(numpy.float32(0)))

    def model(self) -> openvino.Model:
        x = self.embeddings
        rotations, mask = self.rotations(), self.mask()
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            normed = self.norm(x, f"{at}.input_layernorm.weight")
            x = op.add(x, self.attention(normed, f"{at}.self_attn", rotations, mask))
            normed = self.norm(x, f"{at}.post_attention_layernorm.weight")
            x = op.add(x, self.perceptron(normed, f"{at}.mlp"))
        x = self.norm(x, "model.norm.weight")
        # All rows up to here: nothing moves this before the layers.
        last = op.slice(x, whole(-1), whole(2**31 - 1), whole(1), whole(1))
        logits = op.result(self.product(last, "lm_head.weight"))
        inputs = list(self.inputs.values())
        return openvino.Model([logits], self.assigned, inputs, "llama")


def compressed(model: openvino.Model, dtype: str) -> openvino.Model:
    """With weights of fewer bits."""
    import nncf

    if dtype == "int8":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    mode = nncf.CompressWeightsMode.INT4_SYM
    return nncf.compress_weights(model, mode=mode, group_size=64)


class OpenVino:
    types = SETTINGS
    name = f"openvino {openvino.__version__.split('-')[0]}"

    def __init__(self, shape, layers, numbers, embeddings, setting=None):
        protocol.only_on_cpu(shape, "OpenVINO")
        settings = protocol.type_of(shape, SETTINGS, "OpenVINO")
        self.given = shape
        self.embeddings = embeddings
        self.core = openvino.Core()
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        numbers = dict(numbers)
        self.table = numbers["model.embed_tokens.weight"]
        for depth in (layers // 2, layers):
            model = Graph(shape, depth, numbers).model()
            if shape["dtype"] in ("int8", "q4"):
                model = compressed(model, shape["dtype"])
            openvino.save_model(model, self.path(depth), compress_to_fp16=False)
        del model, numbers
        gc.collect()
        self.tried = {}
        self.setting = setting or self.fastest(settings, layers // 2)

    @staticmethod
    def variants(dtype: str) -> list[dict]:
        """All that a check has to try."""
        return [{"setting": setting} for setting in SETTINGS[dtype]]

    def path(self, depth: int) -> pathlib.Path:
        return pathlib.Path(self.folder.name) / f"{depth}-layers.xml"

    def fastest(self, settings: list[dict], layers: int) -> dict:
        """The setting with the shortest prefill."""
        if len(settings) == 1:
            return settings[0]
        # Twice, for somebody else may be at work meanwhile.
        for setting in 2 * settings:
            self.setting = setting
            runner = self.runner(layers)
            runner.prefill()
            times = [protocol.milliseconds(runner.prefill) for _ in range(2)]
            name = ", ".join(setting.values())
            self.tried[name] = min(times + [self.tried.get(name, times[0])])
            del runner
            gc.collect()
        return min(settings, key=lambda it: self.tried[", ".join(it.values())])

    def shape(self) -> dict:
        return self.given

    def facts(self) -> dict:
        return {
            "setting": self.setting,
            "tried_ms": self.tried,
            "operations": self.operations,
        }

    def runner(self, layers: int) -> "Runner":
        options = {**self.setting, "INFERENCE_NUM_THREADS": protocol.threads()}
        compiled = self.core.compile_model(self.path(layers), "CPU", options)
        nodes = compiled.get_runtime_model().get_ops()
        kinds = [str(node.get_rt_info()["layerType"].value) for node in nodes]
        self.operations = dict(collections.Counter(kinds))
        return Runner(compiled, self.embeddings, self.table)


class Runner:
    def __init__(self, compiled, embeddings, table):
        self.request = compiled.create_infer_request()
        self.embeddings = embeddings
        self.table = table
        self.rows = 0
        beams = numpy.zeros(1, dtype=numpy.int32)
        self.request.set_tensor("beam_idx", openvino.Tensor(beams))

    def run(self, embeddings, first: int):
        self.rows = first + len(embeddings)
        positions = numpy.arange(first, self.rows, dtype=numpy.int64)
        for name, values in (
            ("inputs_embeds", embeddings),
            ("position_ids", positions),
        ):
            self.request.set_tensor(name, openvino.Tensor(values[None]))
        self.request.infer()
        return self.request.get_output_tensor(0).data.reshape(-1).copy()

    def prefill(self):
        self.request.reset_state()
        return self.run(self.embeddings, 0)

    def decode(self, token: int):
        return self.run(self.table[token : token + 1], self.rows)


if __name__ == "__main__":
    check.or_serve(OpenVino)
