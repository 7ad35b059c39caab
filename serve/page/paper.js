// Draws an ECG on ECG paper as SVG. One user unit is one millimetre in both directions.

export const MM_PER_S = 25;
export const MM_PER_MV = 10;
export const PAGE_S = 10;

const SVG = "http://www.w3.org/2000/svg"; // only a name; nothing is fetched from there
const LIMB_ROWS = [
  ["I", "aVR"],
  ["II", "aVL"],
  ["III", "aVF"],
];
const TWELVE_ROWS = [
  ["I", "aVR", "V1", "V4"],
  ["II", "aVL", "V2", "V5"],
  ["III", "aVF", "V3", "V6"],
];
export const LEADS = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"];

const LEFT_MM = 15; // room for the calibration pulse
const RIGHT_MM = 5;
const FOOT_MM = 10;
const BAND_MM = 8; // below each row, where there is an attribution
const LEAST_MM = 15; // above the baseline: the calibration pulse and the name
export const MOST_MM = 40; // above or below the baseline; beyond it a trace is cut off, and the caption says so

/** The layouts that suit a recording, the usual one first: [[key, name], …]. */
export function layouts(record) {
  const there = Object.keys(record.leads);
  const full = ["full", `Each lead for ${PAGE_S} s`];
  if (there.length === 1 || seconds(record) < PAGE_S - 1) return [full];
  const chest = there.some((lead) => lead.startsWith("V"));
  return [["rows", chest ? "3 × 4 with a rhythm strip" : "3 × 2 with a rhythm strip"], full];
}

/** Length of a recording in seconds. */
export function seconds(record) {
  return Math.max(0, ...Object.values(record.leads).map((row) => row.length)) / record.rate_hz;
}

/**
 * {svg, cut}: the paper from `start_s` on, and the leads that are cut off. Each lead is drawn around its median.
 * `attributed` are the windows of an explanation, whose attributions are drawn in a band below each row; or null.
 */
export function drawPaper(record, { layout, start_s, label, attributed = null }) {
  const sums = attributed && sumsOfLeads(attributed);
  const length_s = Math.min(PAGE_S, seconds(record) - start_s);
  const rows = layout === "rows" ? gridRows(record) : LEADS.filter((lead) => record.leads[lead]).map((lead) => [lead]);
  const width_mm = LEFT_MM + PAGE_S * MM_PER_S + RIGHT_MM;
  const cut = new Set();
  const bands = [];
  let top_mm = 0;
  for (const row of rows) {
    const span_s = PAGE_S / row.length;
    const parts = row.map((lead, column) => {
      const from_s = column * span_s;
      return {
        lead,
        from_s,
        ...segment(record, lead, start_s + from_s, start_s + Math.min(from_s + span_s, length_s), start_s, length_s),
      };
    });
    const up_mm = limit(Math.max(...parts.map((part) => part.high_mv)), LEAST_MM);
    const down_mm = limit(-Math.min(...parts.map((part) => part.low_mv)), 5);
    for (const part of parts) {
      if (part.high_mv * MM_PER_MV > up_mm || -part.low_mv * MM_PER_MV > down_mm) cut.add(part.lead);
    }
    const height_mm = up_mm + down_mm + (sums ? BAND_MM : 0);
    bands.push({ parts, top_mm, up_mm, down_mm, height_mm });
    top_mm += height_mm;
  }
  const height_mm = top_mm + FOOT_MM;

  const svg = element("svg", {
    viewBox: `0 0 ${width_mm} ${height_mm}`,
    role: "img",
    "aria-label": label,
    "data-mm": `${width_mm} ${height_mm}`,
  });
  svg.append(
    element("rect", { width: width_mm, height: height_mm, class: "sheet" }),
    element("path", { d: grid(width_mm, height_mm, 1), class: "fine" }),
    element("path", { d: grid(width_mm, height_mm, 5), class: "coarse" }),
  );
  for (const { parts, top_mm, up_mm, down_mm, height_mm } of bands) {
    // An inner svg cuts off what is outside its row.
    const band = element("svg", {
      y: top_mm,
      width: width_mm,
      height: height_mm,
      viewBox: `0 0 ${width_mm} ${height_mm}`,
      overflow: "hidden",
    });
    band.append(element("path", { d: `M2 ${up_mm}h3v${-MM_PER_MV}h5v${MM_PER_MV}h3`, class: "trace" }));
    for (const { lead, from_s, values_mv, first_s } of parts) {
      const x_mm = LEFT_MM + from_s * MM_PER_S;
      if (from_s) band.append(element("path", { d: `M${x_mm} ${up_mm - 4}v8`, class: "tick" }));
      if (values_mv)
        band.append(
          element("path", {
            d: trace(values_mv, record.rate_hz, LEFT_MM + first_s * MM_PER_S, up_mm),
            class: "trace",
            "data-lead": lead,
          }),
        );
      band.append(text(x_mm + 1.5, 4.5, name(record, lead), "lead"));
      if (sums?.byLead[lead]) {
        const span_s = Math.min(PAGE_S / parts.length, length_s - from_s);
        band.append(...attribution(sums, lead, start_s + from_s, span_s, x_mm, up_mm + down_mm + BAND_MM / 2));
      }
    }
    svg.append(band);
  }
  const foot_mm = height_mm - 3;
  const shown = `${clock(start_s)}–${clock(start_s + length_s)} s of ${clock(seconds(record))} s`;
  svg.append(
    text(
      LEFT_MM,
      foot_mm,
      `${MM_PER_S} mm/s   ${MM_PER_MV} mm/mV   ${shown}   ${record.rate_hz} Hz   not filtered`,
      "foot",
    ),
    text(width_mm - RIGHT_MM, foot_mm, "Research use only", "foot end"),
  );
  return { svg, cut: [...cut] };
}

/** The usual order, with a place for each lead that was not recorded, and the rhythm strip below. */
function gridRows(record) {
  const there = Object.keys(record.leads);
  const rows = there.some((lead) => lead.startsWith("V")) ? TWELVE_ROWS : LIMB_ROWS;
  const rhythm = ["II", "V1"].find((lead) => record.leads[lead]) ?? LEADS.find((lead) => record.leads[lead]);
  return [...rows, [rhythm]];
}

/** The values between two times, minus the median of the whole page, and their range; no values without the lead. */
function segment(record, lead, from_s, to_s, page_s, length_s) {
  const row = record.leads[lead];
  if (!row || to_s <= from_s) return { low_mv: 0, high_mv: 0, values_mv: null, first_s: 0 };
  const index = (time_s) => Math.round(time_s * record.rate_hz);
  const sorted = Float64Array.from(
    row.slice(index(page_s), index(page_s + length_s)).filter((value) => value !== null),
  ).sort();
  const median_mv = sorted.length ? sorted[sorted.length >> 1] : 0;
  const values_mv = row
    .slice(index(from_s), index(to_s) + 1)
    .map((value) => (value === null ? null : value - median_mv));
  let low_mv = 0;
  let high_mv = 0;
  for (const value of values_mv) {
    if (value < low_mv) low_mv = value;
    if (value > high_mv) high_mv = value;
  }
  return { low_mv, high_mv, values_mv, first_s: index(from_s) / record.rate_hz - page_s };
}

/** One path for one lead, interrupted where nothing was recorded. */
function trace(values_mv, rate_hz, x_mm, baseline_mm) {
  const step_mm = MM_PER_S / rate_hz;
  const points = [];
  let pen = "M";
  values_mv.forEach((value, i) => {
    if (value === null) {
      pen = "M";
      return;
    }
    points.push(`${pen}${(x_mm + i * step_mm).toFixed(2)} ${(baseline_mm - value * MM_PER_MV).toFixed(2)}`);
    pen = "L";
  });
  return points.join("");
}

/** The sum of attributions in each millimetre of each lead, and the largest in size: {byLead: {lead: Map}, largest}. */
function sumsOfLeads(windows) {
  const byLead = {};
  let largest = 0;
  for (const { start_s, rate_hz, leads } of windows) {
    for (const [lead, { attribution }] of Object.entries(leads)) {
      const sums = (byLead[lead] ??= new Map());
      attribution.forEach((value, i) => {
        const at_mm = Math.floor((start_s + i / rate_hz) * MM_PER_S + 1e-6);
        sums.set(at_mm, (sums.get(at_mm) ?? 0) + value);
      });
      for (const sum of sums.values()) largest = Math.max(largest, Math.abs(sum));
    }
  }
  return { byLead, largest };
}

/** Two paths of bars, one a millimetre: above the middle what raises the score, below it what lowers it. */
function attribution({ byLead, largest }, lead, from_s, span_s, x_mm, middle_mm) {
  const paths = { raises: "", lowers: "" };
  const first_mm = Math.round(from_s * MM_PER_S);
  const width_mm = Math.round(span_s * MM_PER_S);
  for (let i = 0; i < width_mm; i++) {
    const share = largest ? (byLead[lead].get(first_mm + i) ?? 0) / largest : 0;
    const height_mm = ((Math.abs(share) * BAND_MM) / 2) * 0.9;
    if (height_mm < 0.02) continue;
    const edge_mm = middle_mm - Math.sign(share) * height_mm;
    paths[share > 0 ? "raises" : "lowers"] +=
      `M${x_mm + i} ${middle_mm}V${edge_mm.toFixed(2)}h1V${middle_mm}z`;
  }
  return [
    element("path", { d: `M${x_mm} ${middle_mm}h${width_mm}`, class: "middle" }),
    ...Object.entries(paths).map(([kind, d]) => element("path", { d, class: kind, "data-attribution": lead })),
  ];
}

function grid(width_mm, height_mm, step_mm) {
  const lines = [];
  for (let x = 0; x <= width_mm; x += step_mm) lines.push(`M${x} 0V${height_mm}`);
  for (let y = 0; y <= height_mm; y += step_mm) lines.push(`M0 ${y}H${width_mm}`);
  return lines.join("");
}

/** Millivolts -> the millimetres that they need, rounded up to a line of the coarse grid. */
function limit(value_mv, least_mm) {
  return Math.min(MOST_MM, Math.max(least_mm, Math.ceil((value_mv * MM_PER_MV + 2) / 5) * 5));
}

function name(record, lead) {
  if (!record.leads[lead]) return `${lead} not recorded`;
  return record.derived.includes(lead) ? `${lead} derived` : lead;
}

function clock(time_s) {
  return String(Math.round(time_s * 100) / 100);
}

function element(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(x, y, content, kind) {
  const made = element("text", { x, y, class: kind });
  made.textContent = content;
  return made;
}
