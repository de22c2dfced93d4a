// What all charts share: the data of the page, colors of the theme in use, fonts, and a call when the theme changes.
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const styleOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

window.report = {
  data,
  color: styleOf,
  familyColor: (name) => data.families.find((family) => family.name === name)[dark.matches ? "dark" : "light"],
  onTheme: (draw) => dark.addEventListener("change", draw),
  config: { displayModeBar: false, responsive: true },
  layout: () => ({
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: styleOf("--sans"), size: 12, color: styleOf("--pale") },
    hoverlabel: { bgcolor: styleOf("--ink"), bordercolor: styleOf("--ink"), font: { color: styleOf("--ground"), size: 12 }, align: "left" },
    showlegend: false,
    // a finger on a chart scrolls the page
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
  }),
  escape: (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;"),
};
