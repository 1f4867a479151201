// Home: what runs, what waits, what ran. It asks for the list of jobs every second, and for the events of one job.
import { ago, duration, el, get, onClick, poll, post } from "./app.js";

const $ = (id) => document.getElementById(id);
const SHOWN = 30;
const RESUMABLE = ["stopped", "failed", "lost"];
const pageOf = (job) => (job.command === "train" && job.state === "finished" ? `/results/${job.id}` : `/runs/${job.id}`);
const canResume = (job) => job.command === "train" && RESUMABLE.includes(job.state);

let shown = ""; // the job in the card at the top
let stopEvents = () => {};
let facts = {}; // of its events

function show({ jobs }) {
  const running = jobs.find((job) => job.state === "running");
  const newest = jobs.find((job) => job.command === "train" && job.state !== "queued");
  const current = running ?? (newest && canResume(newest) ? newest : null);
  showCurrent(current);
  showWaiting(jobs.filter((job) => job.state === "queued").reverse());
  showRecent(jobs.filter((job) => !["queued", "running"].includes(job.state)).slice(0, SHOWN));
}

function showCurrent(job) {
  $("idle").hidden = Boolean(job);
  $("running").hidden = !job;
  if (!job) { shown = ""; stopEvents(); return; }
  $("running-title").textContent = job.title;
  $("running-title").href = $("running-open").href = pageOf(job);
  $("running-state").textContent = job.state;
  $("running-state").className = `badge ${job.state}`;
  $("stop").hidden = job.state !== "running";
  $("resume").hidden = !canResume(job);
  if (shown !== job.id) {
    shown = job.id;
    facts = { recent: [] };
    stopEvents();
    stopEvents = poll((next) => `/api/jobs/${job.id}/events?after=${next}`, follow);
  }
}

// Remember what a line of text and a bar need.
function follow({ events, state }) {
  for (const event of events) {
    if (event.event === "start") facts = { recent: [] };
    if (event.event === "run") Object.assign(facts, { total: event.steps, done: event.first_step, images: event.images });
    if (event.event === "progress" && !facts.total) Object.assign(facts, { part: event.done / event.total, text: event.name });
    if (event.event === "step") {
      Object.assign(facts, { done: event.step, loss: event.loss });
      facts.recent = [...facts.recent.slice(-19), event.seconds];
    }
    if (event.event === "message" && !facts.total) facts.text = event.text;
    if (event.event === "error") facts.error = event.what;
  }
  draw(state);
  return state === "running" || state === "queued" || events.length > 0;
}

function draw(state) {
  const share = facts.total ? facts.done / facts.total : facts.part;
  if (share === undefined) $("running-bar").removeAttribute("value");
  else $("running-bar").value = share;
  $("running-bar").hidden = state !== "running" && share === undefined;
  const words = [];
  if (facts.error && state !== "running") words.push(facts.error);
  else if (facts.total) {
    words.push(`step ${facts.done} of ${facts.total}`);
    if (Number.isFinite(facts.loss)) words.push(`loss ${facts.loss.toFixed(4)}`);
    const seconds = [...facts.recent].sort((a, b) => a - b)[facts.recent.length >> 1];
    if (state === "running" && seconds) words.push(`about ${duration(seconds * (facts.total - facts.done))} left`);
  } else words.push(facts.text ?? (state === "running" ? "starting" : ""));
  $("running-text").textContent = words.join(", ");
}

function showWaiting(jobs) {
  $("waiting").hidden = !jobs.length;
  $("waiting-list").replaceChildren(...jobs.map((job) => el("li", { class: "row spread" }, job.title, button("Cancel", () => post(`/api/jobs/${job.id}/stop`)))));
}

let drawn = ""; // the table is made again only if it changed, so that a focused button stays
function showRecent(jobs) {
  $("recent").hidden = !jobs.length;
  $("no-recent").hidden = jobs.length > 0;
  const key = jobs.map((job) => `${job.id} ${job.state}`).join();
  if (key === drawn) return;
  drawn = key;
  $("recent").tBodies[0].replaceChildren(...jobs.map((job) => el("tr", {},
    el("td", {}, el("a", { href: pageOf(job) }, job.title)),
    el("td", {}, el("span", { class: `badge ${job.state}` }, job.state)),
    el("td", { class: "quiet" }, ago(job.created)),
    el("td", {}, el("div", { class: "row" },
      canResume(job) ? button("Resume", () => post(`/api/jobs/${job.id}/resume`), job) : null,
      button("Remove", () => post(`/api/jobs/${job.id}/remove`), job, "Removes this entry. Its results stay."))))));
}

function button(text, action, job, title) {
  const made = el("button", { type: "button", class: "plain", title, ...(job ? { "aria-label": `${text} ${job.title}` } : {}) }, text);
  onClick(made, async () => { await action(); show(await get("/api/jobs")); });
  return made;
}

onClick($("stop"), () => post(`/api/jobs/${shown}/stop`));
onClick($("resume"), async () => {
  const job = shown;
  shown = "";
  await post(`/api/jobs/${job}/resume`);
  show(await get("/api/jobs"));
});
poll(() => "/api/jobs", show);
