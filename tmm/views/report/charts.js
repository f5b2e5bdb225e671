// What is drawn: curves, layers over steps, values over depth.

const PLOT_OPTIONS = {
  displaylogo: false,
  responsive: true,
  displayModeBar: "hover",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  showSendToCloud: false, // nothing leaves the page
  plotlyServerURL: "",
};
const SYMBOLS = { critical: "diamond", high: "diamond", medium: "circle", low: "circle-open" };

function axis(more = {}) {
  return {
    gridcolor: theme.grid,
    linecolor: theme.line,
    zerolinecolor: theme.grid,
    tickfont: { color: theme.muted, size: 11 },
    automargin: true,
    exponentformat: "e",
    ...more,
  };
}

function layoutOf(height, more = {}) {
  return {
    height,
    margin: { l: 8, r: 12, t: 10, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: theme.text, family: "inherit", size: 12 },
    hoverlabel: { bgcolor: theme.surface, bordercolor: theme.line, font: { color: theme.text } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: theme.muted, activecolor: theme.accent },
    showlegend: false,
    ...more,
  };
}

/** An axis for marks at the edges of a chart, from 0 at the bottom to 1 at the top. */
function edge(overlaying = "y") {
  return { overlaying, range: [0, 1], fixedrange: true, visible: false };
}

/**
 * The axis of values: logarithmic if all are positive, and of several orders of magnitude.
 *
 * With `zeros` it may be that, too, where some are 0; those are to be marked on the lower edge.
 */
function valueAxis(arrays, { zeros = false } = {}) {
  let [low, high] = [Infinity, -Infinity];
  for (const values of arrays) {
    for (const value of values) {
      if (Number.isFinite(value) && !(zeros && value === 0)) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
  }
  if (low > high && !arrays.some((values) => values.includes(0))) {
    const title = { text: "no finite value", font: { size: 11, color: theme.muted } };
    return axis({ title, range: [0, 1], showticklabels: false, showgrid: false });
  }
  if (!(low > 0 && high / 30 > low)) return axis({ nticks: 7 });
  const decades = Math.log10(high / low);
  const dtick = decades < 2.5 ? "D2" : Math.ceil(decades / 8);
  return axis({ type: "log", dtick, tickformat: "~g" });
}

const finiteOnly = (values) => Array.from(values, (v) => (Number.isFinite(v) ? v : null));

/** The axis of steps, which are whole numbers. */
function stepAxis(traces) {
  const steps = traces.flatMap((trace) => [trace.x[0], trace.x.at(-1)]);
  const title = { text: "step", font: { size: 11, color: theme.muted }, standoff: 4 };
  const isShort = Math.max(...steps) - Math.min(...steps) <= 10;
  return axis({ title, ...(isShort ? { dtick: 1 } : {}) });
}

/** What an axis cannot show, with the colour and the sign that stand for it on its edge. */
function strangeKinds() {
  return [
    ["NaN", data.style.nan, "x-thin"],
    ["infinite", data.style.infinity, "x-thin"],
    ["0", theme.muted, "circle-open"], // on a logarithmic axis
  ];
}

/** Marks on the lower edge, where a series has what its axis cannot show. */
function strangeMarks(name, steps, kinds) {
  const traces = [];
  for (const [kind, colour, symbol] of strangeKinds()) {
    const x = Array.from(steps).filter((_, i) => kinds[i] === kind);
    if (!x.length) continue;
    traces.push({
      ...{ x, y: x.map(() => 0), yaxis: "y2", mode: "markers", cliponaxis: false },
      marker: { symbol, size: 7, color: colour, line: { color: colour, width: 1.6 } },
      hovertemplate: `${kind}<extra>${escaped(name)}</extra>`,
    });
  }
  return traces;
}

/** Text as plotly shows it, which reads some tags. */
function escaped(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function kindOf(value) {
  return Number.isNaN(value) ? "NaN" : Number.isFinite(value) ? "" : "infinite";
}

/** As `strangeKinds` calls what a bucket holds; `value` is what is drawn of it. */
function kindOfBucket(flags, value, isLog) {
  if (flags & FLAG.nan) return "NaN";
  if (flags & (FLAG.plus | FLAG.minus)) return "infinite";
  return isLog && value === 0 ? "0" : "";
}

/** The kinds of all buckets of a row, and what is left to draw as a line. */
function splitRow(values, flags, isLog) {
  const kinds = Array.from(values, (value, i) => kindOfBucket(flags[i], value, isLog));
  const drawn = finiteOnly(values).map((value) => (isLog && value === 0 ? null : value));
  return { kinds, drawn };
}

function isLonely(values) {
  return !values.some((value, i) => value !== null && i && values[i - 1] !== null);
}

function lineTrace(x, y, colour, name, more = {}) {
  const mode = isLonely(y) ? "markers" : "lines";
  return {
    ...{ x, y, mode, name: escaped(name), line: { color: colour, width: 1.6 } },
    marker: { color: colour, size: 6 },
    hovertemplate: `step %{x}: %{y:.5g}<extra>${escaped(name)}</extra>`,
    ...more,
  };
}

/** One series of one run: of a curve, or of a row of a block as a band of its extremes. */
function seriesTraces({ steps, values, block, row, held }, colour, name, isLog) {
  if (!block) {
    return [
      lineTrace(Array.from(steps), finiteOnly(values), colour, name),
      ...strangeMarks(name, steps, Array.from(values, kindOf)),
    ];
  }
  const { kinds, drawn: low } = splitRow(held.low(row), held.flags(row), isLog);
  const strange = strangeMarks(name, block.first, kinds);
  if (block.whole) return [lineTrace(block.first, low, colour, name), ...strange];
  const high = finiteOnly(held.high(row));
  const spans = block.first.map((first, i) => span(first, block.last[i]));
  const band = (text) => ({
    text: spans,
    hovertemplate: `steps %{text}: ${text} %{y:.4g}<extra>${escaped(name)}</extra>`,
    line: { color: colour, width: 1 },
  });
  const fillcolor = colour + "38";
  return [
    lineTrace(block.first, low, colour, name, band("smallest")),
    lineTrace(block.first, high, colour, name, { ...band("largest"), fill: "tonexty", fillcolor }),
    ...strange,
  ];
}

/** Marks of anomalies on a series, at its value, or on the upper edge. */
function anomalyMarks(anomalies, valueAt) {
  const marks = { y: [], y2: [] };
  for (const anomaly of anomalies.toReversed()) { // the worst last, on top of the others
    const value = valueAt?.(anomaly) ?? null;
    marks[Number.isFinite(value) && value !== null ? "y" : "y2"].push({ anomaly, value });
  }
  return Object.entries(marks)
    .filter(([, items]) => items.length)
    .map(([yaxis, items]) => ({
      x: items.map(({ anomaly }) => anomaly.first),
      y: items.map(({ value }) => (yaxis === "y" ? value : 1)),
      ...{ yaxis, mode: "markers", cliponaxis: false, name: "anomaly" },
      customdata: items.map(({ anomaly }) => anomaly),
      text: items.map(({ anomaly }) => wrapped(`${anomaly.severity}: ${anomaly.text}`)),
      hovertemplate: "step %{x}<br>%{text}<extra></extra>",
      marker: {
        symbol: items.map(({ anomaly }) => SYMBOLS[anomaly.severity]),
        color: items.map(({ anomaly }) => theme[anomaly.severity]),
        size: 10,
        line: { color: theme.surface, width: 1.2 },
      },
    }));
}

function wrapped(text) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1).length + word.length > 60) lines.push("");
    lines[lines.length - 1] += `${word} `;
  }
  return lines.map((line) => escaped(line.trim())).join("<br>");
}

/** The value of a series at the step of an anomaly, if there is one. */
function valueAt(series, step) {
  if (!series.block) {
    const place = series.steps.indexOf(step);
    return place < 0 ? null : series.values[place];
  }
  const column = columnOf(series.block, step);
  return column < 0 ? null : series.held.worst(series.row)[column];
}

/** The column of a block that holds a step; -1 where none does. */
function columnOf(block, step) {
  let [low, high] = [0, block.first.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (block.first[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return block.first.length && block.first[low] <= step && step <= block.last[low] ? low : -1;
}

/** Steps as lines across a chart. */
function stepLines(steps, colour) {
  return steps.map((step) => ({
    ...{ type: "line", xref: "x", yref: "paper", x0: step, x1: step, y0: 0, y1: 1 },
    line: { color: colour, width: 1, dash: "dot" },
  }));
}

/** A chart of one key, with a series per run. */
function keyChart(series, anomalies, { height = 210, steps = [], click }) {
  const arrays = series.flatMap((one) =>
    one.block ? [one.held.low(one.row), one.held.high(one.row)] : [one.values],
  );
  const yaxis = valueAxis(arrays, { zeros: series.every((one) => one.block?.whole) });
  const traces = series.flatMap((one) => {
    const colour = data.style.runs[one.run % data.style.runs.length];
    return seriesTraces(one, colour, data.runs[one.run].name, yaxis.type === "log");
  });
  const marked = anomalies.slice(0, 400);
  for (const one of series) {
    const own = marked.filter((anomaly) => anomaly.run === one.run && anomaly.key === one.key);
    traces.push(...anomalyMarks(own, (anomaly) => valueAt(one, anomaly.first)));
  }
  traces.push(...anomalyMarks(marked.filter((a) => !series.some((s) => s.key === a.key))));
  return {
    traces,
    layout: layoutOf(height, {
      margin: { l: 8, r: 14, t: 14, b: 8 },
      xaxis: stepAxis(traces),
      yaxis,
      yaxis2: edge(),
      shapes: stepLines(steps, theme.muted),
    }),
    click: ({ customdata }) => customdata?.text && click?.(customdata),
  };
}
