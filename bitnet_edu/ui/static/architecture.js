// Two blocks side by side; a click on a box opens what it is, its code, its sizes. Below: the X-ray.

import { element, headRow, scrollingTable, svg } from "./dom.js";

function bytes(n) {
  if (n >= 1e9) return `${(n / 1e9).toFixed(2)} GB`;
  return n >= 1e6 ? `${(n / 1e6).toFixed(2)} MB` : `${(n / 1e3).toFixed(1)} kB`;
}

function chapterLink(chapter) {
  const ending = location.pathname.endsWith(".html") ? ".html" : ".ipynb";
  return element("a", { href: `${chapter}${ending}` }, `Chapter ${Number(chapter.slice(0, 2))}`);
}

function details(box, place) {
  place.replaceChildren(element("h4", {}, box.ours), element("p", {}, box.text));
  if (box.sizes.length) {
    const head = ["matrix", "shape [out, in]", "packed, 2 bits", "as bfloat16"];
    const rows = box.sizes.map((s) => [s.name, s.shape, bytes(s.packed), bytes(s.bf16)]);
    const body = element("tbody", {}, ...rows.map((r) => element("tr", {}, ...r.map((c) => element("td", {}, c)))));
    place.append(scrollingTable(`Sizes of ${box.ours}`, headRow(head), body));
  }
  if (box.code) place.append(element("pre", { tabindex: "0" }, element("code", {}, box.code)));
  if (box.chapter) place.append(element("p", {}, "Built in ", chapterLink(box.chapter), "."));
}

function drawing(boxes, onPick) {
  const [width, step, tall] = [520, 42, 30];
  const height = boxes.length * step + 40;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "A standard block and a BitNet block" });
  const columns = { standard: 20, ours: 280 };
  for (const [key, x] of Object.entries(columns)) {
    const title = key === "standard" ? "Standard Transformer block" : "BitNet block";
    picture.append(
      svg("path", { d: `M${x + 110} 24V${height - 6}`, class: "bn-flow" }),
      svg("text", { x: x + 110, y: 16, "text-anchor": "middle", class: "bn-title" }, title),
    );
  }
  boxes.forEach((box, index) => {
    for (const [key, x] of Object.entries(columns)) {
      if (!box[key]) continue;
      const changed = key === "ours" && box.ours !== box.standard;
      const kind = box.ours.startsWith("BitLinear") ? "bn-ternary" : changed ? "bn-changed" : "bn-float";
      const y = 30 + index * step;
      const group = svg(
        "g",
        { class: `bn-box ${key === "ours" ? kind : "bn-float"}`, tabindex: "0", role: "button", "aria-label": `${box[key]}: explain` },
        svg("rect", { x, y, width: 220, height: tall, rx: kind === "bn-ternary" && key === "ours" ? 2 : 15 }),
        svg("text", { x: x + 110, y: y + 20, "text-anchor": "middle" }, box[key]),
      );
      const pick = () => onPick(box, group);
      group.addEventListener("click", pick);
      group.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        pick();
      });
      picture.append(group);
    }
  });
  return picture;
}

const MEASURES = {
  zero_share: ["share of zeros", (v) => `${(100 * v).toFixed(1)}%`],
  entropy_bits: ["entropy, bits a weight", (v) => v.toFixed(3)],
  scale: ["scale", (v) => v.toPrecision(3)],
};

function xrayTable(rows, matrices) {
  const body = element("tbody");
  const picker = element("select", {}, ...Object.entries(MEASURES).map(([k, [label]]) => element("option", { value: k }, label)));
  const draw = () => {
    const [, format] = MEASURES[picker.value];
    const values = rows.map((r) => r[picker.value]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const layers = new Map();
    for (const row of rows) layers.set(row.layer, [...(layers.get(row.layer) ?? []), row]);
    body.replaceChildren(
      ...[...layers].map(([layer, cells]) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, `layer ${layer}`),
          ...cells.map((cell) => {
            const value = cell[picker.value];
            const strength = high > low ? (value - low) / (high - low) : 0;
            return element("td", { style: `background: rgba(0, 114, 178, ${(0.05 + 0.45 * strength).toFixed(3)})` }, format(value));
          }),
        ),
      ),
    );
  };
  picker.addEventListener("change", draw);
  draw();
  return element(
    "div",
    {},
    element("h4", {}, "X-ray of the loaded weights"),
    element("label", {}, "Show ", picker),
    scrollingTable("X-ray of the weights", headRow(["layer", ...matrices]), body),
  );
}

function render({ model, el }) {
  const place = element("div", { class: "bn-details", "aria-live": "polite" });
  const onPick = (box, group) => {
    el.querySelector(".bn-picked")?.classList.remove("bn-picked");
    group.classList.add("bn-picked");
    details(box, place);
  };
  const picture = drawing(model.get("boxes"), onPick);
  place.append(element("p", {}, "Choose a box: what it does, its code, its size in this model."));
  el.append(
    element(
      "div",
      { class: "bn-arch" },
      element("p", {}, `This model: ${model.get("facts")}.`),
      element("div", { class: "bn-two" }, picture, place),
      xrayTable(model.get("xray"), model.get("matrices")),
    ),
  );
}

export default { render };
