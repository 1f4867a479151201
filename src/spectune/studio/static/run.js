// Run: everything on the page follows from the events of the job, so that a reload changes nothing.
import { bytes, count, duration, el, fileName, get, onClick, pictureOf, poll, post, remember, remembered, thumbnailOf, toast } from "./app.js";
import { lineChart, smoothed } from "./charts.js";

const at = (id) => document.getElementById(id);
const job = at("run").dataset.job;
const trains = "trains" in at("run").dataset;
const api = `/api/jobs/${encodeURIComponent(job)}`;
const RECENT = 30; // steps whose median time gives the time left
const MESSAGES = 200;

const run = {};
function forget() {
  Object.assign(run, {
    total: 0, first: 0, images: null, steps: [], validations: [], previews: [], saves: [], messages: [],
    stage: null, error: null, ended: null, heard: false,
  });
}
forget();
let card = null, state = "queued";

// ---- events

const on = {
  start() { Object.assign(run, { error: null, ended: null, stage: null, messages: [] }); },
  message({ level, text }) { run.messages.push({ level, text }); if (run.messages.length > MESSAGES) run.messages.shift(); },
  progress({ done, total, name }) { run.stage = { done, total, name }; },
  run(event) {
    Object.assign(run, { total: event.steps, first: event.first_step, images: event.images, stage: null });
    // a run that resumes repeats the steps after its state
    run.steps = run.steps.filter((one) => one.step <= event.first_step);
    run.previews = run.previews.filter((one) => one.step <= event.first_step);
    run.validations = run.validations.filter((one) => one.step <= event.first_step);
  },
  step(event) { run.steps.push(event); run.stage = null; },
  validation(event) { run.validations = [...run.validations.filter((one) => one.step !== event.step), event]; },
  save(event) { run.saves.push(event); },
  preview(event) { run.previews = [...run.previews.filter((one) => one.step !== event.step), event]; },
  error(event) { run.error = event; },
  end(event) { run.ended = event; },
};

function take(reply) {
  for (const event of reply.events) on[event.event]?.(event);
  const changed = reply.events.length > 0 || !run.heard || (reply.state && reply.state !== state);
  run.heard = true;
  if (reply.state) state = reply.state;
  if (changed) show();
}

// ---- what is shown

function show() {
  showState();
  showFailure();
  showProgress();
  showTiles();
  showCharts();
  showPreviews();
  showMessages();
  if (state !== "running") at("kill").hidden = true;
}

const WORDS = { queued: "waiting", running: "running", finished: "finished", stopped: "stopped", failed: "failed", lost: "ended without a result" };

function showState() {
  at("state").textContent = WORDS[state] ?? state;
  at("state").className = `badge ${state}`;
  const running = state === "running", training = trains && running && run.total > 0;
  at("stop").hidden = !(running || state === "queued");
  at("stop").textContent = state === "queued" ? "Remove from the queue" : "Stop";
  at("save").hidden = at("preview").hidden = !training;
  at("resume").hidden = !trains || !["stopped", "failed", "lost"].includes(state);
  at("resume").textContent = run.saves.length ? "Resume" : "Start again";
  at("result").hidden = !trains || (state !== "finished" && !run.saves.length);
  at("result").classList.toggle("primary", state === "finished");
}

function showFailure() {
  const box = at("failure");
  if (state === "lost") {
    box.replaceChildren(notice("The process ended without a message. Perhaps the computer was switched off, or its memory was full.", todo()));
  } else if (state === "failed") {
    const { what, hint } = run.error ?? { what: "The job failed; the log below has the reason." };
    box.replaceChildren(notice(what, hint ? `What to do: ${hint}.` : null, todo()));
    if (!run.error) at("log-box").open = true;
  } else box.replaceChildren();
}
const notice = (...parts) => el("div", { class: "notice bad stack" }, parts.filter(Boolean).map((part) => (typeof part === "string" ? el("p", {}, part) : part)));
function todo() {
  if (!trains) return null;
  const words = run.saves.length ? "Resume continues from the last save; or you " : "You ";
  return el("p", {}, words, "can ", el("a", { href: `/recipe?path=${encodeURIComponent(files?.recipe ?? "")}` }, "change the recipe"), " and start it again.");
}

function showProgress() {
  const last = run.steps.at(-1)?.step ?? run.first;
  let [stage, done, total] = ["", last, run.total];
  if (state === "queued") stage = "Waiting until the job before is done";
  else if (run.stage && state === "running") [stage, done, total] = [capital(run.stage.name), run.stage.done, run.stage.total];
  else if (run.total) stage = `Step ${count(last)} of ${count(run.total)}`;
  else stage = state === "running" ? "Starting" : capital(WORDS[state] ?? state);
  at("stage").textContent = stage;
  const bar = at("bar");
  if (!total && state === "running") bar.removeAttribute("value");
  else { bar.max = total || 1; bar.value = done; }
  const seconds = stepSeconds();
  const left = state === "running" && seconds && run.total ? (run.total - last) * seconds : null;
  at("left").textContent = left === null ? "" : `about ${duration(left)} left, done at ${clock(left)}`;
}
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const clock = (seconds) => new Date(Date.now() + seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
function stepSeconds() {
  const recent = run.steps.slice(-RECENT).map((one) => one.seconds).sort((a, b) => a - b);
  return recent.length ? recent[Math.floor(recent.length / 2)] : null;
}

const losses = () => run.steps.filter((one) => one.loss !== null).map((one) => [one.step, one.loss]);
const short = (value) => (value === null || value === undefined ? "-" : String(+value.toPrecision(4)));

function showTiles() {
  const last = run.steps.at(-1);
  const points = losses();
  at("loss").textContent = points.length ? short(smoothed(points, Number(at("smoothing").value)).at(-1)[1]) : "-";
  const [first, newest] = [run.validations.at(0), run.validations.at(-1)];
  at("held-out").textContent = newest ? short(newest.loss) + change(first, newest) : "-";
  if (!last) return;
  at("rate").textContent = String(+last.learning_rate.toPrecision(3));
  at("speed").textContent = `${+stepSeconds().toPrecision(3)} s`;
  at("memory-name").textContent = card?.memory ? "VRAM" : "Memory";
  at("memory").textContent = bytes(last.memory_bytes) + (card?.memory ? ` of ${bytes(card.memory)}` : "");
}
function change(first, newest) {
  if (first === newest || !first.loss) return "";
  const percent = (newest.loss / first.loss - 1) * 100;
  return ` (${percent > 0 ? "+" : ""}${percent.toFixed(1)} % against the base)`;
}

function showCharts() {
  const [smoothing, log] = [Number(at("smoothing").value), at("log-scale").checked];
  lineChart(at("loss-chart"), [{ name: "loss", points: losses() }], { smoothing, log, xLabel: "step", label: "Loss of each step" });
  const held = run.validations.map((one) => [one.step, one.loss]);
  const base = run.validations.find((one) => one.step === 0);
  const series = [{ name: "tuned", points: held, smooth: false }];
  if (base && held.length > 1) series.push({ name: "base", points: [[0, base.loss], [held.at(-1)[0], base.loss]], smooth: false });
  const empty = "No pictures are held out. Put some into a folder named validation beside the pictures to see whether the training goes too far.";
  lineChart(at("held-chart"), series, { xLabel: "step", label: "Loss on held-out pictures", empty });
  const parts = Object.keys(run.steps.at(-1)?.learning_rates ?? {});
  const rates = parts.map((part) => ({ name: part, smooth: false, points: run.steps.map((one) => [one.step, one.learning_rates?.[part]]) }));
  const same = rates.every((one) => one.points.every(([, y], i) => y === rates[0].points[i][1]));
  lineChart(at("rate-chart"), same ? rates.slice(0, 1).map((one) => ({ ...one, name: "all parts" })) : rates, { xLabel: "step", label: "Learning rate" });
}

let shownPreviews = "";
function showPreviews() {
  const key = JSON.stringify(run.previews);
  if (key === shownPreviews || !run.previews.length) return;
  shownPreviews = key;
  const rows = [...run.previews].sort((a, b) => b.step - a.step);
  const prompts = rows[0].prompts;
  const head = el("thead", {}, el("tr", {}, el("th", {}, el("span", { class: "small quiet" }, "Step")), prompts.map((text) => el("th", { scope: "col", title: text, class: "small" }, cut(text)))));
  const body = rows.map((row) => el("tr", {}, el("th", { scope: "row" }, count(row.step)), row.files.map((file, i) => el("td", {}, thumbnail(file, row.prompts[i] ?? "", row.step)))));
  at("previews").replaceChildren(el("table", { class: "previews" }, head, el("tbody", {}, body)));
}
const cut = (text) => (text.length > 60 ? `${text.slice(0, 57)}...` : text);
function thumbnail(file, prompt, step) {
  const words = `step ${count(step)}: ${prompt}`;
  const picture = el("img", { src: thumbnailOf(file), alt: words, loading: "lazy", width: 128, height: 128 });
  return el("button", { type: "button", title: "Enlarge", onclick: () => enlarge(file, words) }, picture);
}
function enlarge(file, words) {
  at("large-picture").src = pictureOf(file);
  at("large-picture").alt = words;
  at("large-text").textContent = `${words} (${fileName(file)})`;
  at("large").showModal();
}

function showMessages() {
  if (!run.messages.length) return;
  const list = at("messages"), atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 30;
  list.replaceChildren(...run.messages.map(({ level, text }) => el("li", { class: level === "warning" ? "warn" : level === "note" ? "" : "quiet" }, text)));
  if (atEnd) list.scrollTop = list.scrollHeight;
}

// ---- the log, only while it is open

let stopLog = null;
at("log-box").addEventListener("toggle", () => {
  stopLog?.();
  stopLog = null;
  if (!at("log-box").open) return;
  at("log").textContent = "";
  stopLog = poll((next) => `${api}/log?after=${next}`, (reply) => {
    if (!reply.text) return;
    at("log").textContent = (at("log").textContent + reply.text).slice(-40_000);
    at("log").scrollTop = at("log").scrollHeight;
  });
});

// ---- controls

const smoothing = at("smoothing"), logScale = at("log-scale");
smoothing.value = remembered("smoothing", 0.9);
logScale.checked = remembered("log-scale", false);
smoothing.addEventListener("input", () => { remember("smoothing", Number(smoothing.value)); showTiles(); showCharts(); });
logScale.addEventListener("change", () => { remember("log-scale", logScale.checked); showCharts(); });

const said = { stop: trains ? "The training saves after this step and stops." : "It stops at the next item.", save: "It saves after this step.", preview: "It draws after this step." };
for (const flag of ["stop", "save", "preview"]) onClick(at(flag), async () => { await post(`${api}/${flag}`); toast(said[flag]); });
onClick(at("resume"), async () => {
  const made = await post(`${api}/resume`);
  if (made?.id && made.id !== job) location.assign(`/runs/${made.id}`);
});
// A process that does not stop, for example because it waits for a disk, can be ended without a save.
at("stop").addEventListener("click", () => setTimeout(() => { at("kill").hidden = state !== "running"; }, 30_000));
onClick(at("kill"), () => post(`${api}/kill`));
at("close-large").addEventListener("click", () => at("large").close());
at("large").addEventListener("click", (event) => { if (event.target === at("large")) at("large").close(); });

let files = null;
if (trains) {
  get(`/api/runs/${encodeURIComponent(job)}/files`).then((found) => {
    files = found;
    at("files").replaceChildren("Recipe ", el("a", { href: `/recipe?path=${encodeURIComponent(found.recipe)}` }, fileName(found.recipe)), `, results in ${found.output}`);
    show();
  }, () => {});
  get("/api/runs/card").then((found) => { card = found; showTiles(); }, () => {});
}
poll((next) => `${api}/events?after=${next}`, take);
