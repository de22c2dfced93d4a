// The precision map: the tokens of a prompt, colored by tier for one layer and head, or by the share of several.
const map = window.report.data.map;
if (!map) return;

const { color } = window.report;
const layerMenu = document.getElementById("map-layer");
const headMenu = document.getElementById("map-head");
const text = document.getElementById("map-text");
const tip = document.getElementById("map-tip");
const strip = document.getElementById("map-strip");
const total = map.texts.length;
const numHeads = Math.max(...map.layers.map((layer) => layer.high.length));
const WHY = { sink: "a sink: the first tokens always stay", recent: "recent: the newest tokens always stay", protected: "protected by the configuration" };

function fillMenu(menu, all, count, name) {
  menu.append(new Option(all, ""), ...Array.from({ length: count }, (_, i) => new Option(name(i), String(i))));
}
fillMenu(layerMenu, "all", map.layers.length, (i) => map.layers[i].layer);
fillMenu(headMenu, "all", numHeads, (i) => i);

/** The chosen [layer, head] pairs, as indices into map.layers and its heads. */
function chosen() {
  const pairs = [];
  map.layers.forEach((layer, l) => layer.high.forEach((_, h) => {
    if ((!layerMenu.value || l === Number(layerMenu.value)) && (!headMenu.value || h === Number(headMenu.value))) pairs.push([l, h]);
  }));
  return pairs;
}

function countHigh(pairs) {
  const counts = new Array(total).fill(0);
  for (const [l, h] of pairs) {
    const flags = map.layers[l].high[h];
    for (let i = 0; i < total; i++) counts[i] += flags[i] === "1";
  }
  return counts;
}

const spans = map.texts.map((said, i) => {
  const span = document.createElement("span");
  span.dataset.at = i;
  for (const piece of said.split(/(\n)/)) {
    if (piece === "\n") span.append(Object.assign(document.createElement("i"), { className: "blank", textContent: "↵" }));
    span.append(piece);
  }
  if (!said) span.append("·");
  return span;
});
text.append(...spans);

/** Why a token is never demoted in any of the chosen layers, or "". */
const protection = (i) => (layers.every((layer) => layer.protection[i]) ? layers[0].protection[i] : "");
const low = (layer) => (layer.rest === "dropped" ? "dropped" : `low tier: ${layer.formats.low_k} keys, ${layer.formats.low_v} values`);
const alike = (of) => new Set(layers.map((layer) => JSON.stringify(of(layer)))).size === 1;

let layers, pairs, counts, ranks;
function show() {
  pairs = chosen();
  layers = [...new Set(pairs.map(([l]) => map.layers[l]))];
  counts = countHigh(pairs);
  ranks = null;
  spans.forEach((span, i) => {
    // the root makes visible what few heads keep
    span.style.setProperty("--fill", Math.sqrt(counts[i] / pairs.length));
    span.dataset.tier = protection(i) || "policy";
    span.classList.toggle("gone", counts[i] === 0 && layers.every((layer) => layer.rest === "dropped"));
  });
  if (pairs.length === 1) {
    const [l, h] = pairs[0];
    const order = map.layers[l].priority[h].map((score, i) => [score, i]).sort((a, b) => b[0] - a[0]);
    ranks = new Array(total);
    order.forEach(([, i], rank) => { ranks[i] = rank + 1; });
  }
  drawKey();
}

function drawKey() {
  const one = pairs.length === 1;
  const box = (fill, words) => `<span><i style="background:${fill}"></i>${words}</span>`;
  const mix = (name, share) => `color-mix(in srgb, var(${name}) ${share}%, transparent)`;
  const high = one
    ? box(mix("--high", 100), `high tier: ${layers[0].formats.high}`) + box("transparent", low(layers[0]))
    : box(`linear-gradient(90deg, transparent, ${mix("--high", 15)} 10%, ${mix("--high", 100)})`, `high tier in none … all of ${pairs.length}`);
  document.getElementById("map-key").innerHTML = high + box(mix("--kept", 100), "never demoted: sinks, recent");
}

function lines(i) {
  const said = map.texts[i].replaceAll("\n", "↵");
  const found = [["b", said === "" ? "part of a character" : `“${said}”`], ["div", `position ${i.toLocaleString("en")} of ${total.toLocaleString("en")}`]];
  const high = `high tier in ${counts[i]} of ${pairs.length} layers × heads`;
  if (pairs.length > 1) found.push(["div", high]);
  else {
    const [l, h] = pairs[0];
    found.push(["div", counts[i] ? `high tier: ${layers[0].formats.high}` : low(layers[0])]);
    found.push(["div", `score ${map.layers[l].priority[h][i]}, rank ${ranks[i].toLocaleString("en")}`]);
  }
  if (protection(i)) found.push(["div", WHY[protection(i)]]);
  return found;
}

function point(span) {
  text.querySelector(".at")?.classList.remove("at");
  tip.hidden = !span;
  if (!span) return;
  span.classList.add("at");
  tip.replaceChildren(...lines(Number(span.dataset.at)).map(([tag, words]) => Object.assign(document.createElement(tag), { textContent: words })));
  place();
}

/** Put the tip beside its token, wherever that has been scrolled to. */
function place() {
  const at = text.querySelector(".at")?.getClientRects()[0];
  if (!at) return;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  tip.style.top = `${at.top - height - 8 > 8 ? at.top - height - 8 : at.bottom + 8}px`;
}

/** The share of heads with a token high, a row per layer; 2 stands for tokens that are never demoted. */
function drawStrip() {
  const shares = map.layers.map((layer) => {
    const row = new Array(total).fill(0);
    layer.high.forEach((flags) => { for (let i = 0; i < total; i++) row[i] += (flags[i] === "1") / layer.high.length; });
    return row;
  });
  const rows = shares.map((row, l) => row.map((share, i) => (map.layers[l].protection[i] ? 2 : share)));
  const layout = {
    ...window.report.layout(), dragmode: false, margin: { l: 44, r: 10, t: 6, b: 42 },
    xaxis: { title: { text: "position", standoff: 4 }, showgrid: false, zeroline: false, linecolor: color("--line") },
    yaxis: { title: { text: "layer" }, autorange: "reversed", showgrid: false, zeroline: false, tickvals: map.layers.map((_, l) => l).filter((l) => l % 5 === 0), ticktext: map.layers.map((layer) => layer.layer).filter((_, l) => l % 5 === 0) },
  };
  const trace = {
    type: "heatmap", z: rows, zmin: 0, zmax: 2, showscale: false,
    colorscale: [[0, color("--surface")], [0.5, color("--high")], [0.51, color("--kept")], [1, color("--kept")]],
    hovertext: shares.map((row, l) => row.map((share, i) => `layer ${map.layers[l].layer}, position ${i}: ${window.report.escape(map.texts[i])}<br>high tier in ${Math.round(share * map.layers[l].high.length)} of ${map.layers[l].high.length} heads`)),
    hoverinfo: "text",
  };
  Plotly.react(strip, [trace], layout, window.report.config);
}

function about() {
  const number = (count) => count.toLocaleString("en");
  const kept = layers.map((layer) => [...layer.high[0]].filter((flag) => flag === "1").length);
  const [least, most] = [Math.min(...kept), Math.max(...kept)];
  const where = alike((layer) => layer.formats)
    ? `in ${layers[0].formats.high}, ` + (layers[0].rest === "dropped" ? "the others are dropped" : `the others in ${low(layers[0]).replace("low tier: ", "")}`)
    : "in the high tier, in formats that differ from layer to layer: choose one to see its own";
  return `${number(total)} tokens read by ${map.model.replace(/.*\/(?=.)/, "")}; policy ${layers[0].policy}, ${(100 * map.ratio).toFixed(1)} % of the fp16 bytes. ` +
    `Each head keeps ${least === most ? number(least) : `${number(least)} to ${number(most)}`} tokens ${where}. ` +
    "Point at a token for its score; click a row of the picture to choose its layer.";
}

layerMenu.addEventListener("change", show);
headMenu.addEventListener("change", show);
/** The arrow keys go from token to token. */
function step(event) {
  const direction = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!direction) return;
  event.preventDefault();
  const at = text.querySelector(".at");
  const span = spans[Math.min(total - 1, Math.max(0, at ? Number(at.dataset.at) + direction : 0))];
  span.scrollIntoView({ block: "nearest" });
  point(span);
}

const under = (event) => event.target.closest("[data-at]");
text.addEventListener("pointerover", (event) => event.pointerType === "mouse" && point(under(event)));
text.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null));
text.addEventListener("keydown", step);
text.addEventListener("blur", () => point(null));
document.addEventListener("click", (event) => point(text.contains(event.target) ? under(event) : null)); // fingers
addEventListener("scroll", place, true); // of the page and of the text
show();
document.getElementById("map-about").textContent = about();
drawStrip();
strip.on("plotly_click", (event) => { layerMenu.value = String(event.points[0].y); show(); });
window.report.onTheme(drawStrip);
