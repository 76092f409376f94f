"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { ids, layers, heads, causal, prefix, bothWays, scores } = data;
const T = ids.length;
const specials = new Set(data.specials);
const $ = (id) => document.getElementById(id);
const HOT = 10; // nats of the full colour
const state = { token: T - 1, layer: 0, head: -1 }; // head -1: the mean

const bytes = Uint8Array.from(atob(data.weights), (c) => c.charCodeAt(0));
const perHead = bothWays ? T * T : (T * (T + 1)) / 2;

// How much token t attends to token s: see `pack` in page.py.
function weight(layer, head, t, s) {
  if (!bothWays && s > t) return 0;
  const at = (n) => {
    const row = bothWays ? t * T : (t * (t + 1)) / 2;
    return (bytes[(layer * heads + n) * perHead + row + s] / 255) ** 2;
  };
  if (head >= 0) return at(head);
  let sum = 0;
  for (let n = 0; n < heads; n++) sum += at(n);
  return sum / heads;
}

const nameOf = (id) => data.names[id];
const listed = (id) => nameOf(id).replaceAll(" ", "␣");
const percent = (p) => (p >= 0.9995 ? "100%" : p < 0.0005 ? (100 * p).toPrecision(2) + "%" : (100 * p).toFixed(1) + "%");

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function textOf(id, tag = "span") {
  return make(tag, listed(id), specials.has(id) ? "text special" : "text");
}

function facts(list, pairs) {
  list.replaceChildren(
    ...pairs.map(([key, value]) => {
      const pair = make("div");
      pair.append(make("dt", key), make("dd", value));
      return pair;
    }),
  );
}

function tokenButton(t) {
  const button = make("button", t < T ? nameOf(ids[t]) : "next", "token");
  button.type = "button";
  button.dataset.token = t;
  if (t === T) button.classList.add("next");
  else if (specials.has(ids[t])) button.classList.add("special");
  button.addEventListener("click", () => choose(t));
  return button;
}

function strip(place, count) {
  for (let t = 0; t < count; t++) {
    place.append(tokenButton(t));
    if (t < T && nameOf(ids[t]).includes("⏎")) place.append(make("br"));
  }
}

function bars(body, rows) {
  body.replaceChildren(
    ...rows.map(({ id, share, label, right }) => {
      const row = make("tr", undefined, right ? "right" : "");
      const bar = make("td", undefined, "bar");
      bar.append(make("span"));
      bar.firstChild.style.width = `${100 * share}%`;
      row.append(make("td", label, "number"), textOf(id, "td"), make("td", percent(share), "number"), bar);
      return row;
    }),
  );
}

function lossText(t) {
  const loss = scores.loss[t];
  return [
    ["loss", `${loss.toFixed(3)} nats`],
    ["probability", percent(Math.exp(-loss))],
    ["rank", `${scores.rank[t].toLocaleString("en")} of ${scores.vocabulary.toLocaleString("en")}`],
  ];
}

function showDetail() {
  const t = state.token;
  const known = t < T && scores && scores.loss[t] !== null;
  const candidates = scores ? scores.candidates[t] : [];
  const without = causal
    ? prefix > 1
      ? "none: those before it see it, as the prompt is read both ways"
      : "none: nothing stands before it"
    : candidates.length
      ? "unknown: the prompt hides it"
      : "none: a special token";
  $("chosen").replaceChildren(
    ...(t < T ? [`Token ${t + 1} of ${T}: `, textOf(ids[t])] : ["What would come next"]),
  );
  facts($("chosen-facts"), [
    ...(t < T ? [["id", `${ids[t]}`]] : []),
    ...(known ? lossText(t) : t < T && scores ? [["loss", without]] : []),
  ]);
  $("candidates").hidden = candidates.length === 0;
  $("candidates").caption.textContent = "most probable here";
  bars(
    $("candidates").tBodies[0],
    candidates.map(([id, share], i) => ({ id, share, label: `${i + 1}`, right: t < T && known && id === ids[t] })),
  );
}

const looking = () => Math.min(state.token, T - 1);

function showAttention() {
  const { layer, head } = state;
  const t = looking();
  const row = ids.map((_, s) => weight(layer, head, t, s));
  const what = head < 0 ? "mean of its heads" : `head ${head + 1}`;
  $("looking").replaceChildren(`Layer ${layer + 1}, ${what}: `, textOf(ids[t]), ` (${t + 1}) looks at`);
  for (const button of $("looked-at").querySelectorAll("button")) {
    const share = row[Number(button.dataset.token)];
    button.style.setProperty("--heat", share);
    button.title = percent(share);
  }
  const order = ids.map((_, s) => s).filter((s) => row[s] > 0);
  order.sort((a, b) => row[b] - row[a] || a - b);
  bars(
    $("most").tBodies[0],
    order.slice(0, 8).map((s) => ({ id: ids[s], share: row[s], label: `${s + 1}` })),
  );
  drawMap();
}

function drawMap() {
  const canvas = $("map");
  const cell = Math.max(2, Math.min(24, Math.floor(560 / T)));
  const scale = Math.ceil(window.devicePixelRatio || 1);
  canvas.width = canvas.height = cell * T * scale;
  canvas.style.width = `${cell * T}px`;
  const style = getComputedStyle(document.documentElement);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = `rgb(${style.getPropertyValue("--weight")})`;
  for (let t = 0; t < T; t++) {
    for (let s = 0; s < T; s++) {
      pen.globalAlpha = weight(state.layer, state.head, t, s);
      pen.fillRect(s * cell, t * cell, cell, cell);
    }
  }
  pen.globalAlpha = 1;
  pen.strokeStyle = style.getPropertyValue("--focus");
  pen.strokeRect(0.5, looking() * cell + 0.5, cell * T - 1, cell - 1);
  canvas.setAttribute("aria-label", `${T} by ${T} attention weights of layer ${state.layer + 1}`);
}

// The row and column of the map at which the mouse is.
function cellAt(event) {
  const box = $("map").getBoundingClientRect();
  const border = $("map").clientLeft;
  const index = (offset, size) => Math.max(0, Math.min(T - 1, Math.floor(((offset - border) / (size - 2 * border)) * T)));
  return [index(event.clientY - box.top, box.height), index(event.clientX - box.left, box.width)];
}

function choose(t) {
  state.token = t;
  for (const button of document.querySelectorAll("#tokens .token")) {
    button.setAttribute("aria-pressed", Number(button.dataset.token) === t);
  }
  for (const cell of document.querySelectorAll("#lens [data-token]")) {
    cell.classList.toggle("here", Number(cell.dataset.token) === t);
  }
  showDetail();
  showAttention();
}

function buildTokens() {
  strip($("tokens"), scores && causal ? T + 1 : T);
  strip($("looked-at"), T);
  if (!scores) {
    $("tokens-note").textContent = "This model has no head that scores tokens: there is no loss and no logit lens, only attention.";
    return;
  }
  $("tokens-note").replaceChildren(
    causal
      ? prefix > 1
        ? `As the tokenizer cut the prompt, whose ${prefix} tokens are read both ways and not predicted. The colour is the loss of a token behind it, given those before it: 0 `
        : "As the tokenizer cut the prompt. The colour is the loss of a token, given those before it: 0 "
      : "As the tokenizer cut the prompt. The colour is the loss of a token when it alone is hidden: 0 ",
    make("span", undefined, "scale"),
    ` ${HOT} nats or more. Click a token to see what the model expected.`,
  );
  const known = scores.loss.filter((x) => x !== null);
  if (known.length) {
    const mean = known.reduce((a, b) => a + b) / known.length;
    $("summary").textContent = `Mean loss ${mean.toFixed(3)} nats over ${known.length} token${known.length > 1 ? "s" : ""}, perplexity ${Math.exp(mean).toPrecision(4)}.`;
  }
  for (const button of document.querySelectorAll("#tokens .token")) {
    const t = Number(button.dataset.token);
    const lines = (scores.candidates[t] || []).slice(0, 5).map(([id, p]) => `${percent(p)} ${listed(id)}`);
    if (t < T && scores.loss[t] !== null) {
      button.style.setProperty("--heat", Math.min(1, scores.loss[t] / HOT));
      lines.unshift(lossText(t).map(([key, value]) => `${key} ${value}`).join(", "));
    }
    button.title = lines.join("\n");
  }
}

function buildLens() {
  $("lens-section").hidden = !scores;
  if (!scores) return;
  $("lens-note").textContent =
    "The final norm and the head, put on the residual stream after each layer: the most probable " +
    (causal ? "next token at each token" : "token at each place, of the prompt as it stands") +
    ", in a stronger colour where its probability is higher. The lowest row is the embedding." +
    (prefix > 1 ? " Within the prompt, which is read both ways, the model has not learned to predict." : "");
  const table = document.querySelector("#lens table");
  const head = table.createTHead().insertRow();
  head.append(make("th", "layer"));
  ids.forEach((id, t) => {
    const th = textOf(id, "th");
    th.dataset.token = t;
    head.append(th);
  });
  const body = table.createTBody();
  for (let layer = scores.lens.length - 1; layer >= 0; layer--) {
    const row = body.insertRow();
    row.append(make("th", layer ? `${layer}` : "embedding"));
    scores.lens[layer].forEach(([id, share], t) => {
      const cell = textOf(id, "td");
      cell.dataset.token = t;
      cell.style.setProperty("--heat", share);
      cell.title = `${layer ? `after layer ${layer}` : "embedding"}, token ${t + 1}: ${listed(id)} ${percent(share)}`;
      cell.addEventListener("click", () => choose(t));
      row.append(cell);
    });
  }
}

function options(select, values) {
  select.append(
    ...values.map(([value, text]) => {
      const option = make("option", text);
      option.value = value;
      return option;
    }),
  );
}

$("title").textContent = document.title = data.facts[0][1];
facts($("facts"), data.facts.slice(1));
options($("layer"), Array.from({ length: layers }, (_, i) => [i, `${i + 1}`]));
options($("head"), [[-1, "mean"], ...Array.from({ length: heads }, (_, i) => [i, `${i + 1}`])]);
for (const key of ["layer", "head"]) {
  $(key).value = state[key];
  $(key).addEventListener("change", () => {
    state[key] = Number($(key).value);
    showAttention();
  });
}
$("map").addEventListener("click", (event) => choose(cellAt(event)[0]));
$("map").addEventListener("mousemove", (event) => {
  const [t, s] = cellAt(event);
  const share = percent(weight(state.layer, state.head, t, s));
  $("under").replaceChildren(textOf(ids[t]), ` (${t + 1}) looks at `, textOf(ids[s]), ` (${s + 1}): ${share}`);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
buildTokens();
buildLens();
if (scores && !causal) {
  // What the reader hid, or else the first that can be told.
  const told = ids.map((_, t) => t).filter((t) => scores.candidates[t].length);
  state.token = told.find((t) => scores.loss[t] === null) ?? told[0] ?? 0;
}
choose(state.token);
