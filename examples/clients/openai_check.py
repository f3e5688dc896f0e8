"""Tries the openai package against a running server: python openai_check.py [http://127.0.0.1:8000/v1]

Needs nothing but the package, and `reroute serve` with the built-in model (its example picture is asked about).
"""

import base64
import sys
import threading
import time
import urllib.request

import openai
from openai import OpenAI

BASE = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
ROOT = BASE.removesuffix("/v1")


def read(path):
    with urllib.request.urlopen(ROOT + path) as response:
        return response.read()


def metric(name):
    lines = read("/metrics").decode().splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " ")), 0.0)


client = OpenAI(base_url=BASE, api_key="none", max_retries=0)
model = client.models.list().data[0].id
picture = "data:image/png;base64," + base64.b64encode(read("/example.png")).decode()
shown = {"type": "image_url", "image_url": {"url": picture, "detail": "auto"}}


def about(text):
    return [{"role": "user", "content": [shown, {"type": "text", "text": text}]}]


# A chat, with what the package sends back of an earlier answer.
messages = [{"role": "system", "content": "Answer in short."}, {"role": "user", "content": "Hello"}]
first = client.chat.completions.create(model=model, messages=messages, max_tokens=8)
messages += [first.choices[0].message.model_dump(), {"role": "user", "content": "And now?"}]
second = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=8, temperature=0.7, seed=1)
print("chat:", repr(second.choices[0].message.content), second.choices[0].finish_reason, second.usage.total_tokens, "tokens")

# A picture, whole and streamed, routed.
routed = {"routing": "reroute-pdrop@128", "grounding": True, "trace": True}
asked = dict(model=model, messages=about("the large cyan square"), extra_body=routed)
whole = client.chat.completions.create(**asked)
trace = whole.model_extra["reroute"]
print("picture:", whole.choices[0].message.content, "box", trace["boxes"][0]["box"], f"FLOPs {trace['flops']['share']:.0%}")
pieces, usage = [], None
for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
    pieces += [choice.delta.content or "" for choice in chunk.choices]
    usage = chunk.usage or usage
assert "".join(pieces) == whole.choices[0].message.content
assert usage == whole.usage
print("stream:", len(pieces), "chunks, the same text and usage")

# Several answers, probabilities, a stop string.
several = client.chat.completions.create(
    model=model, messages=about("find the cross"), n=3, temperature=1.2, seed=5, logprobs=True, top_logprobs=2, stop=["]"]
)
entry = several.choices[0].logprobs.content[0]
print("n=3:", [choice.message.content for choice in several.choices], "first token", repr(entry.token), f"{entry.logprob:.3f}")

# The helper of the package that puts chunks together.
with client.chat.completions.stream(model=model, messages=about("find the cross")) as stream:
    final = stream.get_final_completion()
print("helper:", final.choices[0].message.content)


def fails(kind, **more):
    try:
        client.chat.completions.create(**{"model": model, "messages": about("x"), **more})
    except kind as error:
        print(f"{kind.__name__}:", error.status_code, error.body["param"], "-", error.body["message"][:70])
    else:
        raise SystemExit(f"{more} did not fail")


fails(openai.NotFoundError, model="gpt-4o")
fails(openai.BadRequestError, tools=[{"type": "function", "function": {"name": "f"}}])
fails(openai.BadRequestError, response_format={"type": "json_object"})
fails(openai.BadRequestError, extra_body={"routing": "reroute-pdorp@128"})
fails(openai.BadRequestError, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}])

# Many at once.
texts, started = [], time.monotonic()


def one():
    texts.append(client.chat.completions.create(**asked).choices[0].message.content)


threads = [threading.Thread(target=one) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert set(texts) == {whole.choices[0].message.content}
print("16 at once:", f"{time.monotonic() - started:.2f} s, one and the same answer")

# Whoever closes a stream is cancelled.
before = metric('reroute_requests_total{outcome="cancelled"}')
stream = client.chat.completions.create(model=model, messages=about("x"), stream=True, temperature=50, max_tokens=400, seed=5)
next(iter(stream))
stream.close()
while metric('reroute_requests_total{outcome="cancelled"}') == before or metric("reroute_requests_under_way") > 0:
    time.sleep(0.05)
print("cancel: the server has noticed")
