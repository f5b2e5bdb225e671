// Parts that sections are made of.

const main = byId("main");
const several = data.runs.length > 1;
const SHOWN_FINDINGS = 50;
const GRAVE_OF_A_KIND = 5;

const SHORT = {
  ...{ stories: "What went wrong", findings: "Findings", comparison: "Differences", loss: "Loss", layers: "Layers" },
  ...{ gradients: "Gradients", updates: "Updates", attention: "Attention", rcc: "RCC" },
  ...{ logged: "Logged", system: "System", settings: "Settings" },
};

/** A section of the page, and its link at the top. */
function section(id, title, lead, ...content) {
  const head = element("div", { className: "head" }, element("h2", {}, title));
  if (lead) head.append(element("p", {}, lead));
  main.append(element("section", { id }, head, ...content));
  byId("nav").append(element("a", { href: `#${id}` }, SHORT[id]));
}

function table(columns, rows) {
  const head = element("tr", {}, ...columns.map((column) => element("th", {}, column)));
  const body = rows.map((row) =>
    element("tr", {}, ...row.map((cell) => (cell?.tagName === "TD" ? cell : element("td", {}, cell ?? "")))),
  );
  const made = element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
  return element("div", { className: "box" }, element("div", { className: "table" }, made));
}

function dotted(run) {
  const name = element("span", { className: "dot" }, data.runs[run].name);
  name.style.setProperty("--run", data.style.runs[run % data.style.runs.length]);
  return element("td", {}, name);
}

const statusChip = (status) => element("span", { className: `chip ${status}` }, status);

function severityChips(counts) {
  const chips = element("div", { className: "chips" });
  for (const name of SEVERITIES) {
    if (counts[name]) {
      const text = `${counts[name].toLocaleString("en")} ${name}`;
      chips.append(element("span", { className: `chip ${name}` }, text));
    }
  }
  if (!chips.children.length) chips.append(element("span", { className: "chip good" }, "none"));
  return chips;
}

function strange(value) {
  return typeof value === "string" && ["NaN", "Infinity", "-Infinity"].includes(value);
}

const RATE = { tokens_per_second: "tokens/s", samples_per_second: "samples/s", step_seconds: "s/step" };
const rateText = (rate) => (rate ? `${shown(rate.median)} ${RATE[rate.metric]}` : "");
