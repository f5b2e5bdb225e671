// The head of the page, and the first that it says of a run.

function showHead() {
  const [first] = data.runs;
  byId("names").textContent = data.runs.map((run) => run.name).join("  ·  ");
  const parts = several
    ? [`${data.runs.length} runs side by side`]
    : [first.project, first.id, when(first.started), first.seconds === null ? "" : `took ${duration(first.seconds)}`];
  const tags = data.runs.flatMap((run) => (several ? [] : run.tags));
  byId("lead").textContent = [...parts, ...tags.map((tag) => `#${tag}`)].filter(Boolean).join(" · ");
}

function card(what, value, more = "", kind = "", action = null) {
  const made = action
    ? button("", action, { className: `card ${kind}` })
    : element("div", { className: `card ${kind}` });
  const shownValue = element("span", { className: "value" });
  shownValue.append(value);
  made.append(element("span", { className: "what" }, what), shownValue);
  if (more) made.append(element("span", { className: "more" }, more));
  return made;
}

const toFindings = () => byId("stories")?.scrollIntoView();

function showCards() {
  const [run] = data.runs;
  const { loss, rate, anomalies, firstNonfinite } = run;
  const cards = element("div", { className: "cards", id: "cards" });
  const running = run.status === "running" ? `until ${when(data.written)}; more may follow` : "";
  const bad = ["failed", "crashed"].includes(run.status);
  cards.append(card("Status", statusChip(run.status), run.reason || running, bad ? "critical" : ""));
  const range = run.steps ? `step ${span(run.first, run.last)}` : "";
  cards.append(card("Recorded steps", shown(run.steps), range));
  if (loss) {
    const least = "least" in loss ? `least ${shown(loss.least)} at step ${loss.leastStep}` : "";
    const notFinite = strange(loss.last);
    const name = `Last ${loss.key}`;
    cards.append(card(name, shown(loss.last), least || "never finite", notFinite ? "critical" : ""));
  }
  if (rate) cards.append(card("Throughput", shown(rate.median), `${RATE[rate.metric]}, median`));
  const worst = SEVERITIES.find((name) => anomalies[name]);
  const total = Object.values(anomalies).reduce((sum, count) => sum + count, 0);
  const serious = worst === "critical" || worst === "high" ? worst : "";
  const chips = severityChips(anomalies);
  cards.append(
    run.steps
      ? card("Anomalies", total ? chips : "none", "", total ? serious : "good", total ? toFindings : null)
      : card("Anomalies", "–", "nothing was recorded"),
  );
  if (firstNonfinite) {
    const [, , step, , key, layer] = firstNonfinite;
    const open = () => (layer ? openLayer(layer, step, key) : showCurve(key));
    cards.append(card("First not finite", `step ${step}`, layer || key, "critical", open));
  } else if (run.steps) {
    cards.append(card("First not finite", "none", "", "good"));
  }
  main.append(cards);
}

function showRuns() {
  const rows = data.runs.map((run, index) => {
    const { firstNonfinite: found, loss } = run;
    const bad = found ? `step ${found[2]}: ${found[5] || found[4]}` : run.steps ? "none" : "";
    return [
      ...[dotted(index), statusCell(run)],
      element("td", { className: found ? "bad" : "" }, bad),
      element("td", {}, run.steps ? severityChips(run.anomalies) : ""),
      lossCell(loss),
      ...[shown(run.steps), rateText(run.rate), duration(run.seconds)],
    ];
  });
  const columns = ["run", "status", "first not finite", "anomalies", "last loss", "steps"];
  const made = table([...columns, "throughput", "time"], rows);
  made.id = "runs";
  main.append(made);
}

function lossCell(loss) {
  const cell = element("td", {}, loss ? shown(loss.last) : "");
  if (loss && strange(loss.last)) cell.className = "bad";
  if (loss && "least" in loss) {
    cell.append(element("div", { className: "least" }, `least ${shown(loss.least)}`));
  }
  return cell;
}

function statusCell(run) {
  const cell = element("td", {}, statusChip(run.status));
  if (run.reason) cell.append(element("div", { className: "lead" }, run.reason));
  return cell;
}
