// One layer: all that was measured of it, over the steps.

const dialog = byId("layer");
byId("layer-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog.addEventListener("close", () => {
  for (const place of byId("layer-body").querySelectorAll(".plot")) forget(place);
  byId("layer-body").replaceChildren();
});

const layers = new Map(); // its rows of blocks, by the name of a layer
for (const block of data.blocks) {
  block.layers.forEach((layer, row) => {
    if (!layers.has(layer)) layers.set(layer, []);
    layers.get(layer).push({ block, row });
  });
}

/** Show a layer; `step` is marked, and the chart of `key` is scrolled to. */
async function openLayer(layer, step = null, key = null) {
  if (!layers.has(layer)) return;
  byId("tip").hidden = true;
  const byKey = new Map();
  for (const { block, row } of layers.get(layer)) {
    const name = block.keys[row];
    if (!byKey.has(name)) byKey.set(name, []);
    byKey.get(name).push({ block, row, key: name, run: block.run });
  }
  const anomalies = (await Promise.all(anomaliesOf)).flat().filter((a) => a.layer === layer);
  byId("layer-name").textContent = layer;
  const marked = step === null ? "" : `, step ${step} marked`;
  byId("layer-lead").textContent = `${plural(byKey.size, "metric")} over the steps${marked}`;
  const body = byId("layer-body");
  for (const place of body.querySelectorAll(".plot")) forget(place);
  body.replaceChildren();
  if (anomalies.length) {
    const box = element("div", { className: "box" });
    findingGroups(box, anomalies, data.runs.length > 1);
    body.append(box);
  }
  body.append(runLegend());
  const grid = element("div", { className: "grid" });
  body.append(grid);
  const few = anomalies.filter((a) => a.severity === "critical" || a.severity === "high");
  for (const [name, series] of byKey) {
    const own = anomalies.filter((anomaly) => anomaly.key === name);
    const [{ block }] = series;
    const note = block.whole ? "" : "band: smallest to largest of the steps of each point";
    const build = async () => {
      for (const one of series) one.held = await valuesOf(one.block);
      return keyChart(series, own, { steps: step === null ? [] : [step] });
    };
    grid.append(chart(name, note, build));
  }
  body.dataset.anomalies = few.length;
  if (!dialog.open) dialog.showModal();
  body.scrollTop = 0;
  if (key && byKey.has(key)) flash(grid.querySelector(`[data-key="${CSS.escape(key)}"]`));
}

/** A box with a title and a chart in it. */
function chart(key, note, build, { wide = false, height = 210 } = {}) {
  const place = element("div", { className: "plot" });
  place.style.minHeight = `${height}px`;
  const made = element(
    ...["div", { className: wide ? "chart wide" : "chart", "data-key": key }],
    element("h3", {}, key),
    note ? element("p", { className: "note" }, note) : null,
    place,
  );
  lazily(place, build);
  return made;
}

function flash(made) {
  made.scrollIntoView({ block: "center" });
  made.classList.add("flash");
  setTimeout(() => made.classList.remove("flash"), 2500);
}

/** The colours of runs, where there are several. */
function runLegend() {
  const legend = element("div", { className: "runs", hidden: data.runs.length < 2 });
  data.runs.forEach(({ name }, run) => {
    const item = element("span", {}, name);
    item.style.setProperty("--run", data.style.runs[run % data.style.runs.length]);
    legend.append(item);
  });
  return legend;
}
