// Clicks on a circuit in a page: a node alone with its edges, the heads of a layer as one.
(() => {
  const figure = document.getElementById("{plot_id}");
  const parts = figure.data.map((trace, i) => ({ i, own: trace.meta, x: trace.x, y: trace.y, text: trace.text })).filter((part) => part.own && part.own.circuit);
  const collapsed = new Set();
  let alone = null;
  const layerOf = (node) => (/^a\d+\.h\d+$/.test(node) ? node.slice(1).split(".")[0] : null);
  const shown = (node) => (collapsed.has(layerOf(node)) ? "a" + layerOf(node) : node);
  const views = new Map();
  for (const part of parts.filter((part) => part.own.circuit === "names")) {
    const places = new Map(part.own.nodes.map((node, j) => [node, part.own.places[j]]));
    const heads = new Map();
    for (const node of part.own.nodes) if (layerOf(node) !== null) heads.set(layerOf(node), [...(heads.get(layerOf(node)) || []), node]);
    const middles = new Map([...heads].map(([layer, some]) => [layer, some.reduce((sum, node) => sum + places.get(node)[0], 0) / some.length]));
    views.set(part.own.view, { places, heads, middles });
  }
  const layers = new Set([...views.values()].flatMap((view) => [...view.heads.keys()]));

  function shift(view, node) {
    return collapsed.has(layerOf(node)) ? view.middles.get(layerOf(node)) - view.places.get(node)[0] : 0;
  }
  function lines(part, view, near) {
    const x = Array.from(part.x), y = Array.from(part.y), step = part.own.points + 1;
    part.own.edges.forEach(([writer, reader], j) => {
      const ends = [shown(writer), shown(reader)], from = shift(view, writer), to = shift(view, reader);
      for (let k = 0; k < part.own.points; k++) {
        const at = j * step + k, share = k / (part.own.points - 1);
        if (near && !ends.includes(alone)) x[at] = y[at] = null;
        else x[at] += from * (1 - share) + to * share;
      }
    });
    return { x, y, text: part.text };
  }
  function nodes(part, view, near) {
    const x = Array.from(part.x), y = Array.from(part.y), text = part.text ? Array.from(part.text) : null;
    const each = part.own.nodes.length ? x.length / part.own.nodes.length : 0;
    part.own.nodes.forEach((node, j) => {
      const layer = layerOf(node), one = collapsed.has(layer), first = one && view.heads.get(layer)[0] === node;
      const gone = (near && !near.has(shown(node))) || (one && (!first || part.own.circuit === "ports"));
      for (let k = j * each; k < (j + 1) * each; k++) {
        if (gone || x[k] === null) x[k] = y[k] = null;
        else x[k] += shift(view, node);
      }
      if (text && first) text[j] = "<b>a" + layer + "</b> ×" + view.heads.get(layer).length;
    });
    return { x, y, text };
  }
  function draw() {
    const changes = { x: [], y: [], text: [] }, nears = new Map();
    for (const [number, view] of views) {
      const near = new Set([alone]);
      let found = false;
      for (const part of parts) {
        if (part.own.circuit !== "edges" || part.own.view !== number) continue;
        for (const ends of part.own.edges.map((ends) => ends.map(shown))) if (ends.includes(alone)) ends.forEach((end) => near.add(end)), (found = true);
      }
      nears.set(number, found ? near : null);
    }
    for (const part of parts) {
      const view = views.get(part.own.view);
      const made = (part.own.circuit === "edges" ? lines : nodes)(part, view, nears.get(part.own.view));
      for (const key of ["x", "y", "text"]) changes[key].push(made[key]);
    }
    Plotly.restyle(figure, changes, parts.map((part) => part.i));
    figure.dataset.alone = alone || "";
    figure.dataset.collapsed = [...collapsed].join(" ");
    all.textContent = collapsed.size ? "expand all layers" : "collapse all layers";
  }
  function toggle(layer) {
    collapsed.delete(layer) || collapsed.add(layer);
    alone = null;
    draw();
  }
  const hint = document.createElement("p");
  hint.style.cssText = "margin: 6px 16px; font: 13px Helvetica, Arial, sans-serif; opacity: 0.8";
  hint.textContent = "Click a node to see its edges alone, a layer's name to see its heads as one; click again to go back. ";
  const all = document.createElement("button");
  all.onclick = () => {
    if (collapsed.size) collapsed.clear();
    else layers.forEach((layer) => collapsed.add(layer));
    alone = null;
    draw();
  };
  hint.append(all);
  figure.before(hint);
  figure.on("plotly_click", (event) => {
    const point = event.points.find((point) => point.data.meta && point.data.meta.circuit === "names");
    if (!point) return;
    const node = shown(point.data.meta.nodes[point.pointNumber]);
    alone = alone === node ? null : node;
    draw();
  });
  figure.on("plotly_clickannotation", (event) => {
    const layer = (event.annotation.name || "").replace("layer ", "");
    if (layers.has(layer)) toggle(layer);
  });
  figure.on("plotly_doubleclick", () => {
    alone = null;
    collapsed.clear();
    draw();
  });
  draw();
})();
