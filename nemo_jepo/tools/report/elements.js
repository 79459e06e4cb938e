"use strict";
// What charts and rollouts share: making elements, and writing numbers. Text only ever becomes a text node.

const DATA = JSON.parse(document.getElementById("data").textContent);

/** An HTML element with attributes, and children that are elements or text. */
function element(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
function shape(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function furnish(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Four significant digits, with a true minus sign; a dash for nothing. */
function number(value, digits = 4) {
  if (value === null || value === undefined) return "\u2013";
  return String(Number(value.toPrecision(digits))).replace("-", "\u2212");
}

/** A labelled drop-down list. options: [value, text] pairs. */
function chooser(label, options, onChange) {
  const select = element("select");
  setOptions(select, options);
  select.addEventListener("change", () => onChange(select.value));
  return [element("label", {}, element("span", {}, label), select), select];
}

function setOptions(select, options) {
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
}
