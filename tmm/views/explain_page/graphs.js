// Nodes of graphs

const NODE = /^( *)(?:(%\w+)(: .*?)? = (input$|[^\s(]+)|(return))(.*)$/s;

/** A line of a node with its name, type and target set off. */
function line(text) {
  const code = element("code");
  const parts = NODE.exec(text);
  if (!parts) {
    code.append(text);
    return code;
  }
  const [, indent, name, type, target, returned, rest] = parts;
  code.append(indent);
  if (name) code.append(element("b", {}, name));
  if (type) code.append(element("i", {}, type));
  if (name) code.append(" = ");
  code.append(element("u", {}, target ?? returned), rest);
  return code;
}

function cell(className, ...children) {
  return element("div", { className, role: "cell" }, ...children);
}

function nodeRow(node) {
  const row = element("div", { className: `row ${node.kind}`, role: "row" });
  const module = node.pass ? "" : node.modules.join(", ");
  row.append(cell("module", module));
  const before = node.before === undefined ? null : line(node.before);
  row.append(before ? cell("before", before) : cell("before gap"));
  if (node.kind === "same") {
    row.append(cell("after", before.cloneNode(true)));
  } else if (node.after === undefined) {
    row.append(cell("after gap"));
  } else {
    row.append(cell("after", line(node.after)));
  }
  if (node.pass) {
    const measures = node.measures.length ? ` for ${node.measures.join(", ")}` : "";
    row.lastChild.append(
      element("div", { className: "why" }, element("b", {}, node.pass), measures),
    );
  }
  return row;
}

/** What search looks at: all text of a node. */
function searchable(node) {
  const { before = "", after = "", pass = "", measures = [], modules: names } = node;
  return [before, after, pass, ...measures, ...names].join(" ").toLowerCase();
}

function showGraph(index) {
  state.graph = index;
  const graph = data.graphs[index];
  const passes = Object.entries(graph.seconds).map(
    ([name, seconds]) => `${name} ${(seconds * 1000).toFixed(1)} ms`,
  );
  byId("about").replaceChildren(
    `Graph ${graph.index} of `,
    element("code", {}, graph.owner),
    ` with `,
    element("code", {}, graph.settings),
    `: ${plural(graph.rows, "row")} in ${plural(graph.outputs, "extra output")}`,
    ` (${size(graph.bytes)}). Passes: ${passes.join(", ") || "none"}.`,
    graph.endedBy ? ` Ended by a graph break at ${graph.endedBy}.` : "",
  );
  const inserted = graph.nodes.filter((node) => node.pass).length;
  byId("before-head").textContent = `Before: ${plural(graph.before, "node")}`;
  byId("after-head").textContent = `After: ${plural(graph.after, "node")}, ${number(inserted)} inserted`;
  graph.elements ??= graph.nodes.map(nodeRow);
  byId("rows").replaceChildren(...graph.elements);
  for (const tab of byId("tabs").children) {
    const chosen = Number(tab.dataset.graph) === index;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
  }
  byId("panel").scrollTop = 0;
}

function belongs(node) {
  return state.module !== null && node.modules.some((name) => within(name, state.module));
}

/** Whether a node passes the filters: the text and the kind, and the module. */
function filters() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const changes = byId("changes").checked;
  const text = (node) =>
    (!changes || node.kind !== "same") && words.every((word) => node.text.includes(word));
  return { text, hit: (node) => (state.module === null || belongs(node)) && text(node) };
}

function refresh() {
  if (!data.graphs.length) return;
  const { text, hit } = filters();
  const hits = data.graphs.map((graph) => graph.nodes.filter(hit).length);
  const graph = data.graphs[state.graph];
  const shown = byId("only").checked ? hit : text;
  let visible = 0;
  graph.nodes.forEach((node, index) => {
    const row = graph.elements[index];
    row.hidden = !shown(node);
    row.classList.toggle("belongs", belongs(node));
    visible += row.hidden ? 0 : 1;
  });
  byId("nothing").hidden = visible > 0;
  const every = sum(data.graphs.map((other) => other.nodes.length));
  const all = `${number(sum(hits))} of ${plural(every, "node")} in all graphs`;
  const here = `${number(hits[state.graph])} of ${plural(graph.nodes.length, "node")}`;
  byId("count").textContent = data.graphs.length > 1 ? `${here} in this graph, ${all}` : here;
  [...byId("tabs").children].forEach((tab, index) => {
    tab.querySelector(".hits").textContent = ` ${number(hits[index])}`;
    tab.classList.toggle("without", !hits[index]);
  });
}

/** A module of the same name in an equal module whose graph `name` may share. */
function counterpart(name) {
  if (!["graph", "both"].includes(modules.get(name).measured)) return null;
  for (const { owner } of data.graphs) {
    if (owner === data.root) continue;
    for (let above = name; above; above = modules.get(above)?.parent) {
      const other = owner + name.slice(above.length);
      const equal = modules.get(owner)?.type === modules.get(above)?.type;
      if (equal && other !== name && modules.has(other)) return other;
    }
  }
  return null;
}

function select(name) {
  state.module = name;
  for (const [other, { item }] of items) {
    item.setAttribute("aria-selected", String(other === name));
  }
  byId("selection").hidden = name === null || !data.graphs.length;
  byId("counterpart").replaceChildren();
  if (name !== null) {
    for (let above = modules.get(name).parent; above; above = modules.get(above).parent) {
      expand(items.get(above).item, true);
    }
    reveal(items.get(name).item.firstElementChild, byId("tree"), 0);
    byId("selected").textContent = name;
    const holding = data.graphs.findIndex((graph) => graph.nodes.some(belongs));
    if (holding >= 0 && !data.graphs[state.graph].nodes.some(belongs)) showGraph(holding);
    const other = holding < 0 ? counterpart(name) : null;
    if (other !== null) {
      byId("counterpart").append(
        "No node has its name. Equal modules can share a graph; look at ",
        nameList([other]).firstChild,
      );
    }
  }
  refresh();
  if (name !== null && data.graphs.length) {
    const first = data.graphs[state.graph].elements.find((row) => row.matches(".belongs"));
    if (first) reveal(first, byId("panel"), byId("table").firstElementChild.offsetHeight);
  }
}

function showTabs() {
  data.graphs.forEach((graph, index) => {
    const tab = element(
      "button",
      { type: "button", role: "tab", title: graph.owner, "aria-controls": "panel" },
      `${graph.index}: ${graph.owner}`,
      element("span", { className: "hits" }),
    );
    tab.dataset.graph = index;
    tab.addEventListener("click", () => {
      showGraph(index);
      refresh();
    });
    byId("tabs").append(tab);
  });
  byId("tabs").addEventListener("keydown", (event) => {
    const last = data.graphs.length - 1;
    const moves = { ArrowRight: state.graph + 1, ArrowLeft: state.graph - 1, Home: 0, End: last };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const tab = byId("tabs").children[Math.min(Math.max(moves[event.key], 0), last)];
    tab.click();
    tab.focus();
  });
  byId("tabs").hidden = data.graphs.length < 2;
}

function showNodes() {
  if (!data.graphs.length) {
    const eager = data.modules.some((module) => module.measured !== "none");
    const text = eager
      ? "There is no graph: every module that was measured ran eagerly."
      : "No graph yet: the model has not run in a monitored step. Graphs, what they hold and what" +
        " stays outside are known after the first one (or monitor.prepare(*batch)).";
    byId("nodes").replaceChildren(
      element("div", { className: "pane-head" }, element("h2", {}, "Graphs, before and after")),
      element("p", { className: "notice", id: "no-graphs" }, text),
      byId("selection"),
    );
    return;
  }
  for (const graph of data.graphs) {
    for (const node of graph.nodes) node.text = searchable(node);
  }
  showTabs();
  byId("search").addEventListener("input", refresh);
  byId("changes").addEventListener("change", refresh);
  byId("only").addEventListener("change", refresh);
  byId("clear").addEventListener("click", () => select(null));
  byId("wrap").addEventListener("change", () => {
    byId("table").classList.toggle("unwrapped", !byId("wrap").checked);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input")) return;
    event.preventDefault();
    byId("search").focus();
  });
  showGraph(0);
  refresh();
}

byId("model").textContent = data.type;
showTotals();
showOverview();
showTree();
showNodes();
