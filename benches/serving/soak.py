"""Half an hour of everything that clients do, what memory does meanwhile, and a server that is killed.

    python benches/serving/soak.py --minutes 30 --json FILE --plot FILE.svg --server "reroute serve --port {port}"

Clients ask about new and old pictures of many sizes, with and without routing, whole and streamed, hang up in the middle, send what
is wrong. In the end the server is killed (SIGKILL) under load and begun again: answers are then as before.
"""

import argparse
import collections
import datetime
import json
import os
import random
import threading
import time

from client import Server, about, picture

ROUTINGS = ["dense", "reroute-fastv@192", "reroute-pdrop@128", "fastv@128", "pdrop@64", "visionzip@64", "reroute-nuwa@128"]
WRONG = [{"messages": []}, {"messages": "no"}, {"tools": [{}]}, {"routing": "nothing@1"}, {"max_tokens": -1}, {"unheard_of": 1}]
EVERY = 5.0

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--server", required=True, help="command with {port}")
parser.add_argument("--minutes", type=float, default=30)
parser.add_argument("--clients", type=int, default=12)
parser.add_argument("--json")
parser.add_argument("--plot")
options = parser.parse_args()
server = Server(options.server)
outcomes, samples, stopped = collections.Counter(), [], threading.Event()


def request(draw: random.Random) -> tuple[dict, int | None]:
    """A request and after how many chunks its client hangs up."""
    if draw.random() < 0.1:
        return draw.choice(WRONG), None
    side = [draw.choice([32, 112, 336, 640, 1000]) for _ in range(2)]
    # Half of the pictures have been shown before.
    seed = draw.randrange(20) if draw.random() < 0.5 else draw.randrange(1 << 30)
    asked = {
        "messages": about(picture(seed, *side), draw.choice(["the red circle", "the blue square " * draw.randrange(1, 30)])),
        "routing": draw.choice(ROUTINGS),
        "max_tokens": draw.choice([1, 8, 40]),
        "stream": draw.random() < 0.6,
        "n": draw.choice([1, 1, 1, 3]),
        "temperature": draw.choice([0, 0, 0.8]),
    }
    return asked, draw.randrange(3) if asked["stream"] and draw.random() < 0.2 else None


def client(seed: int) -> None:
    draw = random.Random(seed)
    while not stopped.is_set():
        asked, leaves_after = request(draw)
        answer = server.ask(asked, leaves_after)
        is_wrong = "temperature" not in asked
        kind = "hung up" if answer.get("left") else answer["status"]
        outcomes["wrong, answered with" if is_wrong else "right, answered with", kind] += 1


def known() -> list:
    """Answers that must stay the same."""
    asked = [{"messages": about(picture(seed), "the red circle"), "temperature": 0, "routing": name} for seed, name in enumerate(ROUTINGS)]
    return [server.ask(request)["text"] for request in asked]


def plot(samples: list) -> str:
    """Memory in MiB against minutes, as SVG."""
    width, height, left = 720, 240, 60
    most = max(sample["bytes"] for sample in samples) * 1.1
    last = samples[-1]["seconds"]
    across, up = width - left - 20, height - 60

    def line(key: str, colour: str) -> str:
        points = (f"{left + at['seconds'] / last * across:.1f},{height - 40 - at[key] / most * up:.1f}" for at in samples)
        return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{" ".join(points)}"/>'

    def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#000") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    parts = [f'<path d="M{left},20V{height - 40}H{width - 20}" fill="none" stroke="#888"/>']
    parts += [text(left - 6, height - 36 - share * up, f"{most * share / 2**20:.0f}", "end") for share in (0, 0.5, 1)]
    parts += [text(left + share * across, height - 24, f"{last * share / 60:.0f}") for share in (0, 0.5, 1)]
    parts += [text(width / 2, height - 6, f"minutes of mixed load by {options.clients} clients")]
    parts += [text(left, 14, "MiB:", "start"), text(left + 30, 14, "resident", "start", "#2a6fdb")]
    parts += [text(left + 90, 14, "keys, values and caches", "start", "#c2571a")]
    parts += [line("bytes", "#2a6fdb"), line("kept", "#c2571a")]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
    return f'{head}<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'


before = known()
threads = [threading.Thread(target=client, args=(seed,)) for seed in range(options.clients)]
[thread.start() for thread in threads]
began = time.monotonic()
while (now := time.monotonic() - began) < options.minutes * 60:
    lines = server.get("/metrics")[1].splitlines()
    kept = sum(float(line.split()[-1]) for line in lines if line.startswith("reroute_kv_bytes"))
    samples.append({"seconds": now, "bytes": server.memory(), "kept": kept, "files": len(os.listdir(f"/proc/{server.process.pid}/fd"))})
    time.sleep(EVERY)
under_load = dict(outcomes)
stopped.set()
server.kill()
[thread.join() for thread in threads]
lost = sum(count for (_, status), count in outcomes.items() if status == 0)
server.start()
after = known()
server.stop()

third = len(samples) // 3
mean = lambda part: sum(sample["bytes"] for sample in part) / len(part)
growth = mean(samples[-third:]) / mean(samples[third : 2 * third]) - 1
report = {
    "date": datetime.date.today().isoformat(),
    "server": options.server,
    "minutes": options.minutes,
    "clients": options.clients,
    "outcomes": {f"{kind} {status}": count for (kind, status), count in sorted(under_load.items(), key=str)},
    "bytes_at_most": max(sample["bytes"] for sample in samples),
    "growth_of_last_third": growth,
    "files_at_most": max(sample["files"] for sample in samples),
    "lost_by_kill": lost,
    "same_answers_after_kill": before == after,
    "samples": samples,
}
print(json.dumps({key: value for key, value in report.items() if key != "samples"}, indent=1))
if options.json:
    with open(options.json, "w") as file:
        json.dump(report, file)
if options.plot:
    with open(options.plot, "w") as file:
        file.write(plot(samples))
if not report["same_answers_after_kill"] or any(isinstance(status, int) and status >= 500 for _, status in under_load):
    raise SystemExit("answers differ after the kill, or the server failed")
