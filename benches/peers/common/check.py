"""Compares an engine with PyTorch at a small shape: `python ENGINE_layer.py --check [TYPE …]`."""

import sys

import numpy

from common import protocol, weights

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "rows": 96,
    "dtype": "f32",
    "runs_on": "cpu",
}

# Errors of logits, relative to their length: those of the arithmetic, and those that
# weights and activations of a type make.
BOUNDS = {"f32": 1e-3, "f16": 1e-2, "bf16": 4e-2, "int8": 8e-2, "q4": 0.5}

TOKENS = 4

DEPTHS = (2, 4)


def logits(engine, layers: int) -> numpy.ndarray:
    """Of the prompt's last row and of some tokens after it, the prompt having run twice."""
    runner = engine.runner(layers)
    runner.prefill()
    rows = [runner.prefill(), *(runner.decode(token) for token in range(TOKENS))]
    return numpy.stack([numpy.array(row, dtype=numpy.float64) for row in rows])


def made(kind, dtype: str, **options):
    shape = {**SHAPE, "dtype": dtype}
    numbers = weights.random(shape, max(DEPTHS))
    return kind(shape, max(DEPTHS), numbers, weights.embeddings(shape), **options)


def run(kind, types: list[str]) -> None:
    """Checks types at both depths that are measured; ends with an error if one fails."""
    from torch_layer import Torch

    reference = made(Torch, "f32")
    expected = {layers: logits(reference, layers) for layers in DEPTHS}
    bounds = {**BOUNDS, **getattr(kind, "bounds", {})}
    failed = []
    offered = [dtype for dtype in bounds if dtype in kind.types]
    for dtype, options in [
        (dtype, options)
        for dtype in types or offered
        for options in getattr(kind, "variants", lambda _: [{}])(dtype)
    ]:
        engine = made(kind, dtype, **options)
        for layers, theirs in expected.items():
            errors = numpy.linalg.norm(logits(engine, layers) - theirs, axis=1)
            errors /= numpy.linalg.norm(theirs, axis=1)
            print(f"{dtype}, {layers} layers: errors of prompt and tokens {errors}")
            if not errors.max() < bounds[dtype]:
                failed.append(
                    f"{dtype} {options}: {errors.max()} is over {bounds[dtype]}"
                )
    sys.exit("; ".join(failed) or 0)


def or_serve(kind) -> None:
    """What the command line asks for: a check, or measurements."""
    if sys.argv[1:2] == ["--check"]:
        run(kind, sys.argv[2:])
    else:
        protocol.serve(kind)
