// Runs once Bokeh has drawn the charts. It is given figures, cursors (one for each figure), sources, renderers and keys
// (one entry for each curve, a key being metric and run), and files, the figures of exported files.
const page = document.documentElement;
const runOf = (key) => key.split(" ")[1];
const isValidation = (key) => key.startsWith("val/");
const hidden = new Set();
let axis = "iteration";

function colour(name) {
  return getComputedStyle(page).getPropertyValue(name).trim();
}

function paint() {
  for (const figure of [...figures, ...files]) {
    for (const ruler of [...figure.below, ...figure.left]) {
      ruler.major_label_text_color = ruler.axis_label_text_color = colour("--muted");
      ruler.axis_line_color = ruler.major_tick_line_color = colour("--line");
    }
    for (const grid of figure.center.filter((part) => "grid_line_color" in part)) grid.grid_line_color = colour("--line");
  }
  for (const cursor of cursors) cursor.line_color = colour("--muted");
  keys.forEach((key, number) => {
    for (const renderer of renderers[number]) paintGlyph(renderer.glyph, runOf(key));
  });
  for (const renderer of files.flatMap((figure) => figure.renderers)) paintGlyph(renderer.glyph, renderer.name);
}

function paintGlyph(glyph, run) {
  glyph.line_color = colour(`--run-${run % 8}`);
  if ("fill_color" in glyph) glyph.fill_color = glyph.line_color;
}

function showCurves() {
  const withTraining = document.getElementById("training").checked;
  keys.forEach((key, number) => {
    const isShown = !hidden.has(runOf(key)) && (withTraining || isValidation(key));
    for (const renderer of renderers[number]) renderer.visible = isShown;
  });
}

function drawOver(name) {
  axis = name;
  const button = document.querySelector(`[data-axis="${name}"]`);
  for (const other of document.querySelectorAll("[data-axis]")) other.setAttribute("aria-pressed", other === button);
  for (const source of sources) source.data = { ...source.data, x: Array.from(source.data[name]) };
  for (const figure of figures) {
    figure.below[0].axis_label = button.dataset.label;
    figure.reset.emit();
  }
  readAt(null);
}

// The point of a curve that is nearest to x; its last one for null; -1 if it has none.
function nearest(xs, x) {
  let found = -1;
  for (let place = 0; place < xs.length; place++) {
    if (Number.isNaN(xs[place])) continue;
    if (x === null || found < 0 || Math.abs(xs[place] - x) <= Math.abs(xs[found] - x)) found = place;
  }
  return found;
}

function readAt(x) {
  for (const cursor of cursors) {
    cursor.visible = x !== null;
    cursor.location = x ?? 0;
  }
  keys.forEach((key, number) => {
    const columns = sources[number].data;
    const place = nearest(columns.x, x);
    const value = place < 0 ? NaN : columns.y[place];
    const text = key.includes("top1") ? `${(100 * value).toFixed(1)} %` : value.toFixed(3);
    document.querySelector(`[data-curve="${key}"]`).textContent = Number.isNaN(value) ? "–" : text;
  });
  const shown = axis === "iteration" ? Math.round(x).toLocaleString("en") : x?.toFixed(1);
  const place = axis === "time" ? `${shown} min` : `${axis} ${shown}`;
  document.getElementById("where").textContent = x === null ? "at the end" : `near ${place}`;
}

for (const figure of figures) {
  figure.on_event("mousemove", (event) => readAt(event.x));
  figure.on_event("tap", (event) => readAt(event.x));
  if (matchMedia("(pointer: coarse)").matches) figure.toolbar.active_drag = null; // so that a finger scrolls the page
  else figure.on_event("mouseleave", () => readAt(null));
}
for (const button of document.querySelectorAll("[data-axis]")) {
  button.addEventListener("click", () => drawOver(button.dataset.axis));
}
for (const box of document.querySelectorAll("[data-shows]")) {
  box.addEventListener("change", () => {
    hidden[box.checked ? "delete" : "add"](box.dataset.shows);
    showCurves();
  });
}
document.getElementById("training")?.addEventListener("change", showCurves);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
paint();
if (figures.length) {
  showCurves();
  readAt(null);
}
