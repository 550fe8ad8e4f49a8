// A report's page: tables that sort, figures drawn when they come into view, one sound at a time.
"use strict";

for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  const inOrder = [...body.rows];
  for (const button of table.tHead.querySelectorAll("button")) {
    button.addEventListener("click", () => sort(table, body, inOrder, button.closest("th")));
  }
}

// Ascending, descending, and back to the sweep's own order.
function sort(table, body, inOrder, head) {
  const next = { none: "ascending", ascending: "descending", descending: "none" };
  const way = next[head.getAttribute("aria-sort")];
  for (const other of table.tHead.querySelectorAll("[aria-sort]")) {
    other.setAttribute("aria-sort", "none");
  }
  head.setAttribute("aria-sort", way);
  const place = head.cellIndex;
  const sign = way === "descending" ? -1 : 1;
  const value = head.classList.contains("number") ? number : words;
  const rows = way === "none" ? inOrder : [...inOrder].sort((a, b) => {
    const [x, y] = [value(a.cells[place]), value(b.cells[place])];
    if (x === null || y === null) return (x === null) - (y === null); // what is unknown stays last
    return sign * (value === number ? x - y : x.localeCompare(y, "en", { numeric: true }));
  });
  body.append(...rows);
}

function number(cell) {
  return cell.dataset.sort === undefined ? null : Number(cell.dataset.sort);
}

function words(cell) {
  const text = cell.textContent.trim();
  return text === "" || text === "-" ? null : text;
}

document.addEventListener("play", (event) => {
  for (const audio of document.querySelectorAll("audio")) {
    if (audio !== event.target) audio.pause();
  }
}, true);

function draw(element) {
  if (element.dataset.drawn) return;
  element.dataset.drawn = "yes";
  const figure = JSON.parse(document.getElementById(element.dataset.figure).textContent);
  figure.layout.autosize = true;
  const config = { responsive: true, displayModeBar: false };
  Plotly.newPlot(element, figure.data, figure.layout, config);
}

const plots = [...document.querySelectorAll(".plot")];
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  }
}, { rootMargin: "300px" });
plots.forEach((plot) => seen.observe(plot));
window.addEventListener("beforeprint", () => plots.forEach(draw));
