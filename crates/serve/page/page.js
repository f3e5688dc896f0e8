// The page of `reroute serve`: a picture and a question, asked under several routings, and for each the answer,
// its boxes, which visual tokens every layer worked on, and what that cost. It talks to this server only.

const MOST_ROUTINGS = 4;
// What the server decodes; anything else that a browser shows is made a PNG here.
const DECODED = ["image/png", "image/jpeg", "image/webp"];
// What a picture is scaled down to, its longer side in pixels, one step for each agreement.
const SIDES = [4096, 2048, 1280, 768, 512, 256, 128];
// A question that has an answer on the built-in scene.
const EXAMPLE = { mode: "find", text: "the large cyan square" };

const MODES = {
  ask: { label: "A question about the picture", hint: "What is on the table?", send: "Ask", title: (text) => text },
  find: { label: "What to find in the picture", hint: "the red cross", send: "Find", title: (text) => `Find ${text}` },
};
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

const page = {
  ready: false, // whether the server said what it has
  known: new Map(), // what /v1/routings says, by id
  usual: "dense",
  key: "", // in memory only
  picture: null, // { name, blob, bitmap, url, width, height }
  columns: [], // what was asked, one for each routing
  layer: null, // which one is looked at; the middle one first
  running: null, // the AbortController of what is being asked
};

const $ = (id) => document.getElementById(id);
const on = (target, type, run) => target.addEventListener(type, run);
const make = (tag, text = "", name = "") => Object.assign(document.createElement(tag), { textContent: text, className: name });
const fromTemplate = (id) => $(id).content.firstElementChild.cloneNode(true);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dots = () => window.devicePixelRatio || 1;

// ---------------------------------------------------------------- the server

// An answer that is no success: its HTTP status, 0 where none came, -1 where nothing was asked.
class Refusal extends Error {
  constructor(status, message, more = {}) {
    super(message);
    Object.assign(this, { status, ...more });
  }
}

async function call(path, options = {}) {
  const key = page.key ? { authorization: `Bearer ${page.key}` } : {};
  const response = await fetch(path, { ...options, headers: { ...options.headers, ...key } }).catch((error) => {
    throw error.name === "AbortError" ? error : new Refusal(0, "The server cannot be reached.");
  });
  if (response.ok) return response;
  let error = { message: (await response.text()).slice(0, 2000) };
  try {
    error = JSON.parse(error.message).error ?? error;
  } catch { /* what a proxy says is shown as it is */ }
  const more = { param: error.param, wait: response.headers.get("retry-after") };
  throw new Refusal(response.status, error.message || response.statusText, more);
}

// What went wrong within a stream has no status.
const STATUS = { rate_limit_exceeded: 429, shutting_down: 503, timeout: 504 };

// The events of a stream, each as the object that it carries.
async function* events(response) {
  const broken = () => { throw new Refusal(0, "The answer broke off before its end."); };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const read = () => reader.read().catch(broken);
  let rest = "";
  for (let part = await read(); !part.done; part = await read()) {
    const lines = (rest + part.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(STATUS[event.error.code] ?? 500, event.error.message);
      yield event;
    }
  }
  broken();
}

const asDataUri = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  on(reader, "load", () => resolve(reader.result));
  on(reader, "error", () => reject(new Refusal(-1, "The picture cannot be read any more. Choose it again.")));
  reader.readAsDataURL(blob);
});

async function requestFor({ routing, mode, text, picture }) {
  const content = [{ type: "image_url", image_url: { url: await asDataUri(picture.blob) } }, { type: "text", text }];
  const extended = { routing, trace: true, grounding: mode === "find" };
  const streamed = { stream: true, stream_options: { include_usage: true } };
  return JSON.stringify({ model: $("model").value, messages: [{ role: "user", content }], ...streamed, ...extended });
}

// ---------------------------------------------------------------- what went wrong

const REMEDIES = {
  "-1": "",
  0: "See whether reroute serve still runs, and ask again.",
  400: "Change the question, the picture or the routing accordingly, and ask again.",
  401: "Give the API key beside the question, and ask again.",
  404: "Load this page again: it then knows what the server has.",
  413: "Choose a smaller picture, or agree to have it scaled down here.",
  429: "The server has too much to do. Ask again in a moment.",
  503: "The server is starting or stopping. Ask again in a moment.",
  504: "",
};

function showError(place, error, button) {
  const wait = error.wait ? ` It asks to wait ${error.wait} s.` : "";
  const remedy = (REMEDIES[error.status] ?? "This is a fault of the server; what it printed says more.") + wait;
  place.replaceChildren(make("strong", error.message), remedy, button ?? "");
  place.hidden = false;
}

const asRefusal = (error) => (error instanceof Refusal ? error : new Refusal(500, String(error)));
const complain = (message) => showError($("notice"), new Refusal(-1, message));

function action(text, run) {
  const button = Object.assign(make("button", text), { type: "button" });
  on(button, "click", run);
  return button;
}

function showKeyField() {
  $("key-section").hidden = false;
  $("key").focus();
}

// ---------------------------------------------------------------- the picture

const size = ({ width, height }) => `${width} × ${height}`;

// A picture drawn anew at a size: as JPEG if it was one, otherwise without loss.
async function redrawn({ name, blob, bitmap }, width, height) {
  const canvas = Object.assign(make("canvas"), { width, height });
  const brush = Object.assign(canvas.getContext("2d"), { imageSmoothingQuality: "high" });
  brush.drawImage(bitmap, 0, 0, width, height);
  const type = blob.type === "image/jpeg" ? "image/jpeg" : "image/png";
  const drawn = await new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));
  return { name, blob: drawn, bitmap: await createImageBitmap(drawn), width, height };
}

const isTooLarge = ({ status, param, message }) => status === 413 || (/image_url/.test(param) && /pixels/.test(message));

// A button that scales the picture down and asks again; nothing is scaled before it is pressed.
function offerSmaller(picture) {
  const longer = Math.max(picture.width, picture.height);
  const side = SIDES.find((side) => side < longer);
  if (!side || page.picture !== picture) return null;
  const [width, height] = [picture.width, picture.height].map((edge) => Math.max(1, Math.round((edge * side) / longer)));
  return action(`Scale it from ${size(picture)} to ${width} × ${height} here, and ask again`, async () => {
    setPicture(await redrawn(picture, width, height), `, scaled down here from ${size(picture)}`);
    submit();
  });
}

async function takeFile(file) {
  if (!file) return;
  $("notice").hidden = true;
  try {
    const bitmap = await createImageBitmap(file);
    const { width, height } = bitmap;
    const picture = { name: file.name, blob: file, bitmap, width, height };
    if (DECODED.includes(file.type)) setPicture(picture, "");
    else setPicture(await redrawn(picture, width, height), ", made a PNG here");
  } catch {
    complain(`This browser cannot show ${file.name} as a picture. Choose a PNG, JPEG or WebP file.`);
  }
}

function setPicture(picture, how) {
  if (page.picture) URL.revokeObjectURL(page.picture.url);
  page.picture = Object.assign(picture, { url: URL.createObjectURL(picture.blob) });
  Object.assign($("preview"), { src: picture.url, alt: `The picture to ask about: ${picture.name}`, hidden: false });
  $("invite").hidden = true;
  $("well").classList.add("full");
  $("about-picture").textContent = `${picture.name}, ${size(picture)}${how}`;
}

async function takeExample() {
  try {
    const blob = await (await call("example.png")).blob();
    await takeFile(new File([blob], "example.png", { type: "image/png" }));
    if ($("text").value.trim() === "") restore({ ...EXAMPLE, routings: chosen() });
  } catch (error) {
    if (error.status === 404) complain("This server has no example. Choose a picture of your own.");
    else showError($("notice"), asRefusal(error));
  }
}

function acceptFiles() {
  const over = (is) => $("well").classList.toggle("over", is);
  // Text that is dropped goes where it always does.
  const withFile = (run) => (event) => { if (event.dataTransfer.types.includes("Files")) { event.preventDefault(); run(event); } };
  on(window, "dragover", withFile(() => over(true)));
  on(window, "dragleave", (event) => { if (!event.relatedTarget) over(false); });
  on(window, "drop", withFile((event) => { over(false); takeFile(event.dataTransfer.files[0]); }));
  on(window, "paste", (event) => takeFile(event.clipboardData.files[0]));
  on($("file"), "change", () => { takeFile($("file").files[0]); $("file").value = ""; });
  on($("example"), "click", takeExample);
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
  if (!$("model").disabled) state.set("model", $("model").value);
  // Before the server said what it has, there is nothing to choose, and an address that was given stays.
  for (const routing of page.ready ? chosen() : remembered().routings) state.append("routing", routing);
  history.replaceState(null, "", `#${state}`);
}

function remembered() {
  const state = new URLSearchParams(location.hash.slice(1));
  return { mode: state.get("mode"), model: state.get("model"), text: state.get("text") ?? "", routings: state.getAll("routing") };
}

function restore({ mode, text, routings, model }) {
  if ([...$("model").options].some(({ value }) => value === model)) $("model").value = model;
  document.querySelector(`[name=mode][value=${mode === "find" ? "find" : "ask"}]`).checked = true;
  $("text").value = text;
  const known = routings.filter(isKnown).slice(0, MOST_ROUTINGS);
  $("routings").replaceChildren();
  for (const routing of known.length ? known : usualRoutings()) addRouting(routing);
  showMode();
  changedRoutings();
}

// ---------------------------------------------------------------- the choice of routings

const parts = (routing) => routing.split(/@(.*)/);

// As they stand behind the @: as published, and solved to be met exactly.
function budgetsOf(id) {
  const { budgets = [], exact = [] } = page.known.get(id) ?? {};
  return [...budgets.map(String), ...exact.map((budget) => `${budget}-exact`)];
}

function isKnown(routing) {
  const [id, budget] = parts(routing);
  return page.known.has(id) && (budget === undefined ? budgetsOf(id).length === 0 : budgetsOf(id).includes(budget));
}

// Beside the model as it is, the method that the project is named after.
function usualRoutings() {
  const own = ["reroute-pdrop@128", "reroute-pdrop@192"].filter(isKnown);
  return [...new Set([isKnown("dense") ? "dense" : page.usual, own[0] ?? page.usual])];
}

function routingOf(row) {
  const [method, budget] = row.querySelectorAll("select");
  return budget.hidden ? method.value : `${method.value}@${budget.value}`;
}
const chosen = () => [...$("routings").children].map(routingOf);

function addRouting(routing) {
  const row = fromTemplate("routing-row");
  const [method, budget] = row.querySelectorAll("select");
  for (const [kind, label] of Object.entries(KINDS)) {
    const group = Object.assign(make("optgroup"), { label });
    group.append(...[...page.known.values()].filter(({ action }) => action === kind).map(({ id }) => new Option(id)));
    if (group.children.length > 0) method.append(group);
  }
  const [id, wanted] = parts(routing);
  method.value = id;
  fillBudgets(budget, id, wanted);
  on(method, "change", () => { fillBudgets(budget, method.value, budget.value); changedRoutings(); });
  on(budget, "change", changedRoutings);
  on(row.querySelector("button"), "click", () => { row.remove(); changedRoutings(); $("add").focus(); });
  $("routings").append(row);
}

function fillBudgets(budget, id, wanted) {
  const budgets = budgetsOf(id);
  budget.replaceChildren(...budgets.map((count) => new Option(`@${count}`, count)));
  budget.hidden = budgets.length === 0;
  budget.value = [wanted, "128", budgets[0]].find((count) => budgets.includes(count));
}

function changedRoutings() {
  const rows = [...$("routings").children];
  rows.forEach((row, index) => {
    const [method, budget, drop] = row.children;
    method.ariaLabel = `Method of routing ${index + 1}`;
    budget.ariaLabel = `Budget of routing ${index + 1}, visual tokens of 576`;
    drop.ariaLabel = `Take away routing ${index + 1}, ${routingOf(row)}`;
    drop.disabled = rows.length === 1;
  });
  $("add").hidden = rows.length >= MOST_ROUTINGS;
  remember();
}

// One more row: another budget of the last method, or whatever is not there yet.
function proposeRouting() {
  const there = chosen();
  const all = [...page.known.keys()].flatMap((id) => (budgetsOf(id).length ? budgetsOf(id).map((budget) => `${id}@${budget}`) : id));
  const free = all.filter((routing) => !there.includes(routing));
  addRouting(free.find((routing) => parts(routing)[0] === parts(there.at(-1))[0]) ?? free[0] ?? page.usual);
  changedRoutings();
  $("routings").lastElementChild.querySelector("select").focus();
}

// ---------------------------------------------------------------- asking

async function submit() {
  if (page.running) return;
  $("notice").hidden = true;
  const question = { mode: mode(), text: $("text").value.trim(), picture: page.picture };
  if (!question.picture) {
    complain("There is no picture yet. Choose one, drop or paste it, or use the example.");
    return $("file").focus();
  }
  if (!question.text) {
    complain("There is no question yet. Write what to ask or to find.");
    return $("text").focus();
  }
  if (!page.ready) await connect();
  if (!page.ready) return;
  $("asked").textContent = MODES[question.mode].title(question.text);
  $("opening").hidden = true;
  page.columns = [...new Set(chosen())].map((routing) => newColumn({ ...question, routing }));
  $("columns").replaceChildren(...page.columns.map(({ element }) => element));
  showLayers();
  if ($("bench").getBoundingClientRect().top > innerHeight / 2) $("bench").scrollIntoView();
  askAll(page.columns);
}

// Not disabled, so that neither loses the focus of a keyboard.
function showRunning() {
  $("send").ariaDisabled = String(page.running !== null);
  $("cancel").ariaDisabled = String(page.running === null);
}

// One after the other, so that their times can be compared.
async function askAll(columns) {
  page.running = new AbortController();
  const { signal } = page.running;
  showRunning();
  for (const column of columns) showAnswer(column, "waiting");
  for (const [index, column] of columns.entries()) {
    $("status").textContent = `Asking ${column.routing}, ${index + 1} of ${columns.length}.`;
    const error = await askOne(column, signal);
    // What would refuse the others as well is asked once.
    if (error && ![400, 404, 500].includes(error.status)) {
      for (const rest of columns.slice(index + 1)) showAnswer(rest, "skipped");
      break;
    }
  }
  page.running = null;
  showRunning();
  const answered = columns.filter(({ result }) => result).length;
  $("status").textContent = signal.aborted ? "Cancelled." : `Answered ${answered} of ${columns.length}.`;
}

async function askOne(column, signal) {
  try {
    const headers = { "content-type": "application/json" };
    const body = await requestFor(column);
    showAnswer(column, "going");
    const response = await call("v1/chat/completions", { method: "POST", headers, body, signal });
    for await (const event of events(response)) take(column, event);
    showAnswer(column, "done");
    return null;
  } catch (error) {
    const refusal = signal.aborted ? new Refusal(-1, "Cancelled.") : asRefusal(error);
    showRefusal(column, refusal);
    return refusal;
  }
}

function take(column, { choices, usage, reroute }) {
  const choice = choices?.[0];
  column.answer += choice?.delta?.content ?? "";
  column.cut ||= choice?.finish_reason === "length";
  if (choice?.delta?.content) showAnswer(column, "going");
  if (usage) column.tokens = usage.completion_tokens;
  if (reroute) {
    column.result = reroute;
    showLayers();
  }
  if (reroute || usage) page.columns.forEach(showFigures);
}

function showRefusal(column, refusal) {
  showAnswer(column, "done");
  const again = action("Ask this again", () => {
    if (page.running) return;
    Object.assign(column, NOTHING);
    column.find(".notice").hidden = true;
    showLayers();
    askAll([column]);
  });
  showError(column.find(".notice"), refusal, (isTooLarge(refusal) && offerSmaller(column.picture)) || again);
  if (refusal.status === 401) showKeyField();
}

// ---------------------------------------------------------------- a column: its answer

const NOTHING = { answer: "", result: null, tokens: null, cut: false };

function newColumn(question) {
  const element = fromTemplate("column");
  const column = { ...question, ...NOTHING, element, find: (part) => element.querySelector(part) };
  element.ariaLabel = question.routing;
  column.find("h3").textContent = question.routing;
  const { description, action } = page.known.get(parts(question.routing)[0]);
  column.find(".kind").textContent = description ?? KINDS[action];
  for (const type of ["pointerdown", "pointermove"]) on(column.find(".depth svg"), type, pointAt);
  new ResizeObserver(() => paint(column)).observe(column.find(".map"));
  return column;
}

const WAITS = { waiting: "Waits for its turn.", skipped: "Not asked." };

function showAnswer(column, state) {
  const place = column.find(".answer");
  place.className = `answer ${state in WAITS ? "waiting" : state}`;
  // A screen reader says the answer once it is whole, not word by word.
  place.ariaBusy = String(state === "going");
  const empty = column.result && column.answer === "" ? "(an empty answer)" : "";
  const cut = column.cut && state === "done" ? " … (cut: the longest answer is reached)" : "";
  place.textContent = (WAITS[state] ?? (column.answer || empty)) + cut;
  const lines = (column.result?.boxes ?? []).map(boxText);
  if (column.mode === "find" && column.result && lines.length === 0) lines.push("no box in the answer");
  column.find(".boxes").replaceChildren(...lines.map((line) => make("li", line)));
  column.find(".boxes").hidden = lines.length === 0;
}

function boxText({ box }, index) {
  const [x0, y0, x1, y1] = box.map(Math.round);
  return `box ${index + 1}: ${x0}, ${y0} to ${x1}, ${y1}`;
}

// ---------------------------------------------------------------- a column: its figures

function inUnits(value, step, units) {
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log(Math.max(value, 1)) / Math.log(step))));
  const scaled = value / step ** power;
  return `${scaled >= 999.5 ? Math.round(scaled) : scaled.toPrecision(3)} ${units[power]}`;
}
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const duration = (ms) => (ms >= 1000 ? `${(ms / 1000).toPrecision(3)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`);

// What a time is measured against: the same one of dense if it was asked, otherwise the longest.
function yardstick(part) {
  const times = page.columns.filter(({ result }) => result).map(({ routing, result }) => ({ routing, time: result.timings_ms[part] }));
  return times.find(({ routing }) => routing === "dense") ?? times.reduce((a, b) => (b.time > a.time ? b : a));
}

function showFigures(column) {
  if (!column.result) return;
  const { flops, kv_bytes, kv_bytes_dense, average_visual_tokens, visual_tokens, timings_ms } = column.result;
  const cached = kv_bytes / kv_bytes_dense;
  const rows = [
    figure("FLOPs", inUnits(flops.decoder, 1000, ["", "k", "M", "G", "T", "P"]), flops.share, `${percent(flops.share)} of dense`),
    figure("KV cache", inUnits(kv_bytes, 1024, ["B", "KiB", "MiB", "GiB"]), cached, `${percent(cached)} of dense`),
    figure("Tokens", average_visual_tokens.toFixed(1), average_visual_tokens / visual_tokens, `mean, of ${visual_tokens}`),
  ];
  for (const part of ["vision", "prefill", "decode"]) {
    const { routing, time } = yardstick(part);
    // The server keeps what the tower made of a picture.
    const kept = part === "vision" && timings_ms.vision < 0.1;
    const share = kept ? 0 : timings_ms[part] / Math.max(time, 0.1);
    const compared = kept ? "known already" : routing === column.routing ? "" : `${percent(share)} of ${routing}`;
    rows.push(figure(part[0].toUpperCase() + part.slice(1), duration(timings_ms[part]), share, compared));
  }
  column.find("h4").textContent = column.tokens ? `Answer, ${column.tokens} tokens` : "Answer";
  column.find("tbody").replaceChildren(...rows);
  column.find(".figures").hidden = false;
}

function figure(name, value, share, compared) {
  const [row, cell, bar, fill] = [make("tr"), make("td", value, "value"), make("span", "", "bar"), make("span")];
  fill.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  bar.append(fill);
  cell.append(bar);
  row.append(Object.assign(make("th", name), { scope: "row" }), make("td", compared, "compared"), cell);
  return row;
}

// ---------------------------------------------------------------- layers

const stageAt = (result, layer) => result.stages.find((stage) => stage.first_layer <= layer && layer <= stage.last_layer);

// How many tokens of each state a layer sees, over all pictures; without stages all are active.
function countsAt(result, layer) {
  const stage = stageAt(result, layer) ?? { states: result.images.map(({ tokens }) => "a".repeat(tokens)) };
  if (!stage.counts) {
    stage.counts = { a: 0, b: 0, d: 0, r: 0, n: 0, all: 0 };
    for (const state of stage.states.join("")) [stage.counts[state], stage.counts.all] = [stage.counts[state] + 1, stage.counts.all + 1];
  }
  return stage.counts;
}

function textAt(result, layer) {
  const counts = countsAt(result, layer);
  const rest = STATES.slice(1).filter(([state]) => counts[state] > 0).map(([state, name]) => `${counts[state]} ${name}`);
  const place = result.images[0]?.area ? [] : ["none of them stands for one place of the picture"];
  return [`${counts.a + counts.b} of ${counts.all} active`, ...rest, ...place].join(", ");
}

// Everything that depends on the layer that is looked at.
function showLayers() {
  const answered = page.columns.filter(({ result }) => result);
  const last = Math.max(1, ...answered.map(({ result }) => result.layers)) - 1;
  $("strip").hidden = answered.length === 0;
  if (answered.length > 0) page.layer = Math.min(page.layer ?? Math.ceil(last / 2), last);
  Object.assign($("layer"), { max: last, value: page.layer });
  $("layer-shown").textContent = page.layer;
  const texts = answered.map(({ routing, result }) => `${routing}: ${textAt(result, page.layer)}`);
  $("layer").setAttribute("aria-valuetext", `layer ${page.layer} of 0 to ${last}. ${texts.join(". ")}`);
  page.columns.forEach(showLayer);
}

function showLayer(column) {
  const { result, picture, routing, find } = column;
  const text = result ? `layer ${page.layer}: ${textAt(result, page.layer)}` : "";
  find(".counts").textContent = text;
  find(".map").ariaLabel = [`${picture.name} under ${routing}`, text, ...(result?.boxes ?? []).map(boxText)].filter(Boolean).join("; ");
  find(".depth").hidden = !result;
  if (result) drawDepth(find, result);
  paint(column);
}

// Steps over all layers: how many tokens each worked on, and where the reader is.
function drawDepth(find, result) {
  const { layers } = result;
  const steps = Array.from({ length: layers }, (_, layer) => {
    const { a, b, all } = countsAt(result, layer);
    return `V${1 - (a + b) / Math.max(1, all)}H${layer + 1}`;
  });
  const shapes = { whole: `M0 0H${layers}V1H0Z`, worked: `M0 1${steps.join("")}V1Z`, here: `M${page.layer + 0.5} 0V1` };
  find(".depth svg").setAttribute("viewBox", `0 0 ${layers} 1`);
  for (const [name, shape] of Object.entries(shapes)) find(`.depth .${name}`).setAttribute("d", shape);
  find(".depth span:last-child").textContent = layers - 1;
}

// What the slider does, for a pointer on the steps.
function pointAt(event) {
  if (event.type === "pointermove" && event.buttons === 0) return;
  const { left, width } = event.currentTarget.getBoundingClientRect();
  const last = Number($("layer").max);
  page.layer = Math.max(0, Math.min(last, Math.floor(((event.clientX - left) / width) * (last + 1))));
  showLayers();
}

// ---------------------------------------------------------------- the map

const BACK = "#2ee6c5";
const BOX = "#ff8a1f";
const DARK = "#0a0f0e";
const ground = { blank: "", dot: "" }; // of the light or dark page

function paint({ find, picture, result }) {
  const canvas = find(".map");
  // The picture and all that the tokens cover, which may reach beyond it.
  const area = result?.images[0]?.area ?? [0, 0, picture.width, picture.height];
  const [x0, y0] = [Math.min(0, area[0]), Math.min(0, area[1])];
  const [width, height] = [Math.max(picture.width, area[2]) - x0, Math.max(picture.height, area[3]) - y0];
  canvas.style.aspectRatio = `${width} / ${height}`;
  if (canvas.clientWidth === 0) return;
  const scale = (canvas.clientWidth * dots()) / width;
  Object.assign(canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
  const toCanvas = ([left, top, right, bottom]) => [(left - x0) * scale, (top - y0) * scale, (right - x0) * scale, (bottom - y0) * scale];
  const brush = Object.assign(canvas.getContext("2d"), { imageSmoothingEnabled: scale < 2, fillStyle: ground.blank });
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.drawImage(picture.bitmap, -x0 * scale, -y0 * scale, picture.width * scale, picture.height * scale);
  const states = result && stageAt(result, page.layer)?.states[0];
  if (states && result.images[0].area && $("tokens").checked) paintTokens(brush, states, result.images[0], toCanvas(area));
  (result?.boxes ?? []).forEach(({ box }, index) => paintBox(brush, toCanvas(box), index + 1));
}

function paintTokens(brush, states, { rows, columns }, [left, top, right, bottom]) {
  // What no token covers looks like tokens that are not in the prompt.
  const { width, height } = brush.canvas;
  const rims = [[0, 0, width, top], [0, bottom, width, height - bottom], [0, top, left, bottom - top], [right, top, width - right, bottom - top]];
  for (const rim of rims) if (rim[2] >= 1 && rim[3] >= 1) paintToken(brush, "n", ...rim);
  // Whole dots, so that no seam shows between neighbours.
  const x = (column) => Math.round(left + ((right - left) * column) / columns);
  const y = (row) => Math.round(top + ((bottom - top) * row) / rows);
  [...states].forEach((state, index) => {
    const [row, column] = [Math.floor(index / columns), index % columns];
    paintToken(brush, state, x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
  });
}

// One token over the picture. No state is told by its colour alone: a frame, a veil, hatching, a blank with a dot.
function paintToken(brush, state, x, y, width, height) {
  if (state === "b") {
    const line = Math.max(1, Math.min(2 * dots(), width / 6));
    frame(brush, x, y, width, height, line * 1.75, DARK);
    frame(brush, x, y, width, height, line, BACK);
  } else if (state === "n") {
    brush.fillStyle = ground.blank;
    brush.fillRect(x, y, width, height);
    const dot = Math.max(1, 1.5 * dots());
    brush.fillStyle = ground.dot;
    brush.fillRect(x + (width - dot) / 2, y + (height - dot) / 2, dot, dot);
  } else if (state === "d" || state === "r") {
    brush.fillStyle = state === "d" ? "rgb(8 13 12 / 72%)" : "rgb(8 13 12 / 80%)";
    brush.fillRect(x, y, width, height);
    if (state === "r") hatch(brush, x, y, width, height);
  }
}

// A line inside of a rectangle.
function frame(brush, x, y, width, height, line, colour) {
  Object.assign(brush, { strokeStyle: colour, lineWidth: line });
  brush.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
}

// Diagonals that go on from token to token.
function hatch(brush, x, y, width, height) {
  const step = 6 * dots();
  const lines = new Path2D();
  for (let sum = Math.ceil((x + y) / step) * step; sum < x + width + y + height; sum += step) {
    const [from, to] = [Math.min(sum - y, x + width), Math.max(sum - y - height, x)];
    lines.moveTo(from, sum - from);
    lines.lineTo(to, sum - to);
  }
  Object.assign(brush, { strokeStyle: "rgb(255 255 255 / 40%)", lineWidth: dots() });
  brush.stroke(lines);
}

function paintBox(brush, [left, top, right, bottom], number) {
  for (const [line, strokeStyle] of [[5 * dots(), DARK], [2.5 * dots(), BOX]]) {
    Object.assign(brush, { strokeStyle, lineWidth: line }).strokeRect(left, top, right - left, bottom - top);
  }
  const side = 18 * dots();
  Object.assign(brush, { fillStyle: BOX }).fillRect(left, top, side, side);
  const font = `600 ${12 * dots()}px system-ui, sans-serif`;
  Object.assign(brush, { fillStyle: DARK, font, textAlign: "center", textBaseline: "middle" });
  brush.fillText(number, left + side / 2, top + side / 2);
}

function drawLegend() {
  $("legend").replaceChildren(...STATES.map(([state, name, more]) => {
    const [entry, text, side] = [make("li"), make("span"), 20 * dots()];
    const canvas = Object.assign(make("canvas"), { width: 2 * side, height: side, ariaHidden: "true" });
    const brush = canvas.getContext("2d");
    const sample = brush.createLinearGradient(0, 0, canvas.width, canvas.height);
    sample.addColorStop(0, "#7f9bb3");
    sample.addColorStop(1, "#c9b38a");
    Object.assign(brush, { fillStyle: sample }).fillRect(0, 0, canvas.width, canvas.height);
    for (const x of [0, side]) paintToken(brush, state, x, 0, side, side);
    text.append(make("b", name), make("span", ` ${more}`, "more"));
    entry.append(canvas, text);
    return entry;
  }));
}

function repaint() {
  Object.assign(ground, { blank: css("--track"), dot: css("--edge") });
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
    $("model").replaceChildren(...models.data.map(({ id }) => new Option(id, id)));
    $("model").disabled = models.data.length < 2;
    page.ready = true;
    restore(remembered());
  } catch (error) {
    showError($("notice"), asRefusal(error), error.status === 401 ? null : action("Try again", connect));
    if (error.status === 401) showKeyField();
  }
}

function onEnter(field, run) {
  on(field, "keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    run();
  });
}

function listen() {
  const useKey = () => { page.key = $("key").value.trim(); connect(); };
  on($("form"), "submit", (event) => { event.preventDefault(); submit(); });
  onEnter($("text"), submit);
  on($("text"), "input", remember);
  on($("model"), "change", remember);
  for (const radio of document.querySelectorAll("[name=mode]")) on(radio, "change", () => { showMode(); remember(); });
  on($("cancel"), "click", () => page.running?.abort());
  on(window, "keydown", (event) => { if (event.key === "Escape") page.running?.abort(); });
  on($("add"), "click", proposeRouting);
  on($("skip"), "click", (event) => { event.preventDefault(); $("bench").focus(); });
  on($("key-use"), "click", useKey);
  onEnter($("key"), useKey);
  on($("layer"), "input", () => { page.layer = Number($("layer").value); showLayers(); });
  on($("tokens"), "change", repaint);
  on(window, "hashchange", () => { if (page.ready) restore(remembered()); });
  on(matchMedia("(prefers-color-scheme: dark)"), "change", repaint);
  on(window, "resize", repaint);
  acceptFiles();
}

showMode();
repaint();
listen();
connect();
