"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, n) => {
    const words = row.cells[n].textContent.trim();
    const number = parseFloat(words);
    return Number.isNaN(number) ? words : number;
  };
  heads.forEach((head, n) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
      const compare = (a, b) => typeof a === typeof b ? (a > b ? 1 : a < b ? -1 : 0) : typeof a === "number" ? -1 : 1;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => down * compare(value(a, n), value(b, n)));
      table.tBodies[0].append(...rows);
    });
  });
}
const organ = document.getElementById("curve-organ");
if (organ) {
  organ.closest("p").hidden = false;
  organ.addEventListener("change", () => {
    for (const figure of document.querySelectorAll("[data-curve]"))
      figure.hidden = figure.dataset.curve !== organ.value;
  });
}
document.documentElement.dataset.ready = "true";
