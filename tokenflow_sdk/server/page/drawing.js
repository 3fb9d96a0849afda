// The panel of drawing: a prompt, a seed and a preset to a picture, which comes scale by scale.

import { TFC, bytes, events, post } from "./api.js";
import { Scales, Tasks, fill, number, offer, stem } from "./parts.js";

const $ = (id) => document.getElementById(id);
const SEEDS = 2 ** 32;

export class Drawing {
  #previews = [];
  #prompt = "";

  /** `drawn(tfc)` is told of the base64 of each new drawing's codes. */
  constructor(model, drawn) {
    const section = $("drawing");
    section.hidden = false;
    this.tell = drawn;
    this.sides = model.patch_nums;
    this.tasks = new Tasks(section, $("drawn-frame"), $("draw-stop"));
    this.scales = new Scales(section, this.sides, (scale) => this.#show(scale));
    $("draw").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#draw();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      $("draw").requestSubmit();
    });
    $("again").addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey || !event.target.href) return;
      event.preventDefault();
      this.#fromLink(event.target.hash);
    });
    window.addEventListener("hashchange", () => this.#fromLink(location.hash));
    this.#fromLink(location.hash);
  }

  /** Draw what a link says. */
  #fromLink(hash) {
    const asked = new URLSearchParams(hash.slice(1));
    if (!asked.get("prompt")) return;
    const preset = asked.get("preset") ?? "";
    $("prompt").value = asked.get("prompt");
    $("seed").value = asked.get("seed") ?? "";
    $("preset").value = [...$("preset").options].some((each) => each.value === preset) ? preset : "";
    if ($("draw").reportValidity()) this.#draw();
  }

  #draw() {
    const prompt = $("prompt").value;
    const preset = $("preset").value;
    const seed = $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS : Number($("seed").value);
    this.tasks.run("Drawing…", (signal) => this.#run({ prompt, seed, ...(preset && { preset }) }, signal));
  }

  async #run(asked, signal) {
    const began = performance.now();
    this.#begin(asked);
    const body = { ...asked, stream: true, partial_scales: this.sides.map((_, i) => i + 1) };
    const answer = await post("v1/images/generations", body, signal);
    for await (const event of events(answer)) {
      const blob = new Blob([bytes(event.b64_json)], { type: `image/${event.output_format}` });
      const scale = event.scale ?? this.sides.length;
      await this.#add(scale, blob, signal);
      if (event.type !== "image_generation.completed") continue;
      this.#finish(asked, event, blob);
      return `Drawn in ${((performance.now() - began) / 1000).toFixed(1)} s with seed ${event.seed}.`;
    }
    throw new Error("The server ended before the picture was finished. Draw again.");
  }

  #begin(asked) {
    this.#previews = [];
    this.#prompt = asked.prompt;
    this.scales.slider.disabled = true;
    this.scales.tiles.forEach((_, i) => (this.scales.canvas(i + 1).width = 1));
    const link = new URLSearchParams(asked);
    history.replaceState(null, "", `#${link}`);
    $("again").href = `#${link}`;
    $("again").removeAttribute("aria-disabled");
    $("drawn-seed").textContent = asked.seed;
    $("drawn-preset").textContent = asked.preset ?? "default";
    $("drawn-bytes").textContent = "–";
    offer($("drawn-png"), null);
    offer($("drawn-tfc"), null);
  }

  async #add(scale, blob, signal) {
    this.#previews[scale - 1] = blob;
    const small = await createImageBitmap(blob, { resizeWidth: 96, resizeHeight: 96, resizeQuality: "medium" });
    signal.throwIfAborted();
    const canvas = this.scales.canvas(scale);
    canvas.width = canvas.height = 96;
    canvas.getContext("2d").drawImage(small, 0, 0);
    await this.#show(scale);
  }

  async #show(scale) {
    if (!this.#previews[scale - 1]) return;
    this.scales.show(scale);
    await fill($("drawn"), this.#previews[scale - 1], `Drawing of “${this.#prompt}”, ${scale} of ${this.sides.length} scales`);
  }

  #finish(asked, event, blob) {
    const name = stem(`${asked.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}-${asked.seed}`);
    const tfc = bytes(event.tfc);
    this.scales.slider.disabled = false;
    $("drawn-bytes").textContent = number(tfc.length);
    offer($("drawn-png"), blob, `${name}.${event.output_format}`);
    offer($("drawn-tfc"), new Blob([tfc], { type: TFC }), `${name}.tfc`);
    this.tell(event.tfc);
  }
}
