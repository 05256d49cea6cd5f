"use strict";

// Numbers before text, what is missing last whichever way a column is sorted.
function compare(a, b, direction) {
  const missing = (a === "") - (b === "");
  if (missing) return missing;
  const x = Number(a), y = Number(b);
  if (!Number.isNaN(x) && !Number.isNaN(y)) return direction * (x - y);
  return direction * a.localeCompare(b);
}

function sortBy(table, column, header) {
  const numeric = header.classList.contains("number");
  const before = header.getAttribute("aria-sort");
  const first = numeric ? "descending" : "ascending";
  const other = numeric ? "ascending" : "descending";
  const order = before === first ? other : first;
  const direction = order === "ascending" ? 1 : -1;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => [row.cells[column].dataset.key ?? row.cells[column].textContent, row]);
  rows.sort((one, two) => compare(one[0], two[0], direction));
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order);
  body.append(...rows.map((pair) => pair[1]));
}

for (const table of document.querySelectorAll("table")) {
  Array.from(table.tHead.rows[0].cells).forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => sortBy(table, column, header));
  });
}

const root = document.documentElement;
const toggle = document.querySelector(".theme");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
function label() {
  toggle.textContent = isDark() ? "Light" : "Dark";
  toggle.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} colours`);
}
toggle.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  label();
});
prefersDark.addEventListener("change", label);
toggle.hidden = false;
label();
