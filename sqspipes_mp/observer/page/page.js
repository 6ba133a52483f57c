// The page of a running engine. Whatever comes from the engine is set as text, never as markup.
"use strict";

const EVERY = 1000;      // milliseconds between two looks
const SAMPLES = 90;      // points of a sparkline
const find = (id) => document.getElementById(id);
const SETTLED = 600;     // milliseconds after an order until every look shows it
const TOLD = 15000;      // milliseconds for which the outcome of an order is shown
const CANCEL = 2;        // seconds from which a call can be cancelled here: shorter ones are over before the click
const rates = new Map(); // the latest rates of each stage
const asked = new Map(); // numbers of workers that were asked for and are not shown yet
let token = sessionStorage.getItem("token");
let chosen = new URLSearchParams(location.search).get("engine");
let timer = null;
let run = null;
let shownAt = null;      // when the numbers that are shown were true
let silence = null;
let workers = [];

// -- text ------------------------------------------------------------------------------------------------------------

// Control characters and those that turn the direction of text are shown as what they are.
const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const plain = (text) => String(text).replace(ODD, (each) => "\\u" + each.charCodeAt(0).toString(16).padStart(4, "0"));
const number = (value, digits = 0) =>
  value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits });
const share = (value) => (value === null || value === undefined ? "–" : `${Math.round(value * 100)}%`);
const counted = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
const clock = () => new Date().toLocaleTimeString("en", { hour12: false });

// As short_time of ipc/running/units.py.
function time(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.0009995) return seconds ? `${Math.round(seconds * 1e6)}us` : "0s";
  if (seconds < 0.9995) return `${Math.round(seconds * 1e3)}ms`;
  if (seconds < 59.5) return seconds < 9.95 ? `${seconds.toFixed(1)}s` : `${Math.round(seconds)}s`;
  const two = (value) => String(value).padStart(2, "0");
  const whole = Math.round(seconds);
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes}m${two(whole % 60)}s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours}h${two(minutes % 60)}m`;
  const days = Math.floor(hours / 24);
  return hours < 2400 ? `${days}d${two(hours % 24)}h` : `${days}d`;
}

const times = (each) => (each.p50 === null ? "–" : `${time(each.p50)}, ${time(each.p95)}`);
const TONES = { good: "good", warn: "mark", bad: "bad" };

function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  return `${number(bytes / 2 ** 20)}M`;
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

const ROWS = ["waiting", "in flight", "running", "workers", "busy", "p50, p95", "queued p50, p95", "failed", "retried",
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
  for (const [row, title] of [["p50, p95", "run time of half the calls, and of 95% of them, since the run began"],
    ["queued p50, p95", "time in the queue of the messages that were received, since the run began"]])
    list.children[2 * ROWS.indexOf(row)].title = title;
  const orders = make("div", undefined, "orders");
  const name = stage.name;
  orders.append(
    button("Stacks", `Stacks of ${name}`, () => stacks(name)),
    button("Pause", `Pause or resume ${name}`, () => order({ do: item.dataset.paused === "yes" ? "resume" : "pause", stage: name })),
    button("−", `One worker less for ${name}`, () => scale(name, Number(item.dataset.wanted), -1)),
    button("+", `One worker more for ${name}`, () => scale(name, Number(item.dataset.wanted), 1)),
  );
  item.append(drawing, make("p", "", "span soft"), list, orders);
  return item;
}

function fillStage(item, stage, engine, workers) {
  const [, rate, drawing, span, list, orders] = item.children;
  item.classList.toggle("bottleneck", stage.bottleneck);
  item.dataset.paused = stage.paused ? "yes" : "no";
  item.dataset.wanted = stage.wanted;
  const state = stage.paused ? "paused" : stage.bottleneck ? "bottleneck" : "";
  rate.replaceChildren(make("span", `${number(stage.per_second.done, 1)}/s`), make("span", state, "mark"),
    make("span", stage.eta >= 1 ? `done in ${time(stage.eta)}` : "", "soft"));
  put(span, draw(drawing, stage));
  const flying = stage.queues.length ? stage.queues.reduce((sum, each) => sum + (each.in_flight || 0), 0) : null;
  const told = (counts) => Object.entries(counts).filter(([, count]) => count).map(([name, count]) => `${name} ${number(count)}`);
  const reasons = told(stage.failures);
  const deaths = Object.values(stage.restarts).reduce((sum, count) => sum + count, 0);
  // Cancelled calls and changed numbers end workers, too.
  const ordered = workers.reduce((sum, worker) => sum + worker.restarts, 0) - deaths;
  const restarts = [...told(stage.restarts), ...(ordered > 0 ? [`by orders ${number(ordered)}`] : [])];
  const calls = stage.failed ? ` of ${number(stage.failed + stage.done)} calls (${reasons.join(", ")})` : "";
  const dead = Math.max(stage.dead_letters || 0, stage.dead_lettered);
  const values = [
    number(stage.waiting), number(flying),
    `${number(stage.running)}${stage.oldest_call === null ? "" : `, longest ${time(stage.oldest_call)}`}`,
    `${number(stage.ready)}/${number(stage.wanted)}`, `${share(stage.busy)}, cpu ${share(stage.cpu)}`,
    times(stage.run_time), times(stage.queue_wait), `${number(stage.failed)}${calls}`, number(stage.retried),
    restarts.join(", ") || "0", `${number(dead)}${stage.cancelled ? `, ${number(stage.cancelled)} cancelled` : ""}`,
  ];
  const alarming = new Set([stage.long_call && "running", stage.failed && "failed", deaths && "restarts", dead && "dead letters"]);
  list.querySelectorAll("dd").forEach((cell, place) => put(cell, values[place], alarming.has(ROWS[place]) ? "bad" : ""));
  const [, pause, less, more] = orders.children;
  show(orders, token !== null);
  put(pause, stage.paused ? "Resume" : "Pause");
  for (const each of orders.children) each.disabled = engine.ending && each !== orders.children[0];
  less.disabled = more.disabled || stage.wanted <= 1;
}

function draw(drawing, stage) {
  const kept = rates.get(stage.name) || [];
  kept.push({ at: Date.now(), rate: stage.per_second.done || 0 });
  while (kept.length > SAMPLES) kept.shift();
  rates.set(stage.name, kept);
  const most = Math.max(...kept.map((each) => each.rate), 1e-9);
  const first = SAMPLES - kept.length;
  drawing.firstChild.setAttribute("points",
    kept.map((each, place) => `${first + place},${97 - 92 * each.rate / most}`).join(" "));
  const told = `at most ${number(most, 1)}/s in the last ${time(Math.round((Date.now() - kept[0].at) / 1000))}`;
  drawing.setAttribute("aria-label", told);
  return told;
}

// -- workers ---------------------------------------------------------------------------------------------------------

const CELLS = ["worker", "state", "for", "message", "done", "cpu", "memory", "restarts", ""];

function buildWorker(worker) {
  const row = make("tr");
  for (const name of CELLS) {
    const cell = make("td");
    cell.dataset.name = name;
    row.append(cell);
  }
  const name = `${worker.stage}[${worker.worker}]`;
  row.lastChild.append(
    button("Stack", `Stack of ${name}`, () => stacks(worker.stage, worker.worker)),
    button("Cancel call", `Cancel the call of ${name}`, () => cancel(name, row.dataset)));
  return row;
}

function fillWorker(row, worker) {
  const cells = row.children;
  const call = worker.calls.reduce((oldest, each) => (oldest && oldest.age >= each.age ? oldest : each), null);
  const pid = worker.pid ? `, pid ${worker.pid}` : "";
  put(cells[0], `${worker.stage}[${worker.worker}]${pid}`);
  put(cells[1], worker.state);
  put(cells[2], time(worker.call_age), worker.long_call ? "bad" : "");
  const progress = call && call.fraction !== null ? `${share(call.fraction)} ` : "";
  const more = worker.calls.length > 1 ? ` +${worker.calls.length - 1}` : "";
  put(cells[3], call ? `${progress}${call.text || ""} ${call.id ? call.id.slice(0, 12) : ""}${more}`.trim() : "",
    call ? "" : "nothing");
  put(cells[4], number(worker.done));
  put(cells[5], share(worker.cpu));
  put(cells[6], size(worker.memory));
  put(cells[7], number(worker.restarts));
  cells[8].classList.toggle("nothing", token === null);
  row.dataset.call = call && call.id ? call.id : "";
  row.dataset.age = call ? time(call.age) : "";
  // The button keeps its place: most calls are over within a second, and rows would jump.
  const [stack, cancels] = cells[8].children;
  const away = !(row.dataset.call && call.age >= CANCEL);
  show(stack, token !== null);
  show(cancels, token !== null);
  cancels.classList.toggle("away", away);
  stack.disabled = false;
  cancels.disabled = away;
}

// -- asking ----------------------------------------------------------------------------------------------------------

const query = () => (chosen === null ? "" : `?engine=${encodeURIComponent(chosen)}`);
const headers = () => (token === null ? {} : { Authorization: `Bearer ${token}` });

async function look() {
  if (timer !== null) clearTimeout(timer);
  timer = null;
  try {
    const answer = await fetch(`api/state${query()}`, { headers: headers(), cache: "no-store" });
    const told = await answer.json();
    if (answer.ok) render(told);
    else refused(answer.status, told);
  } catch (error) {
    const last = shownAt === null ? "" : `; these are its last numbers, of ${shownAt}`;
    trouble(`No answer: the engine has ended, or its server is being started again${last}.`);
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
  find("notes").replaceChildren();
  document.querySelectorAll("#stages button, #workers button, #stop").forEach((each) => { each.disabled = true; });
}

// Tell the outcome of an order.
function said(text, tone = "") {
  put(find("said"), text, TONES[tone] || "");
  show(find("said"), true);
  if (silence !== null) clearTimeout(silence);
  silence = setTimeout(() => show(find("said"), false), TOLD);
}

function buildNote() {
  const item = make("li");
  item.append(make("span"), make("code"), make("span"));
  return item;
}

function fillNote(item, note) {
  item.className = TONES[note.tone] || "";
  put(item.children[0], note.told);
  put(item.children[1], note.command);
  put(item.children[2], note.advice);
  for (const each of item.children) show(each, each.textContent !== "");
}

function render(state) {
  const engine = state.engine;
  if (run !== engine.began) { rates.clear(); run = engine.began; }
  shownAt = clock();
  show(find("trouble"), false);
  document.title = plain(`${engine.domain} – sqspipes_mp`);
  put(find("domain"), engine.domain);
  put(find("verdict"), state.verdict.told, TONES[state.verdict.tone]);
  const machine = state.machine ? `, ${counted(state.machine.cpus, "CPU")} ${share(state.machine.busy)} busy` : "";
  put(find("about"), `${engine.broker}, up ${time(engine.up)}${machine}, version ${engine.version}`);
  show(find("stop"), token !== null);
  find("stop").disabled = engine.ending;
  show(find("sight"), token === null);
  put(find("token"), token === null ? "Enter the token" : "Forget the token");
  keyed(find("notes"), state.notes, (note) => `${note.stage} ${note.worker} ${note.told.replace(/[0-9].*/, "")}`, buildNote, fillNote);
  keyed(find("stages"), state.stages, (stage) => stage.name, buildStage, (item, stage) =>
    fillStage(item, stage, engine, state.workers.filter((worker) => worker.stage === stage.name)));
  workers = state.workers.filter((each) => each.state !== "none");
  keyed(find("workers"), workers, (worker) => `${worker.stage} ${worker.worker}`, buildWorker, fillWorker);
  document.body.dataset.state = "shown";
}

// -- orders ----------------------------------------------------------------------------------------------------------

async function order(keys) {
  said(`${keys.do} ${keys.stage || ""} …`);
  try {
    const answer = await fetch(`api/order${query()}`, { method: "POST", headers: headers(), body: JSON.stringify(keys) });
    const told = await answer.json();
    if (!answer.ok) said(`Refused: ${told.error}`, "bad");
    else said(told.told);
    return answer.ok ? told : null;
  } catch (error) {
    said("No answer to the order.", "bad");
  }
  return null;
}

// Presses add up: the number on the page is as old as the last look.
async function scale(stage, shown, more) {
  const begun = asked.has(stage);
  asked.set(stage, Math.max(0, (begun ? asked.get(stage) : shown) + more));
  if (begun) return;
  for (let sent = null; sent !== asked.get(stage);) {
    sent = asked.get(stage);
    if (await order({ do: "scale", stage, workers: sent }) === null) break;
    await new Promise((resolve) => setTimeout(resolve, SETTLED));
    await look();
  }
  asked.delete(stage);
}

function ask(text, more, no, yes, secret = false) {
  const dialog = find("ask");
  const field = find("ask-value");
  put(find("ask-text"), text);
  put(find("ask-more"), more);
  put(find("ask-no"), no);
  put(find("ask-yes"), yes);
  show(field, secret);
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  // Nothing is killed by a return key that was meant for something else.
  (secret ? field : find("ask-no")).focus();
  return new Promise((resolve) => dialog.addEventListener("close", () =>
    resolve(dialog.returnValue === "yes" ? field.value || true : null), { once: true }));
}

async function cancel(name, { call, age }) {
  const sure = await ask(`Cancel the call of ${name}, which runs for ${age}? Message ${call.slice(0, 12)}`,
    "Its worker is killed and replaced; the message becomes a dead letter. No other message loses an attempt.",
    "Keep it running", "Kill the worker");
  if (sure) await order({ do: "cancel", call });
}

function reading(text) {
  const made = make("pre", text);
  made.tabIndex = 0;
  return made;
}

async function stacks(stage, worker = null) {
  const told = await order({ do: "stack", stage, worker });
  if (told === null) return;
  const silent = told.silent.map((each) => ({ ...each, stack: "no answer: it gets no CPU, or C code keeps its GIL; " +
    `sqspipes-mp stack --stage ${stage} --worker ${each.worker} --signal tells` }));
  const found = [...told.stacks, ...silent].map((each) => ({ ...each,
    state: workers.find((one) => one.stage === each.stage && one.worker === each.worker) }));
  const age = (each) => (each.state && each.state.call_age !== null ? each.state.call_age : -1);
  found.sort((one, other) => age(other) - age(one));
  put(find("stack-title"), `Stacks of ${stage}, at ${clock()}`);
  find("stack-text").replaceChildren(...found.map((each) => {
    const box = make("details");
    // Workers that wait for a message are of little interest.
    box.open = age(each) >= 0 || found.length === 1;
    const since = age(each) >= 0 ? `, in a call for ${time(age(each))}` : `, ${each.state ? each.state.state : "gone"}`;
    box.append(make("summary", `${each.stage}[${each.worker}] (pid ${each.pid})${since}`));
    const [first, ...others] = each.stack.split(/\n(?=Thread )/);
    box.append(reading(first));
    if (others.length) {
      const more = make("details");
      more.append(make("summary", `and ${counted(others.length, "other thread")}`), reading(others.join("\n")));
      box.append(more);
    }
    return box;
  }));
  show(find("stack"), true);
  find("stack-title").focus();
}

find("token").addEventListener("click", async () => {
  if (token !== null) { token = null; sessionStorage.removeItem("token"); return; }
  const given = await ask("The token: SQSPIPES_HTTP_TOKEN, or the text of SQSPIPES_HTTP_TOKEN_FILE, where the engine was started",
    "It shows ids, texts and stacks, and takes orders; this tab keeps it until it is closed.", "Back", "Use it", true);
  if (typeof given === "string") { token = given; sessionStorage.setItem("token", given); }
});
// Enter in the field means OK, not the first button.
find("ask-value").addEventListener("keydown", (event) => {
  if (event.key === "Enter") { event.preventDefault(); find("ask").close("yes"); }
});
find("stop").addEventListener("click", async () => {
  const sure = await ask(`Stop ${find("domain").textContent}?`,
    "As SIGTERM does: running calls end first, what is held goes back to its queue.", "Let it run", "Stop the engine");
  if (sure) await order({ do: "stop" });
});
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") { if (timer === null) look(); }
  else if (timer !== null) { clearTimeout(timer); timer = null; }
});
look();
