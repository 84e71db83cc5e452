// Tables: a header sorts, a field and lists filter. A row's figure stays below it.
const figures = {}, scripts = {};

function sortKey(cell) {
  if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
  return cell.querySelector(".none") ? null : cell.textContent.trim().toLowerCase();
}

function compare(a, b, down) {
  if (a === null || b === null) return (a === null) - (b === null);  // what is missing comes last, either way
  const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return down ? -order : order;
}

function sort(table, place, down) {
  const rows = [...table.tBodies[0].rows].filter((row) => !row.classList.contains("drawn"));
  const keyed = rows.map((row, was) => [sortKey(row.cells[place]), was, row]);
  keyed.sort((a, b) => compare(a[0], b[0], down) || a[1] - b[1]);
  const all = document.createDocumentFragment();
  for (const [, , row] of keyed) all.append(row, ...(row.figureRow ? [row.figureRow] : []));
  table.tBodies[0].append(all);
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    if (i === place) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

function filter(form) {
  const table = document.getElementById(form.dataset.for);
  const words = form.querySelector("input").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = [...form.querySelectorAll("select")].filter((one) => one.value).map((one) => [Number(one.dataset.column), one.value]);
  let shown = 0, all = 0;
  for (const row of table.tBodies[0].rows) {
    if (row.classList.contains("drawn")) continue;
    const text = words.length ? [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase() : "";
    const fits = words.every((word) => text.includes(word)) && chosen.every(([place, value]) => row.cells[place].textContent === value);
    row.hidden = !fits;
    if (row.figureRow) row.figureRow.hidden = !fits;
    all += 1;
    shown += fits;
  }
  form.querySelector("output").value = shown === all ? `${all.toLocaleString("en")} rows` : `${shown.toLocaleString("en")} of ${all.toLocaleString("en")} rows`;
}

// Figures: each in a file of its own, which calls patchlabFigure; pages opened from a disk may load scripts and nothing else.
function patchlabFigure(name, figure) { figures[name] = figure; }

function load(source) {
  scripts[source] ??= new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = source;
    script.onload = done;
    script.onerror = () => { delete scripts[source]; failed(source); };
    document.head.append(script);
  });
  return scripts[source];
}

async function draw(box) {
  if (box.dataset.state) return;
  box.dataset.state = "loading";
  box.textContent = "loading …";
  const name = box.dataset.figure;
  try {
    await Promise.all([load("plotly.min.js"), load(`${name}.js`)]);
  } catch (source) {
    box.textContent = `${source} cannot be loaded: it must lie beside this page.`;
    delete box.dataset.state;
    return;
  }
  box.textContent = "";
  const place = document.createElement("div");
  place.className = "plotly-graph-div";
  box.append(place);
  await Plotly.newPlot(place, figures[name].data, figures[name].layout, { displaylogo: false });
  box.dataset.state = "drawn";
  fit();
}

function show(button) {
  const row = button.closest("tr");
  if (row.figureRow) {
    row.figureRow.remove();
    row.figureRow = null;
    button.textContent = "show";
    return;
  }
  const below = document.createElement("tr"), cell = below.insertCell();
  below.className = "drawn";
  cell.colSpan = row.cells.length;
  cell.innerHTML = "<figure><div></div></figure>";
  cell.firstChild.style.width = `${row.closest(".scroll").clientWidth - 20}px`;
  const box = cell.firstChild.firstChild;
  box.dataset.figure = button.dataset.show;
  row.after(below);
  row.figureRow = below;
  button.textContent = "hide";
  draw(box);
}

addEventListener("click", (event) => {
  const head = event.target.closest("table.sortable th"), button = event.target.closest("button[data-show]");
  if (button) show(button);
  else if (head) sort(head.closest("table"), head.cellIndex, head.getAttribute("aria-sort") === "ascending");
});
addEventListener("input", (event) => { if (event.target.form?.classList.contains("filters")) filter(event.target.form); });
addEventListener("submit", (event) => event.preventDefault());
addEventListener("resize", () => {
  for (const figure of document.querySelectorAll("tr.drawn figure")) figure.style.width = `${figure.closest(".scroll").clientWidth - 20}px`;
});
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "200px" });
addEventListener("load", () => { for (const box of document.querySelectorAll("[data-figure]")) seen.observe(box); });
