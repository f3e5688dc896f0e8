"""lmms-eval as a client of `reroute serve`, beside `reroute eval`: the same answers and metrics?

    python -m venv venv && venv/bin/pip install lmms-eval==0.7.3 'filelock<4'
    venv/bin/python check.py target/release/reroute FOLDER

Needs nothing but the packages and the program. The model is the built-in one, its scenes are laid out as the hub has RefCOCO and
POPE. For POPE its vocabulary is another: numbers for the left edge of a box read yes or no, and the first token is the answer. The
harness's own tasks run as they are; `find` asks for boxes in the words that the model knows. FOLDER must be new. Ends with
1 if an answer or a metric differs.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture

HERE = Path(__file__).resolve().parent
SCENES = HERE.parents[2] / "tests/fixtures/scenes"
MODEL = HERE.parents[2] / "crates/zoo/assets/narrow-llava"
# Of each check: the harness's task, the flags of `reroute eval`, and whether the model says yes and no.
CHECKS = [
    ("refcoco_bbox_rec_val", ["--task", "refcoco", "--prompt", "full"], False),
    ("find", ["--task", "refcoco", "--prompt", "family"], False),
    ("pope", ["--task", "pope", "--max-new-tokens", "1"], True),
]
# What the harness calls a metric, and what `reroute eval` does.
METRICS = {
    "refcoco_ACC@0.5": "accuracy at IoU 0.5",
    "refcoco_IoU": "mean IoU",
    **{f"refcoco_ACC@{at}": f"accuracy at IoU {at}" for at in (0.1, 0.3, 0.7, 0.9)},
    "pope_accuracy": "accuracy",
    "pope_precision": "precision",
    "pope_recall": "recall",
    "pope_f1_score": "F1",
}


def table(path, rows, **types):
    """Writes what `datasets` writes: the hub's tables are its."""
    path.parent.mkdir(parents=True)
    features = Features({name: types.get(name, Value("string")) for name in rows[0]})
    Dataset.from_list(rows, features=features).to_parquet(path)


def encoded(picture, kind):
    out = io.BytesIO()
    picture.save(out, kind, quality=90)
    return {"bytes": out.getvalue(), "path": None}


def scenes(some):
    """Picture, expression and box, in shares."""
    lines = (SCENES / "scenes.jsonl").read_text().splitlines()
    for scene in map(json.loads, lines[some]):
        yield Picture.open(SCENES / scene["image"]).convert("RGB"), scene["expression"], scene["box"]


def refcoco(folder, kind):
    """40 expressions of 36 scenes; every fifth is twice as large."""
    rows = []
    for number, (picture, expression, box) in enumerate(scenes(slice(36))):
        if number % 5 == 4:
            picture = picture.resize((224, 224), Picture.Resampling.BICUBIC)
        x1, y1, x2, y2 = (round(picture.width * at, 2) for at in box)
        rows.append(
            {
                "question_id": str(number),
                "image": encoded(picture, kind),
                "question": "Please carefully observe the area circled in the image and come up with a caption for the area.",
                "answer": [expression, expression.removeprefix("the ")] if number % 9 == 8 else [expression],
                "segmentation": [x1, y1, x2, y2],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": 0,
                "file_name": f"{number}.jpg",
            }
        )
    numbers = List(Value("float32"))
    types = {"image": Image(), "answer": List(Value("string")), "segmentation": numbers, "bbox": numbers, "iscrowd": Value("int64")}
    table(folder / "RefCOCO/data/val-00000-of-00001.parquet", rows, **types)


def pope(folder, kind):
    """Whether something is in the right half of 60 scenes."""
    rows = [
        {
            "id": str(number),
            "question_id": str(number),
            "question": f"Did you find {expression} in the right half of the image?",
            "answer": "yes" if box[0] + box[2] > 1 else "no",
            "image_source": str(number),
            "image": encoded(picture, kind),
            "category": ["random", "popular", "adversarial"][number % 3],
        }
        for number, (picture, expression, box) in enumerate(scenes(slice(100, 160)))
    ]
    table(folder / "POPE/data/test-00000-of-00001.parquet", rows, image=Image())


def yes_and_no(folder):
    """The built-in model, whose boxes begin with a yes where they begin right of 0.4. Blanks tell the words apart."""
    shutil.copytree(MODEL, folder)
    vocabulary = (folder / "tokenizer.json").read_text()
    for hundredth in range(101):
        number, word = f'"▁[{hundredth / 100:.2f},"', "yes" if hundredth >= 40 else "no"
        assert number in vocabulary
        vocabulary = vocabulary.replace(number, f'"▁{word}{hundredth * "▁"}"')
    (folder / "tokenizer.json").write_text(vocabulary)
    return folder


@contextlib.contextmanager
def served(program, folder, flags):
    """The address of a server that runs meanwhile, and what its model is called."""
    command = [program, "serve", "--port", "0", *flags]
    with open(folder / "serve.log", "w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            address = None
            while not address:
                if server.poll() is not None:
                    raise SystemExit(f"the server has ended: see {log.name}")
                time.sleep(0.05)
                address = re.search(r"http://[\d.]+:\d+", Path(log.name).read_text())
            base = address[0] + "/v1"
            with urllib.request.urlopen(base + "/models") as response:
                yield base, json.load(response)["data"][0]["id"]
        finally:
            server.terminate()
            server.wait()


def harness(task, client, model, base, folder, one_token):
    """What lmms-eval measures, and its answers in their order."""
    arguments = f"model={model},base_url={base},api_key=none,max_retries=1"
    command = [sys.executable, "-m", "lmms_eval", "--model", client, "--model_args", arguments, "--tasks", task]
    command += ["--include_path", HERE / "tasks", "--batch_size", "1", "--log_samples", "--output_path", folder / f"harness-{task}"]
    command += ["--gen_kwargs", "max_new_tokens=1"] if one_token else []
    # A folder of the data set's name comes before the hub.
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    subprocess.run(command, cwd=folder, env=os.environ | offline, check=True)
    (results,) = (folder / f"harness-{task}").rglob("*_results.json")
    (samples,) = (folder / f"harness-{task}").rglob("*_samples_*.jsonl")
    metrics = json.loads(results.read_text())["results"][task]
    samples = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return {name.split(",")[0]: value for name, value in metrics.items()}, [sample["filtered_resps"] for sample in samples]


def ours(program, flags, folder, out):
    """The same of `reroute eval`."""
    command = [program, "eval", *flags, "--data", folder / "lmms-lab-encoder", "--out", out]
    subprocess.run(command, check=True)
    metrics = json.loads((out / "results.json").read_text())["results"][0]["metrics"]
    records = [json.loads(line) for line in (out / "records-dense.jsonl").read_text().splitlines()[1:]]
    records.sort(key=lambda record: record["sample"])
    return {metric["name"]: metric["value"] for metric in metrics}, [record["answer"].strip() for record in records]


def compare(task, theirs, ours):
    """Prints both; whether they are the same."""
    (metrics, answers), (our_metrics, our_answers) = theirs, ours
    assert len(answers) == len(our_answers)
    differ = [number for number, (a, b) in enumerate(zip(answers, our_answers)) if a != b]
    print(f"\n{task}: {len(answers) - len(differ)} of {len(answers)} answers are the same, {len(set(answers))} are different ones")
    for number in differ[:5]:
        print(f"  {number}: {answers[number]!r} and {our_answers[number]!r}")
    same = not differ
    shared = [metric for metric in metrics if metric in METRICS]
    assert shared, f"none of {list(metrics)} is known"
    for metric in shared:
        their, our = metrics[metric], our_metrics[METRICS[metric]]
        # The harness keeps the right boxes in f32, as shares of the picture.
        same &= abs(their - our) < 1e-6 if metric == "refcoco_IoU" else their == our
        print(f"  {metric:16} {their!r:22} {our!r:22}" + ("" if their == our else f" {abs(their - our):.0e} apart"))
    return same


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--client", default="openai", choices=["openai", "async_openai"])
    parser.add_argument("--pictures", default="PNG", choices=["PNG", "JPEG"], help="JPEG: the harness compresses RefCOCO's once more")
    arguments = parser.parse_args()
    program, folder = arguments.program.resolve(), arguments.folder.resolve()
    folder.mkdir(parents=True)
    refcoco(folder / "lmms-lab-encoder", arguments.pictures)
    pope(folder / "lmms-lab-encoder", arguments.pictures)
    words = ["--model", yes_and_no(folder / "yes-and-no")]
    pairs = []
    for task, flags, has_words in CHECKS:
        model = words if has_words else []
        with served(program, folder, model) as (base, name):
            theirs = harness(task, arguments.client, name, base, folder, has_words)
        pairs.append((task, theirs, ours(program, flags + model, folder, folder / f"ours-{task}")))
    if not all([compare(*pair) for pair in pairs]):
        raise SystemExit("they differ")


if __name__ == "__main__":
    main()
