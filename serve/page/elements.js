// What the other scripts make the page's elements with.

/** A share as a percentage. */
export const PERCENT = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });

export const at = (id) => document.getElementById(id);

export function make(tag, content, kind = "") {
  const made = document.createElement(tag);
  made.append(content);
  if (kind) made.className = kind;
  return made;
}

export function terms(entries) {
  return Object.entries(entries).flatMap(([term, value]) => [make("dt", term), make("dd", value)]);
}
