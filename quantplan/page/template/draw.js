// Pictures. Each is drawn at the width that it has, so that text keeps its size.

// Cividis from dark to light: told apart by people with colour-blindness and in greyscale.
const SHADES = [
  "#00224e", "#083370", "#35456c", "#4f576c", "#666970", "#7d7c78",
  "#948e77", "#aea371", "#c8b866", "#e5cf52", "#fee838",
];
const HATCHES = [
  "", "M-1 1l2-2M0 8l8-8M7 9l2-2", "M2 2h1.5v1.5h-1.5zM6 6h1.5v1.5h-1.5z",
  "M-1 7l2 2M0 0l8 8M7-1l2 2", "M0 0l8 8M0 8l8-8", "M4 0v8", "M0 4h8",
];

function partColour(part, parts) {
  const filled = Object.keys(parts).filter((name) => name !== "free");
  const at = filled.indexOf(part);
  if (at < 0) return null;
  const share = at / (filled.length - 1);
  return { shade: SHADES[Math.round(share * (SHADES.length - 1))], hatch: at % HATCHES.length,
           ink: share < 0.5 ? "#ffffff" : "#000000" };
}

function hatchId(prefix, part) {
  return `${prefix}-${part}`;
}

function hatchPatterns(prefix, parts, names = Object.keys(parts)) {
  const patterns = names.map((part) => {
    const look = partColour(part, parts);
    if (!look) return null;
    return shape("pattern", { id: hatchId(prefix, part), width: 8, height: 8, patternUnits: "userSpaceOnUse" },
      shape("rect", { width: 8, height: 8, fill: look.shade }),
      shape("path", { d: HATCHES[look.hatch], stroke: look.ink, "stroke-width": 1, opacity: 0.6, fill: "none" }));
  });
  return shape("defs", {}, ...patterns.filter(Boolean));
}

function partFill(prefix, part) {
  return part === "free" ? "none" : `url(#${hatchId(prefix, part)})`;
}

function drawMemory(target, legend, plan, parts) {
  const width = Math.max(260, target.clientWidth);
  const barHeight = 34, rowHeight = 74;
  const svg = shape("svg", {
    width, height: rowHeight * plan.devices.length, role: "img",
    "aria-label": "Memory of each device; the list below has the numbers",
  }, hatchPatterns("bar", parts));
  plan.devices.forEach((device, row) => {
    const top = row * rowHeight + 24;
    const used = Object.entries(device.parts).reduce((n, [part, b]) => n + (part === "free" ? 0 : b), 0);
    const scale = (width - 2) / Math.max(device.capacity_bytes, used);
    svg.append(shape("text", { x: 1, y: top - 7 },
      `${device.name} ${device.model}: ${gib(used)} of ${gib(device.capacity_bytes)} used`));
    let left = 1;
    for (const [part, bytes] of Object.entries(device.parts)) {
      svg.append(shape("rect", { x: left, y: top, width: bytes * scale, height: barHeight,
        fill: partFill("bar", part), class: "part" },
        shape("title", {}, `${parts[part]}: ${size(bytes)}`)));
      svg.append(shape("rect", { x: left, y: top, width: bytes * scale, height: barHeight, class: "edge",
        "pointer-events": "none" }));
      left += bytes * scale;
    }
    const margin = 1 + (device.capacity_bytes - device.margin_bytes) * scale;
    svg.append(shape("line", { x1: margin, x2: margin, y1: top - 3, y2: top + barHeight + 3, class: "margin" },
      shape("title", {}, `margin: ${gib(device.margin_bytes)} are left alone`)));
  });
  target.replaceChildren(svg);
  const present = Object.keys(parts).filter((part) => plan.devices.some((d) => d.parts[part]));
  legend.replaceChildren(...present.map((part) => make("li", {},
    shape("svg", { class: "key", width: 22, height: 16, "aria-hidden": "true" },
      hatchPatterns(`key-${part}`, parts, [part]),
      shape("rect", { width: 22, height: 16, fill: partFill(`key-${part}`, part) }),
      shape("rect", { width: 22, height: 16, class: "edge" })),
    `${parts[part]}: ` + plan.devices.filter((d) => d.parts[part])
      .map((d) => `${d.name} ${size(d.parts[part])}`).join(", "))),
  make("li", {}, shape("svg", { class: "key", width: 22, height: 16, "aria-hidden": "true" },
    shape("line", { x1: 11, x2: 11, y1: 0, y2: 16, class: "margin" })), "memory beyond is left alone"));
}

// Round numbers between two ends, at most about so many.
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high * (1 + 1e-9); value += step) {
    found.push(Number(value.toPrecision(12)));
  }
  // One number alone is no scale.
  return found.length > 1 || low === high ? found : ticks(low, high, 2 * count);
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    for (const n of [1, 2, 5]) {
      const value = Number((n * 10 ** power).toPrecision(2));
      if (value >= low && value <= high) found.push(value);
    }
  }
  return found;
}

// A frame with axes; `x` and `y` map numbers to places.
function chart(target, { height, xs, ys, log, xLabel, yLabel, label }) {
  const width = Math.max(260, target.clientWidth);
  const left = 52, right = width - 10, top = 22, bottom = height - 40;
  const across = (value) => left + ((value - xs[0]) / (xs[1] - xs[0] || 1)) * (right - left);
  const along = log
    ? (value) => bottom - (Math.log(value / ys[0]) / Math.log(ys[1] / ys[0])) * (bottom - top)
    : (value) => bottom - ((value - ys[0]) / (ys[1] - ys[0])) * (bottom - top);
  const svg = shape("svg", { width, height, role: "img", "aria-label": label });
  for (const value of log ? logTicks(...ys) : ticks(...ys, 4)) {
    svg.append(shape("line", { x1: left, x2: right, y1: along(value), y2: along(value), class: "grid" }),
      shape("text", { x: left - 6, y: along(value) + 4, "text-anchor": "end", class: "quiet" }, `${value}`));
  }
  for (const value of ticks(...xs, Math.max(3, Math.floor(width / 110)))) {
    svg.append(shape("line", { x1: across(value), x2: across(value), y1: bottom, y2: bottom + 5, class: "axis" }),
      shape("text", { x: across(value), y: bottom + 18, "text-anchor": "middle", class: "quiet" }, `${value}`));
  }
  svg.append(shape("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }),
    shape("text", { x: left, y: 13 }, yLabel),
    shape("text", { x: right, y: height - 6, "text-anchor": "end" }, xLabel));
  target.replaceChildren(svg);
  return { svg, across, along };
}

// Plain answers may undercut the policy's floors, which the frontier may not.
function plainLook(baseline) {
  return baseline.below_floor.length ? "plain below" : "plain";
}

function drawFrontier(target, content, index, pick) {
  const points = content.plans.map((plan) => ({
    x: lastOf(plan.speed).decode_tps.expected, y: middle(plan.loss_nats) }));
  const positive = points.filter((p) => p.y > 0);
  if (positive.length === 0 || points.length + content.baselines.length < 2) {
    target.replaceChildren();
    return null;
  }
  const best = new Map();
  for (const b of content.baselines) if (b.fits && b.loss_nats > 0 && !best.has(b.types)) best.set(b.types, b);
  const low = Math.min(...positive.map((p) => p.y)), high = Math.max(...positive.map((p) => p.y));
  const shown = [...best.values()].filter((b) => b.loss_nats < 4 * high);
  const allX = [...points.map((p) => p.x), ...shown.map((b) => b.decode_tps.expected)];
  const allY = [low, high, ...shown.map((b) => b.loss_nats)];
  const room = (Math.max(...allX) - Math.min(...allX)) * 0.05 || 1;
  const { svg, across, along } = chart(target, {
    height: 300, log: true, xLabel: "decode tokens/s, context full",
    yLabel: "predicted loss, nats/token (lower is better)",
    xs: [Math.max(0, Math.min(...allX) - room), Math.max(...allX) + room],
    ys: [Math.min(...allY) / 1.3, Math.max(...allY) * 1.3],
    label: `Loss against speed of ${points.length} plans and ${shown.length} plain answers; ` +
      "the slider picks a plan, the table of plain answers has their numbers",
  });
  for (const b of shown) {
    const x = across(b.decode_tps.expected), y = along(b.loss_nats);
    svg.append(shape("path", { d: `M${x - 6} ${y + 5}h12l-6-11z`, class: plainLook(b) },
      shape("title", {}, `${b.types} with ${b.placement}: ${rate(b.decode_tps.expected)} tokens/s, ` +
        `loss ${loss(b.loss_nats)}`)));
  }
  const line = positive.map((p) => `${across(p.x)},${along(p.y)}`).join(" ");
  svg.append(shape("polyline", { points: line, class: "curve" }));
  points.forEach((p, i) => {
    if (p.y <= 0) return;
    const dot = shape("circle", { cx: across(p.x), cy: along(p.y), r: 5, class: "point" },
      shape("title", {}, `${rate(p.x)} tokens/s, loss ${loss(p.y)}`));
    dot.addEventListener("click", () => pick(i));
    svg.append(dot);
    if (i === index) svg.append(shape("circle", { cx: across(p.x), cy: along(p.y), r: 10, class: "ring" }));
  });
  return shown;
}

function drawSpeed(target, plan) {
  const wide = target.clientWidth >= 700;
  const kinds = [["decode_tps", "decode tokens/s"], ["prefill_tps", "prefill tokens/s"]];
  const boxes = kinds.map(() => make("div"));
  target.replaceChildren(...boxes);
  target.style.display = "grid";
  target.style.gridTemplateColumns = wide ? "1fr 1fr" : "minmax(0, 1fr)";
  kinds.forEach(([kind, label], i) => {
    const rows = plan.speed.map((p) => [p.depth, p[kind]]);
    const { svg, across, along } = chart(boxes[i], {
      height: 210, log: false, xLabel: "tokens in the context", yLabel: label,
      xs: [0, lastOf(rows)[0] || 1], ys: [0, Math.max(...rows.map(([, e]) => e.high)) * 1.05],
      label: `${label} from ${rate(rows[0][1].expected)} with an empty context to ` +
        `${rate(lastOf(rows)[1].expected)} with ${lastOf(rows)[0]} tokens`,
    });
    const path = (end) => rows.map(([depth, e]) => `${across(depth)},${along(e[end])}`);
    svg.append(shape("polygon", { points: [...path("low"), ...path("high").reverse()].join(" "), class: "band" }),
      shape("polyline", { points: path("expected").join(" "), class: "curve" }));
  });
}
