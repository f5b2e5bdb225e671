"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SEVERITIES = ["critical", "high", "medium", "low"];
const FLAG = { finite: 1, nan: 2, plus: 4, minus: 8 };

/** An element with properties and children; text is never read as HTML. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function button(text, action, properties = {}) {
  const made = element("button", { type: "button", ...properties }, text);
  made.addEventListener("click", action);
  return made;
}

/** A number for people; of four digits, or `digits`. */
function shown(value, digits = 4) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en");
  if (size >= 1e5 || size < 1e-3) return value.toExponential(digits - 1).replace(/\.?0+e/, "e");
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits });
}

function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

function span(first, last) {
  return first === last ? String(first) : `${first} to ${last}`;
}

function duration(seconds) {
  if (seconds === null) return "";
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function when(text) {
  return text ? text.replace("T", " ").replace(/\.\d+/, "").replace(/\+00:00$/, " UTC") : "";
}

// Packed values

const unpacked = new Map();

/** The bytes that an element of the page holds, unpacked once. */
function bytesOf(id) {
  if (!unpacked.has(id)) {
    const packed = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    unpacked.set(id, new Response(stream).arrayBuffer().then((buffer) => new Uint8Array(buffer)));
  }
  return unpacked.get(id);
}

/** Numbers whose bytes lie sorted by their place in a number. */
function numbers(bytes, offset, count, type) {
  const size = type.BYTES_PER_ELEMENT;
  const sorted = new Uint8Array(count * size);
  for (let place = 0; place < size; place++) {
    const start = offset + place * count;
    for (let i = 0; i < count; i++) sorted[i * size + place] = bytes[start + i];
  }
  return new type(sorted.buffer);
}

const anomaliesOf = data.runs.map((_, run) =>
  bytesOf(`anomalies-${run}`).then((bytes) =>
    JSON.parse(new TextDecoder().decode(bytes)).map(
      ([severity, kind, first, last, key, layer, text]) => ({
        ...{ run, severity, kind, first, last, key, layer, text },
      }),
    ),
  ),
);

const curvesOf = data.runs.map((facts, run) =>
  bytesOf(`curves-${run}`).then((bytes) => {
    const found = new Map();
    let offset = 0;
    for (const { key, count, all } of facts.curves) {
      const steps = numbers(bytes, offset, count, Float64Array);
      const values = numbers(bytes, offset + 8 * count, count, Float64Array);
      offset += 16 * count;
      found.set(key, { steps, values, all });
    }
    return found;
  }),
);

/** The values of a block: low and high (the same where nothing was reduced) and flags, by row. */
function valuesOf(block) {
  block.values ??= bytesOf(block.data).then((bytes) => {
    const [rows, columns] = [block.keys.length, block.first.length];
    const count = rows * columns;
    const low = numbers(bytes, 0, count, Float32Array);
    const high = block.whole ? low : numbers(bytes, 4 * count, count, Float32Array);
    const flags = bytes.subarray((block.whole ? 4 : 8) * count);
    const row = (array, index) => array.subarray(index * columns, (index + 1) * columns);
    return {
      low: (index) => row(low, index),
      high: (index) => row(high, index),
      flags: (index) => row(flags, index),
      worst: (index) => worstOf(block, row(low, index), row(high, index)),
    };
  });
  return block.values;
}

function worstOf(block, low, high) {
  const which = data.groups[block.group].worst;
  if (which === "smallest" || block.whole) return low;
  if (which === "largest") return high;
  return low.map((value, i) => (Math.abs(value) > Math.abs(high[i]) ? value : high[i]));
}

/** Where a value lies on a bar of colours; as `Scale.apply` in Python. */
function placeOn(scale, value) {
  if (scale.kind === "linear") return value;
  if (scale.kind === "symmetric") {
    return Math.sign(value) * Math.log10(1 + Math.abs(value) / scale.unit);
  }
  return value === 0 ? scale.low : Math.log10(value);
}

// Charts are drawn when they come into sight, and again when the colours change.

const drawings = new Map();
const sight = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      const drawing = drawings.get(target);
      if (!drawing) continue;
      drawing.visible = isIntersecting;
      if (isIntersecting && drawing.stale) draw(target);
    }
  },
  { rootMargin: "250px" },
);

/** Have `build`, which gives {traces, layout, options, click, hover}, draw into `place` when it is seen. */
function lazily(place, build) {
  const known = drawings.get(place);
  drawings.set(place, { build, stale: true, visible: known?.visible ?? false });
  if (known?.visible) draw(place);
  else sight.observe(place);
}

async function draw(place) {
  const drawing = drawings.get(place);
  drawing.stale = false;
  const { traces, layout, options, click, hover } = await drawing.build();
  if (drawings.get(place) !== drawing || !place.isConnected) return;
  place.style.minHeight = `${layout.height}px`;
  await Plotly.react(place, traces, layout, options ?? PLOT_OPTIONS);
  place.removeAllListeners("plotly_click");
  place.removeAllListeners("plotly_hover");
  place.removeAllListeners("plotly_unhover");
  if (click) place.on("plotly_click", (event) => click(event.points[0]));
  if (hover) {
    place.on("plotly_hover", ({ points, event }) => showTip(hover(points[0]), event));
    place.on("plotly_unhover", () => (byId("tip").hidden = true));
  }
  place.dataset.drawn = "yes";
}

function forget(place) {
  sight.unobserve(place);
  drawings.delete(place);
  if (place.dataset.drawn) Plotly.purge(place);
}

function redrawAll() {
  for (const [place, drawing] of drawings) {
    drawing.stale = true;
    if (drawing.visible) draw(place);
  }
}

function showTip(lines, event) {
  const tip = byId("tip");
  const [head, ...rest] = lines;
  tip.replaceChildren(element("b", {}, head), ...rest.map((line) => element("div", {}, line)));
  tip.hidden = false;
  const { innerWidth: width, innerHeight: height } = window;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, width - tip.offsetWidth - 8))}px`;
  const below = event.clientY + 16;
  const top = below + tip.offsetHeight > height ? event.clientY - tip.offsetHeight - 10 : below;
  tip.style.top = `${top}px`;
}

// Light and dark

/** Colours of the style sheet as they are now. */
function colours() {
  const probe = element("i");
  document.body.append(probe);
  const found = {};
  for (const name of ["text", "muted", "line", "grid", "surface", "accent", ...SEVERITIES]) {
    probe.style.color = `var(--${name})`;
    found[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return found;
}

let theme = colours();
const darkness = window.matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return (document.documentElement.dataset.theme ?? (darkness.matches ? "dark" : "light")) === "dark";
}

function applyTheme() {
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  theme = colours();
  redrawAll();
}

byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  applyTheme();
});
darkness.addEventListener("change", applyTheme);
