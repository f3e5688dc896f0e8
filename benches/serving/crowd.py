"""Thousands of connections that say nothing, or too little, and what becomes of whoever asks meanwhile.

    ulimit -n 20000; python benches/serving/crowd.py --server "reroute serve --port {port} --max-connections 8192"

Several processes open them: a third are silent, a third stop within the head of a request, a third send a body byte by byte.
"""

import argparse
import json
import multiprocessing
import random
import socket
import statistics
import time

from client import Server, about, picture

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--server", required=True, help="command with {port}")
parser.add_argument("--processes", type=int, default=4)
parser.add_argument("--connections", type=int, default=1000, help="of each process")
parser.add_argument("--asks", type=int, default=30)
parser.add_argument("--json")
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def crowd(port: int, count: int, ready, done) -> None:
    """Opens connections, and drips into a third of them until it is over."""
    opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for index, connection in enumerate(opened):
        if index % 3 == 1:
            connection.sendall(HEAD[: 10 + index % 60])
        if index % 3 == 2:
            connection.sendall(HEAD + b"Content-Length: 5000\r\n\r\n")
    ready.release()
    while not done.wait(0.5):
        for connection in opened[2::3]:
            try:
                connection.sendall(b" ")
            except OSError:
                pass  # Closed by the server: it has waited long enough.


def ask(server: Server, count: int, draw: random.Random) -> dict:
    """Seconds of whole answers, one after the other, to requests that the server has not seen."""
    seconds, failed = [], 0
    for _ in range(count):
        began = time.monotonic()
        answer = server.ask({"messages": about(picture(draw.randrange(1 << 30)), "the red circle"), "max_tokens": 8})
        failed += answer["status"] != 200
        seconds.append(time.monotonic() - began)
    return {"median": statistics.median(seconds), "most": max(seconds), "failed": failed, "memory": server.memory()}


def main() -> None:
    options = parser.parse_args()
    server, draw = Server(options.server), random.Random(1)
    ready, done = multiprocessing.Semaphore(0), multiprocessing.Event()
    report = {"connections": options.processes * options.connections, "before": ask(server, options.asks, draw)}
    people = [
        multiprocessing.Process(target=crowd, args=(server.port, options.connections, ready, done))
        for _ in range(options.processes)
    ]
    for process in people:
        process.start()
    for _ in people:
        ready.acquire()
    report["meanwhile"] = ask(server, options.asks, draw)
    done.set()
    for process in people:
        process.join()
    report["after"] = ask(server, options.asks, draw)
    server.stop()
    print(json.dumps(report, indent=2))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
