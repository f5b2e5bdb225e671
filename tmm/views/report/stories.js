// The first screen: what went wrong first, what followed, and what to try.

/** One story: open it to see its finding, its consequences, the advice and the series. */
function story(told, run, isOpen) {
  const { severity, kind, step, last, key, layer, text, after, advice, evidence } = told;
  const details = element(
    ...["details", { className: "group story", open: isOpen }],
    element(
      ...["summary", {}],
      element("span", { className: `chip ${severity}` }, severity),
      element("b", {}, kind.replaceAll("_", " ")),
      element("span", {}, several ? `${data.runs[run].name}, step ${step}` : `step ${step}`),
      element("span", { className: "said" }, text),
    ),
  );
  const cause = finding({ first: step, last, key, layer, text, run }, several);
  const list = element("ul", {}, element("li", {}, cause));
  if (after) list.append(element("li", { className: "after" }, after));
  if (advice) list.append(element("li", { className: "advice" }, `Try: ${advice}.`));
  for (const line of evidence) list.append(element("li", { className: "key" }, line));
  details.append(list);
  return details;
}

function showStories() {
  if (!data.runs.some((run) => run.stories.length)) return;
  const box = element("div", { className: "box" });
  for (const [run, { stories, allStories }] of data.runs.entries()) {
    const ordered = stories.map((told, place) => story(told, run, place === 0 && run === 0));
    box.append(...ordered);
    const left = allStories - stories.length;
    if (left) box.append(element("p", { className: "lead" }, `and ${left} more below`));
  }
  section("stories", "What went wrong first", "Causes, with what followed from each.", box);
}
