// What every page uses: requests, polling, messages, elements, formats, the theme switch.

// An error of the server or the connection; `what` happened, `hint` is what to do, or null.
export class StudioError extends Error {
  constructor(status, what, hint = null) {
    super(what);
    Object.assign(this, { status, what, hint });
  }
}

// Send a request; return the parsed JSON. Throws StudioError.
async function request(method, url, body) {
  const options = { method, headers: {} };
  if (body instanceof FormData) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["content-type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new StudioError(0, "The Studio does not reply.", "Is its window closed?");
  }
  if (response.status === 401) location.assign("/login");
  const data = await response.json().catch(() => ({}));
  if (response.ok) return data;
  throw new StudioError(response.status, data.error?.what ?? `The Studio replied with ${response.status}.`, data.error?.hint);
}

export const get = (url) => request("GET", url);
export const post = (url, body = {}) => request("POST", url, body);

// Call `url(next)` every `every` milliseconds and pass the reply to `show`. `next` is what the last reply named
// so (for `?after=`), at first 0. It pauses while the page is hidden. Returns a function that stops it;
// `show` may return false to do the same.
export function poll(url, show, every = 1000) {
  let next = 0, timer = 0, stopped = false, failures = 0;
  const stop = () => { stopped = true; clearTimeout(timer); };
  async function round() {
    clearTimeout(timer);
    if (stopped || document.hidden) return;
    try {
      const reply = await get(url(next));
      if (stopped) return;
      next = reply.next ?? next;
      failures = 0;
      connection(true);
      if (show(reply) === false) stop();
    } catch (error) {
      failures += 1;
      if (error.status === 0) connection(false);
      else { toast(error); stop(); }
    }
    if (!stopped) timer = setTimeout(round, every * Math.min(1 + failures, 5));
  }
  document.addEventListener("visibilitychange", round);
  round();
  return stop;
}

// Wait until a job has ended; `take` gets its events. Returns the exit code, null if it ended without one.
export async function ended(id, take = () => {}) {
  for (let next = 0; ;) {
    const reply = await get(`/api/jobs/${id}/events?after=${next}`);
    next = reply.next;
    for (const event of reply.events) {
      take(event);
      if (event.event === "end") return event.exit_code;
    }
    if (["lost", "failed", "stopped"].includes(reply.state)) return null;
    await new Promise((done) => { setTimeout(done, 500); });
  }
}

function connection(works) {
  const notice = document.getElementById("connection");
  if (notice) notice.hidden = works;
}

// Wrap an async function for sliders: one call at a time, and after it only the newest of the waiting ones.
export function newest(ask) {
  let busy = false, waiting = null;
  return async function call(...values) {
    if (busy) { waiting = values; return; }
    busy = true;
    try { await ask(...values); } finally {
      busy = false;
      if (waiting) { const next = waiting; waiting = null; call(...next); }
    }
  };
}

// Show a message for some seconds: a text, or a StudioError.
export function toast(message, kind = "") {
  const failed = message instanceof Error;
  const text = failed ? [message.what ?? message.message, message.hint].filter(Boolean).join(" ") : message;
  const box = el("div", { class: `toast ${failed ? "bad" : kind}` }, text);
  document.getElementById("toasts").append(box);
  setTimeout(() => box.remove(), failed ? 12000 : 5000);
}

// Run an action of a button: the button is disabled meanwhile, and an error becomes a message.
export function onClick(button, action) {
  button.addEventListener("click", async () => {
    button.disabled = true;
    try { await action(); } catch (error) { toast(error); } finally { button.disabled = false; }
  });
}

// Make an element. Properties: `class`, attributes, and `onclick` and the like as functions. Children: elements and
// texts; a text is never parsed as HTML.
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child != null));
  return made;
}

// Show an error beside the field `name` of a form; an empty text removes it.
export function fieldError(form, name, text) {
  const input = form.elements[name];
  const field = input?.closest?.(".field");
  if (!field) return false;
  let line = field.querySelector(".error");
  if (!line && text) {
    line = el("p", { class: "error", id: `${input.id || name}-error` });
    field.append(line);
  }
  if (line) line.textContent = text;
  input.setAttribute("aria-invalid", text ? "true" : "false");
  if (text) input.setAttribute("aria-describedby", line.id);
  return true;
}

// A value that this browser remembers.
export function remembered(key, fallback) {
  try { return JSON.parse(localStorage.getItem(`spectune.${key}`)) ?? fallback; } catch { return fallback; }
}
export function remember(key, value) {
  try { localStorage.setItem(`spectune.${key}`, JSON.stringify(value)); } catch { /* private window */ }
}

// Formats.
export const bytes = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : `${Math.ceil(n / 1e3)} kB`);
export const count = (n) => n.toLocaleString("en");
// Addresses of a picture file: small, or whole.
export const thumbnailOf = (path, size = 256) => `/api/thumbnail?size=${size}&path=${encodeURIComponent(path)}`;
export const pictureOf = (path) => `/api/picture?path=${encodeURIComponent(path)}`;
export const fileName = (path) => path.split(/[\\/]/).pop();
export function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  const [hours, minutes] = [Math.floor(s / 3600), Math.floor((s % 3600) / 60)];
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${s % 60} s`;
}
export function ago(unixSeconds) {
  const s = Date.now() / 1000 - unixSeconds;
  if (s < 60) return "just now";
  if (s < 86400) return `${s < 3600 ? `${Math.floor(s / 60)} min` : `${Math.floor(s / 3600)} h`} ago`;
  return new Date(unixSeconds * 1000).toLocaleDateString();
}

// The theme switch: auto, light, dark.
const themeSwitch = document.getElementById("theme-switch");
if (themeSwitch) {
  onClick(themeSwitch, async () => {
    const themes = ["auto", "light", "dark"];
    const theme = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3];
    setTheme(theme);
    await post("/api/settings", { theme });
  });
}
export function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  themeSwitch.querySelector("span").textContent = theme;
}
