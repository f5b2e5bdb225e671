// What went wrong: anomalies as a list that leads to layers and curves.

/** Anomalies of one kind and severity together, the worst first. */
function findingGroups(box, anomalies, withRuns) {
  const groups = new Map();
  for (const anomaly of anomalies) {
    const name = `${SEVERITIES.indexOf(anomaly.severity)} ${anomaly.kind}`;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(anomaly);
  }
  // Where it first was not finite comes first: much of the rest follows from it.
  const rank = (name) => (name === "0 nonfinite" ? -1 : Number(name[0]));
  const sorted = [...groups].sort(([a], [b]) => rank(a) - rank(b));
  for (const [, found] of sorted) {
    const [{ severity, kind, text }] = found;
    const details = element(
      ...["details", { className: "group", open: severity === "critical" && found.length < 4 }],
      element(
        ...["summary", {}],
        element("span", { className: `chip ${severity}` }, severity),
        element("b", {}, kind.replaceAll("_", " ")),
        element("span", {}, found.length > 1 ? `× ${found.length.toLocaleString("en")}` : ""),
        element("span", { className: "said" }, text),
      ),
    );
    const list = element("ul");
    const more = button("", () => fill(), { className: "more-button" });
    const fill = () => {
      const start = list.children.length;
      const items = found.slice(start, start + SHOWN_FINDINGS);
      list.append(...items.map((anomaly) => element("li", {}, finding(anomaly, withRuns))));
      const left = found.length - list.children.length;
      more.hidden = !left;
      more.textContent = `${Math.min(left, SHOWN_FINDINGS)} more of ${left.toLocaleString("en")}`;
    };
    details.append(list, more);
    if (details.open) fill();
    else details.addEventListener("toggle", fill, { once: true });
    box.append(details);
  }
}

function finding(anomaly, withRuns) {
  const { first, last, key, layer, text, run } = anomaly;
  const open = () => (layer ? openLayer(layer, first, key) : showCurve(key));
  const whose = withRuns ? `${data.runs[run].name}, ` : "";
  const made = button("", open, { className: "finding", "data-key": key });
  made.append(
    element("span", { className: "when" }, `${whose}step ${span(first, last)}`),
    element("span", { className: "key" }, key),
    element("span", { className: "text" }, text),
  );
  return made;
}

async function showFindings(place) {
  const found = (await Promise.all(anomaliesOf)).flat();
  findingGroups(place, found, several);
}

/** Scroll to the chart of a key that belongs to no layer. */
function showCurve(key) {
  dialog.close();
  const made = main.querySelector(`.chart[data-key="${CSS.escape(key)}"]`);
  if (made) flash(made);
}
