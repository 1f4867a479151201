// Pictures and captions: a grid of which only the visible part exists, captions that save themselves, undo.
import { count, el, get, newest, onClick, pictureOf, post, remember, remembered, thumbnailOf, toast } from "./app.js";
import { histogram } from "./charts.js";

const $ = (id) => document.getElementById(id);
const [CARD_WIDTH, CARD_HEIGHT, PAGE] = [230, 300, 100];
const FILTERS = {
  all: "all", no_caption: "without a caption", long: "with more than 225 tokens", small: "enlarged more than 1.5 times",
  cropped: "losing more than 5 % of the area", duplicate: "duplicates", unreadable: "unreadable",
};
let folder = "";
let total = 0;
let pages = new Map(); // page number -> rows, or a promise
let version = 0; // of the filter: replies to an older one are dropped
const undone = []; // what Undo takes back, the newest last: lists of {path, text}

// ---------------------------------------------------------------- the folder

async function listFolders() {
  const found = await get("/api/data/folders");
  $("folder").append(...found.folders.map((one) => el("option", { value: one.path }, `${one.path} (${count(one.pictures)})`)));
  const wanted = new URLSearchParams(location.search).get("folder") ?? remembered("data.folder", "");
  if (found.folders.some((one) => one.path === wanted)) $("folder").value = wanted;
  else if (found.folders.length === 1) $("folder").value = found.folders[0].path;
  if (!found.folders.length) $("facts").textContent = found.roots.length ? "No folder with pictures was found." : "No folder for pictures is set. Add one in Settings.";
  if ($("folder").value) await openFolder();
}

async function openFolder(refresh = false) {
  folder = $("folder").value;
  if (!folder) return;
  remember("data.folder", folder);
  $("facts").textContent = "Reading the folder...";
  const facts = await get(`/api/data/open?folder=${encodeURIComponent(folder)}&refresh=${refresh}`);
  showFacts(facts);
  $("loaded").hidden = false;
  await show();
}

function showFacts(facts) {
  const problems = facts.count - facts.captioned;
  $("facts").textContent = `${count(facts.count)} pictures, ${count(facts.draws)} drawn in an epoch; ${count(facts.captioned)} with a caption`
    + `${problems ? `, ${count(problems)} without` : ""}; ${(100 * facts.cropped).toFixed(1)} % of the area is cropped away.`;
  histogram($("buckets"), facts.buckets, { label: "Pictures of each training size" });
  const chosen = $("filter").value || "all";
  $("filter").replaceChildren(...Object.entries(FILTERS).map(([name, words]) => el("option", { value: name }, `${words} (${count(facts.filters[name])})`)));
  $("filter").value = chosen;
}

async function refreshFacts() {
  showFacts(await get(`/api/data/open?folder=${encodeURIComponent(folder)}`));
}

// ---------------------------------------------------------------- the grid

const query = () => `folder=${encodeURIComponent(folder)}&filter=${$("filter").value}&search=${encodeURIComponent($("search").value)}`;

const show = newest(async () => {
  version += 1;
  pages = new Map();
  const first = await get(`/api/data/rows?${query()}&start=0&count=${PAGE}`);
  total = first.total;
  pages.set(0, first.rows);
  cards.clear();
  $("inner").replaceChildren();
  $("grid").scrollTop = 0;
  draw();
});

const columns = () => Math.max(1, Math.floor($("grid").clientWidth / CARD_WIDTH));
const cards = new Map(); // index -> element

function draw() {
  const across = columns();
  const width = $("grid").clientWidth / across;
  $("inner").style.height = `${Math.ceil(total / across) * CARD_HEIGHT}px`;
  const top = $("grid").scrollTop;
  const first = Math.max(0, (Math.floor(top / CARD_HEIGHT) - 1) * across);
  const last = Math.min(total, (Math.ceil((top + $("grid").clientHeight) / CARD_HEIGHT) + 1) * across);
  for (const [index, card] of cards) {
    if ((index < first || index >= last) && !card.contains(document.activeElement)) { card.remove(); cards.delete(index); }
  }
  for (let index = first; index < last; index++) {
    const row = rowAt(index);
    if (!row) continue;
    let card = cards.get(index);
    if (!card) { card = cardOf(row, index); cards.set(index, card); $("inner").append(card); }
    Object.assign(card.style, { left: `${(index % across) * width}px`, top: `${Math.floor(index / across) * CARD_HEIGHT}px`, width: `${width}px`, height: `${CARD_HEIGHT}px` });
  }
}

// The row at an index; undefined while its page is on the way.
function rowAt(index) {
  const page = Math.floor(index / PAGE);
  const rows = pages.get(page);
  if (Array.isArray(rows)) return rows[index - page * PAGE];
  if (!rows) {
    const asked = version;
    pages.set(page, get(`/api/data/rows?${query()}&start=${page * PAGE}&count=${PAGE}`).then((reply) => {
      if (asked !== version) return;
      pages.set(page, reply.rows);
      draw();
    }).catch((error) => { pages.delete(page); toast(error); }));
  }
  return undefined;
}

function marks(row) {
  if (row.problem) return row.problem;
  const words = [`${row.size.join("x")} to ${row.bucket.join("x")}`, `${row.tokens} tokens`];
  if (row.duplicate) words.push("duplicate");
  if (row.enlarged > 1.5) words.push(`enlarged ${row.enlarged.toFixed(1)}x`);
  if (row.cropped > 0.05) words.push(`${Math.round(100 * row.cropped)} % cropped`);
  return words.join(", ");
}

function cardOf(row, index) {
  const picture = el("img", { src: thumbnailOf(row.path), alt: "", loading: "lazy", decoding: "async" });
  const line = el("p", { class: "marks", title: marks(row) }, marks(row));
  const text = el("textarea", { "aria-label": `Caption of ${row.name}`, spellcheck: "true", placeholder: "no caption" });
  text.value = row.text;
  let timer = 0;
  const save = newest(async () => {
    clearTimeout(timer);
    if (text.value === row.text) return;
    const wanted = text.value;
    try {
      const reply = await post("/api/data/caption", { path: row.path, text: wanted });
      remembering([{ path: row.path, text: reply.before }]);
      Object.assign(row, { text: wanted, tokens: reply.tokens, captioned: wanted.trim() !== "" });
      line.textContent = line.title = `saved; ${marks(row)}`;
      text.setAttribute("aria-invalid", "false");
    } catch (error) {
      if (text.getAttribute("aria-invalid") !== "true") toast(error);
      text.setAttribute("aria-invalid", "true");
      if (error.status === 0) timer = setTimeout(save, 2000); // the server does not reply
    }
  });
  text.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(save, 800); });
  text.addEventListener("change", save);
  return el("div", { class: "picture-card", "data-index": index },
    el("button", { type: "button", "aria-label": `Show ${row.name} large`, onclick: () => enlarge(row) }, picture),
    el("p", { class: "name", title: row.path }, row.name), text, line);
}

function enlarge(row) {
  $("large-picture").src = pictureOf(row.path);
  $("large-picture").alt = row.text || row.name;
  $("large").querySelector("p").textContent = `${row.name}: ${row.text}`;
  $("large").showModal();
}

// ---------------------------------------------------------------- changes

function remembering(changes) {
  undone.push(changes);
  $("undo").disabled = false;
  $("undo").textContent = `Undo (${undone.length})`;
}

onClick($("undo"), async () => {
  const changes = undone.at(-1);
  if (!changes) return;
  await post("/api/data/captions", { changes });
  undone.pop(); // not before: the request can fail
  $("undo").textContent = undone.length ? `Undo (${undone.length})` : "Undo";
  setTimeout(() => { $("undo").disabled = undone.length === 0; });
  await refreshFacts();
  await show();
});

async function replaceAll(apply) {
  const found = await post("/api/data/replace", {
    folder, filter: $("filter").value, search: $("search").value, find: $("find").value, replace: $("by").value, apply,
  });
  $("replace-state").textContent = apply ? `Replaced in ${count(found.pictures)} captions.` : `${count(found.pictures)} of the captions shown contain it.`;
  if (apply && found.changes.length) {
    remembering(found.changes);
    await refreshFacts();
    await show();
  }
}

onClick($("replace-count"), () => replaceAll(false));
$("replace").addEventListener("submit", (event) => { event.preventDefault(); replaceAll(true).catch(toast); });
onClick($("replace-open"), () => { $("replace").hidden = !$("replace").hidden; if (!$("replace").hidden) $("find").focus(); });

async function add(files) {
  if (!folder) { toast("Choose a folder first."); return; }
  let added = 0;
  for (const file of files) {
    const body = new FormData();
    body.append("files", file);
    try { added += (await post(`/api/uploads/data?folder=${encodeURIComponent(folder)}`, body)).added.length; } catch (error) { toast(error); }
    $("facts").textContent = `Adding ${added} of ${files.length}...`;
  }
  if (added) toast(`${added} files added.`);
  await openFolder(true);
}

$("files").addEventListener("change", () => add([...$("files").files]).catch(toast));
let dragged = 0;
document.addEventListener("dragenter", (event) => { event.preventDefault(); dragged += 1; $("drop").hidden = false; });
document.addEventListener("dragleave", () => { dragged -= 1; if (dragged <= 0) $("drop").hidden = true; });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dragged = 0;
  $("drop").hidden = true;
  add([...event.dataTransfer.files]).catch(toast);
});

$("folder").addEventListener("change", () => openFolder().catch(toast));
onClick($("refresh"), () => openFolder(true));
$("filter").addEventListener("change", () => show().catch(toast));
let searching = 0;
$("search").addEventListener("input", () => { clearTimeout(searching); searching = setTimeout(() => show().catch(toast), 200); });
$("grid").addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
new ResizeObserver(() => draw()).observe($("grid"));
onClick($("large-close"), () => $("large").close());

listFolders().catch((error) => { $("facts").textContent = [error.what, error.hint].filter(Boolean).join(" "); });
