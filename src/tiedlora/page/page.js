"use strict";
(() => {
  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // A link into a folded part opens it. (Not every browser does so by itself.)
  const reveal = () => {
    const target = location.hash.length > 1 && !location.hash.includes("?") && document.getElementById(location.hash.slice(1));
    if (!target) return;
    let closed = false;
    for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) {
      closed ||= !fold.open;
      fold.open = true;
    }
    if (closed) target.scrollIntoView();
    if (target.tabIndex < 0) target.focus({ preventScroll: true });
  };
  addEventListener("hashchange", reveal);
  reveal();

  // Numbers sort by value, everything else as text, and what is missing comes last either way.
  const key = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const bare = text.replace(/^(\[|[<>] )/, "");
    const number = parseFloat(bare.replace(/,/g, "").replace("−", "-"));
    return { text, number: /^[+\-−]?[\d.]/.test(bare) ? number : NaN, missing: text === "" || text === "–" };
  };
  const compare = (a, b) =>
    Number.isNaN(a.number) || Number.isNaN(b.number) ? a.text.localeCompare(b.text) : a.number - b.number;
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
      rows.sort(([a], [b]) => a.missing - b.missing || (down ? compare(b, a) : compare(a, b)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    }));
  }

  const selects = [...document.querySelectorAll(".filters select")];
  const rows = [...document.querySelectorAll("#results tbody tr")];
  const filter = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = selects.some((s) => s.value && row.cells[s.dataset.column].textContent !== s.value);
      shown += !row.hidden;
    }
    document.getElementById("count").textContent = `${shown} of ${rows.length} rows`;
  };
  if (document.getElementById("count")) {
    selects.forEach((select) => select.addEventListener("change", filter));
    filter();
  }
})();
