// Series that belong to no layer: losses, rates, what was logged.

/** The keys of the curves of a part of the page, in the order of the runs. */
function curveKeys(name) {
  const keys = data.runs.flatMap((run) => run.curves.filter(({ section }) => section === name));
  return [...new Set(keys.map(({ key }) => key))];
}

function curveNote(key) {
  const thinned = data.runs.flatMap((run) => run.curves).find((c) => c.key === key && c.count < c.all);
  if (!thinned) return "";
  const points = `${plural(thinned.all, "value")} drawn by ${plural(thinned.count, "point")}`;
  return `${points}: extremes and what is not finite are kept`;
}

/** A chart of a curve; the one with `all` also marks the grave anomalies of other keys. */
function curveChart(key, { height = 210, wide = false, all = false } = {}) {
  return chart(
    key,
    curveNote(key),
    async () => {
      const held = await Promise.all(curvesOf);
      const series = held.flatMap((curves, run) =>
        curves.has(key) ? [{ ...curves.get(key), run, key }] : [],
      );
      const anomalies = (await Promise.all(anomaliesOf)).flat();
      const own = anomalies.filter((anomaly) => anomaly.key === key);
      return keyChart(series, all ? [...own, ...graveOnes(anomalies, key)] : own, {
        height,
        click: ({ layer, first, key: of }) => layer && openLayer(layer, first, of),
      });
    },
    { wide, height },
  );
}

/** Of the grave anomalies of other keys, the first few of each kind and run. */
function graveOnes(anomalies, key) {
  const counts = new Map();
  return anomalies.filter((anomaly) => {
    const grave = anomaly.severity === "critical" || anomaly.severity === "high";
    if (!grave || anomaly.key === key) return false;
    const kind = `${anomaly.run} ${anomaly.kind} ${anomaly.severity}`;
    counts.set(kind, (counts.get(kind) ?? 0) + 1);
    return counts.get(kind) <= GRAVE_OF_A_KIND;
  });
}

function grid(keys, { most = 60 } = {}) {
  const made = element("div", { className: "grid" });
  const add = () => {
    const start = made.children.length;
    made.append(...keys.slice(start, start + most).map((key) => curveChart(key)));
    const left = keys.length - made.children.length;
    more.hidden = left <= 0;
    more.textContent = `Show ${Math.min(most, left)} more of ${left.toLocaleString("en")}`;
  };
  const more = button("", add, {});
  add();
  return [made, more];
}

function showLoss() {
  const [first, ...rest] = curveKeys("loss");
  const rates = curveKeys("throughput");
  if (!first && !rates.length) return;
  const made = element("div", { className: "grid" });
  if (first) made.append(curveChart(first, { height: 320, wide: true, all: true }));
  made.append(...[...rest, ...rates].map((key) => curveChart(key)));
  const title = first ? (rates.length ? "Loss and throughput" : "Loss") : "Throughput";
  const lead = "Diamonds are anomalies; at the upper edge the first grave ones of layers. Click one.";
  section("loss", title, lead, runLegend(), made);
}
