// What all figures and panels use to make elements; ui/figure.py puts it into each of them.

function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function element(tag, attributes = {}, ...children) {
  return make(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return make(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

export function headRow(names) {
  return element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
}

// a wide table moves inside of its own box, not the page
export function scrollingTable(label, head, body, attributes = {}) {
  return element(
    "div",
    { class: "bn-scroll", tabindex: "0", role: "region", "aria-label": label },
    element("table", attributes, element("thead", {}, head), body),
  );
}
