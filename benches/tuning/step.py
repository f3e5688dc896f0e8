"""A training step on a decoder of SmolLM2-135M's size, beside PyTorch, transformers and PEFT: in turns, in one run.

    python benches/tuning/step.py --reroute target/release/reroute --folder FOLDER --rounds 3 --json FILE

Makes a checkpoint of random weights and examples in the folder, trains each for a few steps, and says what the median step
took and the most memory that the process had; ours also with `--recompute`. Needs torch, transformers and peft.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What the examples come to: 64 visual tokens and 123 of text, 39 of them answers.
ROWS, ANSWERS, BATCH, STEPS = 187, 39, 8, 6
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {"adapter, f32": "float32", "adapter, bf16": "bfloat16", "decoder, f32": "float32"}


def make(folder: pathlib.Path) -> None:
    """A LLaVA with the smallest tower there is and a large decoder, and examples."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    source = ROOT / "tests/fixtures/llava/ckpt"
    (folder / "model").mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / "model" / file.name)
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    text.update(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )
    text.pop("head_dim", None)
    config.update(vocab_size=49152, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig.from_dict(config)).save_pretrained(folder / "model")
    question = "Describe this image in detail, please: what stands where, and which of the things is the largest? "
    answer = "The large one stands on the left of the small one, "
    draw = random.Random(0)
    with open(folder / "examples.jsonl", "w") as file:
        for _ in range(64):
            asked = question + draw.choice(["find a cup", "show the dog", "where is it"])
            said = answer + draw.choice(["the left one", "a red ring", "near the bar"])
            turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": said}]
            image = str(ROOT / "tests/fixtures/llava/input.png")
            file.write(json.dumps({"image": image, "conversations": turns}) + "\n")


def run(command: list) -> tuple[str, int]:
    """What a command says, and the most bytes that it had."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return said, usage.ru_maxrss * 1024


def ours(program: str, kind: str, folder: pathlib.Path, more: list) -> tuple[list, int]:
    to = folder / "run"
    shutil.rmtree(to, ignore_errors=True)
    trained = ["--train", "decoder"]
    if kind.startswith("adapter"):
        targets = ",".join(f"model.language_model.*.{name}" for name in ATTENTION)
        trained = ["--rank", "16", "--alpha", "32", "--target", targets]
    command = [
        program, "tune", "--model", folder / "model", "--data", folder / "examples.jsonl", "--to", to, "--batch", BATCH,
        "--accumulate", 1, "--steps", STEPS, "--learning-rate", "1e-4", "--dtype", "bf16" if "bf16" in kind else "f32",
    ]
    _, memory = run([str(part) for part in command + trained + more])
    lines = map(json.loads, open(to / "log.jsonl"))
    return [line["seconds"] for line in lines if line["kind"] == "step"], memory


def theirs(kind: str, folder: pathlib.Path) -> tuple[list, int]:
    said, memory = run([sys.executable, __file__, "--torch", kind, "--folder", str(folder)])
    return json.loads(said.splitlines()[-1]), memory


def torch_steps(kind: str, folder: pathlib.Path) -> list:
    """Seconds of each step of PyTorch."""
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    dtype = getattr(torch, KINDS[kind])
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=dtype, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if kind.startswith("adapter"):
        from peft import LoraConfig, get_peft_model

        targets = rf".*language_model.*\.({'|'.join(ATTENTION)})"
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("language_model" in name or "lm_head" in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, eps=1e-8, weight_decay=0.0)
    ids = torch.randint(10, 400, (BATCH, ROWS))
    ids[:, 5:69] = model.config.image_token_id
    labels = ids.clone()
    labels[:, : ROWS - ANSWERS] = -100
    side = model.config.vision_config.image_size
    pixels = torch.randn(BATCH, 3, side, side, dtype=dtype)
    model.train()
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        out = model(input_ids=ids, pixel_values=pixels, labels=labels, attention_mask=torch.ones_like(ids))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reroute", help="the program")
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    parser.add_argument("--torch", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.torch:
        print(json.dumps(torch_steps(options.torch, options.folder)))
        return
    if not (options.folder / "examples.jsonl").exists():
        make(options.folder)
    found = {kind: {"ours": [], "recomputing": [], "pytorch": []} for kind in KINDS}
    for _ in range(options.rounds):
        for kind, programs in found.items():
            programs["ours"].append(ours(options.reroute, kind, options.folder, []))
            programs["recomputing"].append(ours(options.reroute, kind, options.folder, ["--recompute"]))
            programs["pytorch"].append(theirs(kind, options.folder))
    report = {}
    for kind, programs in found.items():
        # The first step of a process is not like the others.
        row = {
            name: {
                "seconds": statistics.median(second for seconds, _ in rounds for second in seconds[1:]),
                "bytes": max(memory for _, memory in rounds),
                "steps": [seconds for seconds, _ in rounds],
            }
            for name, rounds in programs.items()
        }
        row["ratio"] = row["ours"]["seconds"] / row["pytorch"]["seconds"]
        report[kind] = row
        print(kind, {name: [round(x[key] / by, 2) for key, by in (("seconds", 1), ("bytes", 1e9))]
                     for name, x in row.items() if name != "ratio"}, round(row["ratio"], 2))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
