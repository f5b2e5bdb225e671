// What is on the page, from top to bottom.

function groupsOf(test) {
  return Object.keys(data.groups).filter((name) => test(data.groups[name], name));
}

/** Put the groups whose names come first in `wanted` first. */
function preferring(groups, ...wanted) {
  const rank = (name) => (wanted.indexOf(name) + wanted.length + 1) % (wanted.length + 1);
  return [...groups].sort((a, b) => rank(a) - rank(b));
}

const GRADIENTS = ["gradient", "gradient_before_clip", "activation_gradient", "step"];
const UPDATES = ["update", "optimizer_state"];

function showLayers() {
  const every = groupsOf(() => true);
  if (!every.length) return;
  const ordered = preferring(every, "activation/rms", "activation/absmax", "gradient/norm");
  const lead = "Each row is a layer, from the input to the output; each column steps.";
  section("layers", "Layers over steps", lead, panel(ordered, "heat"));
  const parts = [
    ["gradients", "Gradient flow", "depth", GRADIENTS, "How gradients change from layer to layer."],
    ["updates", "Update ratios", "lines", UPDATES, "How far a step moves each parameter."],
  ];
  for (const [id, title, view, families, said] of parts) {
    const groups = groupsOf(({ family, metric }) => families.includes(family) && !isCount(metric));
    const sorted = preferring(groups, "gradient/norm", "gradient/rms", "update/relative_norm");
    if (groups.length) section(id, title, said, panel(sorted, view));
  }
  const attention = groupsOf(
    ({ family }, name) => family.startsWith("attention_") || name.endsWith(" in heads"),
  );
  if (attention.length) {
    const sorted = preferring(attention, "attention_entropy", "attention_normalized_entropy");
    section("attention", "Attention, per head", "", panel(sorted, "heat"));
  }
  const checks = groupsOf(({ family }) => family.startsWith("RCC "));
  if (checks.length) {
    const said = "Refined coordinate check: what own weights, and what changed inputs did.";
    const sorted = preferring(checks, "RCC (W_t-W_0)x_t", "RCC W_0(x_t-x_0)");
    section("rcc", "RCC terms", said, ...sorted.slice(0, 2).map((name) => panel(preferring(sorted, name), "lines")));
  }
}

const isCount = (metric) => metric === "nan_count" || metric === "inf_count";

function show() {
  showHead();
  if (several) showRuns();
  else showCards();
  if (data.runs.every((run) => !run.steps)) {
    main.append(element("p", { className: "notice", id: "empty" }, "No step was recorded."));
  }
  showStories();
  const anomalies = data.runs.some((run) => Object.keys(run.anomalies).length);
  if (anomalies) {
    const box = element("div", { className: "box" });
    section("findings", "All findings", "Click one to open the layer or the curve.", box);
    showFindings(box);
  }
  showComparison();
  showLoss();
  showLayers();
  const logged = [...curveKeys("logged"), ...curveKeys("steps")];
  if (logged.length) section("logged", "Logged values", "", runLegend(), ...grid(logged));
  const system = curveKeys("system");
  if (system.length) section("system", "System", "", runLegend(), ...grid(system));
  showSettings();
  showFoot();
  showSearch();
  applyTheme();
  document.documentElement.dataset.shown = String(Math.round(performance.now()));
}

show();
