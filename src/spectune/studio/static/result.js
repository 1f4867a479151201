// Result: compare, choose strengths and saves, build, verify.
import { bytes, count, el, ended, fileName, get, onClick, pictureOf, post, thumbnailOf, toast } from "./app.js";

const at = (id) => document.getElementById(id);
const job = at("result").dataset.job;
const api = `/api/results/${encodeURIComponent(job)}`;
const NAMES = { unet: ["Picture (UNet)", "The part that draws."], te: ["Words (text encoders)", "The part that reads the prompt. It often learns enough early: choose an earlier step if prompts stop working."] };

let files = null;
const choice = {}; // part -> {step, strength}

async function load() {
  try { files = await get(`${api}/files`); } catch (error) {
    at("failure").replaceChildren(el("p", { class: "notice bad" }, [error.what, error.hint].filter(Boolean).join(" ")));
    return;
  }
  for (const part of files.parts) choice[part] ??= { step: files.tuned ? null : (files.saves.at(-1)?.step ?? null), strength: 1 };
  if (!at("prompts").value) at("prompts").value = files.prompts.join("\n");
  showParts();
  showPreviews();
  showBuilt();
  if (files.compare && !at("sheet").querySelector("img")) showSheet(files.compare);
  const possible = files.tuned !== null || files.saves.length > 0;
  for (const id of ["compare", "checkpoint", "lora"]) at(id).disabled = !possible;
  if (!possible) at("choice").textContent = "There is no result yet: the training has saved nothing.";
}

// ---- the parts

function showParts() {
  at("parts").replaceChildren(...files.parts.map(partFields));
  sayChoice();
}

function partFields(part) {
  const [name, help] = NAMES[part];
  const shown = el("output", { for: `strength-${part}` }, choice[part].strength.toFixed(2));
  const slider = el("input", { type: "range", id: `strength-${part}`, min: 0, max: 1.5, step: 0.05, value: choice[part].strength, oninput: () => {
    choice[part].strength = Number(slider.value);
    shown.textContent = choice[part].strength.toFixed(2);
    sayChoice();
  } });
  const steps = [...(files.tuned ? [["", "the last step"]] : []), ...files.saves.map(({ step }) => [String(step), `step ${count(step)}`]).reverse()];
  const select = el("select", { id: `step-${part}`, onchange: () => {
    choice[part].step = select.value ? Number(select.value) : null;
    sayChoice();
  } }, steps.map(([value, text]) => el("option", { value }, text)));
  select.value = choice[part].step ?? "";
  return el("fieldset", {}, el("legend", { title: help }, name),
    el("div", { class: "field" }, el("label", { for: `strength-${part}` }, "Strength: ", shown), slider),
    el("div", {}, el("label", { for: `step-${part}` }, "From the save of"), select));
}

function sayChoice() {
  const plain = files.parts.every((part) => choice[part].strength === 1 && choice[part].step === null);
  at("choice").textContent = plain ? "Everything from the last step, at full strength." : "The files get a name of their own with these choices.";
}

// ---- jobs

// Queue the jobs of a file and wait for the last one. Returns its path, or null.
async function make(kind) {
  at("work").replaceChildren();
  const plan = await post(`${api}/plan`, { kind, parts: choice, prompts: at("prompts").value.split("\n").filter((line) => line.trim()).slice(0, 4) });
  let made = null;
  for (const one of plan.jobs) made = await post("/api/jobs", { ...one, title: `${files.name}: ${one.command}` });
  if (made && !(await follow(made.id))) return null;
  return plan.target;
}

async function follow(id) {
  const bar = el("progress", { max: 1, "aria-label": "Progress" });
  const words = el("p", { class: "small" }, "Waiting...");
  at("work").replaceChildren(words, bar, el("a", { class: "small", href: `/runs/${id}` }, "Details"));
  let failure = null;
  const code = await ended(id, (event) => {
    if (event.event === "progress") { words.textContent = `${event.name} (${count(event.done)} of ${count(event.total)})`; bar.max = event.total || 1; bar.value = event.done; }
    if (event.event === "error") failure = event;
  });
  at("work").replaceChildren(...(code === 0 ? [] : [failed(failure)]));
  return code === 0;
}
const failed = (error) => el("p", { class: "notice bad small" }, error ? [error.what, error.hint].filter(Boolean).join(". ") : "The job ended without a result.");

onClick(at("compare"), async () => {
  at("sheet").replaceChildren(el("p", { class: "quiet" }, "Drawing; this takes a while without a graphics card..."));
  const target = await make("compare");
  if (target) showSheet(target);
  else at("sheet").replaceChildren(el("p", { class: "bad" }, "It could not be drawn; the reason is on the right."));
});
function showSheet(path) {
  const alt = "Pictures of the base on the left and of the tuned model on the right, with the same prompts and seeds";
  at("sheet").replaceChildren(el("img", { class: "sheet", src: `${pictureOf(path)}&at=${Date.now()}`, alt }), el("p", { class: "small quiet" }, fileName(path)));
}
for (const kind of ["checkpoint", "lora"]) {
  onClick(at(kind), async () => {
    const target = await make(kind);
    if (!target) return;
    await load();
    toast(`Built ${fileName(target)}.`);
    at("built").querySelector(`[data-path="${CSS.escape(target)}"] .copy`)?.focus();
  });
}

// ---- what was built

function showBuilt() {
  if (!files.built.length) return;
  at("built").replaceChildren(...files.built.map(builtFile), comfy());
}

function builtFile({ kind, path, nbytes }) {
  const verdict = el("div", { class: "small", role: "status" });
  const copy = el("button", { type: "button", class: "copy" }, "Copy path");
  onClick(copy, async () => { await copied(path); toast("The path is in the clipboard."); });
  const verify = el("button", { type: "button", title: "Reads the file and lists what other programs load of it" }, "Verify");
  onClick(verify, async () => {
    verdict.textContent = "Reading the file...";
    verdict.replaceChildren(...verified(await get(`/api/results/verify?path=${encodeURIComponent(path)}`), kind));
  });
  return el("div", { class: "built", "data-path": path },
    el("p", {}, el("b", {}, kind === "lora" ? "LoRA" : "Checkpoint"), `, ${bytes(nbytes)}`),
    el("p", { class: "mono small" }, path), el("div", { class: "row" }, copy, verify), verdict);
}

function verified(found, kind) {
  const whole = kind === "lora" || found.role === "model";
  const head = el("p", { class: whole && !found.problems.length ? "good" : "bad" }, whole ? "The file is complete and can be read." : `The file is of the kind ${found.role}.`);
  const rows = found.programs.map((one) => el("li", {}, `${one.program}: ${one.loads}${one.note ? `, ${one.note}` : ""}`));
  return [head, ...found.problems.map((text) => el("p", { class: "bad" }, text)), el("ul", { class: "plain" }, rows)];
}

// Copying needs https or this computer; otherwise the text is selected by the user.
async function copied(text) {
  if (navigator.clipboard) { await navigator.clipboard.writeText(text); return; }
  throw new Error("This browser copies only on this computer: select the path and copy it.");
}

function comfy() {
  const checkpoint = files.built.find((one) => one.kind === "checkpoint"), lora = files.built.find((one) => one.kind === "lora");
  const words = [];
  if (checkpoint) words.push(`copy ${fileName(checkpoint.path)} to models/checkpoints and choose it in the node Load Checkpoint`);
  if (lora) words.push(`copy ${fileName(lora.path)} to models/loras, load ${fileName(files.base)} with Load Checkpoint and add the node Load LoRA with strength 1`);
  return el("p", { class: "small quiet" }, el("b", {}, "In ComfyUI: "), `${words.join("; or ")}. Press R there to see new files.`);
}

function showPreviews() {
  if (!files.previews.length) return;
  const rows = files.previews.map(({ step, files: pictures }) => el("tr", {}, el("th", { scope: "row" }, `step ${count(step)}`),
    pictures.map((path) => el("td", {}, el("a", { href: pictureOf(path), target: "_blank" }, el("img", { src: thumbnailOf(path), alt: `step ${count(step)}, ${fileName(path)}`, loading: "lazy" }))))));
  at("previews").replaceChildren(el("table", { class: "previews" }, el("tbody", {}, rows.reverse())));
}

load();
