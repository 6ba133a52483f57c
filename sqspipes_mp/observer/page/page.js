// The page of a running engine. Whatever comes from the engine is set as text, never as markup.
"use strict";

const EVERY = 1000;      // milliseconds between two looks
const SAMPLES = 90;      // points of a sparkline
const find = (id) => document.getElementById(id);
const rates = new Map(); // the latest rates of each stage
let token = sessionStorage.getItem("token");
let chosen = new URLSearchParams(location.search).get("engine");
let timer = null;
let run = null;

// -- text ------------------------------------------------------------------------------------------------------------

// Control characters and those that turn the direction of text are shown as what they are.
const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const plain = (text) => String(text).replace(ODD, (each) => "\\u" + each.charCodeAt(0).toString(16).padStart(4, "0"));
const number = (value, digits = 0) =>
  value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits });
const share = (value) => (value === null || value === undefined ? "–" : `${Math.round(value * 100)} %`);

function time(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]])
    if (seconds >= 2 * size) return `${number(seconds / size, 1)} ${unit}`;
  if (seconds >= 1) return `${number(seconds, 1)} s`;
  return seconds >= 0.001 ? `${number(seconds * 1000, 1)} ms` : `${number(seconds * 1e6)} µs`;
}

const times = (each) => (each.p50 === null ? "–" : `${time(each.p50)}, p95 ${time(each.p95)}`);
// A call that takes far longer than others of its stage may hang.
const hangs = (age, stage) => age !== null && age >= 10 && (stage.run_time.p95 === null || age > 10 * stage.run_time.p95);

function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  return bytes >= 2 ** 30 ? `${number(bytes / 2 ** 30, 1)} GiB` : `${number(bytes / 2 ** 20)} MiB`;
}

// -- elements --------------------------------------------------------------------------------------------------------

function make(name, text, classes = "") {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = plain(text);
  if (classes) made.className = classes;
  return made;
}

function put(element, text, classes) {
  const wanted = plain(text);
  if (element.textContent !== wanted) element.textContent = wanted;
  if (classes !== undefined) element.className = classes;
}

function show(element, visible) { element.hidden = !visible; }

function button(text, label, act) {
  const made = make("button", text);
  made.type = "button";
  made.setAttribute("aria-label", plain(label));
  made.addEventListener("click", act);
  return made;
}

// Elements of a list by a key of their own, so that focus and selection outlive each second.
function keyed(parent, items, key, build, fill) {
  const there = new Map([...parent.children].map((each) => [each.dataset.key, each]));
  items.forEach((item, place) => {
    const name = key(item);
    let element = there.get(name);
    if (!element) {
      element = build(item);
      element.dataset.key = name;
    }
    there.delete(name);
    if (parent.children[place] !== element) parent.insertBefore(element, parent.children[place] || null);
    fill(element, item);
  });
  there.forEach((element) => element.remove());
}

// -- stages ----------------------------------------------------------------------------------------------------------

const ROWS = ["waiting", "in flight", "running", "workers", "busy", "call time", "wait in queue", "failed", "retried",
  "restarts", "dead letters"];

function buildStage(stage) {
  const item = make("li");
  item.append(make("h3", stage.name), make("p", "", "rate"));
  const drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("viewBox", `0 0 ${SAMPLES - 1} 100`);
  drawing.setAttribute("role", "img");
  drawing.append(document.createElementNS("http://www.w3.org/2000/svg", "polyline"));
  const list = make("dl");
  for (const row of ROWS) list.append(make("dt", row), make("dd"));
  const orders = make("div", undefined, "orders");
  const name = stage.name;
  const paused = () => item.dataset.paused === "yes";
  const wanted = () => Number(item.dataset.wanted);
  orders.append(
    button("Stacks", `Stacks of ${name}`, () => stacks(name)),
    button("Pause", `Pause or resume ${name}`, () =>
      confirmed(`${paused() ? "Resume" : "Pause"} stage ${name}?`, { do: paused() ? "resume" : "pause", stage: name })),
    button("−", `One worker less for ${name}`, () => order({ do: "scale", stage: name, workers: wanted() - 1 })),
    button("+", `One worker more for ${name}`, () => order({ do: "scale", stage: name, workers: wanted() + 1 })),
  );
  item.append(drawing, list, make("p", "", "hint"), orders);
  return item;
}

function fillStage(item, stage) {
  const [, rate, drawing, list, hint, orders] = item.children;
  item.classList.toggle("bottleneck", stage.bottleneck);
  item.dataset.paused = stage.paused ? "yes" : "no";
  item.dataset.wanted = stage.wanted;
  const note = stage.paused ? "paused" : stage.bottleneck ? "bottleneck" : stage.eta >= 1 ? `done in ${time(stage.eta)}` : "";
  rate.replaceChildren(make("span", `${number(stage.per_second.done, 1)} per s `),
    make("span", note, stage.paused || stage.bottleneck ? "mark" : "soft"));
  draw(drawing, stage);
  const flying = stage.queues.length ? stage.queues.reduce((sum, each) => sum + (each.in_flight || 0), 0) : null;
  const reasons = Object.entries(stage.failures).filter(([, count]) => count).map(([name, count]) => `${number(count)} ${name}`);
  const restarts = Object.entries(stage.restarts).filter(([, count]) => count).map(([name, count]) => `${number(count)} ${name}`);
  const oldest = stage.oldest_call !== null ? `, oldest ${time(stage.oldest_call)}` : "";
  const values = [
    number(stage.waiting), number(flying), `${number(stage.running)}${oldest}`,
    `${number(stage.ready)} of ${number(stage.wanted)}`, `${share(stage.busy)}, CPU ${number(stage.cpu, 2)}`,
    times(stage.run_time), times(stage.queue_wait),
    reasons.join(", ") || number(stage.failed), number(stage.retried), restarts.join(", ") || "0",
    stage.dead_letters === null ? number(stage.dead_lettered) : number(stage.dead_letters),
  ];
  list.querySelectorAll("dd").forEach((cell, place) => {
    const name = ROWS[place];
    const alarming = (name === "running" && hangs(stage.oldest_call, stage)) || (name === "failed" && stage.failed) || (name === "restarts" && restarts.length)
      || (name === "dead letters" && (stage.dead_letters || stage.dead_lettered));
    put(cell, values[place], alarming ? "bad" : "");
  });
  const command = `sqspipes-mp dead list ${item.dataset.target || "MODULE:ENGINE"} --stage ${stage.name}`;
  const dead = stage.dead_letters || stage.dead_lettered;
  hint.replaceChildren(...(dead ? [make("span", "why: ", "soft"), make("code", command)] : []));
  const [, pause, less] = orders.children;
  show(orders, token !== null);
  put(pause, stage.paused ? "Resume" : "Pause");
  less.disabled = stage.wanted <= 1;
}

function draw(drawing, stage) {
  const kept = rates.get(stage.name) || [];
  kept.push(stage.per_second.done || 0);
  while (kept.length > SAMPLES) kept.shift();
  rates.set(stage.name, kept);
  const most = Math.max(...kept, 1e-9);
  const first = SAMPLES - kept.length;
  drawing.firstChild.setAttribute("points", kept.map((each, place) => `${first + place},${97 - 92 * each / most}`).join(" "));
  drawing.setAttribute("aria-label", `messages per second, at most ${number(most, 1)} lately`);
}

// -- workers ---------------------------------------------------------------------------------------------------------

const CELLS = ["worker", "state", "call since", "runs", "done", "CPU", "memory", "restarts", "orders"];

function buildWorker() {
  const row = make("tr");
  for (const name of CELLS) {
    const cell = make("td");
    cell.dataset.name = name;
    row.append(cell);
  }
  return row;
}

function fillWorker(row, worker, stage) {
  const cells = row.children;
  const call = worker.calls[0];
  const pid = worker.pid ? `, pid ${worker.pid}` : "";
  put(cells[0], `${worker.stage}[${worker.worker}]${pid}`);
  put(cells[1], worker.state);
  const late = hangs(worker.call_age, stage);
  put(cells[2], worker.call_age === null ? "–" : `${time(worker.call_age)}${late ? " – hangs?" : ""}`, late ? "bad" : "");
  const progress = call && call.fraction !== null ? `${share(call.fraction)} ` : "";
  const more = worker.calls.length > 1 ? ` and ${worker.calls.length - 1} more` : "";
  put(cells[3], call ? `${progress}${call.text || ""} ${call.id ? call.id.slice(0, 12) : ""}${more}`.trim() : "",
    call ? "" : "nothing");
  put(cells[4], number(worker.done));
  put(cells[5], share(worker.cpu));
  put(cells[6], size(worker.memory));
  put(cells[7], number(worker.restarts), worker.restarts ? "bad" : "");
  const wanted = token !== null && call && call.id ? call.id : "";
  cells[8].classList.toggle("nothing", !wanted);
  if (row.dataset.call !== wanted) {
    row.dataset.call = wanted;
    cells[8].replaceChildren(...(wanted ? [button("Cancel call", `Cancel the call of ${worker.stage}[${worker.worker}]`,
      () => confirmed("Cancel this call? Its worker is killed, and the message is dead-lettered.",
        { do: "cancel", call: wanted }))] : []));
  }
}

// -- asking ----------------------------------------------------------------------------------------------------------

const query = () => (chosen === null ? "" : `?engine=${encodeURIComponent(chosen)}`);
const headers = () => (token === null ? {} : { Authorization: `Bearer ${token}` });

async function look() {
  timer = null;
  try {
    const answer = await fetch(`api/state${query()}`, { headers: headers(), cache: "no-store" });
    const told = await answer.json();
    if (answer.ok) render(told);
    else refused(answer.status, told);
  } catch (error) {
    trouble("No answer: the engine has ended, or its server is being started again.");
  }
  again();
}

// Rests while nobody sees the page.
function again() {
  if (timer === null && document.visibilityState === "visible") timer = setTimeout(look, EVERY);
}

function refused(status, told) {
  if (status === 401) { token = null; sessionStorage.removeItem("token"); }
  if (told.engines) {
    find("engines").replaceChildren(...told.engines.map((each) => {
      const link = make("a", each.pid ? `${each.domain} (pid ${each.pid}) ` : `${each.domain} `);
      link.href = `?engine=${encodeURIComponent(each.pid || each.domain)}`;
      return link;
    }));
    show(find("engines"), true);
  }
  trouble(told.error || `The server answers ${status}.`);
}

function trouble(text) {
  put(find("trouble"), text);
  show(find("trouble"), true);
  put(find("verdict"), "not known", "bad");
  document.body.dataset.state = "trouble";
}

function render(state) {
  const engine = state.engine;
  if (run !== engine.began) { rates.clear(); run = engine.began; }
  show(find("trouble"), false);
  document.title = plain(`${engine.domain} – sqspipes_mp`);
  put(find("domain"), engine.domain);
  put(find("verdict"), engine.live ? engine.why : `not live: ${engine.why}`, engine.live && engine.ready ? "good" : "bad");
  put(find("about"), `${engine.broker}, up ${time(engine.up)}, version ${engine.version}`);
  show(find("stop"), token !== null);
  put(find("token"), token === null ? "Token" : "Forget the token");
  keyed(find("stages"), state.stages, (stage) => stage.name, buildStage, (item, stage) => {
    item.dataset.target = engine.target || "";
    fillStage(item, stage);
  });
  keyed(find("workers"), state.workers.filter((each) => each.state !== "none"),
    (worker) => `${worker.stage} ${worker.worker}`, buildWorker,
    (row, worker) => fillWorker(row, worker, state.stages.find((stage) => stage.name === worker.stage)));
  document.body.dataset.state = "shown";
}

// -- orders ----------------------------------------------------------------------------------------------------------

async function order(keys) {
  try {
    const answer = await fetch(`api/order${query()}`, { method: "POST", headers: headers(), body: JSON.stringify(keys) });
    const told = await answer.json();
    if (answer.ok) return told;
    trouble(`Refused: ${told.error}`);
  } catch (error) {
    trouble("No answer to the order.");
  }
  return null;
}

function ask(text, secret = false) {
  const dialog = find("ask");
  const field = find("ask-value");
  put(find("ask-text"), text);
  show(field, secret);
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  (secret ? field : find("ask-yes")).focus();
  return new Promise((resolve) => dialog.addEventListener("close", () =>
    resolve(dialog.returnValue === "yes" ? field.value || true : null), { once: true }));
}

async function confirmed(text, keys) {
  if (await ask(text)) await order(keys);
}

async function stacks(stage) {
  const told = await order({ do: "stack", stage });
  if (told === null) return;
  const texts = told.stacks.map((each) => `${each.stage}[${each.worker}] (pid ${each.pid})\n${each.stack}`);
  texts.push(...told.silent.map((each) => `${each.stage}[${each.worker}] (pid ${each.pid})\n` +
    `no answer: it gets no CPU, or C code keeps its GIL; sqspipes-mp stack --stage ${stage} --signal tells`));
  put(find("stack-text"), texts.join("\n\n"));
  show(find("stack"), true);
  find("stack-title").focus();
}

find("token").addEventListener("click", async () => {
  if (token !== null) { token = null; sessionStorage.removeItem("token"); return; }
  const given = await ask("The token of SQSPIPES_HTTP_TOKEN; this tab keeps it until it is closed.", true);
  if (typeof given === "string") { token = given; sessionStorage.setItem("token", given); }
});
// Enter in the field means OK, not the first button.
find("ask-value").addEventListener("keydown", (event) => {
  if (event.key === "Enter") { event.preventDefault(); find("ask").close("yes"); }
});
find("stop").addEventListener("click", () => confirmed("Stop this run? It finishes what it holds, as with SIGTERM.", { do: "stop" }));
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") { if (timer === null) look(); }
  else if (timer !== null) { clearTimeout(timer); timer = null; }
});
look();
