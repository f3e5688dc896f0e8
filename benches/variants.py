"""Variants of rerouting of a model of 8 layers, with paired intervals: the tables of docs/routing.md.

    cargo build --release && python3 benches/variants.py target/release/reroute FOLDER

Writes schedules and questions into FOLDER, lets `reroute eval` answer them (it goes on where it was ended), and
prints the gain of each variant over its base in points. Needs nothing but Python.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

SCENES = Path(__file__).resolve().parent.parent / "tests/fixtures/scenes"
MODEL = SCENES.parent / "tiny-llava"
SIDE, TOKENS, LAYERS = 112, 64, 8
DECISIONS = [1, 2, 4, 6]
SHARES = [0.50, 0.33, 0.22]
DRAWS = 10_000

# Name: kind of counts, action, what else the schedule has, and what its decisions rank by.
VARIANTS = {
    "fastv": ("single", "remove", {}, {}),
    "fastv-max": ("single", "remove", {}, {"heads": "max"}),
    "pdrop": ("pyramid", "remove", {}, {}),
    "pdrop-max": ("pyramid", "remove", {}, {"heads": "max"}),
    "pdrop-sum": ("pyramid", "remove", {"memory": "sum"}, {}),
}
for kind in ("flat", "pyramid"):
    VARIANTS |= {
        kind: (kind, "reroute", {}, {}),
        f"{kind}-ride": (kind, "reroute", {"waiting": "ride-along"}, {}),
        f"{kind}-sum": (kind, "reroute", {"memory": "sum"}, {}),
        f"{kind}-sum-ride": (kind, "reroute", {"memory": "sum", "waiting": "ride-along"}, {}),
        f"{kind}-sum-max": (kind, "reroute", {"memory": "sum"}, {"heads": "max"}),
        f"{kind}-sum-last3": (kind, "reroute", {"memory": "sum"}, {"query": {"last-mean": 3}}),
    }

PAIRS = [
    ("flat", "fastv"), ("flat-sum", "fastv"), ("flat-sum", "flat"), ("flat-ride", "flat"),
    ("pyramid", "pdrop"), ("pyramid-sum", "pdrop"), ("pyramid-sum", "pyramid"), ("pyramid-ride", "pyramid"),
    ("pdrop-sum", "pdrop"), ("pyramid-sum", "pdrop-sum"), ("fastv-max", "fastv"), ("pdrop-max", "pdrop"),
    *((f"{kind}-sum-{what}", f"{kind}-sum") for kind in ("flat", "pyramid") for what in ("ride", "max", "last3")),
]


def average(counts):
    """The share of visual tokens that a layer works on."""
    ends = [*DECISIONS[1:], LAYERS]
    work = sum(count * (end - start) for count, start, end in zip(counts, DECISIONS, ends))
    return (TOKENS * DECISIONS[0] + work) / (LAYERS * TOKENS)


def counts(kind, share):
    """Keep counts of an average of about `share`: all alike, or falling geometrically."""
    flat = ([keep] * 4 for keep in range(1, TOKENS))
    falling = ([max(1, round(TOKENS * (r / 1000) ** k)) for k in (1, 2, 3, 4)] for r in range(100, 1000))
    return min(falling if kind == "pyramid" else flat, key=lambda counts: abs(average(counts) - share))


def schedule(variant, share):
    kind, action, more, score = VARIANTS[variant]
    stages = [{"layer": layer, "keep_count": keep} for layer, keep in zip(DECISIONS, counts(kind, share))]
    for stage in stages if score else []:
        stage["score"] = {"attention": score}
    return {"action": action, **more, "stages": stages[:1] if kind == "single" else stages}


def scores(folder, name):
    lines = (folder / f"out/records-{name}.json.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[1:]]
    return {record["sample"]: record["score"] for record in records}


def gain(folder, name, base):
    """The mean difference in points, and the bounds of 95 % of resampled ones."""
    name, base = scores(folder, name), scores(folder, base)
    differences = [name[sample] - base[sample] for sample in sorted(name)]
    draw = random.Random(1).choices
    mean = lambda values: 100 * sum(values) / len(values)
    drawn = sorted(mean(draw(differences, k=len(differences))) for _ in range(DRAWS))
    return mean(differences), drawn[DRAWS // 40], drawn[-DRAWS // 40 - 1]


def main(program, folder):
    folder.mkdir(parents=True, exist_ok=True)
    questions = []
    for line in (SCENES / "scenes.jsonl").read_text().splitlines():
        scene = json.loads(line)
        box = [round(SIDE * at, 3) for at in scene["box"]]
        questions.append({"image": str(SCENES / scene["image"]), "question": scene["expression"], "box": box})
    (folder / "scenes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    names = {(variant, share): f"{variant}-{share * 100:.0f}" for variant in VARIANTS for share in SHARES}
    for (variant, share), name in names.items():
        (folder / f"{name}.json").write_text(json.dumps(schedule(variant, share)))
    routings = ["dense", *(f"{name}.json" for name in names.values())]
    command = [program, "eval", "--model", str(MODEL), "--task", "own", "--data", "scenes.jsonl", "--out", "out", "--resume"]
    subprocess.run([*command, "--routing", *routings], cwd=folder, check=True)
    print("\n| variant − base |" + "".join(f" {share:.2f} |" for share in SHARES))
    print("|---|" + "---|" * len(SHARES))
    for variant, base in PAIRS:
        found = (gain(folder, names[variant, share], names[base, share]) for share in SHARES)
        print(f"| {variant} − {base} |" + "".join(f" {x:+.1f} ({low:+.1f} … {high:+.1f}) |" for x, low, high in found))


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()), Path(sys.argv[2]))
