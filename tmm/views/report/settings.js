// How runs were set up, and how they differ.

function showComparison() {
  const { comparison } = data;
  if (!comparison) return;
  const names = data.runs.map((run) => run.name);
  const parts = comparison.partings.map(({ run, parting }) => {
    if (!parting) return `${names[0]} and ${run}: no difference beyond 10 % in what both have.`;
    const more = parting.others ? `, and ${plural(parting.others, "other key")} in that step` : "";
    const numbersSaid = `${shown(parting.a)} and ${shown(parting.b)}`;
    return `${names[0]} and ${run} part at step ${parting.step}, first in ${parting.key} (${numbersSaid})${more}.`;
  });
  const content = parts.map((text) => element("p", { className: "parting" }, text));
  const settings = Object.entries(comparison.configuration);
  if (settings.length) {
    const rows = settings.map(([entry, values]) => [
      ...[entry, ...names.map((name) => (name in values ? text(values[name]) : "–"))],
    ]);
    content.push(table(["setting that differs", ...names], rows));
  } else {
    content.push(element("p", { className: "notice" }, "Their settings are equal."));
  }
  if (comparison.final.length) {
    const rows = comparison.final.map(({ key, final, best }) => [
      key,
      ...names.map((name) =>
        element("td", { className: name === best ? "best" : "" }, shown(final[name] ?? "–")),
      ),
    ]);
    content.push(table(["last value", ...names], rows));
  }
  section("comparison", "Differences", "", ...content);
}

function text(value) {
  return typeof value === "object" && value !== null ? JSON.stringify(value) : String(value);
}

/** Entries of nested objects, joined with dots. */
function flattened(value, prefix = "") {
  return Object.entries(value).flatMap(([name, item]) =>
    item && typeof item === "object" && !Array.isArray(item) && Object.keys(item).length
      ? flattened(item, `${prefix}${name}.`)
      : [[prefix + name, text(item)]],
  );
}

function sideBySide(field) {
  const all = data.runs.map((run) => new Map(flattened(run[field])));
  const names = [...new Set(all.flatMap((entries) => [...entries.keys()]))];
  return names.map((name) => [name, ...all.map((entries) => entries.get(name) ?? "–")]);
}

function showSettings() {
  const names = several ? data.runs.map((run) => run.name) : ["value"];
  const columns = element("div", { className: several ? "" : "columns" });
  for (const [field, title] of [["config", "configuration"], ["environment", "environment"]]) {
    const rows = sideBySide(field);
    if (rows.length) columns.append(table([title, ...names], rows));
  }
  const content = [columns];
  for (const run of data.runs) {
    const whose = several ? ` of ${run.name}` : "";
    if (run.notes) content.push(element("p", { className: "lead" }, `Notes${whose}: ${run.notes}`));
    if (run.events.length) {
      const rows = run.events.map(({ step, kind, text: said }) => [String(step), kind, said]);
      const shownOnes = run.allEvents > rows.length ? ` (the first ${rows.length} of ${run.allEvents})` : "";
      content.push(folded(`Events${whose}: ${run.allEvents}${shownOnes}`, table(["step", "kind", ""], rows)));
    }
    if (run.explanation) {
      const cut = run.explanationCut ? "\n… cut here; tmm explain RUN prints all of it" : "";
      content.push(folded(`What was measured${whose}`, element("pre", {}, run.explanation + cut)));
    }
  }
  section("settings", "Configuration and environment", "", ...content);
}

function folded(title, content) {
  const details = element("details", { className: "fold" }, element("summary", {}, title), content);
  return element("div", { className: "box" }, details);
}

function showFoot() {
  const histograms = data.runs.reduce((sum, run) => sum + run.histograms, 0);
  const reduced = data.blocks.some((block) => !block.whole);
  const lines = [
    `Written ${when(data.written)}. This page holds all that it shows, and loads nothing.`,
    data.exact ? "" : "Charts of layers keep four digits of each value; curves and tables all of them.",
    reduced ? "Runs that are longer than the heat maps are wide are reduced, which each says." : "",
    histograms ? `${plural(histograms, "histogram")} are not shown.` : "",
  ];
  byId("foot").append(...lines.filter(Boolean).map((line) => element("p", {}, line)));
}
