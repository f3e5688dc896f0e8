#!/usr/bin/env python3
"""Whether the page of `reroute serve` does what it says, in a headless Chromium against a server that runs.

    apt-get install chromium chromium-driver; pip install selenium==4.*
    reroute serve --port 8000
    python3 tests/page/check.py http://127.0.0.1:8000/ [--pictures DIR]

What the map must show is asked of the server itself; statuses that no server gives at will are put in place of `fetch`.
Any model does, the built-in one answers at once. `--pictures` writes what the page looks like.
"""

import argparse
import base64
import json
import re
import shutil
import time
import urllib.request
from pathlib import Path

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

HERE = Path(__file__).resolve().parent
SCENE = HERE.parents[1] / "crates" / "zoo" / "assets" / "scenes" / "052.png"
SCENES = json.loads((SCENE.parent / "scenes.json").read_text())
EXPRESSION = next(scene["expression"] for scene in SCENES if scene["image"] == SCENE.name)
BOX = (255, 138, 31)  # as page.js draws it
GIF = "R0lGODlhAQABAIAAAP8AAP///yH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="


class Page:
    """A browser on the page, with what the checks ask of it."""

    def __init__(self, url, pictures):
        self.url, self.pictures = url, pictures
        options = webdriver.ChromeOptions()
        for flag in ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        # Both named, so that Selenium looks for nothing on the net.
        options.binary_location = shutil.which("chromium")
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.script = self.driver.execute_script
        self.size(1440, 1000)

    def size(self, width, height, dots=1):
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": dots, "mobile": width < 600},
        )

    def media(self, **features):
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": listed})

    def open(self, fragment=""):
        self.driver.get("about:blank")
        self.driver.get(self.url + fragment)
        self.until(lambda: self.get("model").get_attribute("value"))

    def get(self, name):
        return self.driver.find_element(By.ID, name)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, what):
        WebDriverWait(self.driver, 120, 0.05).until(lambda _: what())

    def ask(self):
        self.get("send").click()
        self.done()

    def done(self):
        self.until(lambda: self.get("status").text.startswith(("Answered", "Cancelled")))

    def mode(self, value):
        self.script("document.querySelector(`[name=mode][value=${arguments[0]}]`).click()", value)

    def type(self, text):
        self.get("text").clear()
        self.get("text").send_keys(text)

    def drop(self, name, kind, content):
        """Drops a file of these bytes, in base64, on the page."""
        self.script(
            """const bytes = Uint8Array.from(atob(arguments[2]), (c) => c.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], arguments[0], { type: arguments[1] }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));""",
            name, kind, content,
        )

    def instead_of_fetch(self, body):
        """Answers completions with a function body of (request, options, real, count); `window.sent` is what was asked."""
        self.script(
            """window.sent = []; window.real ??= window.fetch;
            const answer = new Function("request", "options", "real", "count", arguments[0]);
            window.fetch = async (path, options) => {
              if (!String(path).endsWith("chat/completions")) return window.real(path, options);
              window.sent.push({ body: JSON.parse(options.body), headers: options.headers });
              return answer(JSON.parse(options.body), options, window.real, window.sent.length);
            };""",
            body,
        )

    def pixels(self, column):
        """Width, height and the colours of a map, row by row."""
        width, height, data = self.script(
            """const canvas = document.querySelectorAll(".map")[arguments[0]];
            const { width, height } = canvas;
            let text = "";
            for (const value of canvas.getContext("2d").getImageData(0, 0, width, height).data) text += String.fromCharCode(value);
            return [width, height, btoa(text)];""",
            column,
        )
        return width, height, base64.b64decode(data)

    def picture(self, name):
        if self.pictures:
            width, height = self.script("return [innerWidth, document.documentElement.scrollHeight]")
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
            (self.pictures / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))


class Server:
    """What the server says to a program."""

    def __init__(self, url):
        self.url = url
        self.routings = self.json("v1/routings")["data"]
        self.models = [model["id"] for model in self.json("v1/models")["data"]]
        routed = {}
        for routing in self.routings:
            if routing["budgets"]:
                routed.setdefault(routing["action"], f"{routing['id']}@{min(routing['budgets'])}")
        named = [r for r in self.routings if r["id"] == "reroute-pdrop"]
        self.rerouted = f"reroute-pdrop@{min(named[0]['budgets'])}" if named else routed["reroute"]
        self.removed = routed["remove"]

    def json(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def traced(self, routing, text):
        """The extension of the last chunk that a streamed answer has."""
        uri = "data:image/png;base64," + base64.b64encode(SCENE.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]
        body = {"model": self.models[0], "messages": [{"role": "user", "content": content}], "stream": True,
                "routing": routing, "trace": True, "grounding": True}
        request = urllib.request.Request(self.url + "v1/chat/completions", json.dumps(body).encode(),
                                         {"content-type": "application/json"})
        with urllib.request.urlopen(request) as response:
            for line in response:
                if line.startswith(b"data: {") and "reroute" in (event := json.loads(line[6:])):
                    return event["reroute"]
        raise AssertionError("no chunk has `reroute`")


def text_at(result, layer):
    """What the page must say of a layer."""
    states = next(s for s in result["stages"] if s["first_layer"] <= layer <= s["last_layer"])["states"][0]
    worked = f"{states.count('a') + states.count('b')} of {len(states)} active"
    names = [("b", "came back"), ("d", "deferred"), ("r", "removed"), ("n", "not in the prompt")]
    return ", ".join([worked] + [f"{states.count(s)} {name}" for s, name in names if s in states])


def opens(page, server):
    page.open()
    listed = [option.get_attribute("value") for option in page.all("#model option")]
    assert listed == server.models and page.get("model").is_enabled() == (len(listed) > 1)
    assert len(page.all("#legend li")) == 5
    assert not page.get("key-section").is_displayed()
    assert len(page.all("#routings li")) == 2
    names(page), contrast(page)
    page.picture("opening")
    page.get("send").click()
    assert "no picture" in page.get("notice").text
    page.drop("a.txt", "text/plain", base64.b64encode(b"no picture").decode())
    page.until(lambda: "cannot show a.txt" in page.get("notice").text)
    page.drop("a.gif", "image/gif", GIF)
    page.until(lambda: page.get("about-picture").text == "a.gif, 1 × 1, made a PNG here")


def finds(page, server):
    """A picture from a file, an expression by keyboard, two routings; the answer grows, the box is drawn."""
    page.open()
    page.get("file").send_keys(str(SCENE))
    page.until(lambda: page.get("about-picture").text.startswith("052.png, "))
    assert page.get("preview").is_displayed() and "052.png" in page.get("preview").get_attribute("alt")
    page.mode("find")
    for row, routing in zip(page.all("#routings li"), ["dense", server.rerouted]):
        method, _, budget = routing.partition("@")
        Select(row.find_element(By.CSS_SELECTOR, ".method")).select_by_visible_text(method)
        if budget:
            Select(row.find_element(By.CSS_SELECTOR, ".budget")).select_by_value(budget)
    page.script(
        """window.grown = {};
        new MutationObserver(() => document.querySelectorAll(".column").forEach((column, index) => {
          const place = column.querySelector(".answer");
          if (place.classList.contains("going")) (window.grown[index] ??= []).push(place.textContent.length);
        })).observe(document.getElementById("columns"), { childList: true, subtree: true, characterData: true });"""
    )
    page.type(EXPRESSION)
    page.get("text").send_keys(Keys.ENTER)
    page.done()
    assert [e.text for e in page.all(".column h3")] == ["dense", server.rerouted]
    for column in ["0", "1"]:
        lengths = page.script("return window.grown")[column]
        assert lengths == sorted(lengths) and len(set(lengths)) >= 3, lengths
    assert page.get("status").text == "Answered 2 of 2."
    assert all(e.get_attribute("aria-busy") == "false" for e in page.all(".answer"))
    for index, routing in enumerate(["dense", server.rerouted]):
        box_is_drawn(page, index, server.traced(routing, EXPRESSION))


def box_is_drawn(page, index, result):
    boxes = page.all(".column")[index].find_elements(By.CSS_SELECTOR, ".boxes li")
    if not result["boxes"]:
        assert boxes[0].text == "no box in the answer"
        return
    assert len(boxes) == len(result["boxes"])
    if len(boxes) > 1:
        return
    assert [int(n) for n in re.findall(r"\d+", boxes[0].text)[1:]] == [round(v) for v in result["boxes"][0]["box"]]
    width, height, data = page.pixels(index)
    image = result["images"][0]
    x0, y0 = min(0, image["area"][0]), min(0, image["area"][1])
    scale = width / (max(image["width"], image["area"][2]) - x0)
    lit = [i for i in range(width * height) if tuple(data[4 * i : 4 * i + 3]) == BOX]
    xs, ys = [i % width for i in lit], [i // width for i in lit]
    drawn = [min(xs), min(ys), max(xs), max(ys)]
    true = [(v - o) * scale for v, o in zip(result["boxes"][0]["box"], [x0, y0, x0, y0])]
    # A box at the rim is cut there.
    true = [min(max(v, 0), limit) for v, limit in zip(true, [width, height, width, height])]
    assert all(abs(a - b) < 4 for a, b in zip(drawn, true)), (drawn, true)


def moves_through_layers(page, server):
    """The slider by keyboard: what each map says and shows is what the server traced."""
    result = server.traced(server.rerouted, EXPRESSION)
    slider = page.get("layer")
    slider.send_keys(Keys.HOME)
    looks = set()
    for layer in range(result["layers"]):
        assert page.get("layer-shown").text == str(layer)
        said = page.all(".counts")[1].text
        assert said == f"layer {layer}: {text_at(result, layer)}", (said, text_at(result, layer))
        assert f"{server.rerouted}: {text_at(result, layer)}" in slider.get_attribute("aria-valuetext")
        assert said in page.all(".map")[1].get_attribute("aria-label")
        looks.add(page.pixels(1)[2])
        slider.send_keys(Keys.ARROW_RIGHT)
    stages = {s["states"][0].replace("b", "a") for s in result["stages"]}
    assert len(looks) >= len(stages) > 1
    tokens_are_veiled(page, result)
    page.script("document.querySelectorAll('.depth svg')[1].dispatchEvent(new PointerEvent('pointerdown', { clientX: -1 }))")
    assert page.get("layer-shown").text == "0"


def below(x, y, box):
    """Whether a place is below a box's line or its number."""
    def within(rim, right=box[2], bottom=box[3]):
        return box[0] - rim < x < right + rim and box[1] - rim < y < bottom + rim

    return within(5) and not within(-5) or within(0, box[0] + 20, box[1] + 20)


def tokens_are_veiled(page, result):
    """In the last layer a deferred token is darker than without the map, an active one is as it was."""
    width, height, veiled = page.pixels(1)
    page.get("tokens").click()
    plain = page.pixels(1)[2]
    page.get("tokens").click()
    assert page.pixels(1)[2] == veiled
    image = result["images"][0]
    left, top, right, bottom = image["area"]
    x0, y0 = min(0, left), min(0, top)
    scale = width / (max(image["width"], right) - x0)
    # The lines of boxes, and their numbers, lie above the map.
    boxes = [[(v - o) * scale for v, o in zip(box["box"], [x0, y0, x0, y0])] for box in result["boxes"]]
    seen = {"a": 0, "d": 0}
    for index, state in enumerate(result["stages"][-1]["states"][0]):
        column, row = index % image["columns"], index // image["columns"]
        x = int((left + (right - left) * (column + 0.5) / image["columns"] - x0) * scale)
        y = int((top + (bottom - top) * (row + 0.5) / image["rows"] - y0) * scale)
        if state not in seen or any(below(x, y, box) for box in boxes):
            continue
        at = 4 * (y * width + x)
        before, after = sum(plain[at : at + 3]), sum(veiled[at : at + 3])
        seen[state] += 1
        assert (before == after) if state == "a" else (after < before * 0.6 + 30), (state, before, after)
    assert seen["a"] and seen["d"], seen


def shows_figures(page, server):
    result = server.traced(server.rerouted, EXPRESSION)
    shares = {"FLOPs": result["flops"]["share"], "KV cache": result["kv_bytes"] / result["kv_bytes_dense"],
              "Tokens": result["average_visual_tokens"] / result["visual_tokens"]}
    rows = page.all(".column")[1].find_elements(By.CSS_SELECTOR, ".figures tr")
    assert [row.find_element(By.TAG_NAME, "th").text for row in rows] == [*shares, "Vision", "Prefill", "Decode"]
    for row, share in zip(rows, shares.values()):
        bar = row.find_element(By.CSS_SELECTOR, ".bar")
        fill = bar.find_element(By.TAG_NAME, "span")
        assert abs(fill.size["width"] / bar.size["width"] - share) < 0.02
    assert "of dense" in rows[4].text


def is_shared_by_address(page, server):
    fragment = page.driver.current_url.split("#")[1]
    assert "base64" not in fragment and len(fragment) < 300
    page.open("#" + fragment)
    assert page.get("text").get_attribute("value") == EXPRESSION
    assert page.script("return document.querySelector('[name=mode]:checked').value") == "find"
    assert routings(page) == ["dense", server.rerouted]
    page.open("#mode=ask&text=x&routing=no-such%40128&routing=dense&routing=" + server.removed.replace("@", "%40"))
    assert routings(page) == ["dense", server.removed]
    for _ in range(4):
        if page.get("add").is_displayed():
            page.get("add").click()
    assert len(set(routings(page))) == len(routings(page)) == 4
    page.all("#routings .drop")[3].click()
    assert len(routings(page)) == 3


def routings(page):
    return page.script("return new URLSearchParams(location.hash.slice(1)).getAll('routing')")


def asks(page, server):
    """Words for an answer, of the example if there is one, under three routings."""
    page.open("#text=what+is+this&routing=dense&routing=" + "&routing=".join([server.rerouted, server.removed]).replace("@", "%40"))
    page.get("example").click()
    page.until(lambda: page.get("about-picture").is_displayed() or page.get("notice").is_displayed())
    if not page.get("about-picture").is_displayed():
        assert "no example" in page.get("notice").text
        page.get("file").send_keys(str(SCENE))
    page.ask()
    assert page.get("status").text == "Answered 3 of 3."
    assert page.get("asked").text == "what is this"
    assert all(answer.text for answer in page.all(".answer"))


def cancels(page, _):
    page.instead_of_fetch(
        """return new Promise((_, reject) =>
          options.signal.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError"))));"""
    )
    for stop in [lambda: page.get("cancel").click(), lambda: ActionChains(page.driver).send_keys(Keys.ESCAPE).perform()]:
        page.get("send").click()
        page.until(lambda: page.get("cancel").get_attribute("aria-disabled") == "false")
        stop()
        page.done()
        assert page.get("status").text == "Cancelled."
        assert [page.get(name).get_attribute("aria-disabled") for name in ("send", "cancel")] == ["false", "true"]
        assert "Not asked." in [answer.text for answer in page.all(".answer")]


def shows_errors(page, _):
    error = """return new Response(JSON.stringify({ error: { message: "said by %d", type: "t", param: null, code: null } }),
      { status: %d, headers: { "retry-after": "7" } });"""
    says = {400: "Change the question", 401: "API key", 404: "Load this page again", 413: "scale", 429: "wait 7 s", 503: "in a moment", 500: "fault"}
    for status, remedy in says.items():
        page.instead_of_fetch(error % (status, status))
        page.ask()
        shown = page.all(".column .notice")[0].text
        assert f"said by {status}" in shown and remedy in shown, shown
        # What concerns one routing does not keep the others from being asked.
        assert len(page.script("return window.sent")) == (3 if status in (400, 404, 500) else 1)
    names(page), contrast(page)
    page.picture("error")
    page.instead_of_fetch("throw new TypeError('gone')")
    page.ask()
    assert "cannot be reached" in page.all(".column .notice")[0].text
    half = """'data: {"choices":[{"delta":{"content":"half"}}]}\\n\\n'"""
    torn = """new ReadableStream({ start(c) {
      c.enqueue(new TextEncoder().encode(%s));
      setTimeout(() => c.error("torn"), 200);
    } })""" % half
    for body in [half, torn]:
        page.instead_of_fetch(f"return new Response({body})")
        page.ask()
        assert "broke off" in page.all(".column .notice")[0].text and page.all(".answer")[0].text == "half"
    page.instead_of_fetch("return new Response('<h1>Bad gateway</h1>', { status: 502 })")
    page.ask()
    assert "Bad gateway" in page.all(".column .notice")[0].text
    # The server's own words: a routing that it does not know.
    page.instead_of_fetch("return real('v1/chat/completions', { ...options, body: JSON.stringify({ ...request, routing: 'no-such@1' }) });")
    page.ask()
    assert "no-such" in page.all(".column .notice")[0].text, page.all(".column .notice")[0].text
    page.instead_of_fetch("return real('v1/chat/completions', options);")
    page.all(".column .notice button")[0].click()
    page.until(lambda: page.get("status").text == "Answered 1 of 1.")
    assert not page.all(".column .notice")[0].is_displayed()


def takes_a_key(page, _):
    page.instead_of_fetch(
        """if (options.headers.authorization === "Bearer secret") return real("v1/chat/completions", options);
        return new Response(JSON.stringify({ error: { message: "a key is missing" } }), { status: 401 });"""
    )
    page.ask()
    assert page.get("key").is_displayed() and page.script("return document.activeElement.id") == "key"
    page.get("key").send_keys("secret", Keys.ENTER)
    page.ask()
    assert page.get("status").text.startswith("Answered 3")
    kept = page.script("return [localStorage.length, sessionStorage.length, document.cookie, location.href.includes('secret')]")
    assert kept == [0, 0, "", False], kept


def scales_only_if_agreed(page, _):
    large = page.script("const c = document.createElement('canvas'); c.width = 1000; c.height = 600; c.getContext('2d').fillRect(0, 0, 9, 9); return c.toDataURL().split(',')[1]")
    page.drop("large.png", "image/png", large)
    page.until(lambda: page.get("about-picture").text == "large.png, 1000 × 600")
    page.instead_of_fetch(
        """if (count > 1) return real("v1/chat/completions", options);
        return new Response(JSON.stringify({ error: { message: "too large" } }), { status: 413 });"""
    )
    page.ask()
    button = page.all(".column .notice button")[0]
    assert button.text == "Scale it from 1000 × 600 to 768 × 461 here, and ask again"
    assert page.get("about-picture").text == "large.png, 1000 × 600"
    button.click()
    page.until(lambda: page.get("status").text.startswith("Answered 3"))
    assert page.get("about-picture").text == "large.png, 768 × 461, scaled down here from 1000 × 600"
    first, second = [page.script("return window.sent[arguments[0]].body.messages[0].content[0].image_url.url", i) for i in (0, 1)]
    assert first.endswith(large) and first != second


def works_by_keyboard(page, _):
    """Tab reaches every control, and shows where it is."""
    page.script("document.getElementById('skip').focus()")
    reached = []
    for _ in range(60):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        name, outlined = page.script(
            """const at = document.activeElement;
            const shown = [at, at.nextElementSibling, at.parentElement].filter(Boolean);
            return [at.id || at.name || at.className || at.tagName, shown.some((e) => getComputedStyle(e).outlineStyle !== "none")];"""
        )
        assert outlined, f"{name} does not show its focus"
        reached.append(name)
        if name == "A":
            break
    wanted = ["file", "example", "mode", "text", "method", "budget", "add", "send", "cancel", "layer", "tokens"]
    missed = [name for name in wanted if name not in reached]
    assert not missed, (missed, reached)


def looks(page, _):
    """Light and dark, wide and narrow: names, contrast, sharp maps, nothing wider than the screen, nothing that moves."""
    for scheme in ["light", "dark"]:
        page.media(prefers_color_scheme=scheme)
        for width, dots in [(1440, 1), (800, 1), (375, 2), (320, 3)]:
            page.size(width, 900, dots)
            time.sleep(0.3)
            names(page), contrast(page)
            assert page.script("return document.documentElement.scrollWidth <= innerWidth"), f"{width} wide: scrolls sideways"
            sharp = page.script("return [...document.querySelectorAll('.map')].every((c) => Math.abs(c.width - c.clientWidth * devicePixelRatio) < 1)")
            assert sharp, f"maps are not drawn for {dots} dots a pixel"
            page.picture(f"{scheme}-{width}")
    page.media(prefers_reduced_motion="reduce")
    page.script("document.querySelector('.answer').classList.add('going')")
    assert page.script("return getComputedStyle(document.querySelector('.answer'), '::after').animationName") == "none"
    page.size(1440, 1000)


def names(page):
    """Every control, picture and region has a name that a screen reader says."""
    wanted = {"button", "link", "textbox", "combobox", "radio", "checkbox", "slider", "image", "img", "region", "article", "table"}
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored") and "role" in n]
    nameless = [role for role, name in told if role in wanted and not name.strip()]
    assert not nameless, nameless
    assert sum(role == "button" for role, _ in told) >= 4
    levels = page.script("return [...document.querySelectorAll('h1,h2,h3,h4')].filter((h) => h.checkVisibility()).map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:])), levels
    assert page.script("return document.documentElement.lang") == "en"


def contrast(page):
    """Text against what is behind it: 4.5 at least, as WCAG 2.2 counts (1.4.3), but for what is disabled."""
    weak = page.script(
        """const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const rgba = (colour) => {
          brush.clearRect(0, 0, 1, 1);
          brush.fillStyle = colour;
          brush.fillRect(0, 0, 1, 1);
          return [...brush.getImageData(0, 0, 1, 1).data];
        };
        const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = (e) => {
          for (; e; e = e.parentElement) {
            const colour = rgba(getComputedStyle(e).backgroundColor);
            if (colour[3] === 255) return colour;
          }
          return [255, 255, 255];
        };
        const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || e.matches("textarea, select");
        const found = [];
        for (const e of document.querySelectorAll("body *")) {
          if (!own(e) || !e.checkVisibility({ visibilityProperty: true }) || e.closest(":disabled, [aria-disabled=true], .unseen, option, template, script")) continue;
          for (const colour of [getComputedStyle(e).color, e.placeholder ? getComputedStyle(e, "::placeholder").color : null]) {
            if (!colour) continue;
            const [a, b] = [light(rgba(colour)), light(behind(e))];
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            if (ratio < 4.5) found.push([e.tagName, e.className, e.textContent.slice(0, 30), ratio]);
          }
        }
        return found;"""
    )
    assert not weak, weak


def stays_here(page, _):
    """No request leaves the server, nothing is blocked, nothing is complained of but the refusals that were asked for."""
    outside, asked = [], 0
    for entry in page.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked += 1
            address = message["params"]["request"]["url"]
            if not address.startswith((page.url, "data:", "blob:", "about:")):
                outside.append(address)
    assert asked > 10 and not outside, outside
    complaints = [e["message"] for e in page.driver.get_log("browser") if e["level"] == "SEVERE"]
    unasked = [c for c in complaints if not ("chat/completions" in c and "status of 4" in c)]
    assert not unasked, unasked
    with urllib.request.urlopen(page.url) as response:
        assert "default-src 'self'" in response.headers["content-security-policy"]


CHECKS = [opens, finds, moves_through_layers, shows_figures, is_shared_by_address, asks, works_by_keyboard, looks,
          cancels, shows_errors, takes_a_key, scales_only_if_agreed, stays_here]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--pictures", type=Path)
    args = parser.parse_args()
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    url = args.url.rstrip("/") + "/"
    server, page = Server(url), Page(url, args.pictures)
    try:
        for check in CHECKS:
            began = time.monotonic()
            check(page, server)
            print(f"{check.__name__.replace('_', ' ')}: ok ({time.monotonic() - began:.1f} s)")
    finally:
        page.driver.quit()


if __name__ == "__main__":
    main()
