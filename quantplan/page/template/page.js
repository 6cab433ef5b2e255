// The page of one `Content`: what is shown, and what happens on a click.

const page = { content: null, index: 0, tensors: null };

function planOfPage() {
  return page.content.plans[page.index];
}

function showNumbers(plan) {
  const full = lastOf(plan.speed), empty = plan.speed[0];
  const rows = [
    ["File", gib(plan.file_bytes), `${plan.bpw.toFixed(2)} bits per weight`],
    ["Decode, context full", `${rate(full.decode_tps.expected)} tokens/s`, interval(full.decode_tps, rate),
      `${rate(empty.decode_tps.expected)} with an empty context`],
    ["Prefill, empty context", `${rate(empty.prefill_tps.expected)} tokens/s`, interval(empty.prefill_tps, rate)],
    ["Loss", `${loss(middle(plan.loss_nats))} nats/token`, interval(plan.loss_nats, loss)],
    ["Fits", `${plan.context} tokens`, ...plan.devices.map((d) => `${d.name}: ${gib(d.parts.free ?? 0)} free (margin ${gib(d.margin_bytes)})`)],
    ["Proven gap", `${(plan.gap * 100).toFixed(3)} %`, plan.status === "time_limit" ? "the time was up" : "the best plan is no better by more"],
  ];
  byId("numbers").replaceChildren(...rows.map(([name, ...values]) =>
    make("div", {}, make("dt", {}, name), ...values.map((value) => make("dd", {}, value)))));
}

function showPlan() {
  const { content, index } = page, plan = planOfPage();
  showNumbers(plan);
  byId("picked").textContent = index === content.chosen ? ""
    : "Shown is another point of the frontier, not the plan that was asked for.";
  byId("notes").replaceChildren(...plan.notes.map((note) => make("li", {}, note)));
  byId("make").textContent = `quantplan quantize recipe.json ${content.model}-BF16.gguf model.gguf`;
  byId("serve").textContent = plan.command;
  const slider = byId("point"), full = lastOf(plan.speed);
  slider.value = index;
  const said = `${rate(full.decode_tps.expected)} tokens/s, loss ${loss(middle(plan.loss_nats))}, ${gib(plan.file_bytes)}`;
  slider.setAttribute("aria-valuetext", said);
  byId("point-value").textContent = `${index + 1} of ${content.plans.length}: ${said}`;
  byId("point-back").disabled = index === content.chosen;
  drawAll();
  showTensors();
}

function drawAll() {
  if (!page.content) return;
  const plan = planOfPage();
  drawMemory(byId("memory"), byId("memory-legend"), plan, page.content.parts);
  const plain = drawFrontier(byId("frontier"), page.content, page.index, pick);
  const key = (child) => shape("svg", { class: "key", width: 22, height: 16, "aria-hidden": "true" }, child);
  const legend = plain === null ? [] : [
    ["a plan", shape("circle", { cx: 11, cy: 8, r: 5, class: "point" })],
    ["the one shown", shape("circle", { cx: 11, cy: 8, r: 6, class: "ring" })],
  ];
  for (const [look, text] of [["plain", "a plain answer in its best placement"], ["plain below", "one below the policy's floors"]]) {
    if (plain?.some((b) => plainLook(b) === look)) legend.push([text, shape("path", { d: "M5 13h12l-6-11z", class: look })]);
  }
  byId("frontier-legend").replaceChildren(...legend.map(([text, child]) => make("li", {}, key(child), text)));
  drawSpeed(byId("speed"), plan);
}

function pick(index) {
  page.index = index;
  showPlan();
}

function options(select, names, all) {
  const before = select.value;
  select.replaceChildren(make("option", { value: "" }, all), ...names.map((name) => make("option", {}, name)));
  if (names.includes(before)) select.value = before;
}

function showTensors() {
  const rows = tensorRows(page.content, planOfPage());
  const name = byId("filter-name").value.toLowerCase();
  const type = byId("filter-type").value, device = byId("filter-device").value;
  const matrices = byId("filter-matrices").checked;
  const kept = rows.filter((t) => t.name.toLowerCase().includes(name) && (!type || t.type === type) &&
    (!device || t.device === device) && (!matrices || t.is_quantizable));
  if (page.tensors) {
    page.tensors.setRows(kept);
  } else {
    page.tensors = sortableTable("Type and device of every tensor", TENSOR_COLUMNS, kept);
    byId("tensors").replaceChildren(page.tensors.table);
  }
  const bytes = kept.reduce((n, t) => n + t.bytes, 0);
  byId("tensor-count").textContent = `${kept.length} of ${rows.length} tensors, ${size(bytes)}`;
}

// Shows a content; a live page does so again and again.
function show(content) {
  Object.assign(page, { content, index: content.chosen });
  document.title = `${content.model}: quantplan`;
  byId("title").textContent = content.model;
  byId("subtitle").textContent = `${content.machine}; ${content.workload}`;
  byId("page").hidden = false;
  const several = content.plans.length > 1;
  byId("frontier-tools").hidden = !several;
  byId("frontier-note").textContent = content.without_frontier ?? "";
  byId("point").max = content.plans.length - 1;
  options(byId("filter-type"), content.qtypes.map((t) => t.name), "all");
  options(byId("filter-device"), [...content.places, "not loaded"], "all");
  const baselines = byId("baselines");
  if (content.baselines.length) {
    baselines.replaceChildren(sortableTable("Plain answers, the best first", baselineColumns(content.plans[content.chosen]), content.baselines,
      { rowClass: (b) => (b.fits && b.reaches_speed ? null : "misses") }).table);
  } else {
    baselines.replaceChildren(make("p", {}, content.without_baselines ?? "None were worked out for this plan."));
  }
  byId("assumptions").replaceChildren(plainTable("What the numbers rest on", ["What", "Taken for granted", "Source"],
    content.assumptions.map((a) => [a.what, a.value, a.source])));
  byId("made").textContent = `quantplan ${content.version}, ${content.date}, model from ${content.source}`;
  showPlan();
  document.dispatchEvent(new CustomEvent("plan-shown"));
}

async function copy(id) {
  const text = byId(id).textContent;
  try {
    await navigator.clipboard.writeText(text);
    byId("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(byId(id));
    byId("copied").textContent = "The browser does not allow copying; the command is selected: press Ctrl+C.";
  }
}

function saveRecipe() {
  const { content } = page, plan = planOfPage();
  const tensors = content.tensors.map((tensor, i) => ({
    tensor: tensor.name, qtype: content.qtypes[plan.types[i]].name,
    device: plan.places[i] < 0 ? null : content.places[plan.places[i]], shape_ne: tensor.shape_ne,
  }));
  const text = JSON.stringify({ ...plan.recipe, tensors }, null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = make("a", { href: url, download: "recipe.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

for (const button of document.querySelectorAll("[data-copies]")) {
  button.addEventListener("click", () => copy(button.dataset.copies));
}
byId("save-recipe").addEventListener("click", saveRecipe);
byId("point").addEventListener("input", (event) => pick(Number(event.target.value)));
byId("point-back").addEventListener("click", () => pick(page.content.chosen));
for (const id of ["filter-name", "filter-type", "filter-device", "filter-matrices"]) {
  byId(id).addEventListener("input", showTensors);
}
let drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== drawnWidth) { drawnWidth = innerWidth; drawAll(); }
});

const embedded = JSON.parse(byId("data").textContent);
if (embedded) show(embedded);
