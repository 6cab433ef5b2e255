// Tables that sort by a click on a column's name.

// columns: { label, text(row), value(row) to sort by, number: whether it is aligned right }
function sortableTable(caption, columns, rows, { rowClass = () => null, start = null } = {}) {
  const body = make("tbody");
  const heads = columns.map((column) => make("th", { scope: "col", class: column.number ? "number" : null }));
  const order = { column: start, descending: false };

  function fillBody() {
    const sorted = [...rows];
    if (order.column !== null) {
      const { value } = columns[order.column];
      const sign = order.descending ? -1 : 1;
      sorted.sort((a, b) => {
        const x = value(a), y = value(b);
        return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
      });
    }
    body.replaceChildren(...sorted.map((row) => make("tr", { class: rowClass(row) },
      ...columns.map((column) => make("td",
        { class: [column.number && "number", column.wide && "wide"].filter(Boolean).join(" ") || null },
        column.text(row))))));
    heads.forEach((head, i) => {
      const is = i === order.column;
      head.setAttribute("aria-sort", is ? (order.descending ? "descending" : "ascending") : "none");
      head.querySelector(".arrow").textContent = is ? (order.descending ? "▼" : "▲") : "";
    });
  }

  columns.forEach((column, i) => {
    const arrow = make("span", { class: "arrow", "aria-hidden": "true" });
    const button = make("button", { type: "button" }, column.label, arrow);
    button.addEventListener("click", () => {
      order.descending = order.column === i && !order.descending;
      order.column = i;
      fillBody();
    });
    heads[i].append(button);
  });
  fillBody();
  const table = make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...heads)), body);
  return { table, setRows(changed) { rows = changed; fillBody(); } };
}

function plainTable(caption, labels, rows) {
  return make("table", {}, make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...labels.map((label) => make("th", { scope: "col" }, label)))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {},
      ...cells.map((cell, i) => make("td", { class: i ? "wide" : null }, cell))))));
}

function tensorRows(content, plan) {
  return content.tensors.map((tensor, i) => {
    const type = content.qtypes[plan.types[i]];
    const weights = tensor.shape_ne.reduce((a, b) => a * b, 1);
    return { ...tensor, type: type.name, bpw: type.bpw, bytes: (weights * type.bpw) / 8,
             device: plan.places[i] < 0 ? "not loaded" : content.places[plan.places[i]] };
  });
}

const TENSOR_COLUMNS = [
  { label: "Tensor", text: (t) => t.name, value: (t) => t.name },
  { label: "Layer", text: (t) => (t.layer === null ? "" : `${t.layer}`), value: (t) => t.layer ?? -1, number: true },
  { label: "Role", text: (t) => t.role, value: (t) => t.role },
  { label: "Shape", text: (t) => t.shape_ne.join("×"), value: (t) => t.shape_ne.reduce((a, b) => a * b, 1), number: true },
  { label: "Type", text: (t) => t.type, value: (t) => t.bpw },
  { label: "Size", text: (t) => size(t.bytes), value: (t) => t.bytes, number: true },
  { label: "Device", text: (t) => t.device, value: (t) => t.device },
];

function baselineColumns(plan) {
  const verdict = (b) => verdictOf(b, plan);
  return [
    { label: "Types", text: (b) => b.types, value: (b) => b.types },
    { label: "Placement", text: (b) => b.placement, value: (b) => b.placement },
    { label: "File", text: (b) => gib(b.file_bytes), value: (b) => b.file_bytes, number: true },
    { label: "VRAM", text: (b) => gib(b.vram_bytes), value: (b) => b.vram_bytes, number: true },
    { label: "RAM", text: (b) => gib(b.ram_bytes), value: (b) => b.ram_bytes, number: true },
    { label: "Tokens/s (80 %)", number: true, value: (b) => b.decode_tps.expected,
      text: (b) => `${rate(b.decode_tps.expected)} (${rate(b.decode_tps.low)} to ${rate(b.decode_tps.high)})` },
    { label: "Loss", text: (b) => loss(b.loss_nats), value: (b) => b.loss_nats, number: true },
    { label: "Beside the plan", value: verdict, text: verdict, wide: true },
  ];
}

function verdictOf(baseline, plan) {
  if (!baseline.fits) return "does not fit";
  if (!baseline.reaches_speed) return "too slow";
  const said = [];
  if (baseline.is_as_good) said.push("as good");
  else {
    if (baseline.loss_nats > middle(plan.loss_nats)) said.push("more loss");
    if (baseline.decode_tps.expected < lastOf(plan.speed).decode_tps.expected) said.push("slower");
  }
  if (baseline.below_floor.length) said.push(`below the policy's floors: ${baseline.below_floor.join(", ")}`);
  return said.join("; ");
}
