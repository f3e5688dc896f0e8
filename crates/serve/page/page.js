// The page of `reroute serve`: a picture and a question, asked under several routings, and for each the answer,
// its boxes, which visual tokens every layer worked on, and what that cost. It talks to this server only.

const MOST_ROUTINGS = 4;
// What the server decodes; anything else that a browser shows is made a PNG here.
const DECODED = ["image/png", "image/jpeg", "image/webp"];
// What a picture is scaled down to, its longer side in pixels, one step for each agreement.
const SIDES = [4096, 2048, 1280, 768, 512, 256, 128];
// The question that is known to have an answer on the built-in scene.
const EXAMPLE = { mode: "find", text: "the large cyan square" };

const KINDS = {
  none: "Nothing is routed",
  reroute: "Deferred tokens can come back",
  remove: "Tokens are removed for good",
  reduce: "Fewer tokens enter the decoder",
};
const STATES = [
  ["a", "active", "the layer works on it"],
  ["b", "came back", "active, and had been deferred"],
  ["d", "deferred", "goes around the layer, and is a candidate again"],
  ["r", "removed", "gone for the layers that follow"],
  ["n", "not in the prompt", "never entered the decoder"],
];
const MODES = {
  ask: { label: "A question about the picture", hint: "What is on the table?", send: "Ask", asked: (text) => text },
  find: { label: "What to find in the picture", hint: "the red cross", send: "Find", asked: (text) => `Find ${text}` },
};

const page = {
  model: null, // its name
  known: new Map(), // what /v1/routings says, by id
  usual: "dense",
  key: "", // in memory only
  picture: null, // { name, blob, bitmap, url, width, height }
  columns: [], // what was asked, one for each routing
  layer: 0,
  running: null, // the AbortController of what is being asked
};

const $ = (id) => document.getElementById(id);
const make = (tag, text, name) => Object.assign(document.createElement(tag), { textContent: text ?? "", className: name ?? "" });
const fromTemplate = (id) => $(id).content.firstElementChild.cloneNode(true);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---------------------------------------------------------------- the server

// An answer that is no success, with its status.
class Refusal extends Error {
  constructor(status, message, after) {
    super(message);
    Object.assign(this, { status, after });
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (page.key) headers.authorization = `Bearer ${page.key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text();
  let message = text.slice(0, 500);
  try {
    message = JSON.parse(text).error.message;
  } catch { /* what a proxy between says is shown as it is */ }
  return new Refusal(response.status, message || response.statusText, response.headers.get("retry-after"));
}

// The events of a stream of them, each as the object that it carries.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    rest += value;
    const lines = rest.split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(event.error.code ?? 500, event.error.message);
      yield event;
    }
  }
  throw new Refusal(0, "The answer broke off before its end.");
}

const asDataUri = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Refusal(-1, "The picture cannot be read any more; choose it again."));
  reader.readAsDataURL(blob);
});

async function requestFor({ routing, mode, text, picture }) {
  const content = [{ type: "image_url", image_url: { url: await asDataUri(picture.blob) } }, { type: "text", text }];
  const messages = [{ role: "user", content }];
  return { model: page.model, messages, stream: true, stream_options: { include_usage: true }, routing, trace: true, grounding: mode === "find" };
}

// ---------------------------------------------------------------- what went wrong

const REMEDIES = {
  "-1": "",
  0: "See whether reroute serve still runs, and ask again.",
  400: "Change the question, the picture or the routing accordingly, and ask again.",
  401: "Give the API key at the left, and ask again.",
  404: "Load this page again: it then knows what the server has.",
  413: "Agree to scale the picture down here, or choose a smaller one.",
  429: "The server has too much to do. Ask again in a moment.",
  503: "The server is starting, stopping or out of memory. Ask again in a moment.",
};

function showError(place, error, actions) {
  const later = error.after ? ` It asks to wait ${error.after} s.` : "";
  const remedy = (REMEDIES[error.status] ?? "This is a fault of the server; what it printed says more.") + later;
  place.replaceChildren(make("strong", error.message), remedy, ...actions.filter(Boolean));
  place.hidden = false;
}

function action(text, run) {
  const button = Object.assign(make("button", text), { type: "button" });
  button.addEventListener("click", run);
  return button;
}

function showKeyField() {
  $("key-section").hidden = false;
  $("key").focus();
}

// A button that scales the picture down and asks again; nothing is scaled before it is pressed.
function offerSmaller(picture) {
  const longer = Math.max(picture.width, picture.height);
  const side = SIDES.find((side) => side < longer);
  if (!side || page.picture !== picture) return null;
  const [width, height] = scaled(picture, side);
  return action(`Scale it from ${size(picture)} to ${width} × ${height} here, and ask again`, async () => {
    setPicture(await redrawn(picture, width, height), `, scaled down here from ${size(picture)}`);
    submit();
  });
}

// ---------------------------------------------------------------- the picture

const size = ({ width, height }) => `${width} × ${height}`;
const scaled = ({ width, height }, side) => [width, height].map((edge) => Math.max(1, Math.round((edge * side) / Math.max(width, height))));

// A picture drawn anew at a size: as JPEG if it was one, otherwise without loss.
async function redrawn({ name, blob, bitmap }, width, height) {
  const canvas = Object.assign(make("canvas"), { width, height });
  const brush = canvas.getContext("2d");
  brush.imageSmoothingQuality = "high";
  brush.drawImage(bitmap, 0, 0, width, height);
  const type = blob.type === "image/jpeg" ? "image/jpeg" : "image/png";
  const drawn = await new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));
  return { name, blob: drawn, bitmap: await createImageBitmap(drawn), width, height };
}

async function takeFile(file) {
  if (!file) return;
  $("notice").hidden = true;
  try {
    const bitmap = await createImageBitmap(file);
    const { width, height } = bitmap;
    const picture = { name: file.name || "pasted picture", blob: file, bitmap, width, height };
    if (DECODED.includes(file.type)) setPicture(picture, "");
    else setPicture(await redrawn(picture, width, height), ", made a PNG here");
  } catch {
    showError($("notice"), new Refusal(-1, `This browser cannot show ${file.name || "it"} as a picture. Choose a PNG, JPEG or WebP file.`), []);
  }
}

function setPicture(picture, how) {
  if (page.picture) URL.revokeObjectURL(page.picture.url);
  page.picture = Object.assign(picture, { url: URL.createObjectURL(picture.blob) });
  Object.assign($("preview"), { src: picture.url, alt: `The picture to ask about: ${picture.name}`, hidden: false });
  $("invite").hidden = true;
  $("well").classList.add("full");
  $("about-picture").textContent = `${picture.name}, ${size(picture)}${how}`;
  $("about-picture").hidden = false;
  $("status").textContent = `The picture is ${picture.name}, ${size(picture)}.`;
}

async function takeExample() {
  $("notice").hidden = true;
  try {
    const blob = await (await call("example.png")).blob();
    await takeFile(new File([blob], "example.png", { type: "image/png" }));
    if ($("text").value.trim() === "") restore({ ...EXAMPLE, routings: chosen() });
  } catch (error) {
    showError($("notice"), error.status === 404 ? new Refusal(-1, "This server has no example. Choose a picture of your own.") : error, []);
  }
}

function acceptDrops() {
  const over = (is) => $("well").classList.toggle("over", is);
  addEventListener("dragover", (event) => { event.preventDefault(); over(true); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) over(false); });
  addEventListener("drop", (event) => { event.preventDefault(); over(false); takeFile(event.dataTransfer.files[0]); });
  addEventListener("paste", (event) => takeFile([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
  $("file").addEventListener("change", () => { takeFile($("file").files[0]); $("file").value = ""; });
}

// ---------------------------------------------------------------- the question and its address

const mode = () => document.querySelector("[name=mode]:checked").value;

function showMode() {
  const { label, hint, send } = MODES[mode()];
  $("text-label").textContent = label;
  $("text").placeholder = hint;
  $("send").textContent = send;
}

function remember() {
  const state = new URLSearchParams({ mode: mode(), text: $("text").value });
  for (const routing of chosen()) state.append("routing", routing);
  history.replaceState(null, "", `#${state}`);
}

function remembered() {
  const state = new URLSearchParams(location.hash.slice(1));
  return { mode: state.get("mode"), text: state.get("text") ?? "", routings: state.getAll("routing") };
}

function restore(state) {
  const radio = document.querySelector(`[name=mode][value=${state.mode === "find" ? "find" : "ask"}]`);
  radio.checked = true;
  $("text").value = state.text;
  const routings = state.routings.filter((routing) => isKnown(routing)).slice(0, MOST_ROUTINGS);
  $("routings").replaceChildren();
  for (const routing of routings.length ? routings : usualRoutings()) addRouting(routing);
  showMode();
  remember();
}

// ---------------------------------------------------------------- the choice of routings

const parts = (routing) => routing.split(/@(.*)/);

function isKnown(routing) {
  const [id, budget] = parts(routing);
  const known = page.known.get(id);
  return Boolean(known) && (known.budgets.length ? known.budgets.map(String).includes(budget) : budget === undefined);
}

// Beside what the server does without being asked, the method that the project is named after.
function usualRoutings() {
  const own = ["reroute-pdrop@128", "reroute-pdrop@192"].find(isKnown);
  return [...new Set([isKnown("dense") ? "dense" : page.usual, own ?? page.usual])];
}

const routingOf = (row) => {
  const [method, budget] = [row.querySelector(".method").value, row.querySelector(".budget")];
  return budget.hidden ? method : `${method}@${budget.value}`;
};
const chosen = () => [...$("routings").children].map(routingOf);

function addRouting(routing) {
  const row = fromTemplate("routing-row");
  const [method, budget] = [row.querySelector(".method"), row.querySelector(".budget")];
  for (const [kind, title] of Object.entries(KINDS)) {
    const ids = [...page.known.values()].filter(({ action }) => action === kind).map(({ id }) => new Option(id));
    if (ids.length === 0) continue;
    const group = Object.assign(make("optgroup"), { label: title });
    group.append(...ids);
    method.append(group);
  }
  const [id, wanted] = parts(routing);
  method.value = id;
  fillBudgets(budget, id, wanted);
  method.addEventListener("change", () => { fillBudgets(budget, method.value, budget.value); changedRoutings(); });
  budget.addEventListener("change", changedRoutings);
  row.querySelector(".drop").addEventListener("click", () => { row.remove(); changedRoutings(); $("add").focus(); });
  $("routings").append(row);
  nameRoutings();
}

function fillBudgets(budget, id, wanted) {
  const { budgets } = page.known.get(id) ?? { budgets: [] };
  budget.replaceChildren(...budgets.map((count) => new Option(`@${count}`, count)));
  budget.hidden = budgets.length === 0;
  if (budgets.map(String).includes(String(wanted))) budget.value = wanted;
  else if (budgets.includes(128)) budget.value = 128;
}

function changedRoutings() {
  nameRoutings();
  remember();
}

function nameRoutings() {
  const rows = [...$("routings").children];
  rows.forEach((row, index) => {
    row.querySelector(".method").ariaLabel = `Method of routing ${index + 1}`;
    row.querySelector(".budget").ariaLabel = `Budget of routing ${index + 1}, visual tokens of 576`;
    row.querySelector(".drop").ariaLabel = `Take away routing ${index + 1}, ${routingOf(row)}`;
    row.querySelector(".drop").disabled = rows.length === 1;
  });
  $("add").hidden = rows.length >= MOST_ROUTINGS;
}

// One more row: the first budget of the last method that is not there yet, or whatever is not.
function proposeRouting() {
  const there = chosen();
  const [id] = parts(there.at(-1));
  const all = [...page.known.values()].flatMap(({ id, budgets }) => (budgets.length ? budgets.map((budget) => `${id}@${budget}`) : [id]));
  const free = all.filter((routing) => !there.includes(routing));
  addRouting(free.find((routing) => parts(routing)[0] === id) ?? free[0] ?? page.usual);
  changedRoutings();
  $("routings").lastElementChild.querySelector(".method").focus();
}

// ---------------------------------------------------------------- asking

async function submit() {
  const text = $("text").value.trim();
  if (page.running) return;
  $("notice").hidden = true;
  if (!page.picture) return missing("There is no picture yet. Choose one, drop or paste it, or take the example.", $("file"));
  if (!text) return missing("There is no question yet. Write what to ask or to find.", $("text"));
  if (page.model === null) await connect();
  if (page.model === null) return;
  const question = { mode: mode(), text, picture: page.picture };
  const routings = [...new Set(chosen())];
  $("asked").textContent = MODES[question.mode].asked(text);
  $("opening").hidden = true;
  page.columns = routings.map((routing) => newColumn({ ...question, routing }));
  $("columns").replaceChildren(...page.columns.map(({ element }) => element));
  showLayers();
  if ($("bench").getBoundingClientRect().top > innerHeight / 2) $("bench").scrollIntoView();
  askAll(page.columns);
}

function missing(message, place) {
  showError($("notice"), new Refusal(-1, message), []);
  place.focus();
}

// One after the other, so that their times can be compared.
async function askAll(columns) {
  const running = new AbortController();
  page.running = running;
  $("cancel").disabled = false;
  $("send").disabled = true;
  for (const column of columns) showAnswer(column, "waiting");
  for (const [index, column] of columns.entries()) {
    $("status").textContent = `Asking ${column.routing}, ${index + 1} of ${columns.length}.`;
    const error = await askOne(column, running.signal);
    // What would refuse the others as well is asked once.
    if (error && ![400, 404, 500].includes(error.status)) {
      columns.slice(index + 1).forEach((rest) => showAnswer(rest, "skipped"));
      break;
    }
  }
  page.running = null;
  $("cancel").disabled = true;
  $("send").disabled = false;
  const answered = columns.filter(({ result }) => result).length;
  $("status").textContent = running.signal.aborted ? "Cancelled." : `Answered ${answered} of ${columns.length}.`;
}

async function askOne(column, signal) {
  try {
    const body = JSON.stringify(await requestFor(column));
    showAnswer(column, "going");
    const headers = { "content-type": "application/json" };
    const response = await call("v1/chat/completions", { method: "POST", headers, body, signal });
    for await (const event of events(response)) take(column, event);
    showAnswer(column, "done");
    return null;
  } catch (error) {
    const stopped = signal.aborted ? new Refusal(-1, "Cancelled.") : error instanceof Refusal ? error : new Refusal(500, String(error));
    failed(column, stopped);
    return stopped;
  }
}

function take(column, event) {
  const choice = event.choices?.[0];
  if (choice?.delta?.content) {
    column.text += choice.delta.content;
    showAnswer(column, "going");
  }
  if (choice?.finish_reason === "length") column.cut = true;
  if (event.usage) column.tokens = event.usage.completion_tokens;
  if (event.reroute) {
    column.result = event.reroute;
    showLayers();
  }
  if (event.reroute || event.usage) page.columns.forEach(showFigures);
}

function failed(column, error) {
  showAnswer(column, "done");
  if (error.status === 401) showKeyField();
  const again = action("Ask this again", () => {
    if (page.running) return;
    Object.assign(column, { text: "", result: null, tokens: null, cut: false });
    column.find(".notice").hidden = true;
    showLayers();
    askAll([column]);
  });
  const smaller = error.status === 413 ? offerSmaller(column.picture) : null;
  showError(column.find(".notice"), error, [smaller ?? again]);
}

// ---------------------------------------------------------------- a column: its answer

function newColumn(question) {
  const element = fromTemplate("column");
  const column = { ...question, element, text: "", result: null, tokens: null, cut: false, find: (part) => element.querySelector(part) };
  column.find("h3").textContent = question.routing;
  column.find(".kind").textContent = KINDS[page.known.get(parts(question.routing)[0])?.action] ?? "";
  element.ariaLabel = question.routing;
  for (const type of ["pointerdown", "pointermove"]) column.find(".depth svg").addEventListener(type, pointAt);
  new ResizeObserver(() => paint(column)).observe(column.find(".map"));
  return column;
}

const WAITS = { waiting: "Waits for its turn.", skipped: "Not asked." };

function showAnswer(column, state) {
  const place = column.find(".answer");
  place.className = `answer ${state in WAITS ? "waiting" : state}`;
  // A screen reader says the answer once it is whole, not word by word.
  place.ariaBusy = String(state === "going");
  const cut = column.cut && state === "done" ? " … (cut: the longest answer is reached)" : "";
  place.textContent = (WAITS[state] ?? column.text) + cut;
  const boxes = column.result?.boxes ?? [];
  const none = column.mode === "find" && state === "done" && column.result && boxes.length === 0 ? [make("li", "no box in the answer")] : [];
  column.find(".boxes").replaceChildren(...boxes.map((box, index) => make("li", boxText(box, index))), ...none);
  column.find(".boxes").hidden = boxes.length + none.length === 0;
}

const boxText = ({ box }, index) => {
  const [x0, y0, x1, y1] = box.map(Math.round);
  return `box ${index + 1}: ${x0}, ${y0} to ${x1}, ${y1}`;
};

// ---------------------------------------------------------------- a column: its figures

const number = (value, unit) => {
  const powers = ["", "k", "M", "G", "T", "P"];
  const power = Math.max(0, Math.min(powers.length - 1, Math.floor(Math.log10(Math.max(value, 1)) / 3)));
  return `${(value / 1000 ** power).toPrecision(3)} ${powers[power]}${unit}`;
};
const bytes = (value) => {
  const power = value >= 2 ** 30 ? 3 : value >= 2 ** 20 ? 2 : 1;
  return `${(value / 1024 ** power).toFixed(value / 1024 ** power < 10 ? 2 : 1)} ${["", "KiB", "MiB", "GiB"][power]}`;
};
const duration = (ms) => (ms >= 1000 ? `${(ms / 1000).toPrecision(3)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`);
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

// What a time is measured against: the same one of dense if it was asked, otherwise the longest.
function yardstick(part) {
  const times = page.columns.filter(({ result }) => result).map(({ routing, result }) => [routing, result.timings_ms[part]]);
  const [name, time] = times.find(([routing]) => routing === "dense") ?? times.reduce((a, b) => (b[1] > a[1] ? b : a));
  return { name, time };
}

function showFigures(column) {
  if (!column.result) return;
  const { flops, kv_bytes, kv_bytes_dense, average_visual_tokens, visual_tokens, timings_ms } = column.result;
  const rows = [
    figure("FLOPs", number(flops.decoder, ""), flops.share, `${percent(flops.share)} of dense`),
    figure("KV cache", bytes(kv_bytes), kv_bytes / kv_bytes_dense, `${percent(kv_bytes / kv_bytes_dense)} of dense`),
    figure("Tokens", average_visual_tokens.toFixed(1), average_visual_tokens / visual_tokens, `mean, of ${visual_tokens}`),
  ];
  for (const part of ["vision", "prefill", "decode"]) {
    const { name, time } = yardstick(part);
    const share = time > 0 ? timings_ms[part] / time : 1;
    const tokens = part === "decode" && column.tokens ? `, ${column.tokens} tokens` : "";
    const compared = name === column.routing ? tokens.slice(2) : `${percent(share)} of ${name}${tokens}`;
    rows.push(figure(part[0].toUpperCase() + part.slice(1), duration(timings_ms[part]), share, compared));
  }
  column.find(".figures tbody").replaceChildren(...rows);
  column.find(".figures").hidden = false;
}

function figure(name, value, share, compared) {
  const row = make("tr");
  const [cell, bar, fill] = [make("td", value, "value"), make("span", "", "bar"), make("span")];
  fill.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  bar.append(fill);
  cell.append(bar);
  row.append(Object.assign(make("th", name), { scope: "row" }), make("td", compared, "compared"), cell);
  return row;
}

// ---------------------------------------------------------------- layers

const stageAt = (result, layer) => result.stages.find(({ first_layer, last_layer }) => first_layer <= layer && layer <= last_layer);

// How many tokens of each state a layer sees, over all pictures.
function countsAt(result, layer) {
  const counts = { a: 0, b: 0, d: 0, r: 0, n: 0 };
  const states = stageAt(result, layer)?.states ?? result.images.map(({ rows, columns }) => "a".repeat(rows * columns));
  for (const state of states.join("")) counts[state] += 1;
  return { ...counts, worked: counts.a + counts.b, all: states.join("").length };
}

function textAt(result, layer) {
  const { worked, all, b, d, r, n } = countsAt(result, layer);
  const rest = [[b, "came back"], [d, "deferred"], [r, "removed"], [n, "not in the prompt"]].filter(([count]) => count > 0);
  return [`${worked} of ${all} active`, ...rest.map(([count, name]) => `${count} ${name}`)].join(", ");
}

// Everything that depends on the layer that is looked at.
function showLayers() {
  const answered = page.columns.filter(({ result }) => result);
  const layers = Math.max(1, ...answered.map(({ result }) => result.layers));
  page.layer = Math.min(page.layer, layers - 1);
  $("strip").hidden = answered.length === 0;
  Object.assign($("layer"), { max: layers - 1, value: page.layer });
  $("layer-shown").textContent = page.layer;
  const texts = answered.map(({ routing, result }) => `${routing}: ${textAt(result, page.layer)}`);
  $("layer").setAttribute("aria-valuetext", `layer ${page.layer} of 0 to ${layers - 1}. ${texts.join(". ")}`);
  page.columns.forEach(showLayer);
}

function showLayer(column) {
  const { result, picture } = column;
  const text = result ? `layer ${page.layer}: ${textAt(result, page.layer)}` : "";
  column.find(".counts").textContent = text;
  const boxes = (result?.boxes ?? []).map(boxText);
  column.find(".map").ariaLabel = [`${picture.name} under ${column.routing}`, text, ...boxes].filter(Boolean).join("; ");
  drawDepth(column);
  paint(column);
}

// Steps over all layers: how many tokens each worked on, and where the reader is.
function drawDepth({ find, result }) {
  find(".depth").hidden = !result;
  if (!result) return;
  const { layers } = result;
  const steps = Array.from({ length: layers }, (_, layer) => {
    const { worked, all } = countsAt(result, layer);
    return `V${1 - worked / Math.max(1, all)}H${layer + 1}`;
  });
  const here = `M${page.layer + 0.5} 0V1`;
  const shapes = [["whole", `M0 0H${layers}V1H0Z`], ["worked", `M0 1${steps.join("")}V1Z`], ["here", here]];
  find(".depth svg").setAttribute("viewBox", `0 0 ${layers} 1`);
  find(".depth svg").replaceChildren(...shapes.map(([name, d]) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", name);
    path.setAttribute("d", d);
    return path;
  }));
  find(".depth span:first-child").textContent = 0;
  find(".depth span:last-child").textContent = layers - 1;
}

// What the slider does, for a pointer on the steps.
function pointAt(event) {
  if (event.type === "pointermove" && event.buttons === 0) return;
  const { left, width } = event.currentTarget.getBoundingClientRect();
  const layers = Number($("layer").max) + 1;
  page.layer = Math.max(0, Math.min(layers - 1, Math.floor(((event.clientX - left) / width) * layers)));
  showLayers();
}

// ---------------------------------------------------------------- the map

const BACK = "#2ee6c5";
const BOX = "#ff8a1f";
const DARK = "#0a0f0e";

// What is drawn: the picture and all that the tokens cover, which may reach beyond it.
function viewOf({ picture, result }) {
  const [x0, y0, x1, y1] = result?.images[0]?.area ?? [0, 0, picture.width, picture.height];
  const view = { x: Math.min(0, x0), y: Math.min(0, y0), right: Math.max(picture.width, x1), bottom: Math.max(picture.height, y1) };
  return { ...view, width: view.right - view.x, height: view.bottom - view.y };
}

function paint(column) {
  const canvas = column.find(".map");
  const { picture, result } = column;
  const view = viewOf(column);
  canvas.style.aspectRatio = `${view.width} / ${view.height}`;
  if (canvas.clientWidth === 0) return;
  const dots = window.devicePixelRatio || 1;
  const scale = (canvas.clientWidth * dots) / view.width;
  canvas.width = Math.round(view.width * scale);
  canvas.height = Math.round(view.height * scale);
  const brush = canvas.getContext("2d");
  const at = (x, y) => [(x - view.x) * scale, (y - view.y) * scale];
  brush.fillStyle = css("--track");
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.imageSmoothingEnabled = scale < 2;
  brush.drawImage(picture.bitmap, ...at(0, 0), picture.width * scale, picture.height * scale);
  if (result && $("tokens").checked) paintTokens(brush, result, at, dots);
  (result?.boxes ?? []).forEach(({ box }, index) => paintBox(brush, box, index, at, dots));
}

function paintTokens(brush, { images, ...result }, at, dots) {
  const states = stageAt(result, page.layer)?.states[0];
  if (!states || !images[0]) return;
  const { rows, columns, area } = images[0];
  const [left, top] = at(area[0], area[1]);
  const [right, bottom] = at(area[2], area[3]);
  paintUnseen(brush, left, top, right, bottom);
  // Whole dots, so that no seam shows between neighbours.
  const x = (column) => Math.round(left + ((right - left) * column) / columns);
  const y = (row) => Math.round(top + ((bottom - top) * row) / rows);
  [...states].forEach((state, index) => {
    const [row, column] = [Math.floor(index / columns), index % columns];
    paintToken(brush, state, x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row), dots);
  });
}

// Parts of the picture that no token covers look like tokens that are not in the prompt.
function paintUnseen(brush, left, top, right, bottom) {
  const { width, height } = brush.canvas;
  for (const rest of [[0, 0, width, top], [0, bottom, width, height - bottom], [0, top, left, bottom - top], [right, top, width - right, bottom - top]]) {
    if (rest[2] >= 1 && rest[3] >= 1) paintToken(brush, "n", ...rest, 1);
  }
}

// One token over the picture. No state is told by its colour alone: frame, veil, hatching, blank with a dot.
function paintToken(brush, state, x, y, width, height, dots) {
  if (state === "b") {
    const line = Math.max(1, Math.min(2 * dots, width / 6));
    frame(brush, x, y, width, height, line * 1.75, DARK);
    frame(brush, x, y, width, height, line, BACK);
  } else if (state === "n") {
    brush.fillStyle = css("--track");
    brush.fillRect(x, y, width, height);
    brush.fillStyle = css("--edge");
    const dot = Math.max(1, 1.5 * dots);
    brush.fillRect(x + (width - dot) / 2, y + (height - dot) / 2, dot, dot);
  } else if (state === "d" || state === "r") {
    brush.fillStyle = state === "d" ? "rgb(8 13 12 / 72%)" : "rgb(8 13 12 / 80%)";
    brush.fillRect(x, y, width, height);
    if (state === "r") hatch(brush, x, y, width, height, dots);
  }
}

function frame(brush, x, y, width, height, line, colour) {
  brush.strokeStyle = colour;
  brush.lineWidth = line;
  brush.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
}

// Diagonals that go on from token to token.
function hatch(brush, x, y, width, height, dots) {
  const step = 6 * dots;
  brush.save();
  brush.beginPath();
  brush.rect(x, y, width, height);
  brush.clip();
  brush.beginPath();
  for (let sum = Math.ceil((x + y) / step) * step; sum < x + width + y + height; sum += step) {
    brush.moveTo(sum - y, y);
    brush.lineTo(sum - y - height, y + height);
  }
  brush.strokeStyle = "rgb(255 255 255 / 40%)";
  brush.lineWidth = dots;
  brush.stroke();
  brush.restore();
}

function paintBox(brush, [x0, y0, x1, y1], index, at, dots) {
  const [left, top] = at(x0, y0);
  const [right, bottom] = at(x1, y1);
  for (const [line, colour] of [[5 * dots, DARK], [2.5 * dots, BOX]]) {
    brush.strokeStyle = colour;
    brush.lineWidth = line;
    brush.strokeRect(left, top, right - left, bottom - top);
  }
  const side = 18 * dots;
  brush.fillStyle = BOX;
  brush.fillRect(left, top, side, side);
  brush.fillStyle = DARK;
  brush.font = `600 ${12 * dots}px system-ui, sans-serif`;
  brush.textAlign = "center";
  brush.textBaseline = "middle";
  brush.fillText(index + 1, left + side / 2, top + side / 2);
}

function drawLegend() {
  const dots = window.devicePixelRatio || 1;
  const entries = STATES.map(([state, name, more]) => {
    const entry = make("li");
    const canvas = Object.assign(make("canvas"), { width: 40 * dots, height: 20 * dots, ariaHidden: "true" });
    const brush = canvas.getContext("2d");
    const ground = brush.createLinearGradient(0, 0, canvas.width, canvas.height);
    ground.addColorStop(0, "#7f9bb3");
    ground.addColorStop(1, "#c9b38a");
    brush.fillStyle = ground;
    brush.fillRect(0, 0, canvas.width, canvas.height);
    for (const x of [0, 20 * dots]) paintToken(brush, state, x, 0, 20 * dots, 20 * dots, dots);
    const text = make("span");
    text.append(make("b", name), make("span", ` ${more}`, "more"));
    entry.append(canvas, text);
    return entry;
  });
  $("legend").replaceChildren(...entries);
}

function repaint() {
  drawLegend();
  page.columns.forEach(paint);
}

// ---------------------------------------------------------------- the beginning

async function connect() {
  $("notice").hidden = true;
  try {
    const [models, routings] = await Promise.all(["v1/models", "v1/routings"].map(async (path) => (await call(path)).json()));
    page.known = new Map(routings.data.map((routing) => [routing.id, routing]));
    page.usual = routings.default;
    page.model = models.data[0].id;
    $("model").textContent = page.model;
    restore(remembered());
  } catch (error) {
    if (error.status === 401) showKeyField();
    showError($("notice"), error instanceof Refusal ? error : new Refusal(500, String(error)), [error.status !== 401 && action("Try again", connect)]);
  }
}

function listen() {
  $("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  $("text").addEventListener("input", remember);
  for (const radio of document.querySelectorAll("[name=mode]")) radio.addEventListener("change", () => { showMode(); remember(); });
  $("cancel").addEventListener("click", () => page.running?.abort());
  addEventListener("keydown", (event) => { if (event.key === "Escape") page.running?.abort(); });
  $("example").addEventListener("click", takeExample);
  $("add").addEventListener("click", proposeRouting);
  $("skip").addEventListener("click", (event) => { event.preventDefault(); $("bench").focus(); });
  const useKey = () => { page.key = $("key").value.trim(); connect(); };
  $("key-use").addEventListener("click", useKey);
  $("key").addEventListener("change", () => { page.key = $("key").value.trim(); });
  $("key").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); useKey(); } });
  $("layer").addEventListener("input", () => { page.layer = Number($("layer").value); showLayers(); });
  $("tokens").addEventListener("change", repaint);
  addEventListener("hashchange", () => restore(remembered()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  addEventListener("resize", repaint);
  acceptDrops();
}

showMode();
drawLegend();
listen();
connect();
