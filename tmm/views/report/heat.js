// Layers over steps, as colours.

function shortened(text, most) {
  return text.length <= most ? text : `${text.slice(0, 6)}…${text.slice(7 - most)}`;
}

function rowHeight(rows) {
  return rows <= 40 ? 17 : rows <= 120 ? 12 : rows <= 400 ? 6 : 3;
}

function heatHeight(rows) {
  return Math.max(110, rows * rowHeight(rows) + 48);
}

/** Rows of a block over its steps, as colours. */
async function heatChart(block, rows, anomalies, click) {
  const held = await valuesOf(block);
  const { scale } = data.groups[block.group];
  const [z, strange] = [[], []];
  let anyStrange = false;
  for (const row of rows) {
    const [worst, flags] = [held.worst(row), held.flags(row)];
    z.push(worst.map((v, i) => (flags[i] > FLAG.finite ? NaN : placeOn(scale, v))));
    const marks = Float32Array.from(flags, (f) => (f > FLAG.finite ? (f & FLAG.nan ? 0 : 1) : NaN));
    strange.push(marks);
    anyStrange ||= marks.some((mark) => mark >= 0);
  }
  const each = rowHeight(rows.length);
  const gap = each >= 12 && block.first.length <= 200 ? 1 : 0;
  const common = { type: "heatmap", hoverinfo: "none", xgap: gap, ygap: gap, showscale: false };
  const colorscale = scale.kind === "symmetric" ? data.style.signed : data.style.magnitudes;
  const traces = [{ ...common, z, zmin: scale.low, zmax: scale.high, colorscale }];
  if (anyStrange) {
    const reds = [[0, data.style.nan], [1, data.style.infinity]];
    traces.push({ ...common, z: strange, zmin: 0, zmax: 1, colorscale: reds });
  }
  const place = new Map(rows.map((row, i) => [block.keys[row], i]));
  const marked = anomalies
    .filter((anomaly) => place.has(anomaly.key) && columnOf(block, anomaly.first) >= 0)
    .slice(0, 300);
  if (marked.length) {
    const ink = { color: "#fff", width: 1.2 };
    traces.push({
      ...{ mode: "markers", hoverinfo: "none", customdata: marked },
      x: marked.map((anomaly) => columnOf(block, anomaly.first)),
      y: marked.map((anomaly) => place.get(anomaly.key)),
      marker: { size: Math.min(9, each + 3), color: marked.map((a) => theme[a.severity]), line: ink },
    });
  }
  const every = each < 11 ? Math.ceil(24 / each) : 1;
  const ticks = rows.map((_, i) => i).filter((i) => i % every === 0);
  const most = window.innerWidth < 900 ? 22 : 36;
  const names = ticks.map((i) => shortened(block.labels[rows[i]], most));
  // Measuring hundreds of names is what would take plotly longest.
  const room = 16 + 6.6 * Math.max(0, ...names.map((name) => name.length));
  const count = block.first.length;
  const steps = Math.min(count, window.innerWidth < 900 ? 6 : 10);
  const columns = Array.from({ length: steps }, (_, i) =>
    Math.round((i * (count - 1)) / Math.max(1, steps - 1)),
  );
  const bare = { showgrid: false, zeroline: false, fixedrange: true };
  return {
    traces,
    options: { ...PLOT_OPTIONS, displayModeBar: false },
    layout: layoutOf(heatHeight(rows.length), {
      margin: { l: room, r: 14, t: 34, b: 6 },
      xaxis: axis({
        ...bare,
        ...{ side: "top", range: [-0.5, count - 0.5] },
        ...{ tickvals: columns, ticktext: columns.map((column) => String(block.first[column])) },
      }),
      yaxis: axis({
        ...bare,
        ...{ range: [rows.length - 0.5, -0.5], tickvals: ticks, automargin: false },
        ticktext: names.map(escaped),
        tickfont: { size: 10.5, color: theme.muted, family: "monospace" },
      }),
    }),
    click: (point) => {
      const index = point.customdata ? place.get(point.customdata.key) : Math.round(point.y);
      const column = point.customdata ? columnOf(block, point.customdata.first) : Math.round(point.x);
      click(block, rows[index], block.first[column]);
    },
    hover: (point) => {
      const index = rows[Math.round(point.y)];
      const column = Math.round(point.x);
      const when = `step ${span(block.first[column], block.last[column])}`;
      const said = [block.labels[index], `${when}: ${cellText(block, held, index, column)}`];
      const text = point.customdata?.text;
      return text ? [...said, text] : said;
    },
  };
}

/** What a cell of a heat map stands for. */
function cellText(block, held, row, column) {
  const flags = held.flags(row)[column];
  if (!flags) return "not measured";
  const [low, high] = [held.low(row)[column], held.high(row)[column]];
  const parts = [];
  if (flags & FLAG.nan) parts.push("NaN");
  if (flags & FLAG.plus) parts.push("∞");
  if (flags & FLAG.minus) parts.push("−∞");
  if (flags & FLAG.finite) {
    parts.push(block.whole || low === high ? shown(low) : `${shown(low)} to ${shown(high)}`);
  }
  return parts.join(", ");
}
