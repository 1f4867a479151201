// A command as a form: it runs as a job; progress, messages and the result appear beside it.
import { el, ended, get, onClick, pictureOf, post, toast } from "./app.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
let job = null;

// The values that differ from the defaults, and all required ones; a text with lines is a list.
function values() {
  const found = {};
  for (const input of form.elements) {
    if (!input.name) continue;
    const text = input.type === "checkbox" ? String(input.checked) : input.value.trim();
    if (text === "" || (text === input.dataset.default && !input.required)) continue;
    if (input.type === "checkbox") found[input.name] = input.checked;
    else if ("lines" in input.dataset) found[input.name] = text.split("\n").map((line) => line.trim()).filter(Boolean);
    else found[input.name] = "number" in input.dataset ? Number(text) : text;
  }
  return found;
}

// Pictures that the command wrote, for the fields that name one.
function pictures() {
  const named = ["plot", "sheet", "out"].map((name) => form.elements[name]?.value).filter((path) => path?.endsWith(".png"));
  return named.map((path) => el("img", { class: "picture", src: pictureOf(path), alt: `Written to ${path}` }));
}

const HANDLERS = {
  start: () => { $("state").textContent = "Running"; },
  progress: (event) => {
    $("progress").max = event.total || 1;
    $("progress").value = event.done;
    $("current").textContent = `${event.done} of ${event.total} ${event.name}`;
  },
  message: (event) => $("messages").append(el("p", { class: event.level === "warning" ? "notice warn" : "quiet" }, event.text)),
  error: (event) => $("messages").append(el("div", { class: "notice bad" }, el("p", {}, event.what), event.hint ? el("p", {}, event.hint) : null)),
};

// The pictures that were written, and what the command printed.
async function showOutcome(exitCode) {
  let [text, next] = ["", 0];
  for (;;) {
    const part = await get(`/api/jobs/${job}/log?after=${next}`);
    if (!part.text) break;
    [text, next] = [text + part.text, part.next];
  }
  const log = exitCode === 2 ? [] : [el("pre", { tabindex: 0 }, text)]; // 2: the error is shown above
  $("result").replaceChildren(...(exitCode === 0 ? pictures() : []), ...log);
}

function over() {
  $("progress").hidden = true;
  $("current").textContent = "";
  $("run").disabled = false;
  $("stop").hidden = true;
}

async function follow(id) {
  job = id;
  $("stop").hidden = false;
  const code = await ended(id, (event) => HANDLERS[event.event]?.(event));
  const states = { 0: "Finished", 1: "Finished, with differences or open points", 130: "Stopped" };
  $("state").textContent = code === null ? "The process ended without a result" : states[code] ?? "Failed";
  over();
  await showOutcome(code);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  $("run").disabled = true;
  for (const id of ["messages", "result"]) $(id).replaceChildren();
  $("outcome").hidden = false;
  $("progress").hidden = false;
  $("progress").removeAttribute("value");
  $("state").textContent = "Waiting for its turn";
  try {
    const made = await post("/api/jobs", { command: form.dataset.command, values: values() });
    follow(made.id).catch(toast);
  } catch (error) {
    $("outcome").hidden = true;
    $("run").disabled = false;
    toast(error);
  }
});
onClick($("stop"), () => post(`/api/jobs/${job}/stop`));

const found = await get("/api/tools/files").catch(() => ({ files: [] }));
$("files").append(...found.files.map((path) => el("option", { value: path })));
