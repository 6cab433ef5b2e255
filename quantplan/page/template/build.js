// Elements, and numbers as text. Text is always set as text, never parsed as HTML.

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function byId(id) {
  return document.getElementById(id);
}

function gib(bytes) {
  return `${(bytes / 2 ** 30).toFixed(2)} GiB`;
}

function size(bytes) {
  if (bytes >= 2 ** 30) return gib(bytes);
  if (bytes >= 2 ** 20) return `${(bytes / 2 ** 20).toFixed(2)} MiB`;
  return `${(bytes / 2 ** 10).toFixed(1)} KiB`;
}

function rate(tps) {
  return tps.toFixed(tps >= 100 ? 0 : 1);
}

function loss(nats) {
  return nats === 0 ? "0" : nats.toPrecision(2);
}

// A number may come with its interval or alone.
function middle(estimate) {
  return typeof estimate === "number" ? estimate : estimate.expected;
}

function interval(estimate, text) {
  if (typeof estimate === "number") return "interval not known without the model's tensors";
  return `80 %: ${text(estimate.low)} to ${text(estimate.high)}`;
}

function lastOf(list) {
  return list[list.length - 1];
}
