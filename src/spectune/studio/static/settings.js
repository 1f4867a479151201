// Settings: every change is saved at once.
import { fieldError, onClick, post, setTheme, toast } from "./app.js";

const page = document.getElementById("main");
const current = (kind) => [...page.querySelectorAll(`[data-folders="${kind}"] [data-remove]`)].map((one) => one.dataset.remove);

async function save(form, change) {
  if (form) fieldError(form, "folder", "");
  try {
    await post("/api/settings", change);
    location.reload();
  } catch (error) {
    if (!form) throw error;
    fieldError(form, "folder", [error.what, error.hint].filter(Boolean).join(". "));
  }
}

for (const form of page.querySelectorAll("form[data-add]")) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    save(form, { [form.dataset.add]: [...current(form.dataset.add), form.elements.folder.value] });
  });
}

for (const button of page.querySelectorAll("[data-remove]")) {
  const kind = button.closest("[data-folders]").dataset.folders;
  onClick(button, () => save(null, { [kind]: current(kind).filter((folder) => folder !== button.dataset.remove) }));
}

for (const button of page.querySelectorAll("[data-browse]")) {
  onClick(button, async () => {
    const form = button.closest("form");
    toast("The dialog may be behind this window.");
    const { folder } = await post("/api/settings/browse", { kind: button.dataset.browse });
    if (!folder) return;
    form.elements.folder.value = folder;
    form.requestSubmit();
  });
}

const output = page.querySelector("form[data-output]");
output.addEventListener("submit", (event) => {
  event.preventDefault();
  save(output, { output: output.elements.folder.value });
});

document.getElementById("themes").addEventListener("change", async (event) => {
  setTheme(event.target.value);
  try { await post("/api/settings", { theme: event.target.value }); } catch (error) { toast(error); }
});
