// Makes elements and texts of the page. All text goes in with textContent: what the data say is never markup.

export const at = (id) => document.getElementById(id);

export function make(name, text, attributes = {}, ...children) {
  const element = document.createElement(name);
  if (text !== null && text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") element.addEventListener("click", value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

export function fact(name, value) { return make("div", null, {}, make("dt", name), make("dd", value)); }

export function quiet(text) { return make("p", text, { class: "quiet" }); }

export function fold(title, ...children) { return make("details", null, {}, make("summary", title), ...children); }

export const decimals = (value, num = 3) => value.toFixed(num).replace("-", "−");
export const signed = (value) => (value > 0 ? "+" : "") + decimals(value);
export const count = (number, one) => `${number.toLocaleString("en")} ${one}${number === 1 ? "" : "s"}`;

export function words(found, title) {
  const parts = [];
  if (found.text !== null) parts.push(make("p", "The language model wrote:", { class: "quiet" }), make("pre", found.text));
  if (found.prompt !== null) parts.push(make("p", "It had read:", { class: "quiet" }), make("pre", found.prompt));
  if (found.reason) parts.push(quiet(`Absent: ${found.reason}.`));
  return fold(title, ...parts);
}
