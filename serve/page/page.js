// The page: sends recordings to this service and shows its answers. It stores nothing and sends nothing elsewhere.

import { at, make, PERCENT, terms } from "./elements.js";
import { showExplanation } from "./explanation.js";
import { drawPaper, layouts, LEADS, MM_PER_MV, MOST_MM, PAGE_S, seconds } from "./paper.js";

const MAIN_FILE = /\.(hea|xml|dcm|scp|atc|npy|csv|json)$/i;
const UNREACHED =
  "The service does not answer. Is it running, and is the network up? A file that is too large can have this effect too.";
const NO_TOKEN = "This service asks for an access token. Enter it in the field “Access token” above.";
const WRONG_TOKEN =
  "This service does not accept that access token. Check it, and enter it again in the field “Access token” above.";

let items = []; // {name, simulated, result, files, alone, explaining, explanation}, one for each recording
let shown = null; // the item on display
let page = 0; // which ten seconds of it
let running = new AbortController();
let asking = new AbortController(); // for an explanation
let flagMeanings = {};

at("files").addEventListener("change", () => send([...at("files").files]));
at("example").addEventListener("click", sendExample);
at("token").addEventListener("change", describeService);
at("layout").addEventListener("change", () => draw());
at("size").addEventListener("change", resize);
at("earlier").addEventListener("click", () => turn(-1));
at("later").addEventListener("click", () => turn(1));
at("explain").addEventListener("click", explain);
at("stop").addEventListener("click", () => asking.abort());
at("band").addEventListener("change", () => draw());
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // else the browser would open the file
    at("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) send([...event.dataTransfer.files]);
  });
}

// --- asking the service ---------------------------------------------------------------------------------------

class Answered extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The JSON of an answer: of a successful one, or of any with `results`. Otherwise throws what the service says. */
async function ask(path, options = {}) {
  const token = at("token").value.trim();
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Answered(UNREACHED, 0);
  }
  const text = await answer.text();
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // not JSON, such as a proxy's own page: its beginning is shown below
  }
  if (body !== null && (answer.ok || Array.isArray(body.results))) return body;
  if (answer.status === 401) throw new Answered(token ? WRONG_TOKEN : NO_TOKEN, 401);
  const wait = answer.headers.get("Retry-After");
  throw new Answered(
    `${says(body) ?? text.slice(0, 300)} (HTTP ${answer.status})${wait ? ` Try again in ${wait} s.` : ""}`,
    answer.status,
  );
}

/** The service's own words. */
function says(body) {
  const detail = body?.detail;
  if (typeof detail === "string") return detail;
  if (Array.isArray(detail)) return detail.map((entry) => `${(entry.loc ?? []).join(".")}: ${entry.msg}`).join("; ");
  return detail?.reason ?? detail?.message ?? null;
}

/** Shows which models are served. Returns null, or the error that prevents scoring now. */
async function describeService() {
  try {
    const models = await ask("v1/models");
    const named = models.map(
      (model) =>
        `${model.name}${model.version === null ? "" : ` version ${model.version}`} (${model.leads.length} leads)`,
    );
    at("served").textContent = named.length
      ? `This service holds: ${named.join(", ")}.`
      : "This service holds no model yet.";
    showCards(models);
    return null;
  } catch (error) {
    at("served").textContent = error.message;
    at("cards").replaceChildren();
    return error;
  }
}

/** The cards of the models that have one, folded. A card is text: nothing in it is read as HTML. */
function showCards(models) {
  const open = new Set([...at("cards").querySelectorAll("details[open] summary")].map((summary) => summary.textContent));
  at("cards").replaceChildren(
    ...models
      .filter((model) => model.card)
      .map((model) => {
        const title = `Model card of ${modelName(model)}`;
        const folded = make("details", make("summary", title));
        folded.append(make("pre", model.card, "card"));
        folded.open = open.has(title);
        return folded;
      }),
  );
}

async function sendExample() {
  complain();
  at("status").textContent = "Fetching the simulated recording …";
  try {
    const answer = await fetch("page/example.csv");
    if (!answer.ok) throw new Answered(`The simulated recording cannot be fetched (HTTP ${answer.status}).`, answer.status);
    await send([new File([await answer.blob()], "simulated.csv")], true);
  } catch (error) {
    complain(error instanceof Answered ? error.message : UNREACHED);
    at("status").textContent = "Nothing was scored.";
  }
}

/** Files of one name are one recording. WFDB headers alone are sent together with the files of no other recording. */
function group(files) {
  const byStem = new Map();
  for (const file of files) {
    const stem = file.name.replace(/\.[^.]*$/, "");
    byStem.set(stem, [...(byStem.get(stem) ?? []), file]);
  }
  const groups = [...byStem].map(([name, members]) => ({ name, members }));
  const headers = groups.filter(({ members }) => members.length === 1 && /\.hea$/i.test(members[0].name));
  const rest = groups.filter(({ members }) => !members.some((file) => MAIN_FILE.test(file.name)));
  if (!headers.length || !rest.length) return groups;
  const together = {
    name: headers.map(({ name }) => name).join(", "),
    members: [...headers, ...rest].flatMap(({ members }) => members),
  };
  return [...groups.filter((one) => !headers.includes(one) && !rest.includes(one)), together];
}

async function send(files, simulated = false) {
  running.abort();
  asking.abort();
  const { signal } = (running = new AbortController());
  items = [];
  shown = null;
  at("result").hidden = at("recordings").hidden = true;
  complain();
  at("status").textContent = "Asking the service …";
  // Asked first: a service that refuses an upload may close the connection while it is sent, and its answer is lost.
  const closed = await describeService();
  if (signal.aborted) return;
  if (closed) {
    complain(closed.message);
    at("status").textContent = "Nothing was scored.";
    return;
  }
  const groups = group(files);
  for (const [position, { name, members }] of groups.entries()) {
    at("status").textContent =
      groups.length > 1 ? `Scoring ${position + 1} of ${groups.length}: ${name} …` : `Scoring ${name} …`;
    const form = new FormData();
    for (const file of members) form.append("files", file, file.name);
    try {
      const { results } = await ask("v1/score/file?signal=true", { method: "POST", body: form, signal });
      const alone = results.length === 1;
      for (const result of results) items.push({ name: result.id || name, simulated, result, files: members, alone });
      list();
      if (!shown && items.length) show(items[0]);
    } catch (error) {
      if (error.name === "AbortError") return; // other recordings have been chosen meanwhile
      complain(`${name}: ${error.message}`);
    }
  }
  const refused = items.filter(({ result }) => result.refused).length;
  at("status").textContent = items.length
    ? `${items.length - refused} scored, ${refused} refused.`
    : "Nothing was scored.";
  at("files").value = ""; // so that the same file can be chosen again
}

function complain(message = null) {
  if (message === null) at("error").replaceChildren();
  else at("error").append(make("p", message));
}

// --- showing answers ------------------------------------------------------------------------------------------

function list() {
  at("recordings").hidden = items.length < 2;
  at("recordings-rows").replaceChildren(
    ...items.map((item) => {
      const { result } = item;
      const button = make("button", item.name);
      button.type = "button";
      button.addEventListener("click", () => {
        show(item);
        at("result-heading").focus();
      });
      if (item === shown) button.setAttribute("aria-current", "true");
      const head = make("th", button);
      head.scope = "row";
      const row = make("tr", head);
      const model = result.model ? modelName(result.model) : "–";
      const cells = result.refused
        ? [model, make("span", `Refused: ${result.refused.reason}`)]
        : [
            model,
            number(result.score),
            result.probability == null ? "not calibrated" : PERCENT.format(result.probability),
            result.decision ? "at or above" : "below",
            result.reliability?.level ?? "–",
          ];
      row.append(...cells.map((cell) => make("td", cell)));
      if (result.refused) row.lastChild.colSpan = 4;
      return row;
    }),
  );
}

function show(item) {
  if (item !== shown) asking.abort();
  shown = item;
  page = 0;
  list();
  const { result } = item;
  const { model, refused, record } = result;
  at("result").hidden = false;
  at("result-heading").textContent = item.name;
  at("simulated").hidden = !item.simulated;
  at("refused").hidden = !refused;
  at("refused").replaceChildren(
    ...(refused ? [make("strong", "Refused, no score: "), `${refused.reason} (${refused.code})`] : []),
  );
  at("answer").hidden = Boolean(refused);
  if (!refused) showAnswer(result);
  at("details").hidden = !model && !record; // the recording could not be read
  showLeads(result);
  showFlags(result.flags ?? []);
  at("model").replaceChildren(
    ...(model
      ? terms({
          Name: model.name,
          Version: model.version ?? "none: loaded from a folder",
          "Looks for": model.task,
          Leads: model.leads.join(", "),
          Threshold: number(model.threshold),
          Digest: make("code", model.digest),
          "Preprocessing digest": make("code", model.preprocess_digest),
        })
      : terms({ Name: "none: no model could take this recording" })),
  );
  offerExplanation();
  at("paper-section").hidden = !record;
  if (record) {
    at("layout").replaceChildren(
      ...layouts(record).map(([value, label]) => Object.assign(make("option", label), { value })),
    );
    draw();
  }
}

function showAnswer({ score, probability, decision, reliability, model }) {
  at("score").textContent = number(score);
  at("score-meaning").textContent =
    `From 0 to 1; higher means more signs of “${model.task}”. A score is not a probability.`;
  const mark = make("span", "", "mark");
  const threshold = make("span", "", "threshold");
  mark.style.left = `${100 * score}%`;
  threshold.style.left = `${100 * model.threshold}%`;
  const scale = make("div", "", "scale");
  scale.setAttribute("role", "img");
  scale.setAttribute(
    "aria-label",
    `Score ${number(score)} on a scale from 0 to 1, threshold ${number(model.threshold)}`,
  );
  scale.append(threshold, mark);
  at("scale").replaceChildren(scale);
  at("decision").textContent = decision ? "At or above the threshold" : "Below the threshold";
  at("decision-meaning").textContent =
    `The model’s threshold is ${number(model.threshold)}: at or above it, a recording counts as positive for “${model.task}”. This is not a diagnosis.`;
  at("probability").textContent = probability == null ? "Not calibrated" : PERCENT.format(probability);
  at("probability-meaning").textContent =
    probability == null
      ? "This model was stored without a calibration, so there is no probability."
      : `Of 100 recordings of the training cohort with this score, about ${Math.round(100 * probability)} had “${model.task}”. Where “${model.task}” is rarer or more common, this number does not hold.`;
  const words = { good: "Good", limited: "Limited" };
  at("reliability").textContent = words[reliability?.level] ?? "Not stated";
  at("reliability-reasons").replaceChildren(...(reliability?.reasons ?? []).map((reason) => make("li", reason)));
}

function showLeads({ leads_used = [], leads_derived = [], model, record, refused }) {
  const derived = record?.derived ?? leads_derived;
  const named = (leads, none) => (leads.length ? leads.join(", ") : none);
  at("leads-used").textContent = refused ? "none: there is no score" : named(leads_used, "none");
  at("leads-derived").textContent = derived.length
    ? `${derived.join(", ")}: computed from I and II, not recorded`
    : "none";
  const missing = record?.missing ?? (model?.leads ?? []).filter((lead) => !leads_used.includes(lead));
  const unused = refused
    ? []
    : (model?.leads ?? []).filter((lead) => !leads_used.includes(lead) && !missing.includes(lead));
  const asked = !missing.length || !model || missing.some((lead) => model.leads.includes(lead));
  at("leads-missing").textContent = `${named(missing, "none")}${asked ? "" : ": this model does not take them"}`;
  at("leads-unused").textContent = named(unused, "none");
  at("leads-table").hidden = !record;
  at("leads-rows").replaceChildren(
    ...(record ? LEADS : []).map((lead) => {
      const row_mv = record.leads[lead];
      const head = make("th", lead);
      head.scope = "row";
      const row = make("tr", head);
      const there = (row_mv ?? []).filter((value) => value !== null);
      const range = there.length
        ? [there.reduce((a, b) => Math.min(a, b)), there.reduce((a, b) => Math.max(a, b))].map((value) =>
            value.toFixed(3),
          )
        : ["–", "–"];
      const origin = !row_mv ? "missing" : derived.includes(lead) ? "derived" : "measured";
      const cells = [
        origin,
        ...range,
        row_mv ? String(row_mv.length - there.length) : "–",
        leads_used.includes(lead) ? "yes" : "no",
      ];
      row.append(...cells.map((cell) => make("td", cell)));
      return row;
    }),
  );
}

/** Flags of one kind in one line with what the kind means: "wander" for "wander:V1" and "wander:V2". */
function showFlags(flags) {
  const byKind = new Map();
  for (const flag of flags) {
    const [kind, ...rest] = flag in flagMeanings ? [flag] : flag.split(":");
    byKind.set(kind, [...(byKind.get(kind) ?? []), ...rest]);
  }
  const lines = [...byKind].map(([kind, details]) => {
    const line = make("li", make("strong", kind));
    line.append(`${details.length ? ` (${details.join(", ")})` : ""}: ${flagMeanings[kind] ?? "no description"}`);
    return line;
  });
  at("flags").replaceChildren(...(lines.length ? lines : [make("li", "None.")]));
}

// --- the explanation ------------------------------------------------------------------------------------------

/** The explanation of the recording on display, or the button that asks for it. */
function offerExplanation() {
  const { explanation, explaining, result } = shown;
  at("explain-about").textContent = result.refused
    ? "There is no score to explain."
    : "Which leads and waves this score depends on. It is computed when you ask for it, which takes seconds to a minute.";
  at("explain").hidden = Boolean(result.refused || explanation || explaining);
  at("stop").hidden = !explaining;
  at("explain-status").textContent = explaining
    ? "Explaining the score. You can go on reading; another recording ends it."
    : "";
  at("explain-error").replaceChildren();
  at("explained").hidden = at("band-choice").hidden = !explanation;
  if (explanation) showExplanation(explanation);
}

async function explain() {
  const item = shown;
  const { signal } = (asking = new AbortController());
  item.explaining = true;
  offerExplanation();
  at("stop").focus();
  const began = Date.now();
  const clock = setInterval(() => {
    at("clock").textContent = `${Math.round((Date.now() - began) / 1000)} s`;
  }, 1000);
  let said = "The score is explained below.";
  let error = null;
  try {
    const form = new FormData();
    for (const file of await filesOf(item)) form.append("files", file, file.name);
    const body = await ask("v1/explain/file", { method: "POST", body: form, signal });
    const [{ explanation, refused }] = body.results;
    if (refused) throw new Answered(refused.reason, 422);
    item.explanation = explanation;
  } catch (caught) {
    said = caught.name === "AbortError" ? "Stopped." : "The score was not explained.";
    if (caught.name !== "AbortError") error = caught.message;
  } finally {
    clearInterval(clock);
    item.explaining = false;
  }
  at("clock").textContent = "";
  if (shown !== item) return; // another recording is on display
  offerExplanation();
  at("explain-status").textContent = said;
  if (error) at("explain-error").append(make("p", error));
  if (item.explanation) {
    draw();
    at("explanation-heading").focus();
  } else {
    at("explain").focus();
  }
}

/** The files of one recording: of several that were sent together, its main file and those that it names. */
async function filesOf({ name, files, alone }) {
  const main = files.find((file) => file.name === name);
  if (alone || !main) return files;
  const text = await main.text();
  return files.filter((file) => file === main || text.includes(file.name));
}

// --- the paper ------------------------------------------------------------------------------------------------

function draw() {
  const { record } = shown.result;
  const attributed = at("band").checked ? shown.explanation?.windows : null;
  const length_s = seconds(record);
  const pages = Math.max(1, Math.ceil(length_s / PAGE_S - 0.01)); // a few samples more make no page
  const start_s = page === 0 ? 0 : Math.min(page * PAGE_S, length_s - PAGE_S);
  const there = LEADS.filter((lead) => record.leads[lead]);
  const label = `ECG of ${shown.name}${shown.simulated ? " (simulated)" : ""}: leads ${there.join(", ")}, from ${start_s.toFixed(0)} s, 25 mm/s and 10 mm/mV${attributed ? ", each with the attribution below it; the section Explanation has tables" : ""}. The section Leads has a table.`;
  const { svg, cut } = drawPaper(record, { layout: at("layout").value, start_s, label, attributed });
  at("paper").replaceChildren(svg);
  resize();
  at("pages").hidden = pages === 1;
  at("span").textContent =
    `${start_s.toFixed(0)}–${Math.min(length_s, start_s + PAGE_S).toFixed(0)} s of ${length_s.toFixed(0)} s`;
  at("earlier").disabled = page === 0;
  at("later").disabled = page === pages - 1;
  const notes = ["As recorded, not filtered; each lead is drawn around its median."];
  if (record.derived.length) notes.push(`${record.derived.join(", ")}: derived from I and II.`);
  if (record.missing.length) notes.push(`${record.missing.join(", ")}: not recorded.`);
  if (cut.length) notes.push(`${cut.join(", ")}: beyond the paper, cut off here at ${MOST_MM / MM_PER_MV} mV.`);
  if (attributed)
    notes.push(
      "Below each trace, up and filled: this part raises the score; down and hollow: it lowers it. One scale for all leads.",
    );
  notes.push("At 100 % one square is 5 mm in print; on a screen it depends on the screen.");
  at("paper-caption").textContent = notes.join(" ");
}

function resize() {
  const svg = at("paper").firstElementChild;
  const [width_mm, height_mm] = svg.dataset.mm.split(" ");
  svg.setAttribute("width", `${width_mm * at("size").value}mm`);
  svg.setAttribute("height", `${height_mm * at("size").value}mm`);
}

function turn(by) {
  page += by;
  draw();
}

// --- words and elements ---------------------------------------------------------------------------------------

function number(value) {
  return value.toFixed(3);
}

function modelName({ name, version }) {
  return version == null ? name : `${name} version ${version}`;
}

flagMeanings = await ask("page/flags.json").catch(() => ({}));
await describeService();
