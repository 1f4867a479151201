// New tune: what can be chosen, the live numbers of the rank, the check, and the start.
import { ago, bytes, count, duration, el, ended, fieldError, fileName, get, newest, onClick, post, remember, remembered, thumbnailOf, toast } from "./app.js";

const RANKS = [4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256];
const LENGTHS = { quick: 0.25, normal: 1, long: 2 };
const OTHER = "(other)";
const TAKES_MINUTES = 1e8; // bytes; the energy of a larger checkpoint is measured by a job
const form = document.getElementById("tune");
const at = (id) => document.getElementById(id);

const state = {
  model: null, // the reply about the checkpoint
  pictures: null, // the reply about the folder
  resolution: 1024, // of the recipe, in pixels
  normalSteps: null, // for the chosen pictures and batch
  energies: null, rankChosen: false, promptsEdited: false, nameEdited: false,
  check: null, // the newest reply of the check
  checked: "", // the fields that it belongs to
  speed: null, // seconds per step of earlier runs with this checkpoint
};

const modelPath = () => (form.model.value === OTHER ? form.model_path.value.trim() : form.model.value);
const folderPath = () => (form.folder.value === OTHER ? form.folder_path.value.trim() : form.folder.value);
const rank = () => RANKS[Number(form.rank.value)];
const prompts = () => form.prompts.value.split("\n").map((line) => line.trim()).filter(Boolean);

function steps() {
  const length = form.length.value;
  if (length === "own") return Number(form.own_steps.value) || null;
  return state.normalSteps && length !== "normal" ? stepsOf(length) : null; // null: the usual number
}
function stepsOf(length) {
  const wanted = state.normalSteps * LENGTHS[length];
  return wanted >= 10 ? Math.round(wanted / 10) * 10 : Math.max(1, Math.round(wanted));
}

// ---- what can be chosen

async function loadChoices() {
  let found;
  try { found = await get("/api/new/choices"); } catch (error) { reason(error.what); toast(error); return; }
  const models = found.checkpoints.map((one) => [one.path, `${one.name} (${one.kind}, ${bytes(one.nbytes)}, ${ago(one.modified)})`]);
  fill(form.model, models, "Another file...", remembered("model", ""));
  const folders = found.folders.map((one) => [one.path, `${one.name} (${count(one.pictures)} pictures, ${ago(one.modified)})`]);
  fill(form.folder, folders, "Another folder...", remembered("folder", ""));
  if (!models.length) at("model-facts").replaceChildren(none("checkpoint", found.model_folders, "model"));
  if (!folders.length) at("picture-facts").replaceChildren(none("folder of pictures", found.data_folders, "picture"));
  reason("Choose a checkpoint and a folder of pictures.");
  await Promise.all([showModel(), showFolder()]);
}

function fill(select, rows, other, preferred) {
  const wanted = new URLSearchParams(location.search).get(select.name);
  select.replaceChildren(...rows.map(([value, text]) => el("option", { value }, text)), el("option", { value: OTHER }, other));
  const chosen = [wanted, preferred].find((value) => rows.some((row) => row[0] === value));
  select.value = chosen ?? rows[0]?.[0] ?? OTHER;
  if (wanted && !chosen) { select.value = OTHER; form[`${select.name}_path`].value = wanted; }
  showOther(select);
}

function none(what, folders, kind) {
  const where = folders.length ? `in ${folders.join(", ")}` : `: no ${kind} folder is set`;
  return el("p", {}, `No ${what} was found ${where}. Add a ${kind} folder in `, el("a", { href: "/settings" }, "Settings"), ", or type a path.");
}

const showOther = (select) => { at(`${select.name}-path-field`).hidden = select.value !== OTHER; };

// ---- the checkpoint

const showModel = newest(async () => {
  const path = modelPath();
  [state.model, state.energies, state.speed] = [null, null, null];
  stale();
  if (!path) return;
  at("model-facts").textContent = "Reading the checkpoint...";
  fieldError(form, fieldOf("model"), "");
  try {
    const found = await get(`/api/new/checkpoint?path=${encodeURIComponent(path)}`);
    if (path !== modelPath()) return;
    state.model = found;
    remember("model", path);
    const names = { unet: "the UNet", te1: "text encoder 1", te2: "text encoder 2", vae: "the VAE" };
    const type = `predicts ${found.prediction}${found.declared ? "" : " (assumed: the file does not say it)"}`;
    at("model-facts").textContent = `${bytes(found.nbytes)} with ${found.parts.map((part) => names[part] ?? part).join(", ")}; ${type}.`;
    showEnergy(path);
    showSpeed(path);
  } catch (error) {
    at("model-facts").textContent = "";
    fieldError(form, fieldOf("model"), [error.what, error.hint].filter(Boolean).join(" "));
  }
  showRank();
  check();
});

const fieldOf = (name) => (form[name].value === OTHER ? `${name}_path` : name);

async function showEnergy(path) {
  state.energies = remembered(`energy.${path}`, null);
  if (!state.energies && state.model.nbytes < TAKES_MINUTES) {
    const reply = await get(`/api/new/energy?path=${encodeURIComponent(path)}`).catch(() => null);
    keepEnergies(path, reply?.energies);
  }
  showRank();
}

function keepEnergies(path, energies) {
  if (!energies) return;
  remember(`energy.${path}`, energies);
  if (path === modelPath()) state.energies = energies;
}

// Measure a large checkpoint with a job, and wait for its result.
async function measure() {
  const path = modelPath();
  at("rank-energy").textContent = "measuring...";
  const job = await post("/api/jobs", { command: "inspect", values: { model: path, spectrum: true } });
  let energies = null;
  await ended(job.id, (event) => { if (event.event === "result") energies = event.report.total.energies; });
  if (energies) keepEnergies(path, energies);
  else toast("The measurement ended without a result.");
  showRank();
}

async function showSpeed(path) {
  state.speed = await get(`/api/new/speed?path=${encodeURIComponent(path)}`).catch(() => null);
  showLength();
}

// ---- the pictures

const showFolder = newest(async () => {
  [state.pictures, state.normalSteps] = [null, null];
  stale();
  if (!folderPath()) return;
  at("picture-facts").replaceChildren(el("p", { class: "quiet" }, "Looking at the pictures..."));
  fieldError(form, fieldOf("folder"), "");
  try {
    await judgePictures();
  } catch (error) {
    at("picture-facts").replaceChildren();
    fieldError(form, fieldOf("folder"), [error.what, error.hint].filter(Boolean).join(" "));
  }
  check();
});

// Ask for the facts about the pictures at the resolution of the recipe, and show them.
async function judgePictures() {
  const path = folderPath();
  const found = await get(`/api/new/pictures?path=${encodeURIComponent(path)}&resolution=${state.resolution}`);
  if (path !== folderPath()) return;
  state.pictures = found;
  remember("folder", path);
  if (!state.nameEdited && form.name.value !== found.name) form.name.value = found.name;
  at("picture-facts").replaceChildren(...pictureFacts(found, path));
}

function pictureFacts(found, path) {
  const captions = found.captioned === found.pictures ? "all with a caption" : `${count(found.captioned)} with a caption of their own`;
  const facts = [el("p", {}, el("b", {}, `${count(found.pictures)} pictures`), `, ${captions}. `, el("a", { href: `/data?folder=${encodeURIComponent(path)}` }, "Look at them"))];
  const strip = found.samples.map((file) => el("img", { src: thumbnailOf(file, 144), alt: fileName(file), loading: "lazy", width: 72, height: 72 }));
  facts.push(el("div", { class: "strip" }, strip));
  if (!found.problems.length) return [...facts, el("p", { class: "good small" }, "No problem was found.")];
  const list = found.problems.map((one) => el("li", {}, one.text, one.items.length ? `: ${one.items.join(", ")}${one.more > 0 ? ` and ${count(one.more)} more` : ""}` : ""));
  return [...facts, el("details", {}, el("summary", {}, `${found.problems.length} ${found.problems.length === 1 ? "thing" : "things"} to look at; they do not stop the training`), el("ul", { class: "plain small" }, list))];
}

// ---- the live numbers of the rank

// A cost between the listed ranks: costs grow in proportion to the rank.
function costAt(ranks, wanted, key) {
  let [low, from] = [0, 0];
  for (const row of ranks) {
    if (wanted <= row.rank) return from + ((wanted - low) / (row.rank - low)) * (row[key] - from);
    [low, from] = [row.rank, row[key]];
  }
  return from;
}

function energyAt(energies, wanted) {
  const rows = Object.entries(energies).map(([r, e]) => [Number(r), e]).sort((a, b) => a[0] - b[0]);
  let [low, from] = [0, 0];
  for (const [r, e] of rows) {
    if (wanted <= r) return from + ((wanted - low) / (r - low)) * (e - from);
    [low, from] = [r, e];
  }
  return from;
}

function requiredAt(wanted) {
  const memory = state.check?.forecast?.memory;
  if (!memory || !state.model || !state.check.rank) return null;
  const cost = (r) => costAt(state.model.ranks, r, "training_bytes");
  return memory.required + cost(wanted) - cost(state.check.rank);
}

function showRank() {
  at("rank-value").textContent = rank();
  form.rank.setAttribute("aria-valuetext", `${rank()} directions`);
  const ranks = state.model?.ranks;
  at("rank-file").textContent = ranks ? bytes(2 * costAt(ranks, rank(), "file_bytes")) : "-";
  const required = requiredAt(rank());
  at("rank-memory").textContent = required ? bytes(required) : "-";
  if (state.energies) at("rank-energy").textContent = `${Math.round(energyAt(state.energies, rank()) * 100)} %`;
  else if (!state.model || state.model.nbytes < TAKES_MINUTES) at("rank-energy").textContent = "-";
  else {
    const button = el("button", { type: "button", class: "plain", title: "Reads the whole file; this takes minutes." }, "Measure");
    onClick(button, measure);
    at("rank-energy").replaceChildren(button);
  }
  showMemory(required);
}

// ---- memory and length

function showMemory(required) {
  const forecast = state.check?.forecast;
  if (!forecast || required === null) { at("memory-line").replaceChildren(); return; }
  const { available } = forecast.memory;
  const card = forecast.device.startsWith("cuda");
  at("memory-name").textContent = card ? "VRAM" : "Memory";
  const place = card ? forecast.device : "main memory";
  const share = available ? Math.min(100, (required / available) * 100) : 0;
  const fits = !available || required <= available;
  const fill = el("i", {});
  fill.style.width = `${share}%`;
  const text = available ? `about ${bytes(required)} of ${bytes(available)} (${place})` : `about ${bytes(required)}`;
  at("memory-line").replaceChildren(
    el("div", { class: "row spread small" }, el("b", {}, card ? "VRAM" : "Memory"), el("span", { class: fits ? "" : "bad" }, text)),
    el("div", { class: `meter ${fits ? "" : "bad"}`, role: "img", "aria-label": text }, fill),
    card ? "" : el("p", { class: "small quiet" }, "No graphics card was found: the processor does the work. For a full SDXL, this takes days."),
  );
}

function showLength() {
  const batch = state.check?.forecast?.schedule?.pictures_per_step;
  for (const length of Object.keys(LENGTHS)) {
    if (!state.normalSteps) continue;
    at(`steps-${length}`).textContent = `${count(stepsOf(length))} steps${time(stepsOf(length), batch)}`;
  }
  const planned = state.check?.steps;
  if (!planned || !batch) return;
  const times = Math.round((planned * batch) / state.check.pictures);
  const known = state.speed?.seconds_per_picture ? "" : " The time is known after the first steps.";
  at("length-facts").textContent = `Each picture is seen about ${count(times)} times.${known}`;
}

function time(wanted, batch) {
  const seconds = state.speed?.seconds_per_picture;
  if (!seconds || !batch) return "";
  const all = seconds * batch * wanted;
  return `, about ${all < 120 || all >= 3600 ? duration(all) : `${Math.round(all / 60)} min`}`;
}

// ---- the check

function fields() {
  return {
    model: modelPath(), folder: folderPath(), name: form.name.value.trim(),
    rank: state.rankChosen ? rank() : null, steps: steps(),
    prediction: form.prediction.value || null, prompts: state.promptsEdited ? prompts() : null,
  };
}

function reason(text) { at("reason").textContent = text; }

function stale() {
  state.check = null;
  at("start").disabled = at("open-recipe").disabled = true;
  if (modelPath() && folderPath()) reason("Checking...");
  else reason("Choose a checkpoint and a folder of pictures.");
}

const runCheck = newest(async () => {
  if (!state.model || !state.pictures) {
    at("problems").replaceChildren();
    const missing = [modelPath() && !state.model ? "the checkpoint" : "", folderPath() && !state.pictures ? "the pictures" : ""].filter(Boolean);
    if (missing.length) reason(`Start is possible when ${missing.join(" and ")} can be used.`);
    return;
  }
  const asked = fields();
  at("start").disabled = true;
  reason("Checking...");
  try {
    const found = await post("/api/new/check", asked);
    if (JSON.stringify(asked) !== JSON.stringify(fields())) return; // a newer check follows
    [state.check, state.checked] = [found, JSON.stringify(asked)];
    showCheck(found);
  } catch (error) {
    state.check = null;
    at("open-recipe").disabled = true;
    showProblems([{ what: error.what ?? error.message, hint: error.hint }]);
  }
  showRank();
  showLength();
});

let timer = 0;
function check() {
  clearTimeout(timer);
  timer = setTimeout(runCheck, 150);
}

function showCheck(found) {
  if (found.resolution !== state.resolution) { // the pictures were judged for another size
    state.resolution = found.resolution;
    judgePictures().catch(toast);
  }
  if (asUsual()) state.normalSteps = found.steps;
  if (!state.rankChosen) {
    const nearest = RANKS.reduce((best, one) => (Math.abs(one - found.rank) < Math.abs(best - found.rank) ? one : best));
    form.rank.value = RANKS.indexOf(nearest);
  }
  if (!state.promptsEdited) form.prompts.value = found.prompts.join("\n");
  at("notes").replaceChildren(...[...found.notes, found.forecast?.chosen ?? ""].filter(Boolean).map((text) => el("p", {}, text)));
  at("open-recipe").disabled = false;
  showPlan(found);
  showProblems(found.problems, [...found.warnings, ...(found.forecast?.warnings ?? [])]);
  if (state.checked !== JSON.stringify(fields())) check(); // the usual number of steps was not known
}
const asUsual = () => form.length.value === "normal" || (form.length.value !== "own" && !state.normalSteps);

function showPlan(found) {
  const { forecast } = found;
  const rows = [["Steps", `${count(found.steps)}${time(found.steps, forecast?.schedule.pictures_per_step)}`]];
  if (forecast) {
    rows.push(["Pictures", `${count(forecast.pictures.training)}${forecast.pictures.validation ? `, and ${count(forecast.pictures.validation)} to measure with` : ""}`]);
    rows.push(["Saves", forecast.saves], ["Recipe", found.path]);
  }
  at("plan").replaceChildren(...rows.flatMap(([name, text]) => [el("dt", {}, name), el("dd", { class: "small" }, text)]));
}

function showProblems(problems, warnings = []) {
  const blocks = problems.map((one) => el("p", { class: "notice bad small" }, one.what, one.hint ? ` ${capital(one.hint)}.` : ""));
  const notes = [...new Set(warnings)].map((text) => el("p", { class: "notice warn small" }, text));
  at("problems").replaceChildren(...blocks, ...notes);
  at("start").disabled = problems.length > 0;
  reason(problems.length ? "Start is possible when this is solved." : "The check passed. Nothing is written before you press Start.");
}
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// ---- events

form.model.addEventListener("change", () => { showOther(form.model); showModel(); });
form.folder.addEventListener("change", () => { showOther(form.folder); showFolder(); });
form.model_path.addEventListener("change", showModel);
form.folder_path.addEventListener("change", showFolder);
form.rank.addEventListener("input", () => { state.rankChosen = true; showRank(); });
form.rank.addEventListener("change", check);
form.prediction.addEventListener("change", check);
form.name.addEventListener("input", () => { state.nameEdited = form.name.value !== ""; check(); });
form.prompts.addEventListener("input", () => { state.promptsEdited = true; });
form.prompts.addEventListener("change", check);
form.own_steps.addEventListener("input", () => { form.length.value = "own"; check(); });
for (const radio of form.length) radio.addEventListener("change", check);

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (at("start").disabled) return;
  at("start").disabled = true;
  reason("Starting...");
  try {
    const written = await post("/api/new/write", fields());
    const job = await post("/api/jobs", { command: "train", values: { recipe: written.path }, title: written.name });
    location.assign(`/runs/${job.id}`);
  } catch (error) {
    showProblems([{ what: error.what ?? error.message, hint: error.hint }]);
    toast(error);
  }
});
onClick(at("open-recipe"), async () => {
  const written = await post("/api/new/write", fields());
  location.assign(`/recipe?path=${encodeURIComponent(written.path)}`);
});

loadChoices();
