// The view of the explorer. It draws a state, and asks for what the state does not hold.
// mount(root, { Plotly, state, live, ask }): ask(question, options) is a promise of an answer; returns what ends the view.
const HEADS = ["z", "q", "k", "v", "pattern"];
const ABSENT = {
  exact: "This page holds exact effects of the cells with the largest estimates only. In a notebook every cell can be patched.",
  together: "This page holds the largest cells together only (button above). In a notebook any cells can be patched together.",
  attention: "This page does not hold this pattern: those of the mean and of the first examples fit.",
  parts: "This page does not hold what this cell is made of. In a notebook it is worked out when it is asked for.",
};
const INK = "#1f2328", MUTED = "#636c76", PALE = "#e9ebef", RING = "#e69f00";
const PRGN = [[0, "#762a83"], [0.5, "#ffffff"], [1, "#1b7837"]];
const FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif";

const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const shown = (token) => {
  const text = (token.trim() === "" ? token.replace(/ /g, "␣") : token.trim()).replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
  return text.length > 14 ? text.slice(0, 13) + "…" : text;
};
function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const text = Math.abs(value) < 1e-12 ? "0.00" : value.toPrecision(3);
  return (value > 0 ? "+" : "") + text.replace(/-/g, "−");
}
function unpacked(value) {
  if (value === null || typeof value !== "object") return value;
  const kind = "f8" in value ? "f8" : "f4" in value ? "f4" : null;
  if (kind === null) {
    for (const key of Object.keys(value)) value[key] = unpacked(value[key]);
    return value;
  }
  const text = atob(value[kind]), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return kind === "f8" ? new Float64Array(bytes.buffer) : new Float32Array(bytes.buffer);
}
function made(tag, options = {}, ...children) {
  const one = document.createElement(tag);
  const { data = {}, on = {}, ...own } = options;
  Object.assign(one, own);
  Object.assign(one.dataset, data);
  for (const [name, act] of Object.entries(on)) one.addEventListener(name, act);
  one.append(...children.filter((child) => child !== null && child !== undefined));
  return one;
}

function mount(root, { Plotly, state, live, ask }) {
  unpacked(state.groups);
  const directions = Object.keys(state.groups);
  const first = state.groups[directions[0]];
  const at = { direction: directions[0], method: Object.keys(first.maps)[0], site: Object.keys(first.sites)[0], panel: 0, example: -1, cell: null };
  const looks = { side: "clean", head: 0, into: null, source: null };
  const patched = new Map(); // [direction, site, cell number] -> exact effect
  let chosen = []; // { site, number, label }
  let together = null; // the last answer, for which cells
  const listening = new AbortController();

  const group = () => state.groups[at.direction];
  const site = () => group().sites[at.site];
  const panel = () => site().panels[at.panel];
  const unit = state.unit ? " " + state.unit : "";
  const local = (name, cell) => group().sites[name].cells.indexOf(cell);
  const name = (cell) => site().labels[cell];
  const keyOf = (of = at.site, cell = site().cells[at.cell]) => JSON.stringify([at.direction, of, cell]);
  const exactMap = () => Object.keys(group().maps).find((one) => group().maps[one].exact);

  // ---- values
  function value(method, cell, example = at.example) {
    const scores = site().scores[method];
    return example < 0 ? scores.mean[cell] : scores.each[cell * state.shown + example];
  }
  function exactOf(cell) {
    const found = patched.get(keyOf(at.site, site().cells[cell]));
    if (found) return { ...found, from: "patched" };
    const method = exactMap();
    if (!method) return null;
    const scores = site().scores[method];
    if (scores.not_scored || !Number.isFinite(scores.mean[cell])) return null;
    const each = Array.from(scores.each.slice(cell * state.shown, (cell + 1) * state.shown));
    const base = group()[at.direction === "denoising" ? "corrupted" : "clean"];
    const before = base.reduce((sum, one) => sum + one, 0) / base.length;
    return { mean: scores.mean[cell], low: scores.low[cell], high: scores.high[cell], each, before, after: before + scores.mean[cell], from: method };
  }
  const exactValue = (cell, example = at.example) => {
    const found = exactOf(cell);
    return found === null ? null : example < 0 ? found.mean : found.each[example];
  };

  // ---- the frame
  root.classList.add("plx");
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab has keys of its own
  const part = (kind, options = {}) => made("div", { className: kind, ...options });
  const heat = part("plot", { tabIndex: 0, data: { role: "heatmap" } });
  heat.setAttribute("role", "application");
  heat.setAttribute("aria-label", "Heatmap of effects. Arrow keys move, Enter adds a cell to the set, P patches it exactly.");
  const bars = part("bar"), legend = part("legend muted"), working = part("working"), said = part("muted", { data: { role: "said" } });
  said.setAttribute("aria-live", "polite");
  const pick = part("bar"), scatter = part("plot", { data: { role: "scatter" } }), graph = part("plot", { data: { role: "circuit" } });
  const detail = part("detail", { data: { role: "cell" } }), tray = part("wide", { data: { role: "tray" } });
  const left = part("left"), right = part("right");
  left.append(pick, heat, said, scatter);
  right.append(detail);
  const grid = part("grid");
  grid.append(left, right, tray);
  if (state.circuit) {
    const wide = part("wide");
    wide.append(made("h3", { textContent: "Circuit: click a node to go to its cell" }), graph);
    grid.append(wide);
  }
  const title = made("h2", { textContent: `${state.title}: effects on ${state.metric}` });
  const keys = made("p", { className: "muted" });
  keys.innerHTML = "Click a cell, or <kbd>Tab</kbd> to the heatmap and use the arrow keys; <kbd>Enter</kbd> adds the cell to the set, <kbd>P</kbd> patches it exactly.";
  root.append(title, keys, bars, legend, working, grid);

  // ---- what is chosen above
  function choice(words, options, current, act, role) {
    const list = made("select", { on: { change: () => act(list.value) }, data: { role } });
    for (const [key, text] of options) list.append(made("option", { value: key, textContent: text, selected: key === current }));
    return made("label", {}, words, list);
  }
  function drawBars() {
    const parts = [];
    if (directions.length > 1) parts.push(choice("direction", directions.map((one) => [one, one]), at.direction, turn, "direction"));
    else parts.push(made("label", {}, "direction", made("span", { textContent: at.direction, style: "color: var(--ink); padding: 4px 0", data: { role: "direction" } })));
    parts.push(choice("method", Object.keys(group().maps).map((one) => [one, one]), at.method, (one) => ((at.method = one), draw()), "method"));
    parts.push(choice("site", Object.keys(group().sites).map((one) => [one, one]), at.site, (one) => visit(one), "site"));
    const single = at.example >= 0;
    parts.push(choice("effects of", [["mean", `the mean of ${state.n} examples`], ["one", "one example"]], single ? "one" : "mean", (one) => ((at.example = one === "one" ? 0 : -1), draw()), "view"));
    if (single) {
      const box = made("input", { type: "number", min: 0, max: state.shown - 1, value: at.example, data: { role: "example" } });
      box.addEventListener("change", () => ((at.example = Math.min(state.shown - 1, Math.max(0, Math.round(Number(box.value)) || 0))), draw()));
      const words = state.shown < state.n ? `example (of the first ${state.shown})` : `example (0 to ${state.n - 1})`;
      parts.push(made("label", {}, words, box));
    }
    bars.replaceChildren(...parts);
    const own = group(), unsigned = own.maps[at.method].unsigned;
    const colours = unsigned ? [[own.unsigned_scale[1][1], "size of the effect, sign unknown"]] : [own.above, own.below];
    legend.replaceChildren(
      ...[...colours, ["#ced3d9", "cannot matter"]].map(([colour, words]) => made("span", {}, made("b", { textContent: "■ ", style: `color: ${colour}` }), words)),
      made("span", { textContent: `${at.direction}, ${own.source === "paired" ? "the other prompt" : own.source} patched in; one scale for all methods, 0 has no colour` }),
    );
  }
  function turn(direction) {
    const before = at.cell === null ? null : [at.site, site().cells[at.cell], name(at.cell)];
    at.direction = direction;
    if (!(at.method in group().maps)) at.method = Object.keys(group().maps)[0];
    if (!(at.site in group().sites)) at.site = Object.keys(group().sites)[0];
    if (at.panel >= site().panels.length) at.panel = 0;
    const same = before && before[0] === at.site ? local(before[0], before[1]) : -1;
    at.cell = same >= 0 && name(same) === before[2] ? same : null;
    chosen = chosen.filter((one) => one.site in group().sites && group().sites[one.site].labels[local(one.site, one.number)] === one.label);
    together = null;
    looks.into = null;
    draw();
  }
  function strongest() {
    const { panels, scores, zeros } = site(), mean = scores[at.method].mean;
    const sizes = panels.map((one) => Math.max(0, ...one.cells.flat().filter((cell) => cell >= 0 && !zeros[cell] && Number.isFinite(mean[cell])).map((cell) => Math.abs(mean[cell]))));
    return Math.max(0, sizes.indexOf(Math.max(...sizes)));
  }
  function visit(one, cell = null) {
    at.site = one;
    at.panel = strongest();
    at.cell = null;
    looks.head = 0;
    if (cell !== null) go(cell);
    else draw();
  }
  function go(cell) {
    if (cell === null || cell < 0 || site().labels[cell] === undefined) return;
    if (cell !== at.cell) looks.head = 0;
    at.cell = cell;
    if (!panel().cells.some((row) => row.includes(cell))) at.panel = Math.max(0, site().panels.findIndex((one) => one.cells.some((row) => row.includes(cell))));
    draw();
  }

  // ---- the heatmap
  function look(width, height, more) {
    return { width, height, margin: { l: 8, r: 8, t: 8, b: 8 }, paper_bgcolor: "white", plot_bgcolor: "white", font: { family: FONT, size: 12, color: INK }, hoverlabel: { align: "left", font: { family: FONT } }, ...more };
  }
  const config = { displaylogo: false, displayModeBar: false, responsive: false };
  const line = { showgrid: false, zeroline: false, showline: true, linecolor: MUTED, ticks: "outside", ticklen: 3, mirror: true, automargin: true, fixedrange: true };
  const axisOf = (axis, count) => ({ ...line, title: { text: axis.title, standoff: 8 }, tickmode: "array", tickvals: axis.places, ticktext: axis.texts, tickangle: axis.angle, tickfont: { size: 11 }, range: [-0.5, count - 0.5] });
  function drawPick() {
    const several = site().panels.length > 1;
    const options = site().panels.map((one, i) => [String(i), one.title.replace(at.site, "").trim() || one.title]);
    pick.replaceChildren(
      made("h3", { textContent: `${at.site}: ${panel() ? panel().note || site().what : site().what}`, style: "margin: 6px 0 0" }),
      ...(several ? [choice("panel", options, String(at.panel), (one) => ((at.panel = Number(one)), draw()), "panel")] : []),
    );
  }
  function drawHeat() {
    const own = panel(), scores = site().scores[at.method];
    if (!own || scores.not_scored) {
      Plotly.purge(heat);
      heat.listens = false;
      heat.replaceChildren(made("p", { className: "why", textContent: `${at.method} does not score ${at.site}: ${scores.not_scored || "no cells"}` }));
      return;
    }
    if (!heat._fullLayout) heat.replaceChildren();
    const cells = own.cells, tall = cells.length, across = cells[0].length;
    const grey = cells.map((row) => row.map((cell) => (cell < 0 || site().zeros[cell] ? 0 : null)));
    const z = cells.map((row) => row.map((cell) => (cell < 0 || site().zeros[cell] || !Number.isFinite(value(at.method, cell)) ? null : value(at.method, cell))));
    const words = (cell) => (cell < 0 ? "no effect" : `<b>${escaped(name(cell))}</b><br>` + (site().zeros[cell] ? escaped(site().zeros[cell]) : `effect ${number(value(at.method, cell))}${unit}`));
    const text = cells.map((row) => row.map(words));
    const limit = site().limits[at.example < 0 ? 0 : 1], unsigned = group().maps[at.method].unsigned;
    const gap = tall <= 60 && across <= 60 ? 1 : 0;
    const common = { type: "heatmap", text, hovertemplate: "%{text}<extra></extra>", hoverongaps: false, xgap: gap, ygap: gap };
    const bar = { thickness: 10, outlinewidth: 0, nticks: 5, title: { text: `effect${state.unit ? ` (${escaped(state.unit)})` : ""}`, side: "right" }, tickfont: { size: 11 } };
    const colours = { colorscale: unsigned ? group().unsigned_scale : group().scale, zmin: unsigned ? 0 : -limit, zmax: limit, colorbar: bar };
    const box = (row, column, stroke, width, dash = "solid") => ({ type: "rect", x0: column - 0.5, x1: column + 0.5, y0: row - 0.5, y1: row + 0.5, line: { color: stroke, width, dash }, layer: "above" });
    const shapes = [];
    cells.forEach((row, r) =>
      row.forEach((cell, c) => {
        if (cell < 0) return;
        if (chosen.some((one) => one.site === at.site && one.number === site().cells[cell])) shapes.push(box(r, c, RING, 3));
        if (cell === at.cell) shapes.push(box(r, c, INK, 2));
      }),
    );
    const labels = Math.max(...own.rows.texts.map((one) => one.length), 0);
    const height = Math.min(900, Math.max(190, tall * (tall > 40 ? 13 : tall > 20 ? 16 : 22))) + 100;
    const width = Math.min(Math.max(heat.clientWidth, 260), 130 + 7 * labels + across * 46 + 60);
    Plotly.react(heat, [
      { ...common, z: grey, colorscale: [[0, "#ced3d9"], [1, "#ced3d9"]], showscale: false },
      { ...common, z, ...colours },
    ], look(width, height, { xaxis: axisOf(own.columns, across), yaxis: { ...axisOf(own.rows, tall), range: [tall - 0.5, -0.5] }, shapes, dragmode: false }), config);
    once(heat, (event) => {
      const [row, column] = event.points[0].pointNumber;
      go(panel().cells[row][column]);
    });
  }
  function once(div, act) {
    if (div.listens) return;
    div.listens = true;
    div.on("plotly_click", (event) => div.acts(event));
    div.acts = act;
  }
  heat.addEventListener("keydown", (event) => {
    const own = panel();
    if (!own) return;
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    let [row, column] = [0, 0];
    own.cells.forEach((line, r) => line.forEach((cell, c) => cell === at.cell && at.cell !== null && ([row, column] = [r, c])));
    if (event.key in moves) {
      if (at.cell !== null) {
        row = Math.min(own.cells.length - 1, Math.max(0, row + moves[event.key][0]));
        column = Math.min(own.cells[0].length - 1, Math.max(0, column + moves[event.key][1]));
      }
      go(own.cells[row][column]);
    } else if (event.key === "Enter" || event.key === " ") toggle();
    else if (event.key.toLowerCase() === "p" && !event.ctrlKey && !event.metaKey) patch();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }, { signal: listening.signal });

  // ---- agreement
  function drawScatter() {
    const reference = exactMap();
    const method = at.method !== reference ? at.method : Object.keys(group().maps).find((one) => one !== reference);
    const points = [];
    if (method) {
      const unsigned = group().maps[method].unsigned;
      site().cells.forEach((_, cell) => {
        const x = exactValue(cell), y = value(method, cell);
        if (!site().zeros[cell] && x !== null && Number.isFinite(x) && Number.isFinite(y)) points.push([unsigned ? Math.abs(x) : x, y, cell]);
      });
    }
    if (!points.length) {
      Plotly.purge(scatter);
      const words = method ? "Agreement with exact patching: no cell of this site has been patched yet." : "There is no other method to compare with exact patching.";
      scatter.replaceChildren(made("p", { className: "why", textContent: words }));
      scatter.listens = false;
      return;
    }
    if (!scatter._fullLayout) scatter.replaceChildren();
    const all = points.flatMap(([x, y]) => [x, y]).concat(0);
    const low = Math.min(...all), high = Math.max(...all), room = 0.06 * (high - low) || 1;
    const range = [low - room, high + room];
    const layers = points.map(([, , cell]) => site().layers[cell]);
    const many = points.length > 3000 ? "scattergl" : "scatter";
    const traces = [
      { type: "scatter", mode: "lines", x: range, y: range, line: { color: MUTED, width: 1, dash: "dash" }, hoverinfo: "skip" },
      { type: many, mode: "markers", x: points.map((one) => one[0]), y: points.map((one) => one[1]), text: points.map((one) => escaped(name(one[2]))), hovertemplate: `<b>%{text}</b><br>exact %{x:.3g}, ${escaped(method)} %{y:.3g}<extra></extra>`, marker: { size: 7, opacity: 0.85, color: layers, colorscale: "Viridis", cmin: 0, cmax: 1.1 * Math.max(1, ...site().layers), line: { width: 0.5, color: "white" }, showscale: layers.some((one) => one !== layers[0]), colorbar: { thickness: 10, outlinewidth: 0, title: { text: "layer", side: "right" }, nticks: 6, tickfont: { size: 11 } } } },
    ];
    const ring = points.find((one) => one[2] === at.cell);
    const set = points.filter((one) => chosen.some((other) => other.site === at.site && other.number === site().cells[one[2]]));
    traces.push({ type: "scatter", mode: "markers", x: set.map((one) => one[0]), y: set.map((one) => one[1]), hoverinfo: "skip", marker: { symbol: "circle-open", size: 14, color: RING, line: { width: 3 } } });
    traces.push({ type: "scatter", mode: "markers", x: ring ? [ring[0]] : [], y: ring ? [ring[1]] : [], hoverinfo: "skip", marker: { symbol: "circle-open", size: 14, color: INK, line: { width: 2 } } });
    const side = Math.min(Math.max(scatter.clientWidth, 260), 460);
    const axis = { ...line, range, nticks: 6, tickfont: { size: 11 } };
    const what = at.example < 0 ? "mean effect" : `effect on example ${at.example}`;
    Plotly.react(scatter, traces, look(side, Math.min(side, 380) + 30, {
      title: { text: `<b>${escaped(method)} against exact</b>, ${points.length} cell${points.length > 1 ? "s" : ""}, ${what}`, font: { size: 12 }, x: 0, xanchor: "left", pad: { l: 6 }, y: 0.985, yanchor: "top" },
      margin: { l: 8, r: 8, t: 34, b: 8 }, showlegend: false, hovermode: "closest", dragmode: false,
      xaxis: { ...axis, title: { text: group().maps[method].unsigned ? "|exact|" : "exact" + (state.unit ? ` (${escaped(state.unit)})` : ""), standoff: 8 } }, yaxis: { ...axis, title: { text: escaped(method), standoff: 8 } },
    }), config);
    once(scatter, (event) => scatter.acts(event));
    scatter.acts = (event) => {
      const point = event.points.find((one) => one.curveNumber === 1);
      if (point) go(points[point.pointNumber][2]);
    };
  }

  // ---- the circuit
  let drawn = false;
  const roomOf = (figure) => figure.layout.width || Math.max(680, graph.clientWidth);
  function drawGraph() {
    if (!state.circuit) return;
    const { figure, links } = state.circuit;
    if (!drawn) {
      drawn = true;
      const layout = { ...figure.layout, dragmode: false, autosize: false, width: roomOf(figure) };
      for (const slider of layout.sliders || []) for (const step of slider.steps) if (step.args[0].visible) step.args[0].visible.push(true);
      const ring = { type: "scatter", mode: "markers", x: [], y: [], hoverinfo: "skip", marker: { symbol: "square-open", size: 42, color: RING, line: { width: 4 } }, meta: {} };
      const names = figure.data.find((one) => one.meta && one.meta.circuit === "names");
      ring.xaxis = names ? names.xaxis : "x";
      ring.yaxis = names ? names.yaxis : "y";
      const rings = names ? [ring] : figure.data.map((one) => ({ ...ring, xaxis: one.xaxis, yaxis: one.yaxis, marker: { ...ring.marker, symbol: "circle-open", size: 24 } }));
      Plotly.newPlot(graph, [...figure.data, ...rings], layout, config);
      graph.on("plotly_click", (event) => {
        const point = event.points.find((one) => one.data.meta && ["names", "addresses"].includes(one.data.meta.circuit));
        if (point) toNode(point.data.meta.nodes[point.pointNumber]);
      });
      graph.on("plotly_sliderend", drawGraph);
      graph.on("plotly_sliderchange", () => setTimeout(drawGraph, 0));
    }
    const count = figure.data.length, mine = at.cell === null ? [] : site().nodes[at.cell], x = [], y = [];
    const linked = (node) => links[node] && links[node][0] === at.site && at.cell !== null && links[node][1] === site().cells[at.cell];
    for (let i = count; i < graph.data.length; i++) {
      const from = graph.data.slice(0, count).filter((one, j) => one.meta && ["names", "addresses"].includes(one.meta.circuit) && one.visible !== false && (graph.data.length === count + 1 || j === i - count));
      const hits = from.flatMap((one) => one.meta.nodes.map((node, j) => [node, one.x[j], one.meta.places ? one.meta.places[j][1] : one.y[j]])).filter(([node]) => mine.includes(node) || linked(node));
      x.push(hits.map((one) => one[1]));
      y.push(hits.map((one) => one[2]));
    }
    graph.dataset.nodes = mine.join(" ");
    if (graph.layout.width !== roomOf(figure)) Plotly.relayout(graph, { width: roomOf(figure) });
    Plotly.restyle(graph, { x, y }, x.map((_, i) => count + i));
  }
  function toNode(node) {
    const link = state.circuit.links[node];
    if (link && link[0] in group().sites) return visit(link[0], local(...link));
    const order = [at.site, ...Object.keys(group().sites).filter((one) => one !== at.site)];
    for (const one of order) {
      const own = group().sites[one], found = own.nodes.map((of, cell) => [of, cell]).filter(([of]) => of.includes(node));
      if (!found.length) continue;
      const few = Math.min(...found.map(([of]) => of.length));
      const sizes = found.filter(([of]) => of.length === few).map(([, cell]) => [Math.abs(own.scores[at.method].mean[cell]) || 0, cell]);
      return one === at.site ? go(sizes.reduce((a, b) => (b[0] > a[0] ? b : a))[1]) : visit(one, sizes.reduce((a, b) => (b[0] > a[0] ? b : a))[1]);
    }
    tell(`No site of these maps has a cell of ${node}.`);
  }

  // ---- work that takes a while
  const tell = (text) => (said.textContent = text);
  async function work(words, question, total, part = () => {}) {
    const bar = made("progress", { value: 0, max: total || 1 });
    if (!total) bar.removeAttribute("value");
    const stop = made("button", { textContent: "stop", data: { role: "stop" } });
    let done = 0;
    const step = (n = 1) => total && ((bar.value = done += n), (count.textContent = `${Math.min(done, total)} of ${total}`));
    const count = made("span", { className: "muted" });
    const row = made("span", { className: "working" }, words, bar, count, stop);
    const shows = setTimeout(() => working.append(row), 120);
    try {
      return await ask(question, { progress: () => part === null && step(), part: (...found) => (part(...found), step()), started: (end) => (stop.onclick = end) });
    } finally {
      clearTimeout(shows);
      row.remove();
    }
  }
  async function patch() {
    if (at.cell === null || site().zeros[at.cell]) return;
    const where = keyOf(), label = name(at.cell);
    const question = ["exact", at.direction, at.site, site().cells[at.cell]];
    try {
      patched.set(where, await work(`patching ${label} exactly`, question));
      tell(`${label}: exact effect ${number(patched.get(where).mean)}${unit}`);
    } catch (error) {
      tell(`${label}: ${error.message}`);
    }
    draw();
  }
  async function sweep() {
    const direction = at.direction, one = at.site, cells = site().cells.filter((cell, i) => !site().zeros[i] && !patched.has(keyOf(one, cell)));
    let due = 0;
    try {
      await work(`patching ${cells.length} cells of ${one} exactly`, ["sweep", direction, one, cells], cells.length, (cell, found) => {
        patched.set(JSON.stringify([direction, one, cell]), found);
        if (at.site === one && at.direction === direction && Date.now() > due) (due = Date.now() + 700), drawScatter();
      });
    } catch (error) {
      tell(error.message);
    }
    draw();
  }

  // ---- the cell
  const table = (head, rows) => {
    const body = rows.map(({ cells, own, data }) => made("tr", { className: own ? "own" : "", data: data || {} }, ...cells.map((cell) => (cell instanceof Node ? made("td", {}, cell) : made("td", { textContent: cell })))));
    return made("div", { className: "scroll" }, made("table", {}, made("thead", {}, made("tr", {}, ...head.map((text) => made("th", { textContent: text })))), made("tbody", {}, ...body)));
  };
  const figure = (value, role) => made("span", { textContent: number(value), data: { role, value: String(value) } });
  const interval = (low, high) => (low === null || !Number.isFinite(low) ? "–" : `${number(low)} to ${number(high)}`);
  function drawCell() {
    if (at.cell === null) {
      detail.replaceChildren(made("p", { className: "why", textContent: "Click a cell to see what it is." }), prompts());
      detail.dataset.label = "";
      return;
    }
    const cell = at.cell, label = name(cell), zero = site().zeros[cell];
    detail.dataset.label = label;
    const mine = chosen.some((one) => one.site === at.site && one.number === site().cells[cell]);
    const head = made("div", { className: "bar" }, made("h2", { textContent: label, data: { role: "label" } }), made("button", { textContent: mine ? "remove from the set" : "add to the set", on: { click: toggle }, data: { role: "toggle" } }));
    if (zero) {
      detail.replaceChildren(head, made("p", { textContent: `Its effect is 0: ${zero}.` }), prompts());
      return;
    }
    const one = at.example >= 0, truth = exactOf(cell);
    const rows = Object.keys(group().maps).filter((method) => !site().scores[method].not_scored && Number.isFinite(site().scores[method].mean[cell])).map((method) => {
      const scores = site().scores[method], mean = scores.mean[cell];
      const whole = truth && (group().maps[method].unsigned ? Math.abs(truth.mean) : truth.mean);
      const share = truth && !group().maps[method].exact && Math.abs(whole) > 1e-6 ? (mean / whole).toFixed(2).replace("-", "−") : "";
      const cells = [method, figure(mean, "mean"), interval(scores.low[cell], scores.high[cell]), ...(one ? [figure(value(method, cell), "one")] : []), truth ? share : ""];
      return { cells, own: method === at.method, data: { method } };
    });
    const again = patched.get(keyOf());
    if (again) rows.push({ cells: ["exact patch, run here", figure(again.mean, "mean"), interval(again.low, again.high), ...(one ? [figure(again.each[at.example], "one")] : []), ""], data: { method: "patched" } });
    const missed = Object.keys(group().maps).filter((method) => site().scores[method].not_scored).map((method) => made("p", { className: "why", textContent: `${method}: not scored, ${site().scores[method].not_scored}` }));
    const list = table(["effect" + (unit ? ` in${unit}` : ""), "mean", "95 % interval", ...(one ? [`example ${at.example}`] : []), truth ? "of exact" : ""], rows);
    const run = made("div", { className: "bar", data: { role: "exact" } });
    if (live) run.append(made("button", { textContent: again ? "patched exactly" : "patch it exactly", disabled: Boolean(again), on: { click: patch }, data: { role: "patch" } }), made("button", { textContent: "patch all cells shown", on: { click: sweep }, data: { role: "sweep" } }));
    else if (!again && !exactMap()) ask(["exact", at.direction, at.site, site().cells[cell]]).then(
      () => run.replaceChildren(made("button", { textContent: "show the exact patch", on: { click: patch }, data: { role: "patch" } })),
      (error) => run.replaceChildren(made("span", { className: "why", textContent: error.message })),
    );
    else if (!again) run.append(made("span", { className: "muted", textContent: `Exact effects are those of the map ${exactMap()}.` }));
    if (truth) run.append(made("span", { data: { role: "metric" }, textContent: `${state.metric} ${number(truth.before)} → ${number(truth.after)} when it is patched` }));
    const strip = part("plot"), attention = part(), pieces = part();
    detail.replaceChildren(head, list, ...missed, run, strip, prompts(), attention, pieces);
    drawExamples(strip, cell, truth);
    if (HEADS.includes(site().kind) && site().nodes[cell].length) drawAttention(attention);
    if (site().made_of) drawParts(pieces);
  }
  function drawExamples(div, cell, truth) {
    const x = Array.from({ length: state.shown }, (_, i) => i), traces = [];
    const add = (name, colour, each, mean, low, high, symbol) => {
      if (Number.isFinite(low) && low !== null) traces.push({ type: "scatter", mode: "lines", x: [-0.5, state.shown - 0.5, state.shown - 0.5, -0.5], y: [low, low, high, high], fill: "toself", fillcolor: colour, opacity: 0.16, line: { width: 0 }, hoverinfo: "skip", showlegend: false });
      traces.push({ type: "scatter", mode: "lines", x: [-0.5, state.shown - 0.5], y: [mean, mean], line: { color: colour, width: 1.5 }, hoverinfo: "skip", showlegend: false });
      traces.push({ type: "scatter", mode: "markers", name: escaped(name), x, y: each, marker: { color: colour, size: 6, symbol }, hovertemplate: `example %{x}<br>${escaped(name)} %{y:.3g}<extra></extra>` });
    };
    const scores = site().scores[at.method];
    if (scores.not_scored) return;
    add(at.method, group().maps[at.method].colour, Array.from(scores.each.slice(cell * state.shown, (cell + 1) * state.shown)), scores.mean[cell], scores.low[cell], scores.high[cell], "circle");
    if (truth && !group().maps[at.method].exact) add(truth.from === "patched" ? "exact patch" : truth.from, INK, truth.each.slice(0, state.shown), truth.mean, truth.low, truth.high, "x");
    const marks = at.example < 0 ? [] : [{ type: "line", x0: at.example, x1: at.example, yref: "paper", y0: 0, y1: 1, line: { color: RING, width: 2 }, layer: "below" }];
    Plotly.newPlot(div, traces, look(Math.max(260, Math.min(div.clientWidth || right.clientWidth, 640)), 200, {
      title: { text: "<b>per example</b>; line and band: mean, 95 % interval", font: { size: 12 }, x: 0, xanchor: "left", pad: { l: 6 }, y: 0.98, yanchor: "top" },
      margin: { l: 8, r: 8, t: 30, b: 8 }, hovermode: "closest", dragmode: false, shapes: marks,
      legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom", font: { size: 11 } },
      xaxis: { ...line, title: { text: "example", standoff: 4 }, range: [-0.7, state.shown - 0.3], nticks: 9, tickformat: "d", tickfont: { size: 11 } },
      yaxis: { ...line, nticks: 5, zeroline: true, zerolinecolor: "#b6bcc3", tickfont: { size: 11 } },
    }), config);
    div.on("plotly_click", (event) => ((at.example = event.points[0].x), draw()));
  }
  const exampleShown = () => Math.max(0, at.example);
  function prompts() {
    const example = exampleShown(), prompt = state.prompts[example], here = new Set();
    if (at.cell !== null) for (const of of Object.values(site().places)) here.add(state.index[example][of[at.cell]]);
    const names = Object.entries(prompt.names);
    const strip = (side) => {
      const tokens = prompt[side].map((token, i) => {
        const roles = names.filter(([, place]) => place === i).map(([role]) => role);
        return made("span", { className: `token${prompt.changed[i] ? " changed" : ""}${here.has(i) ? " here" : ""}`, textContent: shown(token), title: [`position ${i}`, ...roles, JSON.stringify(token)].join(", ") });
      });
      return made("div", { className: "prompt", data: { role: side } }, made("span", { className: "side", textContent: side }), ...tokens);
    };
    const answers = (side) => prompt[side].map((token) => shown(token)).join(", ") || "none";
    return made("div", { data: { role: "prompts" } },
      made("h3", { textContent: `Prompts of example ${example}` + (at.example < 0 ? " (choose another above)" : "") }),
      strip("clean"), strip("corrupted"),
      made("p", { className: "muted", textContent: `correct: ${answers("correct")}; incorrect: ${answers("incorrect")}; what differs is marked` + (here.size ? ", the cell's position is framed" : "") }));
  }
  async function drawAttention(div) {
    const where = keyOf() + at.example, nodes = site().nodes[at.cell];
    const head = nodes[Math.min(looks.head, nodes.length - 1)];
    const mean = at.example < 0 && state.aligned, example = mean ? -1 : exampleShown();
    const bar = made("div", { className: "bar" },
      made("h3", { textContent: `Attention of ${head}, ${mean ? "mean over examples" : `example ${example}`}`, style: "margin: 0" }),
      nodes.length > 1 ? choice("head", nodes.map((one, i) => [String(i), one]), String(looks.head), (one) => ((looks.head = Number(one)), draw()), "head") : null,
      choice("prompt", [["clean", "clean"], ["corrupted", "corrupted"], ["difference", "clean − corrupted"]], looks.side, (one) => ((looks.side = one), draw()), "side"));
    div.replaceChildren(bar);
    let rows;
    try {
      const sides = looks.side === "difference" ? ["clean", "corrupted"] : [looks.side];
      const found = [];
      for (const side of sides) found.push((await ask(["attention", head, example, side])).pattern);
      rows = found[0].map((row, r) => row.map((share, c) => (found[1] ? share - found[1][r][c] : share)));
    } catch (error) {
      if (div.isConnected) div.append(made("p", { className: "why", textContent: error.message }));
      return;
    }
    if (where !== (at.cell === null ? "" : keyOf() + at.example) || !div.isConnected) return;
    const prompt = state.prompts[exampleShown()], side = looks.side === "corrupted" ? "corrupted" : "clean";
    const role = (i) => Object.entries(prompt.names).filter(([, place]) => place === i).map(([one]) => one)[0];
    const texts = prompt[side].map((token, i) => {
      const same = !mean || state.prompts.every((one) => one[side][i] === token);
      return [role(i), same ? shown(token) : role(i) ? "" : `pos ${i}`].filter(Boolean).join(": ");
    });
    const count = rows.length, z = rows.map((row) => [...row, ...Array(count - row.length).fill(null)]);
    const hover = z.map((row, r) => row.map((share, c) => `<b>${head}</b><br>${escaped(texts[r])} → ${escaped(texts[c])}: ${share === null ? "" : share.toFixed(2)}`));
    const plot = part("plot", { data: { role: "attention" } });
    div.append(plot);
    const places = site().places, own = (axis) => (places[axis] ? state.index[exampleShown()][places[axis][at.cell]] : null);
    const dest = own("dest") ?? (["z", "q"].includes(site().kind) ? own("pos") : null), src = own("src") ?? (["k", "v"].includes(site().kind) ? own("pos") : null);
    const shapes = dest === null && src === null ? [] : [{ type: "rect", x0: src === null ? -0.5 : src - 0.5, x1: src === null ? count - 0.5 : src + 0.5, y0: dest === null ? count - 0.5 : dest + 0.5, y1: dest === null ? -0.5 : dest - 0.5, line: { color: INK, width: 2 } }];
    const all = rows.flat(), most = Math.max(...all.map(Math.abs), 0.05);
    const colours = looks.side === "difference" ? { colorscale: PRGN, zmin: -most, zmax: most } : { colorscale: [[0, "#ffffff"], [1, "#00682f"]], zmin: 0, zmax: 1 };
    const width = Math.max(260, Math.min(plot.clientWidth || 500, 90 + 34 * count + 7 * Math.max(...texts.map((one) => one.length)))), cell = Math.min(24, Math.max(10, (width - 160) / count));
    const axis = { ...line, tickmode: "array", tickvals: texts.map((_, i) => i), ticktext: texts.map(escaped), tickfont: { size: count > 30 ? 9 : 11 } };
    Plotly.newPlot(plot, [{ type: "heatmap", z, text: hover, hovertemplate: "%{text}<extra></extra>", hoverongaps: false, xgap: 1, ygap: 1, ...colours, colorbar: { thickness: 10, outlinewidth: 0, nticks: 5, tickfont: { size: 11 } } }],
      look(width, cell * count + 120, { shapes, dragmode: false, xaxis: { ...axis, tickangle: -60, range: [-0.5, count - 0.5], title: { text: "looks at", standoff: 6 } }, yaxis: { ...axis, range: [count - 0.5, -0.5], title: { text: "from", standoff: 6 } } }), config);
  }
  async function drawParts(div) {
    const where = keyOf();
    let found;
    div.replaceChildren(made("h3", { textContent: "What it is made of" }), made("p", { className: "why", textContent: "…" }));
    try {
      found = await work(`scoring what ${name(at.cell)} is made of`, ["parts", at.direction, at.site, site().cells[at.cell]]);
    } catch (error) {
      if (div.isConnected) div.lastChild.textContent = error.message;
      return;
    }
    if (at.cell === null || where !== keyOf() || !div.isConnected) return;
    const one = at.example >= 0;
    div.replaceChildren(...found.lists.flatMap((list) => {
      const head = made("h3", { textContent: `Top ${list.what}` + (list.rows ? ` of ${list.count.toLocaleString("en")}, by ${list.method}, largest mean first` : "") });
      if (!list.rows) return [head, made("p", { className: "why", textContent: list.why })];
      const row = (words, from, own) => ({ own, data: { label: words }, cells: [words, figure(from.mean, "mean"), interval(from.low, from.high), ...(one ? [figure(from.each[at.example], "one")] : [])] });
      const rows = [...list.rows.map((from) => row(from.label, from)), row("sum of all", list.sum, true)];
      return [head, made("div", { data: { role: list.what } }, table(["", "mean", "95 % interval", ...(one ? [`example ${at.example}`] : [])], rows))];
    }));
    if (!found.lists.length) div.replaceChildren();
  }

  // ---- the set
  function toggle() {
    if (at.cell === null) return;
    const one = { site: at.site, number: site().cells[at.cell], label: name(at.cell) };
    const rest = chosen.filter((other) => other.site !== one.site || other.number !== one.number);
    chosen = rest.length < chosen.length ? rest : [...chosen, one];
    together = null;
    draw();
  }
  function largest(count) {
    const reference = exactMap() || Object.keys(group().maps)[0];
    const scores = site().scores[site().scores[reference].not_scored ? at.method : reference];
    const order = site().cells.map((_, cell) => cell).filter((cell) => !site().zeros[cell] && Number.isFinite(scores.mean[cell]));
    order.sort((a, b) => Math.abs(scores.mean[b]) - Math.abs(scores.mean[a]));
    chosen = order.slice(0, count).map((cell) => ({ site: at.site, number: site().cells[cell], label: name(cell) })).sort((a, b) => a.number - b.number);
    together = null;
    draw();
  }
  function drawTray() {
    const into = looks.into || at.direction, source = looks.source || group().source;
    const chips = chosen.map((one) => made("button", { className: "chip", textContent: `${one.label} ×`, title: "remove", on: { click: () => ((chosen = chosen.filter((other) => other !== one)), (together = null), draw()) } }));
    const runs = live ? ["denoising", "noising"] : [at.direction], sources = live ? ["paired", "mean", "zero", "mean_positional"] : [group().source];
    const words = { denoising: "corrupted prompts (restore)", noising: "clean prompts (ablate)", paired: "the other prompt's", mean: "mean", zero: "zero", mean_positional: "mean at each position" };
    const bar = made("div", { className: "bar" },
      choice("run on", runs.map((one) => [one, words[one]]), into, (one) => ((looks.into = one), (together = null), draw()), "into"),
      choice("values put in", sources.map((one) => [one, words[one]]), source, (one) => ((looks.source = one), (together = null), draw()), "source"),
      made("button", { textContent: `patch ${chosen.length} together`, disabled: !chosen.length, on: { click: run }, data: { role: "together" } }),
      ...[2, 5, 10].map((count) => made("button", { textContent: `the ${count} largest`, on: { click: () => largest(count) }, data: { role: `largest-${count}` } })),
      made("button", { textContent: "clear", disabled: !chosen.length, on: { click: () => ((chosen = []), (together = null), draw()) } }));
    const out = made("div", { data: { role: "result" } });
    if (together && together.error) out.append(made("p", { className: "why", textContent: together.error }));
    else if (together) {
      const found = together;
      const same = into === at.direction && source === group().source;
      const parts = chosen.map((one) => ({ scores: group().sites[one.site].scores[at.method], cell: local(one.site, one.number) }));
      const sum = parts.reduce((all, { scores, cell }) => all + (scores.not_scored ? NaN : scores.mean[cell]), 0);
      out.append(table(["", "mean", "95 % interval"], [
        { cells: [`${state.metric} before`, figure(found.before, "before"), ""] },
        { cells: [`${state.metric} with all ${found.cells} patched`, figure(found.after, "after"), ""], own: true },
        { cells: ["effect of all together", figure(found.mean, "effect"), interval(found.low, found.high)], own: true },
        ...(same ? [{ cells: [`if effects added up: sum of ${at.method}`, figure(sum, "sum"), ""] }] : []),
      ]));
    }
    tray.replaceChildren(made("h3", { textContent: chosen.length ? `Set of ${chosen.length} cell${chosen.length > 1 ? "s" : ""}` : "Set of cells: add some, then patch or ablate them together" }), made("div", { className: "chips" }, ...chips), bar, out);
    async function run() {
      const asked = chosen, cells = chosen.map((one) => [one.site, one.number]).sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] - b[1]));
      let found;
      try {
        found = await work(`patching ${cells.length} cells together`, ["together", into, source, cells]);
      } catch (error) {
        found = { error: error.message };
      }
      if (asked !== chosen || into !== (looks.into || at.direction) || source !== (looks.source || group().source)) return;
      together = found;
      draw();
    }
  }

  // ---- all of it
  function draw() {
    const focused = document.activeElement, role = root.contains(focused) && focused !== heat ? focused.dataset.role : null;
    drawBars();
    drawPick();
    drawHeat();
    drawCell();
    drawScatter();
    drawTray();
    drawGraph();
    if (at.cell !== null) tell(`${name(at.cell)}: ${site().zeros[at.cell] || `effect ${number(value(at.method, at.cell))}${unit}`}`);
    root.dataset.cell = at.cell === null ? "" : name(at.cell);
    if (role) root.querySelector(`[data-role="${role}"]`)?.focus();
  }
  const theme = () => {
    const lab = document.body.dataset.jpThemeLight;
    root.classList.toggle("dark", lab !== undefined ? lab === "false" : matchMedia("(prefers-color-scheme: dark)").matches);
  };
  const watching = new MutationObserver(theme);
  watching.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme, { signal: listening.signal });
  theme();
  let before = root.clientWidth;
  const sizes = new ResizeObserver(() => {
    if (Math.abs(root.clientWidth - before) < 12) return;
    before = root.clientWidth;
    draw();
  });
  sizes.observe(root);
  at.panel = strongest();
  draw();
  root.dataset.ready = "true";
  return () => {
    listening.abort();
    watching.disconnect();
    sizes.disconnect();
    for (const div of root.querySelectorAll(".js-plotly-plot")) Plotly.purge(div);
  };
}
