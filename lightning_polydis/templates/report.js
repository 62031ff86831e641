(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("js");

  // Closed details do not print; those that were opened for it close again.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = Array.from(document.querySelectorAll("details:not([open])"));
    opened.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => { opened.forEach((part) => { part.open = false; }); opened = []; });

  const names = document.getElementById("full-names");
  if (names) names.addEventListener("change", () => root.classList.toggle("full-names", names.checked));

  const table = document.getElementById("channels");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const heads = Array.from(table.tHead.rows[0].cells);
  const text = document.getElementById("filter-text");
  const layer = document.getElementById("filter-layer");
  const clear = document.getElementById("filter-clear");
  const status = document.getElementById("shown");

  const announce = (more) => {
    const shown = rows.filter((row) => !row.hidden).length;
    status.textContent = `${shown} of ${rows.length} ${rows.length === 1 ? "channel" : "channels"} shown${more || ""}.`;
  };

  const filter = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      row.hidden = !(words.every((word) => texts.get(row).includes(word))
        && (!layer || !layer.value || row.dataset.layer === layer.value)
        && (!clear || !clear.checked || row.dataset.clear === "yes"));
    }
    announce();
  };
  let waiting;
  text.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
  for (const control of [layer, clear]) if (control) control.addEventListener("change", filter);

  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  const sort = (column, direction) => {
    const numeric = heads[column].classList.contains("number") || heads[column].dataset.numeric !== undefined;
    const keyed = rows.map((row, place) => {
      const value = row.cells[column].dataset.value;
      return [value === "" ? null : numeric ? Number(value) : value, place, row];
    });
    keyed.sort((one, other) => { // what was not measured comes last, whatever the direction
      if (one[0] === null || other[0] === null) return (one[0] === null) - (other[0] === null) || one[1] - other[1];
      return direction * compare(one[0], other[0]) || one[1] - other[1];
    });
    body.append(...keyed.map((entry) => entry[2]));
  };
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      sort(column, direction);
      announce(`, sorted by ${button.textContent.trim()}, ${direction > 0 ? "ascending" : "descending"}`);
    });
  });
  announce();
})();
