// Chooses a photo: a sample, a file, a dropped one, or a pasted one.

import { at } from "./dom.js";

/** Calls `onPhoto({blob, bitmap, name})` for every chosen photo; bitmap is null if the browser cannot read it. */
export function listenForPhotos(onPhoto) {
  let latest = 0;
  async function take(blob, name) {
    const number = ++latest;
    const bitmap = await createImageBitmap(blob).catch(() => null);
    if (number === latest) onPhoto({ blob, bitmap, name });
  }

  async function takeSample(button) {
    const number = ++latest;
    const response = await fetch(button.dataset.sample).catch(() => null);
    if (!response?.ok) {
      at("photo-error").textContent = "The server does not answer, so this sample cannot be fetched.";
      at("photo-error").hidden = false;
      return;
    }
    const blob = await response.blob();
    if (number === latest) await take(blob, button.firstElementChild.alt);
    press(button);
  }

  function takeFile(file) {
    if (!file) return;
    press(null);
    take(file, file.name || "Pasted photo");
  }

  const buttons = [...document.querySelectorAll("[data-sample]")];
  const press = (pressed) => buttons.forEach((button) => button.setAttribute("aria-pressed", button === pressed));
  buttons.forEach((button) => button.addEventListener("click", () => takeSample(button)));

  at("file").addEventListener("change", (event) => {
    takeFile(event.target.files[0]);
    event.target.value = ""; // the same file may be chosen again
  });
  addEventListener("paste", (event) => takeFile([...event.clipboardData.files][0]));

  let depth = 0; // of elements that the drag is over
  const veil = (shown) => (at("veil").hidden = !shown);
  addEventListener("dragenter", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    depth += 1;
    veil(true);
  });
  addEventListener("dragleave", () => veil((depth = Math.max(depth - 1, 0)) > 0));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    veil((depth = 0) > 0);
    takeFile(event.dataTransfer.files[0]);
  });
  return () => takeSample(buttons[0]);
}
