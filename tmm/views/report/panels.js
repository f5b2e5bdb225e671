// A panel shows one metric of many layers: as a heat map, as lines, or over the depth.

const VIEWS = { heat: "Heat map", lines: "Over steps", depth: "Over depth" };
const HEIGHTS = { lines: 360, depth: 430 };
const MOST_LINES = 24;
const MOST_ROWS = 2000;

/** A gradient with its values, and what the other colours mean. */
function scaleBar(block) {
  const { scale } = data.groups[block.group];
  const stops = scale.kind === "symmetric" ? data.style.signed : data.style.magnitudes;
  const gradient = stops.map(([place, colour]) => `${colour} ${100 * place}%`).join(", ");
  const strip = element("i");
  strip.style.background = `linear-gradient(to right, ${gradient})`;
  const bar = element("span", { className: "bar" }, strip);
  scale.ticks.forEach((tick, i) => {
    const label = element("span", {}, scale.labels[i]);
    label.style.left = `${(100 * (tick - scale.low)) / (scale.high - scale.low)}%`;
    bar.append(label);
  });
  const keys = [["NaN", data.style.nan], ["infinite", data.style.infinity]];
  const chips = [...keys, ["not measured", "transparent"]].map(([text, colour]) => {
    const chip = element("span", { className: "key" }, text);
    chip.style.setProperty("--cell", colour);
    return chip;
  });
  const how = { log: "logarithmic", symmetric: "logarithmic on both sides of 0", linear: "linear" };
  return element("div", { className: "scale" }, bar, ...chips, element("span", {}, how[scale.kind]));
}

function select(label, options, chosen, changed) {
  const made = element("select", { "aria-label": label });
  for (const [value, text] of options) {
    made.append(element("option", { value, selected: String(value) === String(chosen) }, text));
  }
  made.addEventListener("change", () => changed(made.value));
  return made;
}

/** `count` of `items`, evenly; with the first and the last. */
function evenly(items, count) {
  if (items.length <= count) return items;
  return Array.from({ length: count }, (_, i) => items[Math.round((i * (items.length - 1)) / (count - 1))]);
}

/** A panel for the metrics of `groups` that begins with `view`, and with the first of them. */
function panel(groups, view) {
  const state = { group: groups[0], run: 0, view, filter: "" };
  const controls = element("div", { className: "controls" });
  const legend = element("div");
  const place = element("div", { className: "plot" });
  const scroller = element("div", { className: "scroller" }, place);
  const note = element("p", { className: "note" });
  const made = element("div", { className: "panel" }, controls, legend, scroller, note);

  const holders = () => data.blocks.filter((block) => block.group === state.group);

  function choose(change) {
    Object.assign(state, change);
    const runs = holders().map((block) => block.run);
    if (!runs.includes(state.run)) state.run = runs[0];
    renderControls();
    renderChart();
  }

  function renderControls() {
    const options = groups.map((name) => [name, name]);
    const metric = select("Metric", options, state.group, (group) => choose({ group }));
    const runs = holders().map(({ run }) => [run, data.runs[run].name]);
    const run = select("Run", runs, state.run, (value) => choose({ run: Number(value) }));
    run.hidden = data.runs.length < 2;
    const views = element("span", { className: "views", role: "group" });
    for (const [name, text] of Object.entries(VIEWS)) {
      const pressed = { "aria-pressed": String(name === state.view), "data-view": name };
      views.append(button(text, () => choose({ view: name }), pressed));
    }
    controls.replaceChildren(metric, run, views, filter);
  }

  const filter = element("input", {
    ...{ type: "search", placeholder: "Only layers with …", value: "", spellcheck: false },
    "aria-label": "Only layers whose name holds this",
  });
  filter.addEventListener("input", () => {
    state.filter = filter.value;
    renderChart();
  });

  function renderChart() {
    const block = holders().find(({ run }) => run === state.run);
    const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const all = block.labels
      .map((_, row) => row)
      .filter((row) => words.every((word) => block.labels[row].toLowerCase().includes(word)));
    const [rows, said] = chosenRows(block, all, state.view);
    note.textContent = said.join(" ");
    legend.replaceChildren(...(state.view === "heat" ? [scaleBar(block)] : []));
    made.dataset.rows = rows.length;
    // Its room at once, so that what follows stays where it is when this is drawn.
    place.style.minHeight = `${state.view === "heat" ? heatHeight(rows.length) : HEIGHTS[state.view]}px`;
    const open = (of, row, step) => openLayer(of.layers[row], step, of.keys[row]);
    lazily(place, async () => {
      if (state.view === "lines") return linesChart(block, rows, open);
      if (state.view === "depth") return depthChart(block, rows, open);
      return heatChart(block, rows, await anomaliesOf[block.run], open);
    });
  }

  choose({});
  return made;
}

/** The rows that a view shows of `all` that are wanted, and what to say of it. */
function chosenRows(block, all, view) {
  const said = [];
  let rows = all;
  if (view === "lines" && all.length > MOST_LINES) {
    rows = evenly(all, MOST_LINES);
    said.push(`${rows.length} of ${all.length} layers, evenly over the depth; all are in the heat map.`);
  } else if (all.length > MOST_ROWS) {
    rows = all.slice(0, MOST_ROWS);
    said.push(`The first ${plural(rows.length, "layer")} of ${all.length}; narrow them by name.`);
  }
  if (!all.length) said.push("No layer has such a name.");
  if (block.note) said.push(view === "heat" ? `${block.note}.` : reducedNote(block));
  if (view === "lines") said.push("Colours go from the input (blue) to the output (red).");
  if (all.length) said.push("Click to open the layer.");
  return [rows, said];
}

function reducedNote(block) {
  const most = Math.max(...block.first.map((_, i) => i && block.first[i] - block.first[i - 1]));
  return `Each point is ${block.shows} of up to ${plural(most, "step")}.`;
}
