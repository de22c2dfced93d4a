// Size against quality: a chart of score and one of KL per model, for the chosen task and the families that are on.
const { data, color, familyColor, escape } = window.report;
const SHARES = [0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.33, 0.5, 0.75, 1, 1.5, 2];
const LEAST_KL = 1e-6; // a logarithmic axis has no 0
const menu = document.getElementById("curve-task");
const chips = [...document.querySelectorAll(".chip")];

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const height = (point, value) => (value === "kl" && point.kl !== null ? Math.max(point.kl, LEAST_KL) : point[value]);

function about(point) {
  const lines = [`<b>${escape(point.cache)}</b>`];
  lines.push(`${(100 * point.ratio).toFixed(1)} % of fp16, ${Math.round(point.bytes_per_token).toLocaleString("en")} bytes per token`);
  if (point.score !== null) {
    const error = point.score_stderr === null ? "" : ` ± ${point.score_stderr.toFixed(3)}`;
    lines.push(`score ${point.score.toFixed(3)}${error}`);
  }
  if (point.kl !== null) {
    const error = point.kl_stderr === null ? "" : ` ± ${point.kl_stderr.toPrecision(2)}`;
    lines.push(`KL ${point.kl.toPrecision(2)}${error}`);
  }
  return lines.join("<br>");
}

const pointsOf = (view, value) => view.points.filter((point) => point[value] !== null);

function front(view, value) {
  const points = pointsOf(view, value).filter((point) => view.fronts[value].includes(point.cache));
  return {
    x: points.map((point) => point.ratio), y: points.map((point) => height(point, value)),
    mode: "lines", line: { color: color("--pale"), width: 1.2, dash: "dot", shape: "hv" }, hoverinfo: "skip",
  };
}

/** ± the standard error; a logarithmic axis has no 0, so a bar ends above it. */
function errorBars(points, value, barColor) {
  const errors = points.map((point) => point[`${value}_stderr`] ?? 0);
  const down = errors.map((error, i) => (value === "kl" ? Math.min(error, 0.9 * height(points[i], value)) : error));
  return { type: "data", symmetric: false, array: errors, arrayminus: down, thickness: 1, width: 0, color: barColor };
}

function familyTrace(family, view, value) {
  const points = pointsOf(view, value).filter((point) => point.family === family);
  const ours = family === "mikv";
  // of other settings than a preset's the name is too long
  const named = points.map((point) => ours && !point.cache.includes("+") && view.fronts[value].includes(point.cache));
  return {
    x: points.map((point) => point.ratio), y: points.map((point) => height(point, value)),
    hovertext: points.map(about), hoverinfo: "text",
    mode: "markers+text", text: points.map((point, i) => (named[i] ? escape(point.cache.replace("mikv:", "")) : "")),
    // of a point on the front this side is empty
    textposition: value === "kl" ? "bottom left" : "top left",
    textfont: { color: familyColor(family), size: 11 },
    error_y: errorBars(points, value, familyColor(family)),
    marker: { symbol: points.map((point) => point.symbol), size: ours ? 11 : 9, color: familyColor(family), opacity: 0.92, line: { width: 1, color: color("--surface") } },
    cliponaxis: false,
  };
}

/** The full cache's score as a line, with its number in the caption. */
function fullCache(node, view, value) {
  const known = value === "score" && view.full_score !== null;
  node.closest("figure").querySelector(".reference").textContent = known ? `full cache ${view.full_score.toFixed(3)}` : "";
  const line = { type: "line", xref: "paper", x0: 0, x1: 1, y0: view.full_score, y1: view.full_score };
  return { shapes: known ? [{ ...line, line: { color: color("--ink"), width: 1, dash: "dash" }, layer: "below" }] : [] };
}

function draw(node) {
  const { model, value } = node.dataset;
  const view = data.curves[model].tasks[menu.value];
  const families = chips.filter((chip) => chip.getAttribute("aria-pressed") === "true").map((chip) => chip.dataset.family);
  const axis = { gridcolor: color("--line"), linecolor: color("--line"), zeroline: false, automargin: true };
  const ratios = pointsOf(view, value).map((point) => point.ratio);
  // a task without such numbers has no chart
  node.closest("figure").hidden = ratios.length === 0;
  if (!ratios.length) return;
  node.closest("figure").querySelector(".extent").textContent = view.extents[value];
  const layout = {
    ...window.report.layout(),
    margin: { l: 44, r: 16, t: 12, b: 44 },
    xaxis: {
      ...axis, type: "log", title: { text: "bytes, share of fp16" }, tickvals: SHARES, ticktext: SHARES.map(percent),
      range: [Math.log10(Math.min(...ratios) * 0.8), Math.log10(Math.max(...ratios) * 1.12)],
    },
    yaxis: value === "kl" ? { ...axis, type: "log", exponentformat: "none", dtick: 1 } : { ...axis, rangemode: "normal" },
    ...fullCache(node, view, value),
  };
  const traces = families.map((family) => familyTrace(family, view, value));
  Plotly.react(node, [front(view, value), ...traces], layout, window.report.config);
}

const drawAll = () => document.querySelectorAll(".chart").forEach(draw);
menu.addEventListener("change", drawAll);
for (const chip of chips) {
  chip.addEventListener("click", () => {
    chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
    drawAll();
  });
}
window.report.onTheme(drawAll);
drawAll();
