"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const KINDS = { graph: "in a graph", eager: "eagerly", both: "both ways", none: "without rows" };
const modules = new Map(data.modules.map((module) => [module.name, module]));
const items = new Map(); // tree items by the name of their module
const state = { graph: 0, module: null };

/** An element with properties and children; text is never read as HTML. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function number(value) {
  return value.toLocaleString("en");
}

function plural(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; bytes >= 1024 && unit < units.length - 1; unit++) bytes /= 1024;
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

/** Whether `name` is `ancestor` or lies below it. */
function within(name, ancestor) {
  return name === ancestor || ancestor === data.root || name.startsWith(`${ancestor}.`);
}

/** Scroll `pane`, and not the page, until `part` shows below the `covered` pixels at its top. */
function reveal(part, pane, covered) {
  const { top, bottom } = part.getBoundingClientRect();
  const outer = pane.getBoundingClientRect();
  if (top < outer.top + covered) pane.scrollTop += top - outer.top - covered;
  else if (bottom > outer.bottom) pane.scrollTop += bottom - outer.bottom;
}

// Overview

function showTotals() {
  const total = (field) => sum(data.graphs.map((graph) => graph[field]));
  const totals = [
    ["modules", modules.size],
    ["graphs", data.graphs.length],
    ["rows in a step", data.rows],
    ["extra outputs", total("outputs")],
    ["in extra outputs", size(total("bytes"))],
    ["inserted nodes", sum(data.graphs.map((g) => g.nodes.filter((n) => n.pass).length))],
  ];
  for (const [name, value] of totals) {
    const text = typeof value === "number" ? number(value) : value;
    byId("totals").append(
      element("div", {}, element("dt", {}, name), element("dd", {}, text)),
    );
  }
  const bar = element("div", { className: "bar", "aria-hidden": "true" });
  const legend = element("div", { className: "legend" });
  for (const [kind, label] of Object.entries(KINDS)) {
    const count = data.modules.filter((module) => module.measured === kind).length;
    const part = element("span", { className: `kind-${kind}` });
    part.style.flexGrow = count;
    if (count) bar.append(part);
    const text = kind === "none" ? label : `measured ${label}`;
    legend.append(
      element("span", { className: `kind-${kind}` }, element("b", {}, number(count)), ` ${text}`),
    );
  }
  byId("coverage").append(bar, legend);
}

/** Names as buttons that select the module; others as text. */
function nameList(names) {
  const list = element("div", { className: "names" });
  for (const name of names) {
    if (!modules.has(name)) {
      list.append(element("span", { className: "name" }, name));
      continue;
    }
    const button = element("button", { type: "button", className: "name" }, name);
    button.addEventListener("click", () => {
      select(name);
      byId("nodes").scrollIntoView({ block: "nearest" });
    });
    list.append(button);
  }
  return list;
}

function folded(summary, names) {
  const details = element("details", {}, element("summary", {}, summary));
  details.addEventListener("toggle", () => details.append(nameList(names)), { once: true });
  return details;
}

function card(title, entries, otherwise) {
  const made = element("div", { className: "card" }, element("h2", {}, title));
  for (const entry of entries) made.append(element("div", { className: "entry" }, ...entry));
  if (!entries.length) made.append(element("p", { className: "muted" }, otherwise));
  byId("overview").append(made);
}

function reasons(groups) {
  return groups.map(({ text, names }) => [
    element("div", { className: "reason" }, text),
    names.length > 12 ? folded(plural(names.length, "module"), names) : nameList(names),
  ]);
}

function showOverview() {
  const rules = data.rules.map(({ rule, matched, count, subject }) => [
    element("code", {}, rule),
    folded(`${number(matched.length)} of ${plural(count, subject)}`, matched),
  ]);
  const ran = data.graphs.length || data.modules.some((module) => module.measured !== "none");
  const unknown = "Not known before the first monitored step.";
  card("Rules", rules, "None.");
  card(
    "Compiled",
    data.regions.map(({ text, names }) => [element("code", {}, text), nameList(names)]),
    "Nothing is compiled.",
  );
  card("Measured eagerly, and why", reasons(data.eager), ran ? "Nothing." : unknown);
  if (data.notes.length) {
    card("To be known of rows", reasons(data.notes));
  }
  card("Not measured, and why", reasons(data.unmeasured), ran ? "Nothing." : unknown);
  if (data.recorded.length) {
    const names = data.recorded.map((name) => element("span", { className: "name" }, name));
    card("Recorded by tmm.record", [[element("div", { className: "names" }, ...names)]]);
  }
}

// Module tree

function showTree() {
  for (const module of data.modules) {
    const parent = items.get(module.parent);
    const depth = parent ? parent.depth + 1 : 0;
    const below = module.parent && module.parent !== data.root;
    const label = below ? module.name.slice(module.parent.length + 1) : module.name;
    const row = element(
      "div",
      { className: "item" },
      element("span", { className: "twist", "aria-hidden": "true" }),
      element("span", { className: "label" }, label),
      element("span", { className: "type" }, module.type),
      element(
        "span",
        {
          className: `badge kind-${module.measured}`,
          title: module.measured === "none" ? "has no rows" : `measured ${KINDS[module.measured]}`,
        },
        module.measured,
      ),
    );
    row.style.setProperty("--depth", depth);
    if (module.metrics.length) {
      row.append(element("span", { className: "metrics" }, module.metrics.join(", ")));
    }
    const item = element(
      "li",
      { role: "treeitem", tabIndex: -1, title: module.name, "aria-selected": "false" },
      row,
    );
    item.dataset.name = module.name;
    items.set(module.name, { item, depth });
    if (!parent) {
      byId("tree").append(item);
    } else {
      let group = parent.item.querySelector(":scope > ul");
      if (!group) {
        group = element("ul", { role: "group" });
        parent.item.append(group);
        // A large model starts folded, down to where repeated blocks begin.
        parent.item.setAttribute("aria-expanded", String(modules.size < 60 || parent.depth < 2));
      }
      group.append(item);
    }
  }
  const first = byId("tree").firstElementChild;
  if (first) first.tabIndex = 0;
}

function expand(item, expanded) {
  if (item.hasAttribute("aria-expanded")) item.setAttribute("aria-expanded", String(expanded));
}

function focusItem(item) {
  for (const other of byId("tree").querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  item.tabIndex = 0;
  item.focus();
}

function visibleItems() {
  return [...byId("tree").querySelectorAll("li")].filter((item) => item.offsetParent !== null);
}

byId("tree").addEventListener("click", (event) => {
  const item = event.target.closest("li");
  if (!item) return;
  if (event.target.classList.contains("twist") && item.hasAttribute("aria-expanded")) {
    expand(item, item.getAttribute("aria-expanded") !== "true");
    return;
  }
  focusItem(item);
  select(item.dataset.name === state.module ? null : item.dataset.name);
});

byId("tree").addEventListener("keydown", (event) => {
  const item = event.target.closest("li");
  const visible = visibleItems();
  const at = visible.indexOf(item);
  const open = item.getAttribute("aria-expanded") === "true";
  const moves = {
    ArrowDown: () => visible[at + 1],
    ArrowUp: () => visible[at - 1],
    Home: () => visible[0],
    End: () => visible.at(-1),
    ArrowRight: () => (open ? visible[at + 1] : expand(item, true)),
    ArrowLeft: () => (open ? expand(item, false) : item.parentElement.closest("li")),
    Enter: () => select(item.dataset.name),
    " ": () => select(item.dataset.name),
  };
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in moves)) return;
  event.preventDefault();
  const next = moves[event.key]();
  if (next) focusItem(next);
});

for (const [id, expanded] of [["expand", true], ["collapse", false]]) {
  byId(id).addEventListener("click", () => {
    for (const { item, depth } of items.values()) expand(item, expanded || depth === 0);
  });
}
