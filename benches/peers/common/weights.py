"""Random weights and embeddings of a shape, under the names that transformers gives them."""

from collections.abc import Iterator

import numpy


def sizes(shape: dict, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes of all weights of a decoder of so many layers."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.mlp.gate_proj.weight", (wide, hidden)
        yield f"{at}.mlp.up_proj.weight", (wide, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, wide)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape["vocab_size"], hidden)


def random(shape: dict, layers: int) -> Iterator[tuple[str, numpy.ndarray]]:
    """Names and numbers, one after the other: all at once they are gigabytes.

    Rows of a product have a length of about one; norms are around one.
    """
    generator = numpy.random.default_rng(0)
    for name, size in sizes(shape, layers):
        numbers = generator.random(size, dtype=numpy.float32)
        numbers -= 0.5
        if len(size) == 1:
            numbers += 1.0
        else:
            numbers *= (12 / size[-1]) ** 0.5
        yield name, numbers


def embeddings(shape: dict) -> numpy.ndarray:
    """A prompt `[rows, hidden_size]`."""
    generator = numpy.random.default_rng(1)
    prompt = generator.standard_normal(
        (shape["rows"], shape["hidden_size"]), dtype=numpy.float32
    )
    return 0.1 * prompt
