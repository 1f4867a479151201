// Small charts as SVG: lines with smoothing and a logarithmic scale, and histograms.

const NS = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [640, 260];
const [LEFT, RIGHT, TOP, BOTTOM] = [58, 12, 10, 36];

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Round values between `low` and `high` for the marks of an axis.
export function ticks(low, high, most = 5) {
  if (!(high > low)) return [low];
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => power * factor >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-9); i++) found.push(i * step);
  return found;
}

// An exponential moving average of [x, y] points; `weight` from 0 (none) to below 1. It starts without a bias.
export function smoothed(points, weight) {
  let sum = 0, scale = 0;
  return points.map(([x, y]) => {
    sum = weight * sum + (1 - weight) * y;
    scale = weight * scale + (1 - weight);
    return [x, sum / scale];
  });
}

// At most `most` points: each is the mean of neighbors, so that a long run stays quick to draw.
export function thinned(points, most = 1200) {
  const group = Math.ceil(points.length / most);
  if (group <= 1) return points;
  const found = [];
  for (let i = 0; i < points.length; i += group) {
    const part = points.slice(i, i + group);
    found.push([0, 1].map((axis) => part.reduce((sum, point) => sum + point[axis], 0) / part.length));
  }
  return found;
}

const label = (value) => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(0) : String(+value.toPrecision(3)));

// Draw lines into `place` and replace what is there.
// series: [{name, points: [[x, y], ...], smooth: true}]; options: {label, xLabel, smoothing: 0 to 0.99, log: false}.
export function lineChart(place, series, options = {}) {
  const { smoothing = 0, log = false, xLabel = "" } = options;
  const scale = log ? Math.log10 : (y) => y;
  const lines = series.map(({ points, ...rest }, index) => ({
    ...rest, style: `s${(index % 4) + 1}`,
    points: thinned(points.filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y) && (!log || y > 0))),
  })).filter((line) => line.points.length);
  if (!lines.length) { place.replaceChildren(empty(options.empty ?? "No values yet.")); return; }
  const all = lines.flatMap((line) => line.points);
  let [x0, x1] = extent(all.map(([x]) => x)), [y0, y1] = extent(all.map(([, y]) => scale(y)));
  if (x0 === x1) x1 = x0 + 1;
  const margin = (y1 - y0) * 0.05 || Math.abs(y0) * 0.05 || 1;
  [y0, y1] = [y0 - margin, y1 + margin];
  const px = (x) => LEFT + ((x - x0) / (x1 - x0)) * (WIDTH - LEFT - RIGHT);
  const py = (y) => HEIGHT - BOTTOM - ((scale(y) - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const chart = frame(options.label ?? lines.map((line) => line.name).join(", "));
  for (const y of ticks(y0, y1)) {
    const value = log ? 10 ** y : y;
    chart.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: py(value), y2: py(value) }), text(LEFT - 6, py(value) + 4, label(value), "end"));
  }
  for (const x of ticks(x0, x1, 6)) chart.append(text(px(x), HEIGHT - BOTTOM + 16, label(x)));
  chart.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, xLabel));
  const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
  for (const line of lines) {
    const smooth = smoothing > 0 && line.smooth !== false;
    if (smooth) chart.append(svg("path", { class: `line faint ${line.style}`, d: path(line.points) }));
    chart.append(svg("path", { class: `line ${line.style}`, d: path(smooth ? smoothed(line.points, smoothing) : line.points) }));
    if (line.points.length === 1) chart.append(svg("circle", { class: `line ${line.style}`, r: 3, cx: px(line.points[0][0]), cy: py(line.points[0][1]) }));
  }
  place.replaceChildren(chart, legend(lines));
}

// Draw bars into `place`. bars: [{label, value, title}].
export function histogram(place, bars, options = {}) {
  if (!bars.length) { place.replaceChildren(empty(options.empty ?? "No values yet.")); return; }
  const most = Math.max(...bars.map((bar) => bar.value), 1);
  const chart = frame(options.label ?? "Histogram");
  const step = (WIDTH - LEFT - RIGHT) / bars.length, height = HEIGHT - TOP - BOTTOM;
  for (const y of ticks(0, most)) {
    const at = HEIGHT - BOTTOM - (y / most) * height;
    chart.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }), text(LEFT - 6, at + 4, label(y), "end"));
  }
  const every = Math.ceil(bars.length / 10);
  bars.forEach((bar, i) => {
    const h = (bar.value / most) * height;
    const box = svg("rect", { class: "bar", x: LEFT + i * step + step * 0.1, width: step * 0.8, y: HEIGHT - BOTTOM - h, height: h });
    const title = svg("title", {});
    title.textContent = bar.title ?? `${bar.label}: ${bar.value}`;
    box.append(title);
    chart.append(box);
    if (i % every === 0) chart.append(text(LEFT + (i + 0.5) * step, HEIGHT - BOTTOM + 16, bar.label));
  });
  place.replaceChildren(chart);
}

function frame(name) {
  const chart = svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": name });
  chart.append(svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
  return chart;
}

function text(x, y, words, anchor = "middle") {
  const made = svg("text", { x, y, "text-anchor": anchor });
  made.textContent = words;
  return made;
}

function legend(lines) {
  const box = document.createElement("div");
  box.className = "legend";
  for (const line of lines) {
    const [entry, mark] = [document.createElement("span"), document.createElement("i")];
    mark.className = line.style;
    const last = line.points[line.points.length - 1][1];
    entry.append(mark, `${line.name} ${+last.toPrecision(4)}`);
    box.append(entry);
  }
  return box;
}

function empty(words) {
  const made = document.createElement("p");
  made.className = "quiet";
  made.textContent = words;
  return made;
}

function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}
