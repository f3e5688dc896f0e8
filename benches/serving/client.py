"""Requests to a server that speaks OpenAI's chat completions; needs nothing but Python."""

import base64
import http.client
import json
import random
import shlex
import socket
import struct
import subprocess
import time
import zlib

TIMEOUT = 1800


def picture(seed: int, width: int = 336, height: int = 336) -> str:
    """A picture of its own for every seed, as a data URL: what servers keep of one tells nothing about another."""
    draw = random.Random(seed)
    tiles = [[bytes(draw.randrange(256) for _ in range(3)) for _ in range(8)] for _ in range(8)]
    rows = (b"\0" + b"".join(tiles[y * 8 // height][x * 8 // width] for x in range(width)) for y in range(height))

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    png = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    png += part(b"IDAT", zlib.compress(b"".join(rows), 1)) + part(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


def about(url: str, text: str) -> list:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


class Server:
    """A server that is started by a command, with {port} in it."""

    def __init__(self, command: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = shlex.split(command.format(port=self.port))
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 600
        while time.monotonic() < until:
            try:
                if self.get("/v1/models")[0] == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None:
                raise SystemExit(f"ended with {self.process.returncode}: {shlex.join(self.command)}")
            time.sleep(0.2)
        raise SystemExit(f"does not answer: {shlex.join(self.command)}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def get(self, path: str):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode()
        connection.close()
        return response.status, body

    def memory(self, key: str = "VmRSS") -> int:
        """Bytes that it has, or had at most (`VmHWM`)."""
        with open(f"/proc/{self.process.pid}/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

    def ask(self, request: dict, leaves_after: int | None = None) -> dict:
        """One request: its status, text, seconds to the first token and in all. `leaves_after` so many chunks it hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        began = time.perf_counter()
        found = {"status": 0, "text": "", "first": None, "usage": None, "began": began}
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
            response = connection.getresponse()
            found["status"] = response.status
            if request.get("stream") and response.status == 200:
                self._read(response, found, leaves_after)
            else:
                answer = json.loads(response.read())
                if response.status == 200:
                    found["text"] = answer["choices"][0]["message"]["content"]
                    found["usage"] = answer["usage"]
        except (OSError, http.client.HTTPException, ValueError) as error:
            found |= {"status": 0, "error": repr(error)}
        finally:
            connection.close()
        found["seconds"] = time.perf_counter() - began
        return found

    def _read(self, response, found: dict, leaves_after: int | None) -> None:
        chunks, done = 0, False
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                done = True
                break
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(chunk["error"])
            found["usage"] = chunk.get("usage") or found["usage"]
            for choice in chunk["choices"]:
                # A first chunk only says who speaks.
                if "content" in choice["delta"] and not (choice["delta"].get("role") and not choice["delta"]["content"]):
                    found["first"] = found["first"] or time.perf_counter() - found["began"]
                    found["text"] += choice["delta"]["content"] or ""
                    found["chunks"] = chunks = chunks + 1
            if leaves_after is not None and chunks >= leaves_after:
                found["left"] = True
                return
        if not done:
            raise ValueError("the stream broke off")
