// Draws the figures and the sampled responses of a report from its JSON block. Text of a run is only ever set as text.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const several = data.runs.length > 1;
const FEW = 60; // so many points or fewer are bars in a stack, and dots on a line
const HEIGHT = 210;
const OPENED = 3; // responses shown at first
const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3]];
const plots = [];

// What a person has chosen here, for when the page is loaded again.
const kept = `report ${location.pathname}`;
const chosen = { steps: null, colour: "version", opened: {} };
try {
  Object.assign(chosen, JSON.parse(sessionStorage.getItem(kept)));
} catch { /* a page without storage, as in a mail */ }

function keep(change) {
  Object.assign(chosen, change);
  try {
    sessionStorage.setItem(kept, JSON.stringify(chosen));
  } catch { /* likewise */ }
}

const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const runColour = run => colour(`--run-${run % 8}`);
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

function element(tag, parent, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  if (parent) parent.append(made);
  return made;
}

function words(value) {
  if (value == null) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

// -- figures ---------------------------------------------------------------------------------------

function options(width, xs, series) {
  const ink = colour("--quiet"), line = { stroke: colour("--line"), width: 1 };
  const pad = xs.length <= FEW ? 0.5 : 0;
  const zoomed = (chart, scale) => {
    if (scale !== "x" || chart.status !== 1) return; // not while it is made
    const { min, max } = chart.scales.x;
    keep({ steps: min === xs[0] - pad && max === xs.at(-1) + pad ? null : [min, max] });
  };
  return {
    width, height: HEIGHT, series, hooks: { setScale: [zoomed] },
    cursor: { sync: { key: "steps", scales: ["x", null] }, drag: { x: true, y: false }, points: { size: 6 } },
    scales: { x: { time: false, range: (u, low, high) => [low - pad, high + pad] } },
    axes: [
      { stroke: ink, grid: line, ticks: line, size: 34, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5] },
      { stroke: ink, grid: line, ticks: line, size: roomForTicks, values: tickWords },
    ],
  };
}

// As many digits as tell neighbours apart, all ticks in one notation.
function tickWords(chart, ticks, axis, space, increment) {
  const most = Math.max(...ticks.map(Math.abs));
  const digits = Math.min(Math.max(Math.ceil(Math.log10(most / increment)), 0) + 2, 15);
  const rounded = ticks.map(tick => Number(tick.toPrecision(digits)));
  return rounded.map(tick => tick !== 0 && (most < 1e-3 || most >= 1e6) ? tick.toExponential() : String(tick));
}

function roomForTicks(chart, texts, axis, cycle) {
  const { _size, ticks, gap, font } = chart.axes[axis];
  if (cycle > 1) return _size; // a longer text may have moved the ticks: settle
  chart.ctx.font = font[0]; // in the canvas's pixels
  const widest = Math.max(0, ...(texts ?? []).map(text => chart.ctx.measureText(text).width));
  return Math.ceil(ticks.size + gap + widest / devicePixelRatio) + 1;
}

function lineFigure(figure) {
  const joined = uPlot.join(figure.lines.map(line => [line.x, line.y]));
  const series = figure.lines.map(line => {
    // With one run the main line is bold, and the others are told apart by colour as well.
    const hue = runColour(several ? line.run : line.role);
    return {
      label: several ? `${data.runs[line.run]}${figure.lines.some(other => other.role) || line.faint ? " " + line.label : ""}` : line.label,
      stroke: line.faint ? hue + "55" : hue,
      width: line.faint ? 1 : 1.75,
      dash: several ? DASHES[line.role % DASHES.length] : [],
      points: { show: line.x.length <= FEW, size: 5, fill: hue },
      value: (u, value) => words(value),
    };
  });
  return [joined, [{ label: "step" }, ...series]];
}

function stackColour(figure, index) {
  const { label, place } = figure.parts[index];
  if (figure.ordered) { // from cool and light to warm and strong
    const t = place / Math.max(figure.last, 1);
    return `hsl(${210 - 190 * t} ${55 + 20 * t}% ${isDark() ? 62 - 8 * t : 70 - 22 * t}%)`;
  }
  return label === "rest" ? colour("--line") : runColour(place);
}

function stackFigure(figure) {
  // The sums of a part and all below it, the largest first: each is painted over by the next.
  const sums = figure.parts.map(part => part.y.map(value => value ?? 0));
  for (let row = sums.length - 2; row >= 0; row--)
    sums[row] = sums[row].map((value, place) => value + sums[row + 1][place]);
  const bars = figure.x.length <= FEW ? uPlot.paths.bars({ size: [0.9, 100] }) : uPlot.paths.linear();
  const series = figure.parts.map((part, index) => ({
    label: part.label, stroke: stackColour(figure, index), fill: stackColour(figure, index), width: 0,
    paths: bars, points: { show: false }, value: (u, value, s, place) => words(place == null ? null : part.y[place]),
  }));
  return [[figure.x, ...sums], [{ label: "step" }, ...series]];
}

function draw({ figure, place }) {
  const [values, series] = figure.kind === "stack" ? stackFigure(figure) : lineFigure(figure);
  const made = options(place.clientWidth, values[0], series);
  if (figure.kind === "stack") made.scales.y = { range: (u, low, high) => [0, high > 0 ? high * 1.02 : 1] };
  const chart = new uPlot(made, values, place);
  if (chosen.steps) chart.setScale("x", { min: chosen.steps[0], max: chosen.steps[1] });
  return chart;
}

function drawAll() {
  for (const plot of plots) {
    plot.chart?.destroy();
    plot.chart = draw(plot);
  }
}

for (const section of data.sections) {
  const part = element("section", document.getElementById("figures"));
  element("h2", part, section.title);
  const grid = element("div", part, undefined, "grid");
  for (const figure of section.figures) {
    const box = element("figure", grid);
    element("h3", box, several && figure.kind === "stack" ? `${figure.title}: ${data.runs[figure.run]}` : figure.title);
    element("figcaption", box, figure.note);
    plots.push({ figure, place: element("div", box) });
  }
}
drawAll();
const resized = new ResizeObserver(entries => {
  for (const { target } of entries) {
    const chart = plots.find(plot => plot.place === target).chart;
    if (target.clientWidth && chart.width !== target.clientWidth) chart.setSize({ width: target.clientWidth, height: HEIGHT });
  }
});
plots.forEach(plot => resized.observe(plot.place));

// -- sampled responses -----------------------------------------------------------------------------

const VERSION_HUES = [210, 35, 150, 290, 60, 340, 180, 100];
const tint = (hue, strength) => `hsl(${hue} 75% ${isDark() ? 22 + 14 * strength : 90 - 14 * strength}%)`;

function versionColour(version) {
  return tint(VERSION_HUES[version % VERSION_HUES.length], 0.5);
}

function weightColour(weight) {
  if (weight == null) return "transparent";
  const size = Math.min(Math.abs(Math.log(weight)) / Math.log(2), 1); // twice or half is full strength
  return size < 0.02 ? "transparent" : tint(weight > 1 ? 20 : 215, size);
}

function describe(sample, place) {
  const version = sample.versions[place];
  const said = [`version ${version}, ${sample.current_version - version} behind`, `sampled with log-prob ${words(sample.behave_logp[place])}`];
  if (sample.logp[place] != null) said.push(`log-prob in the update ${words(sample.logp[place])}`);
  if (sample.importance_weight[place] != null) said.push(`importance weight ${words(sample.importance_weight[place])}`);
  if (sample.clipped[place]) said.push("clipped");
  return said.join(", ");
}

function response(sample, box) {
  element("p", box, sample.prompt, "prompt");
  const text = element("div", box, undefined, "response");
  if (!sample.texts) {
    text.textContent = sample.response;
    element("p", box, "Recorded without the texts of its tokens, so without colours.", "quiet");
    return;
  }
  const line = element("p", box, "Touch a token for its numbers.", "quiet");
  sample.texts.forEach((piece, place) => {
    const token = element("span", text, piece, "token");
    token.dataset.place = place;
    token.classList.toggle("seam", place > 0 && sample.versions[place] !== sample.versions[place - 1]);
    token.classList.toggle("clipped", sample.clipped[place] === true);
    token.title = describe(sample, place);
  });
  if (sample.num_tokens > sample.texts.length) element("span", text, ` ... ${sample.num_tokens - sample.texts.length} more tokens`, "quiet");
  text.addEventListener("click", event => {
    const place = event.target.dataset.place;
    if (place !== undefined) line.textContent = `Token ${Number(place) + 1}, ${JSON.stringify(sample.texts[place])}: ${describe(sample, place)}.`;
  });
  paint(sample, text);
}

function paint(sample, text) {
  const by = document.querySelector("input[name=colour]:checked").value;
  for (const token of text.querySelectorAll(".token")) {
    const place = token.dataset.place;
    token.style.background = by === "weight" ? weightColour(sample.importance_weight[place]) : versionColour(sample.versions[place]);
  }
}

const opened = [];
function listSamples() {
  const place = document.getElementById("responses");
  document.getElementById("samples").hidden = data.samples.length === 0;
  const shown = interesting();
  data.samples.forEach((sample, index) => {
    const box = element("details", place);
    const versions = new Set(sample.versions ?? []).size, clipped = (sample.clipped ?? []).filter(Boolean).length;
    const said = [`step ${sample.step}`, `reward ${words(sample.reward)}`, `${sample.num_tokens} tokens`];
    if (several) said.unshift(data.runs[sample.run]);
    if (versions > 1) said.push(`${versions} versions`);
    if (clipped) said.push(`${clipped} clipped`);
    if (sample.finish_reason === "length") said.push("truncated");
    const prompt = String(sample.prompt ?? "");
    said.push(prompt.length > 60 ? `${prompt.slice(0, 60)}...` : prompt);
    element("summary", box, said.join(" \u00b7 "));
    const name = [sample.run, sample.step, prompt, sample.response].join("\n").slice(0, 200);
    const fill = () => {
      if (!box.open || box.querySelector(".response")) return;
      response(sample, box);
      if (sample.texts) opened.push([sample, box.querySelector(".response")]);
    };
    const before = chosen.opened[name] ?? shown.has(index);
    box.addEventListener("toggle", () => {
      fill();
      if (box.open !== (chosen.opened[name] ?? before)) keep({ opened: { ...chosen.opened, [name]: box.open } });
    });
    box.open = before;
    fill();
  });
}

// Those that show the most: several versions, then clipped tokens.
function interesting() {
  const worth = sample => 1000 * new Set(sample.versions ?? []).size + (sample.clipped ?? []).filter(Boolean).length;
  const order = data.samples.map((sample, index) => [worth(sample), index]).sort((one, other) => other[0] - one[0]);
  return new Set(order.slice(0, OPENED).map(([, index]) => index));
}

function showKey() {
  const key = document.getElementById("key"), by = document.querySelector("input[name=colour]:checked").value;
  key.replaceChildren();
  const swatch = (text, background) => { element("span", key, text, "swatch").style.background = background; };
  if (by === "version") {
    key.append("A colour is a version of the weights; a bar is where a response was continued under new ones. ");
  } else if (data.samples.some(sample => (sample.importance_weight ?? []).some(weight => weight != null))) {
    for (const weight of [0.5, 0.8, 1, 1.25, 2]) swatch(words(weight), weightColour(weight));
  } else {
    key.append("These samples were recorded without importance weights. ");
  }
  key.append("Framed tokens were clipped.");
}

document.querySelector(`input[name=colour][value=${chosen.colour}]`).checked = true;
listSamples();
showKey();
for (const choice of document.querySelectorAll("input[name=colour]"))
  choice.addEventListener("change", () => { keep({ colour: choice.value }); showKey(); opened.forEach(pair => paint(...pair)); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawAll();
  showKey();
  opened.forEach(pair => paint(...pair));
});
// Charts commit in microtasks queued above: when this one runs, everything is drawn.
queueMicrotask(() => { document.documentElement.dataset.drawnMs = Math.round(performance.now()); });
})();
