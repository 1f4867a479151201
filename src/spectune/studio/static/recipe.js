// The recipe: a form made from the schema, and the same recipe as text.
import { el, get, newest, onClick, post, remember, remembered, toast } from "./app.js";

const $ = (id) => document.getElementById(id);
const DRAFT = "recipe.draft";
let schema = null;
let values = remembered(DRAFT, {}); // the sections of the recipe: {model: {rank: 64}}
let path = null; // the file that was opened or saved last
let checked = false; // the last full check found nothing, and nothing changed since
let timer = 0;

// ---------------------------------------------------------------- values

function valueOf(key) {
  return key.split(".").reduce((found, word) => found?.[word], values);
}

function setValue(key, value) {
  const words = key.split(".");
  const name = words.pop();
  if (value === undefined) {
    const section = words.reduce((found, word) => found?.[word], values);
    if (section) delete section[name];
    if (words.length && section && !Object.keys(section).length) setValue(words.join("."), undefined);
    return;
  }
  let section = values;
  for (const word of words) section = section[word] ??= {};
  section[name] = value;
}

// The value that a text of the form stands for; a text that does not fit is left to the check.
function parsed(field, text) {
  const number = Number(text);
  switch (field.kind) {
    case "boolean": return text === "true";
    case "integer":
    case "number": return text !== "" && Number.isFinite(number) ? number : text;
    case "list": return text.split("\n").map((line) => line.trim()).filter(Boolean).map((line) => parsed(field.items, line));
    case "pair": return text.split(",").map((word) => parsed(field.items, word.trim()));
    case "table":
    case "any": try { return JSON.parse(text); } catch { return text; }
    default: return text;
  }
}

function shown(field, value) {
  if (value === undefined || value === null) return "";
  if (field.kind === "list" && Array.isArray(value)) return value.join("\n");
  if (field.kind === "pair" && Array.isArray(value)) return value.join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

// ---------------------------------------------------------------- the form

// The parts of a text; what stands in backticks is code.
const coded = (text) => text.split("`").map((part, place) => (place % 2 ? el("code", {}, part) : part));

function range(field) {
  const { minimum, maximum, above, below } = field.kind === "list" ? field.items : field;
  const words = [];
  if (minimum !== undefined) words.push(`at least ${minimum}`);
  if (above !== undefined) words.push(`above ${above}`);
  if (maximum !== undefined) words.push(`at most ${maximum}`);
  if (below !== undefined) words.push(`below ${below}`);
  return words.join(", ");
}

function typeWords(field) {
  const names = field.choices ?? field.items?.choices;
  const type = { list: "one per line", pair: "two values", table: "JSON", any: "JSON" }[field.kind] ?? (field.choices ? "" : field.kind);
  return [field.required ? "required" : "", type, field.choices ? "" : names?.join(", "), range(field)].filter(Boolean).join("; ");
}

function entry(field, id) {
  const fallback = field.default === null || field.default === undefined ? "" : shown(field, field.default);
  const shared = { id, name: field.key, "data-key": field.key, "aria-describedby": `${id}-help ${id}-error` };
  if (field.kind === "boolean" || field.kind === "choice") {
    const names = field.kind === "boolean" ? ["true", "false"] : field.choices;
    const first = fallback ? `default: ${fallback}` : "default";
    return el("select", shared, el("option", { value: "" }, first), names.map((name) => el("option", { value: name }, name)));
  }
  if (field.kind === "list") return el("textarea", { ...shared, rows: 2, placeholder: fallback });
  const numeric = field.kind === "integer" || field.kind === "number";
  const list = { "model.base": "checkpoints", "data.validation_folder": "picture-folders" }[field.key];
  return el("input", { ...shared, placeholder: fallback, inputmode: numeric ? "decimal" : "text", list });
}

function row(field) {
  const id = `key-${field.key.replaceAll(".", "-")}`;
  const input = entry(field, id);
  const reset = el("button", { type: "button", class: "plain", title: "Back to the default", "aria-label": `Back to the default of ${field.key}`, hidden: true }, "reset");
  reset.addEventListener("click", () => change(field, ""));
  input.addEventListener("change", () => change(field, input.value));
  return el("div", { class: "key field", "data-search": `${field.key} ${field.help}`.toLowerCase() },
    el("label", { for: id }, field.key, el("small", {}, typeWords(field))),
    el("div", { class: "entry" }, input, reset),
    el("p", { class: "help", id: `${id}-help` }, coded(field.help)));
}

function sectionOf(section, fields, title = section.name) {
  return el("details", { class: "card section", "data-section": section.name },
    el("summary", {}, title, " ", el("span", { class: "quiet" })),
    el("p", { class: "quiet small" }, coded(section.help)), fields.map(row));
}

let fieldsByKey = new Map();

function build() {
  const chosen = valueOf("optimizer.name") ?? "adamw";
  const options = schema.optimizers[chosen];
  const open = new Set([...document.querySelectorAll(".section[open]")].map((one) => one.dataset.section));
  const sections = [];
  fieldsByKey = new Map();
  for (const section of schema.sections) {
    if (section.many) continue;
    const fields = section.fields.filter((field) => field.key !== "optimizer.options");
    sections.push(sectionOf(section, fields));
    for (const field of fields) fieldsByKey.set(field.key, field);
    if (section.name === "optimizer" && options) {
      sections.push(sectionOf({ name: "optimizer.options", help: options.help }, options.fields, `options of ${chosen}`));
      for (const field of options.fields) fieldsByKey.set(field.key, field);
    }
  }
  $("fields").replaceChildren(...sections);
  const first = open.size ? open : new Set(["model", "data", "run"]);
  for (const one of document.querySelectorAll(".section")) one.open = first.has(one.dataset.section);
  fill();
}

function fill() {
  for (const input of document.querySelectorAll("[data-key]")) {
    const field = fieldsByKey.get(input.dataset.key);
    const value = valueOf(field.key);
    if (document.activeElement !== input || input.value === "") input.value = shown(field, value);
    const box = input.closest(".key");
    box.classList.toggle("set", value !== undefined);
    box.querySelector(".entry button").hidden = value === undefined;
  }
  for (const section of document.querySelectorAll(".section")) {
    const set = section.querySelectorAll(".key.set").length;
    section.querySelector("summary .quiet").textContent = set ? `${set} set` : "";
  }
  filter();
}

function filter() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const changedOnly = $("changed").checked;
  for (const box of document.querySelectorAll(".key")) {
    const found = words.every((word) => box.dataset.search.includes(word));
    box.hidden = !found || (changedOnly && !box.classList.contains("set"));
  }
  for (const section of document.querySelectorAll(".section")) {
    const any = section.querySelector(".key:not([hidden])") !== null;
    section.hidden = !any && (words.length > 0 || changedOnly);
    if (any && words.length) section.open = true;
  }
}

// ---------------------------------------------------------------- changes

function change(field, text) {
  setValue(field.key, text.trim() === "" ? undefined : parsed(field, text));
  if (field.key === "optimizer.name") {
    setValue("optimizer.options", undefined);
    build();
  }
  changed();
  refreshText();
}

function changed() {
  checked = false;
  remember(DRAFT, values);
  allowStart("The recipe has not been checked since the last change");
  fill();
  clearTimeout(timer);
  timer = setTimeout(quickCheck, 300);
}

const refreshText = newest(async () => {
  try {
    $("text").value = (await post("/api/recipe/text", { values })).text;
    $("text-error").textContent = "";
  } catch (error) { $("text-error").textContent = error.what ?? String(error); }
});

const quickCheck = newest(async () => {
  try { showProblems((await post("/api/recipe/check", { values, quick: true })).problems); } catch (error) { toast(error); }
});

const readText = newest(async () => {
  try {
    values = (await post("/api/recipe/open", { text: $("text").value })).values;
    $("text-error").textContent = "";
    build();
    changed();
  } catch (error) { $("text-error").textContent = [error.what, error.hint].filter(Boolean).join(" "); }
});

function showProblems(problems) {
  for (const line of document.querySelectorAll(".key .error")) line.remove();
  for (const input of document.querySelectorAll("[data-key]")) input.removeAttribute("aria-invalid");
  const general = [];
  for (const problem of problems) {
    const input = document.querySelector(`[data-key="${CSS.escape(problem.key)}"]`);
    if (!input) { general.push(problem); continue; }
    input.setAttribute("aria-invalid", "true");
    input.closest(".key").append(el("p", { class: "error", id: `${input.id}-error` }, coded(problem.what)));
  }
  const inFields = problems.length - general.length;
  const lines = general.map((one) => el("li", {}, coded([one.what, one.hint].filter(Boolean).join(" "))));
  if (inFields) lines.push(el("li", {}, `${inFields} more beside the fields, marked red`));
  $("problems").hidden = lines.length === 0;
  $("problems").className = "notice bad";
  $("problems").replaceChildren(el("ul", {}, lines));
  const set = document.querySelectorAll(".key.set").length;
  $("state").textContent = problems.length ? `${set} keys set, ${problems.length} to mend` : `${set} keys set, all valid`;
}

function allowStart(reason) {
  $("start").disabled = reason !== "";
  $("start").title = reason;
}

async function fullCheck() {
  $("state").textContent = "Checking the files, the pictures and the memory...";
  const reply = await post("/api/recipe/check", { values });
  showProblems(reply.problems);
  checked = reply.problems.length === 0;
  allowStart(checked ? "" : "The check found problems");
  if (checked) {
    const warnings = reply.forecast.warnings ?? [];
    $("state").textContent = "Checked: the training can start.";
    $("problems").hidden = warnings.length === 0;
    $("problems").className = "notice warn";
    $("problems").replaceChildren(el("ul", {}, warnings.map((text) => el("li", {}, coded(text)))));
  }
  return checked;
}

async function save(name, overwrite) {
  const saved = await post("/api/recipe/save", { values, name, overwrite });
  path = saved.path;
  return path;
}

// ---------------------------------------------------------------- open

async function open(source) {
  const reply = await post("/api/recipe/open", source);
  values = reply.values;
  path = source.path ?? null;
  $("text").value = reply.text;
  showFlags(reply.flags, reply.notes);
  build();
  changed();
}

function showFlags(flags, notes) {
  const rows = flags.map((one) => el("tr", {}, el("td", { class: "mono" }, one.flag), el("td", {}, one.verdict), el("td", {}, one.text)));
  const lines = notes.map((text) => el("p", { class: "warn" }, text));
  const head = el("thead", {}, el("tr", {}, ["Flag", "Verdict", "What became of it"].map((text) => el("th", {}, text))));
  $("flags").replaceChildren(...lines, ...(rows.length ? [el("table", {}, head, el("tbody", {}, rows))] : []));
}

function choose(select, source) {
  select.addEventListener("change", () => {
    if (select.value) open(source(select.value)).catch(toast);
  });
}

async function listFiles() {
  const files = await get("/api/recipe/files");
  $("preset").append(...files.presets.map((one) => el("option", { value: one.name }, one.name)));
  $("file").append(...files.recipes.map((one) => el("option", { value: one }, one)));
  $("preset").addEventListener("change", () => {
    $("preset-about").textContent = files.presets.find((one) => one.name === $("preset").value)?.about ?? "";
  });
}

// Offer the checkpoints and folders that were found, in the fields that take one.
async function offerFiles() {
  const found = await get("/api/new/choices");
  for (const [id, items] of [["checkpoints", found.checkpoints], ["picture-folders", found.folders]]) {
    document.body.append(el("datalist", { id }, items.map((one) => el("option", { value: one.path }))));
  }
}

choose($("preset"), (preset) => ({ preset }));
choose($("file"), (file) => ({ path: file }));
onClick($("import"), () => open({ command: $("command").value }));
onClick($("clear"), () => open({ text: "" }).then(() => { $("text").value = ""; }));
onClick($("check"), fullCheck);
$("save").addEventListener("click", () => {
  $("save-form").hidden = !$("save-form").hidden;
  $("save-name").value ||= valueOf("run.name") ?? "";
  if (!$("save-form").hidden) $("save-name").focus();
});
$("save-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    toast(`Saved as ${await save($("save-name").value, event.target.elements.overwrite.checked)}`);
    $("save-form").hidden = true;
  } catch (error) { toast(error); }
});
onClick($("start"), async () => {
  const recipe = await save(valueOf("run.name") ?? "recipe", true);
  const job = await post("/api/jobs", { command: "train", values: { recipe } });
  location.assign(`/runs/${job.id}`);
});
$("search").addEventListener("input", filter);
$("changed").addEventListener("change", () => { remember("recipe.changed", $("changed").checked); filter(); });
$("text").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(readText, 700); });
$("fields").addEventListener("submit", (event) => event.preventDefault());

$("changed").checked = remembered("recipe.changed", false);
schema = await get("/api/recipe/schema");
listFiles().catch(toast);
offerFiles().catch(() => {}); // the fields work without
const asked = new URLSearchParams(location.search).get("path");
if (asked) await open({ path: asked }).catch(toast);
else { build(); changed(); if (Object.keys(values).length) refreshText(); }
