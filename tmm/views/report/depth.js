// Many layers as lines: over steps, and over their depth.

function depthColour(part) {
  const { depth } = data.style;
  return depth[Math.round(part * (depth.length - 1))];
}

/** Some rows over steps, coloured by their depth. */
async function linesChart(block, rows, click) {
  const held = await valuesOf(block);
  const values = rows.map((row) => held.worst(row));
  const yaxis = valueAxis(values, { zeros: true });
  const traces = rows.flatMap((row, i) => {
    const name = block.labels[row];
    const colour = depthColour(rows.length < 2 ? 0 : i / (rows.length - 1));
    const more = { line: { color: colour, width: 1.3 }, customdata: block.first.map(() => row) };
    const { kinds, drawn } = splitRow(values[i], held.flags(row), yaxis.type === "log");
    return [
      lineTrace(block.first, drawn, colour, name, more),
      ...strangeMarks(name, block.first, kinds),
    ];
  });
  return {
    traces,
    layout: layoutOf(HEIGHTS.lines, {
      hovermode: "closest",
      xaxis: stepAxis(traces),
      yaxis,
      yaxis2: edge(),
    }),
    click: ({ customdata, x }) => customdata !== undefined && click(block, customdata, x),
  };
}

/** Values over the layers at five columns of steps, from the first to the last. */
async function depthChart(block, rows, click) {
  const held = await valuesOf(block);
  const count = block.first.length;
  const columns = [...new Set([0, 0.25, 0.5, 0.75, 1].map((p) => Math.round(p * (count - 1))))];
  const worst = rows.map((row) => held.worst(row));
  const x = rows.map((_, i) => i);
  const yaxis = valueAxis(columns.map((column) => worst.map((of) => of[column])), { zeros: true });
  const isLog = yaxis.type === "log";
  const traces = [];
  for (const [i, column] of columns.entries()) {
    const values = worst.map((of) => of[column]);
    const flags = rows.map((row) => held.flags(row)[column]);
    const { kinds, drawn } = splitRow(values, flags, isLog);
    const colour = depthColour(columns.length < 2 ? 0 : i / (columns.length - 1));
    const name = `step ${span(block.first[column], block.last[column])}`;
    const text = rows.map((row) => escaped(block.labels[row]));
    traces.push({
      ...lineTrace(x, drawn, colour, name),
      ...{ text, customdata: rows.map(() => column), showlegend: true },
      mode: rows.length > 150 ? "lines" : "lines+markers",
      marker: { color: colour, size: 4 },
      hovertemplate: `%{text}: %{y:.4g}<extra>${name}</extra>`,
    });
    for (const [kind, mark, symbol] of strangeKinds()) {
      const bad = x.filter((index) => kinds[index] === kind);
      if (!bad.length) continue;
      traces.push({
        ...{ x: bad, y: bad.map(() => (kind === "0" ? 0 : 1 - 0.03 * i)), yaxis: "y2" },
        mode: "markers",
        ...{ cliponaxis: false, customdata: bad.map(() => column), showlegend: false },
        text: bad.map((index) => text[index]),
        marker: { symbol, size: 7, color: mark, line: { color: mark, width: 1.6 } },
        hovertemplate: `%{text}: ${kind}<extra>${name}</extra>`,
      });
    }
  }
  const room = window.innerWidth < 900 ? 16 : 32;
  const ticks = x.filter((i) => i % Math.ceil(rows.length / room) === 0);
  return {
    traces,
    layout: layoutOf(HEIGHTS.depth, {
      showlegend: true,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
      hovermode: "closest",
      xaxis: axis({
        ...{ tickvals: ticks, tickangle: -50, zeroline: false, range: [-0.5, rows.length - 0.5] },
        ticktext: ticks.map((i) => escaped(shortened(block.labels[rows[i]], 24))),
        tickfont: { size: 10, color: theme.muted, family: "monospace" },
      }),
      yaxis,
      yaxis2: edge(),
    }),
    click: ({ customdata, x: index }) => click(block, rows[index], block.first[customdata]),
  };
}
