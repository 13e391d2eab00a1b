// The published tables: choose one, sort it, follow a cell to its source; ours beside them.

import { element, headRow, scrollingTable, svg } from "./dom.js";

function link(text, url, title) {
  return element("a", { href: url, title, target: "_blank", rel: "noopener" }, text);
}

// "1.37x" sorts as 1.37, text after all numbers
const rank = (text) => (Number.isNaN(parseFloat(text)) ? Infinity : parseFloat(text));

function publishedTable(table) {
  let rows = [...table.rows];
  let sorted = { column: null, up: true };
  const value = (row, column) => table.cells[`${row}|${column}`] ?? ["", "", ""];
  // a unit that the whole row shares stands once, behind its name
  const unitOf = (row) => {
    const units = new Set(table.columns.map((column) => value(row, column)[1]).filter(Boolean));
    return units.size === 1 ? ` ${[...units][0]}` : "";
  };
  const body = element("tbody");
  const heads = ["", ...table.columns].map((column) => {
    const button = element("button", { type: "button" }, column || "row");
    const head = element("th", { scope: "col" }, button);
    button.addEventListener("click", () => {
      sorted = { column, up: sorted.column === column ? !sorted.up : true };
      const key = (row) => (column ? rank(value(row, column)[0]) : table.rows.indexOf(row));
      rows = [...table.rows].sort((a, b) => (sorted.up ? key(a) - key(b) : key(b) - key(a)) || 0);
      draw();
    });
    return head;
  });
  const draw = () => {
    heads.forEach((head, index) => {
      const active = sorted.column === ["", ...table.columns][index];
      head.setAttribute("aria-sort", active ? (sorted.up ? "ascending" : "descending") : "none");
    });
    body.replaceChildren(
      ...rows.map((row) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, row, element("small", {}, unitOf(row))),
          ...table.columns.map((column) => {
            const [text, unit, status] = value(row, column);
            const title = [table.paper, unit, status].filter(Boolean).join(" · ");
            const ours = /BitNet b1\.58 2B|bitnet\.cpp|latest/.test(column + row);
            return element("td", ours ? { class: "bn-ours" } : {}, text ? link(text, table.url, title) : "");
          }),
        ),
      ),
    );
  };
  draw();
  return scrollingTable(`${table.paper}, ${table.name}`, element("tr", {}, ...heads), body);
}

// score against memory, as in Figure 1 of the 2B4T report
function chart(table) {
  const [memory, score] = table.columns;
  const points = table.rows.map((row) => ({
    row,
    x: Number(table.cells[`${row}|${memory}`][0]),
    y: Number(table.cells[`${row}|${score}`][0]),
  }));
  const [width, height, left, bottom] = [640, 300, 52, 44];
  const x = (v) => left + (v / 6) * (width - left - 120);
  const y = (v) => height - bottom - ((v - 45) / 22) * (height - bottom - 16);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  picture.append(
    svg("title", {}, "Average score of eleven benchmarks against memory without embedding, in GB"),
    svg("path", { d: `M${left} 12V${height - bottom}H${width - 110}`, class: "bn-axis" }),
    svg("text", { x: left + 180, y: height - 6 }, "memory without embedding (GB)"),
    svg("text", { x: -height / 2 - 40, y: 14, transform: "rotate(-90)" }, "mean score (%)"),
  );
  for (const v of [0, 1, 2, 3, 4, 5, 6]) {
    picture.append(svg("text", { x: x(v), y: height - bottom + 18, "text-anchor": "middle" }, String(v)));
  }
  for (const v of [45, 50, 55, 60, 65]) {
    picture.append(svg("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, String(v)));
  }
  for (const point of points) {
    const ours = point.row.startsWith("BitNet");
    const crowded = points.some((p) => p.x > point.x && p.x - point.x < 1 && Math.abs(p.y - point.y) < 1);
    const place = { x: x(point.x) + 9, y: y(point.y) + (crowded ? 18 : 4) };
    picture.append(
      svg("circle", { cx: x(point.x), cy: y(point.y), r: ours ? 7 : 5, class: ours ? "bn-dot-ours" : "bn-dot" }),
      svg("text", ours ? { ...place, class: "bn-strong" } : place, point.row),
    );
  }
  return element("figure", {}, picture, element("figcaption", {}, "Points read off the report's Figure 1."));
}

function plainTable(columns, rows, className = "") {
  const lines = rows.map((row) =>
    element("tr", {}, ...row.map((cell, i) => element(i ? "td" : "th", i ? {} : { scope: "row" }, cell))),
  );
  const body = element("tbody", {}, ...lines);
  return scrollingTable(columns.join(", "), headRow(columns), body, { class: className });
}

function render({ model, el }) {
  const tables = model.get("tables");
  const recomputed = model.get("recomputed");
  const picker = element("select", {});
  for (const paper of new Set(tables.map((t) => t.paper))) {
    const group = element("optgroup", { label: paper });
    tables.forEach((t, i) => t.paper === paper && group.append(element("option", { value: i }, `${paper} · ${t.name}`)));
    picker.append(group);
  }
  const shown = element("div");
  const show = () => {
    const table = tables[picker.value];
    const parts = [publishedTable(table)];
    if (table.name.startsWith("Figure 1: score")) parts.unshift(chart(table));
    shown.replaceChildren(...parts);
  };
  picker.addEventListener("change", show);
  picker.value = "0";
  show();

  const claims = model.get("claims").map((c) => [c.row, c.verdict, c.why]);
  const traps = element("dl", {});
  for (const d of model.get("disagreements")) {
    traps.append(element("dt", {}, d.title), element("dd", {}, d.text));
  }
  el.append(
    element(
      "div",
      { class: "bn-paper" },
      element("label", {}, "Table ", picker),
      shown,
      element("p", { class: "bn-small" }, "Sort by a column's name. Each figure links to its source."),
      element("h4", {}, "Ours beside theirs"),
      plainTable(["Published", "Here", "Why"], claims, "bn-words"),
      element("h4", {}, "Memory and energy, recomputed (an estimate of arithmetic, not a measurement)"),
      plainTable(["Model", ...recomputed.columns], recomputed.rows),
      element("h4", {}, "Where the papers disagree"),
      traps,
    ),
  );
}

export default { render };
