"""How fast a server answers, by the number of clients that ask at the same time.

    python benches/serving/load.py --clients 1,2,4,8,16 --json FILE \\
        --server "batched=reroute serve --model DIR --port {port}" \\
        --server "one at a time=reroute serve --model DIR --max-running 1 --port {port}"

Every client asks again when it is answered, always about a picture that nobody has shown before. Servers take turns, round by
round; figures are medians of the rounds. The text of a question is made so long that the prompt has `--prompt` tokens on every server.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import threading

from client import Server, about, picture

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--server", action="append", required=True, help="NAME=COMMAND with {port}")
parser.add_argument("--clients", default="1,2,4,8,16")
parser.add_argument("--requests", type=int, default=2, help="of every client")
parser.add_argument("--least", type=int, default=6, help="requests of a figure at least")
parser.add_argument("--tokens", type=int, default=32, help="of an answer")
parser.add_argument("--prompt", type=int, help="tokens of a prompt; as they come without it")
parser.add_argument("--extra", default="{}", help="more fields of requests, as JSON")
parser.add_argument("--rounds", type=int, default=1)
parser.add_argument("--json")
options = parser.parse_args()
extra = json.loads(options.extra)
seeds = iter(range(1, 1 << 30))


def asked(text: str) -> dict:
    messages = about(picture(next(seeds)), text)
    usage = {"include_usage": True}
    return {"messages": messages, "max_tokens": options.tokens, "temperature": 0, "stream": True, "stream_options": usage, **extra}


def question(server: Server) -> str:
    """A text with which a prompt is as long as asked for."""
    text = "Where is it?"
    if options.prompt:
        count = lambda text: server.ask({**asked(text), "stream": False, "stream_options": None, "max_tokens": 1})["usage"]["prompt_tokens"]
        text += " x" * max(options.prompt - count(text), 0)
        text = text[: len(text) - max(count(text) - options.prompt, 0)]
    return text


def measure(server: Server, text: str, clients: int) -> dict:
    requests = [asked(text) for _ in range(max(options.requests * clients, options.least))]
    left, answers, lock = iter(requests), [], threading.Lock()

    def client() -> None:
        while True:
            with lock:
                request = next(left, None)
            if request is None:
                return
            answers.append(server.ask(request))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    fine = [answer for answer in answers if answer["status"] == 200]
    began = min(answer["began"] for answer in answers)
    wall = max(answer["began"] + answer["seconds"] for answer in answers) - began
    tokens = sum((answer["usage"] or {}).get("completion_tokens", answer.get("chunks", 0)) for answer in fine)
    firsts = sorted(answer["first"] for answer in fine if answer["first"] is not None)
    return {
        "clients": clients,
        "requests": len(requests),
        "failed": len(answers) - len(fine),
        "requests_per_second": len(fine) / wall,
        "tokens_per_second": tokens / wall,
        "first_token": statistics.median(firsts) if firsts else None,
        "first_token_95": firsts[min(len(firsts) - 1, len(firsts) * 95 // 100)] if firsts else None,
        "answer": statistics.median(answer["seconds"] for answer in fine) if fine else None,
        "prompt_tokens": low_high(answer["usage"]["prompt_tokens"] for answer in fine if answer["usage"]),
    }


def low_high(numbers) -> list:
    numbers = list(numbers)
    return [min(numbers), max(numbers)] if numbers else []


rows, peaks = {}, {}
for _ in range(options.rounds):
    for given in options.server:
        name, command = given.split("=", 1)
        server = Server(command)
        try:
            text = question(server)
            [server.ask(asked(text)) for _ in range(2)]
            for clients in map(int, options.clients.split(",")):
                row = measure(server, text, clients)
                rows.setdefault((name, clients), []).append(row)
                print(name, json.dumps(row), flush=True)
            peaks[name] = max(peaks.get(name, 0), server.memory("VmHWM"))
        finally:
            server.stop()

numbers = ["requests_per_second", "tokens_per_second", "first_token", "first_token_95", "answer"]


def middle(found: list, key: str) -> float | None:
    known = [row[key] for row in found if row[key] is not None]
    return statistics.median(known) if known else None


def shown(number: float | None, width: int) -> str:
    return f"{number:{width}.3f}" if number is not None else "–".rjust(width)


table = [{"server": name, "clients": clients, **{key: middle(found, key) for key in numbers}, "failed": sum(row["failed"] for row in found), "rounds": found} for (name, clients), found in rows.items()]
print(f"{'server':16} clients  requests/s  tokens/s  first token  (95 %)  answer, s  failed")
for row in table:
    figures = " ".join(shown(row[key], width) for key, width in zip(numbers, [11, 9, 12, 7, 10]))
    print(f"{row['server']:16} {row['clients']:7} {figures} {row['failed']:7}")
if options.json:
    processor = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    about_run = {"date": datetime.date.today().isoformat(), "device": processor, "threads": os.cpu_count(), "servers": options.server, "tokens": options.tokens, "prompt": options.prompt, "extra": extra, "rounds": options.rounds, "peak_bytes": peaks}
    with open(options.json, "w") as file:
        json.dump({**about_run, "rows": table}, file, indent=1)
