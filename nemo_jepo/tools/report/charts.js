// One chart a metric, one line a run. A chart is a slider over steps; all of them stand on the same step.

const charts = [];
const MARGIN = { left: 50, right: 12, top: 10, bottom: 26 };
const HEIGHT = 190;

/** The points of a run's metric as [step, value], without steps where it was not logged. */
function pointsOf(run, metric) {
  const values = run.metrics[metric] ?? [];
  return values.map((value, index) => [run.steps[index], value]).filter((point) => point[1] !== null);
}

/** Round numbers from low to high, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const found = [];
  for (let index = Math.ceil(low / size - 1e-9); index * size <= high + 1e-9 * size; index++) found.push(index * size);
  return found;
}

class Chart {
  constructor(spec) {
    this.step = null;
    this.title = element("h3");
    this.readout = element("div", { class: "readout" });
    this.svg = shape("svg", { class: "chart", tabindex: 0, role: "slider" });
    this.figure = element("figure", {}, this.title, this.svg, this.readout);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => standOn(null));
    this.svg.addEventListener("blur", () => standOn(null));
    this.svg.addEventListener("keydown", (event) => this.press(event));
    this.show(spec);
  }

  show(spec) {
    this.spec = spec;
    this.series = DATA.runs.map((run) => pointsOf(run, spec.metric));
    this.steps = [...new Set(this.series.flat().map((point) => point[0]))].sort((a, b) => a - b);
    this.title.replaceChildren(spec.title, element("small", {}, spec.unit));
    this.draw();
  }

  /** The axes' ranges in data, and the functions from data to pixels. */
  measure() {
    const values = this.series.flat().map((point) => point[1]);
    let low = this.spec.low ?? Math.min(...values);
    let high = this.spec.high ?? Math.max(...values);
    const isFlat = high - low <= Math.abs(high) * 1e-9;
    const room = (isFlat ? Math.abs(high) || 1 : high - low) * 0.06;
    if (this.spec.low === null) low -= room;
    if (this.spec.high === null) high += room;
    const [first, last] = [this.steps[0], this.steps.at(-1)];
    const width = Math.max(this.svg.clientWidth, 200);
    const span = width - MARGIN.left - MARGIN.right;
    const height = HEIGHT - MARGIN.top - MARGIN.bottom;
    this.x = (step) => MARGIN.left + (last > first ? (span * (step - first)) / (last - first) : span / 2);
    this.y = (value) => MARGIN.top + height * (1 - (value - low) / (high - low || 1));
    return { low, high, first, last, width };
  }

  draw() {
    if (!this.steps.length) return;
    const { low, high, first, last, width } = this.measure();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.cursor = shape("g", { class: "cursor" });
    const lines = this.series.map((points, run) => this.line(points, run));
    this.svg.replaceChildren(...this.axes(low, high, first, last, width), ...lines, this.cursor);
    this.svg.setAttribute("aria-label", `${this.spec.title}, ${this.spec.unit}, over steps`);
    this.svg.setAttribute("aria-valuemin", first);
    this.svg.setAttribute("aria-valuemax", last);
    this.stand(this.step);
  }

  axes(low, high, first, last, width) {
    const parts = [];
    for (const value of ticks(low, high, 4)) {
      const y = this.y(value);
      parts.push(shape("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }));
      parts.push(shape("text", { class: "tick", x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, number(value)));
    }
    const steps = last > first ? ticks(first, last, 5).filter(Number.isInteger) : [first];
    for (const step of steps) {
      const place = { class: "tick", x: this.x(step), y: HEIGHT - 8, "text-anchor": "middle" };
      parts.push(shape("text", place, String(step)));
    }
    return parts;
  }

  line(points, run) {
    const path = points.map(([step, value]) => `${this.x(step).toFixed(1)},${this.y(value).toFixed(1)}`).join("L");
    const group = shape("g", { class: `line run-${run % 8}` });
    if (points.length) group.append(shape("path", { d: `M${path}` }));
    if (points.length <= 30) {
      group.append(...points.map(([step, value]) => shape("circle", { cx: this.x(step), cy: this.y(value), r: 2.5 })));
    }
    return group;
  }

  /** Show the values at the last step up to `step` that this chart has; those of the end for null. */
  stand(step) {
    this.step = step;
    const at = this.steps.findLast((known) => step === null || known <= step) ?? this.steps[0];
    const values = this.series.map((points) => points.findLast((point) => point[0] <= at) ?? null);
    this.cursor.replaceChildren();
    if (step !== null) {
      const ends = { y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom };
      this.cursor.append(shape("line", { x1: this.x(at), x2: this.x(at), ...ends }));
      values.forEach((point, run) => {
        if (point === null) return;
        const place = { cx: this.x(point[0]), cy: this.y(point[1]), r: 4 };
        this.cursor.append(shape("g", { class: `line run-${run % 8}` }, shape("circle", place)));
      });
    }
    const entries = values.map((point, run) => (point === null ? null : this.entry(run, point[1])));
    this.readout.replaceChildren(element("span", { class: "step" }, `step ${at}`), ...entries.filter(Boolean));
    this.svg.setAttribute("aria-valuenow", at);
    this.svg.setAttribute("aria-valuetext", [...this.readout.children].map((part) => part.textContent).join(", "));
  }

  entry(run, value) {
    const swatch = element("i", { class: `swatch run-${run % 8}` });
    return element("span", {}, swatch, DATA.runs[run].name, " ", element("b", {}, number(value)));
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.svg.viewBox.baseVal.width;
    const distance = (step) => Math.abs(this.x(step) - x);
    standOn(this.steps.reduce((best, step) => (distance(step) < distance(best) ? step : best)));
  }

  press(event) {
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const now = this.steps.indexOf(Number(this.svg.getAttribute("aria-valuenow")));
    standOn(this.steps[Math.min(Math.max(now + moves[event.key], 0), this.steps.length - 1)]);
  }
}

function standOn(step) {
  charts.forEach((chart) => chart.stand(step));
}

function drawCharts() {
  const place = document.getElementById("charts");
  if (!place) return;
  const shown = DATA.charts.filter((spec) => DATA.runs.some((run) => pointsOf(run, spec.metric).length));
  charts.push(...shown.map((spec) => new Chart(spec)));
  place.append(...charts.map((chart) => chart.figure));
  addFreeChart(place);
  new ResizeObserver(() => charts.forEach((chart) => chart.draw())).observe(place);
}

/** The last chart shows whichever metric is chosen. */
function addFreeChart(place) {
  const names = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.metrics)))].sort();
  const metrics = names.filter((name) => DATA.runs.some((run) => pointsOf(run, name).length));
  if (!metrics.length) return;
  const spec = (metric) => ({ title: "", unit: "", metric, low: null, high: null });
  const chosen = metrics.includes("train_optim/grad_norm") ? "train_optim/grad_norm" : metrics[0];
  const chart = new Chart(spec(chosen));
  const options = metrics.map((name) => [name, name]);
  const [label, select] = chooser("Any metric", options, (metric) => chart.show(spec(metric)));
  select.value = chosen;
  chart.title.replaceWith(label);
  charts.push(chart);
  place.append(chart.figure);
}

drawCharts();
