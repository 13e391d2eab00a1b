// Point at a byte, or walk to it with the arrow keys, and see which weights it holds.

import { element } from "./dom.js";

const SIGN = { "-1": "−1", 0: "0", 1: "+1" };
const KIND = { "-1": "bn-minus", 0: "bn-zero", 1: "bn-plus" };

function render({ model, el }) {
  const [rows, columns] = [model.get("rows"), model.get("columns")];
  const [codes, layouts] = [model.get("codes"), model.get("layouts")];
  const name = `bn-micro-${Math.random().toString(36).slice(2)}`;
  let layout = layouts[0];
  let chosen = 0;

  const cells = codes.map((code) => element("span", { class: KIND[code] }));
  const matrix = element("div", { class: "bn-grid bn-weights", role: "img" }, ...cells);
  matrix.setAttribute("aria-label", `The weight matrix, ${rows} rows by ${columns} columns`);
  matrix.style.setProperty("--bn-columns", columns);
  cells.forEach((cell, k) => cell.addEventListener("pointerover", () => choose(layout.byteOf[k])));

  const list = element("div", { class: "bn-grid bn-bytes", role: "listbox", tabindex: "0" });
  list.setAttribute("aria-label", "Bytes in the order of the file; move with the arrow keys");
  let options = [];
  const title = element("p", { class: "bn-caption" });
  const readout = element("div", { class: "bn-readout", "aria-live": "polite" });

  function show(next) {
    const weight = layout.byteOf.indexOf(chosen);
    layout = next;
    options = layout.bytes.map((byte, i) => {
      const hex = byte.toString(16).padStart(2, "0");
      const option = element("span", { role: "option", id: `${name}-${i}` }, hex);
      option.addEventListener("pointerover", () => choose(i));
      option.addEventListener("click", () => choose(i));
      return option;
    });
    list.replaceChildren(...options);
    list.style.setProperty("--bn-columns", layout.line);
    title.textContent =
      `${layout.bytes.length} bytes (hexadecimal), ${layout.bits.toFixed(1)} bits a weight`;
    choose(layout.byteOf[weight]);
  }

  function choose(index) {
    chosen = index;
    options.forEach((option, i) => option.setAttribute("aria-selected", i === index));
    list.setAttribute("aria-activedescendant", `${name}-${index}`);
    const inside = layout.byteOf.flatMap((byte, k) => (byte === index ? [k] : []));
    matrix.classList.add("bn-dim");
    cells.forEach((cell, k) => cell.classList.toggle("bn-lit", inside.includes(k)));
    inside.sort((a, b) => layout.place[b] - layout.place[a]); // highest place first, as numbers are written
    const binary = !inside.some((k) => layout.place[k] % 3 === 0);
    const boxes = inside.map((k) => {
      const stored = codes[k] + 1;
      const top = binary ? stored.toString(2).padStart(2, "0") : `${stored} × ${layout.place[k]}`;
      return element(
        "div",
        {},
        element("b", { class: KIND[codes[k]] }, top),
        element("span", {}, `${SIGN[codes[k]]}`),
        element("small", {}, `row ${Math.floor(k / columns)}`),
        element("small", {}, `column ${k % columns}`),
      );
    });
    const byte = layout.bytes[index];
    const text = `Byte ${index} is ${byte}` + (binary ? ", in bits:" : ", in powers of three:");
    readout.replaceChildren(element("p", {}, text), element("div", { class: "bn-boxes" }, ...boxes));
  }

  const steps = { ArrowRight: () => 1, ArrowLeft: () => -1, ArrowDown: () => layout.line, ArrowUp: () => -layout.line };
  list.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    const next = chosen + steps[event.key]();
    if (next >= 0 && next < layout.bytes.length) choose(next);
  });

  const picker = element("fieldset", {}, element("legend", {}, "Layout"));
  layouts.forEach((each, i) => {
    const radio = element("input", { type: "radio", name, ...(i ? {} : { checked: "" }) });
    radio.addEventListener("change", () => show(each));
    picker.append(element("label", {}, radio, ` ${each.name}`));
  });

  const caption = element("p", { class: "bn-caption" }, `Weights, ${rows} × ${columns}`);
  el.append(element("div", { class: "bn-micro" }, picker, caption, matrix, title, list, readout));
  show(layout);
}

export default { render };
