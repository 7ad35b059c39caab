// Shows what a score depends on: tables with bars, and what the numbers are.

import { at, make, PERCENT, terms } from "./elements.js";

const WAVES = { P: "P", QRS: "QRS", ST: "ST, from QRS to T", T: "T", rest: "Between the waves" };
const BASELINES = {
  zero: "no signal",
  "mean-beat": "the mean beat of other recordings",
  expected: "other recordings",
};

/** Fills the section with an explanation of `/v1/explain`. */
export function showExplanation({ baseline, leads, waves, cells, notes, windows }) {
  const largest = Math.max(...Object.values({ ...leads, ...waves }).map(({ signed }) => Math.abs(signed)), 1e-9);
  at("explained-leads").replaceChildren(
    ...Object.entries(leads).map(([lead, share]) => row(lead, share, largest, [change(share.drop)])),
  );
  at("explained-waves-table").hidden = !waves;
  const beats = windows.reduce((total, window) => total + window.beats, 0);
  at("explained-waves").replaceChildren(
    ...Object.entries(waves ?? {}).map(([wave, share]) => row(WAVES[wave], share, largest, [found(wave, windows, beats)])),
  );
  showCells(cells);
  at("explained-notes").replaceChildren(...notes.map((note) => make("li", note)));
  const mean = (name) => windows.reduce((total, window) => total + window[name], 0) / windows.length;
  at("explained-facts").replaceChildren(
    ...terms({
      Method: "integrated gradients; “without it” is measured by leaving the lead out",
      "Compared with": BASELINES[baseline] ?? baseline,
      "Logit of the score": `${mean("logit").toFixed(3)}; ${mean("baseline_logit").toFixed(3)} for ${BASELINES[baseline] ?? baseline}`,
      "Not accounted for": `${Math.abs(mean("delta")).toFixed(4)} of the logit, after ${Math.max(...windows.map(({ steps }) => steps))} steps`,
      Windows: `${windows.length}, with ${beats} beats`,
    }),
  );
}

function row(name, { signed, absolute }, largest, rest) {
  const head = make("th", name);
  head.scope = "row";
  const made = make("tr", head);
  const value = make("td", bar(signed / largest), "signed");
  value.append(make("span", percent(signed)));
  made.append(value, ...[PERCENT.format(absolute), ...rest].map((cell) => make("td", cell)));
  return made;
}

/** To the right and filled where it raises the score, to the left and hollow where it lowers it. */
function bar(share) {
  const made = make("span", "", "bar");
  made.setAttribute("aria-hidden", "true");
  const part = make("span", "", share < 0 ? "lowers" : "raises");
  part.style.width = `${50 * Math.abs(share)}%`;
  made.append(part);
  return made;
}

function showCells(cells) {
  at("explained-cells-table").hidden = !cells;
  at("explained-cells").replaceChildren(
    ...Object.entries(cells ?? {}).map(([lead, of]) => {
      const head = make("th", lead);
      head.scope = "row";
      const made = make("tr", head);
      made.append(...Object.keys(WAVES).map((wave) => make("td", percent(of[wave].signed))));
      return made;
    }),
  );
}

/** "9 of 10 beats": in how many the wave was found. */
function found(wave, windows, beats) {
  if (!windows.some(({ waves }) => waves[wave])) return "–";
  const missed = windows.reduce((total, { failures }) => total + (failures[wave] ?? 0), 0);
  return `${beats - missed} of ${beats} beats`;
}

/** What leaving a lead out does to the logit. */
function change(drop) {
  return drop === null ? "cannot be left out" : sign(-drop, Math.abs(drop).toFixed(3));
}

function percent(share) {
  return sign(share, PERCENT.format(Math.abs(share)));
}

function sign(value, size) {
  if (!/[1-9]/.test(size)) return size;
  return `${value < 0 ? "−" : "+"}${size}`;
}
