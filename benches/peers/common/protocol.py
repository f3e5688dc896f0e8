"""The protocol of ../README.md.

An engine is a class, made of

- `shape`: the first line of input,
- `layers`: how many it has to make,
- `weights`: names and numbers of all weights, one after the other,
- `embeddings`: the prompt, `[rows, hidden_size]`,

with `name`, `shape()` (what it runs), `facts()` (what else a reader should know) and
`runner(layers)`: the decoder of the first so many layers. A runner has

- `prefill()`: forgets everything, runs the prompt, returns the logits of its last row,
- `decode(token)`: runs one more token after it, returns its logits.

An engine that puts its weights into files has `folder`, a temporary one, which goes as soon as all
runners have opened what they need: whoever is killed later leaves nothing behind.
"""

import json
import os
import statistics
import sys
import time

from common import weights

TOKENS = 8

TRIES = 5


def threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def milliseconds(work) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def prefill(runner) -> float:
    runner.prefill()  # Unmeasured: see ../README.md.
    return milliseconds(runner.prefill)


def measure_once(runners: dict) -> dict:
    """Times of the deeper and of the shallower decoder, in turn, and their differences."""
    times = {f"prefill_{layers}_ms": prefill(it) for layers, it in runners.items()}
    tokens = {layers: [] for layers in runners}
    for _ in range(TOKENS):
        for layers, runner in runners.items():
            tokens[layers].append(milliseconds(lambda: runner.decode(1)))
    for layers, measured in tokens.items():
        times[f"decode_{layers}_ms"] = statistics.median(measured)
    for what in ("prefill", "decode"):
        deep, shallow = (times[f"{what}_{layers}_ms"] for layers in runners)
        times[f"{what}_ms"] = deep - shallow
    return times


def measure(runners: dict) -> dict:
    """The first times whose differences are positive; the last ones if none are."""
    for tries in range(1, TRIES + 1):
        times = measure_once(runners)
        if min(times["prefill_ms"], times["decode_ms"]) > 0:
            break
    return {**times, "tries": tries}


def serve(kind) -> None:
    # Whatever else prints is no answer to anybody.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    shape = json.loads(sys.stdin.readline())
    measured = shape["num_hidden_layers"]
    deep = 2 * measured
    numbers = weights.random(shape, deep)
    engine = kind(shape, deep, numbers, weights.embeddings(shape))
    runners = {layers: engine.runner(layers) for layers in (deep, measured)}
    if hasattr(engine, "folder"):
        engine.folder.cleanup()
    first = milliseconds(lambda: measure_once(runners))
    hello = {
        "peer": engine.name,
        "shape": {**engine.shape(), "num_hidden_layers": measured},
        "threads": threads(),
        "first_seconds": first / 1e3,
        **engine.facts(),
    }
    print(json.dumps(hello), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure(runners)), file=answers, flush=True)


def only_on_cpu(shape: dict, who: str) -> None:
    if shape["runs_on"] != "cpu":
        sys.exit(f"{who} runs on the CPU here, not on {shape['runs_on']}")


def type_of(shape: dict, kinds: dict, who: str):
    """What an engine calls the type; ends the program if it does not offer it."""
    if shape["dtype"] not in kinds:
        sys.exit(f"{who} is measured in {', '.join(kinds)}, not in {shape['dtype']}")
    return kinds[shape["dtype"]]
