// Finding a layer or a key by its name.

function showSearch() {
  const keys = [
    ...[...layers.keys()].map((layer) => [layer, () => openLayer(layer)]),
    ...[...layers].flatMap(([layer, rows]) =>
      rows.map(({ block, row }) => [block.keys[row], () => openLayer(layer, null, block.keys[row])]),
    ),
    ...data.runs.flatMap((run) => run.curves.map(({ key }) => [key, () => showCurve(key)])),
  ];
  const entries = new Map(keys);
  const [box, found] = [byId("search"), byId("found")];
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    found.hidden = !words.length;
    const hits = [...entries].filter(([name]) => words.every((w) => name.toLowerCase().includes(w)));
    const shownHits = hits.slice(0, 40).map(([name, open]) =>
      button(name, () => {
        found.hidden = true;
        box.value = "";
        open();
      }),
    );
    const rest = hits.length > 40 ? `and ${(hits.length - 40).toLocaleString("en")} more` : "";
    const said = hits.length ? rest : "Nothing has such a name.";
    found.replaceChildren(...shownHits, ...(said ? [element("p", {}, said)] : []));
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault(); // or it would press what has the focus next: the layer's close
      found.querySelector("button")?.click();
    }
    if (event.key === "Escape") found.hidden = true;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !dialog.open && !/INPUT|SELECT/.test(document.activeElement.tagName)) {
      event.preventDefault();
      box.focus();
    }
  });
  document.addEventListener("click", (event) => {
    if (!event.target.closest(".search")) found.hidden = true;
  });
}
