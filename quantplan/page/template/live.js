// The live page: a form that asks this machine for plans.

const offered = JSON.parse(byId("options").textContent);
const asked = { page: crypto.randomUUID(), number: 0, timer: null };

function question() {
  const speed = byId("ask-speed").value.trim();
  return {
    model: byId("ask-model").value.trim(), machine: byId("ask-machine").value.trim(),
    context: offered.contexts[Number(byId("ask-context").value)], kv: byId("ask-kv").value,
    min_tps: speed === "" ? null : Number(speed), policy: byId("ask-policy").value,
  };
}

async function fetchContent(wants) {
  const { page, number } = asked;
  const answer = await fetch("plan", {
    method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...question(), wants, page, number }),
  });
  if (answer.status === 204) return null;
  if (!answer.ok) throw new Error(`quantplan failed (${answer.status}); its terminal says why.`);
  const body = await answer.json();
  if (body.problems) throw new Error(body.problems.join("\n"));
  return body;
}

function showProblem(error) {
  const box = byId("problem");
  const lost = error instanceof TypeError ? "quantplan ui does not answer: is it still running?" : error.message;
  box.replaceChildren(...lost.split("\n").map((text) => make("p", {}, text)));
  box.hidden = false;
  byId("page").classList.add("stale");
}

// The plan comes at once; plain answers and frontier follow, unless something else is asked first.
async function ask() {
  const number = (asked.number += 1);
  const isNewest = () => number === asked.number;
  clearTimeout(asked.timer);
  byId("busy").textContent = "Planning …";
  keepAddress();
  try {
    const content = await fetchContent("plan");
    if (!isNewest() || content === null) return;
    byId("problem").hidden = true;
    byId("page").classList.remove("stale");
    show({ ...content, without_frontier: "Being worked out …", without_baselines: "Being worked out …" });
    byId("busy").textContent = "Working out the frontier …";
    asked.timer = setTimeout(async () => {
      try {
        const whole = await fetchContent("frontier");
        if (!isNewest() || whole === null) return;
        show(whole);
        byId("busy").textContent = "Done.";
      } catch (error) {
        if (isNewest()) { showProblem(error); byId("busy").textContent = ""; }
      }
    }, 400);
  } catch (error) {
    if (isNewest()) { showProblem(error); byId("busy").textContent = ""; }
  }
}

// The address says what is asked, so that it can be kept.
function keepAddress() {
  const kept = Object.entries(question()).filter(([, value]) => value !== null);
  history.replaceState(null, "", `?${new URLSearchParams(kept)}`);
}

function showContext() {
  const slider = byId("ask-context"), text = `${offered.contexts[Number(slider.value)]} tokens`;
  byId("ask-context-value").textContent = text;
  slider.setAttribute("aria-valuetext", text);
}

// Puts a known GPU in place of the GPUs of the text; the RAM stays.
function useGpu(name) {
  const machine = byId("ask-machine"), terms = machine.value.split("+");
  machine.value = name === "" ? lastOf(terms).trim() : `${name} + ${lastOf(terms).trim()}`;
}

byId("models").replaceChildren(...offered.models.map((name) => make("option", { value: name })));
byId("ask-gpu").replaceChildren(make("option", { value: "-" }, "as in the text"),
  make("option", { value: "" }, "none"), ...offered.gpus.map((name) => make("option", { value: name }, name)));
byId("ask-kv").replaceChildren(...offered.kv.map((name) => make("option", {}, name)));
byId("ask-policy").replaceChildren(...offered.policies.map((name) => make("option", {}, name)));
const first = { ...offered.first, ...Object.fromEntries(new URLSearchParams(location.search)) };
byId("ask-model").value = first.model;
byId("ask-machine").value = first.machine;
byId("ask-kv").value = first.kv;
byId("ask-policy").value = first.policy;
byId("ask-speed").value = first.min_tps ?? "";
byId("ask-context").max = offered.contexts.length - 1;
byId("ask-context").value = offered.contexts.findIndex((n) => n >= Number(first.context));
showContext();
byId("ask-context").addEventListener("input", showContext);
byId("ask-gpu").addEventListener("change", (event) => {
  if (event.target.value !== "-") useGpu(event.target.value);
});
byId("ask-machine").addEventListener("input", () => { byId("ask-gpu").value = "-"; });
byId("ask").addEventListener("change", (event) => {
  if (byId("ask").checkValidity()) ask();
  else event.target.reportValidity();
});
byId("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
ask();
