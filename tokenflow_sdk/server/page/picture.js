// The panel of encoding: a picture, its reconstruction from any number of scales, its token maps, its .tfc file.

import { TFC, bytes, call } from "./api.js";
import { Scales, Tasks, fill, number, offer, pixels, stem } from "./parts.js";
import { TokenMap, paint } from "./token_map.js";

const $ = (id) => document.getElementById(id);

export class Picture {
  #codes = null;
  #rebuilt = new Map();

  /** `encoded(tfc)` is told of the base64 of each new picture's codes. */
  constructor(model, encoded) {
    const section = $("picture");
    this.tell = encoded;
    this.tasks = new Tasks(section, section.querySelector(".pair"));
    this.map = new TokenMap();
    this.scales = new Scales(section, model.patch_nums, () => this.#show());
    this.scales.tiles.forEach((tile, i) => {
      tile.addEventListener("pointerenter", () => this.#codes && (this.#setMap(i + 1), this.map.peek()));
      tile.addEventListener("pointerleave", () => this.#codes && this.#setMap(this.scales.value));
    });
    $("file").addEventListener("change", (event) => this.#take(event.target.files));
    document.addEventListener("paste", (event) => {
      if (this.#take(event.clipboardData.files)) event.preventDefault();
    });
    for (const name of ["dragover", "dragleave", "drop"]) {
      document.addEventListener(name, (event) => {
        if (!event.dataTransfer.types.includes("Files")) return;
        $("drop").classList.toggle("over", name === "dragover");
        if (name === "drop") this.#take(event.dataTransfer.files);
      });
    }
  }

  #take(files) {
    if (!files.length) return false;
    this.tasks.run("Encoding…", (signal) => this.#encode(files[0], signal));
    $("file").value = "";
    return true;
  }

  async #encode(file, signal) {
    const headers = { "Content-Type": file.type.startsWith("image/") ? file.type : "application/octet-stream" };
    const answer = await call("v1/images/tokens?prepared=true", { method: "POST", headers, body: file, signal });
    const codes = (await answer.json()).data[0];
    const prepared = new Blob([bytes(codes.prepared)], { type: "image/png" });
    const original = await pixels(prepared);
    const tfc = new Blob([bytes(codes.tfc)], { type: TFC });
    signal.throwIfAborted();
    this.#codes = { ...codes, tfc, original, name: file.name };
    this.#rebuilt.clear();
    $("rebuilt").hidden = true;
    await fill($("original"), prepared, `The picture ${file.name} as it is encoded`);
    $("original-note").textContent = `${file.name}, ${number(file.size)} bytes`;
    offer($("picture-tfc"), tfc, `${stem(file.name)}.tfc`);
    this.#paintTiles();
    this.scales.slider.disabled = false;
    this.scales.show(codes.n_scales);
    this.tell(codes.tfc);
    return this.#rebuild(signal);
  }

  #show() {
    this.#setMap(this.scales.value);
    this.tasks.run("", (signal) => this.#rebuild(signal));
  }

  /** Show the reconstruction of the chosen scales, and its figures. */
  async #rebuild(signal) {
    const [scale, codes] = [this.scales.value, this.#codes];
    const count = codes.patch_nums.slice(0, scale).reduce((sum, side) => sum + side * side, 0);
    const size = codes.scale_ends[scale - 1];
    this.#setMap(scale);
    $("picture-codes").textContent = number(count);
    $("picture-bytes").textContent = number(size);
    $("psnr").textContent = "–";
    if (!this.#rebuilt.has(scale)) {
      const options = { method: "POST", headers: { "Content-Type": TFC }, body: codes.tfc, signal };
      const answer = await call(`v1/images/decode?scales=${scale}`, options).catch((error) => {
        if (!signal.aborted) $("rebuilt").hidden = true;
        throw error;
      });
      const blob = await answer.blob();
      const found = { blob, psnr: psnr(codes.original, await pixels(blob)) };
      signal.throwIfAborted();
      this.#rebuilt.set(scale, found);
    }
    const { blob, psnr: quality } = this.#rebuilt.get(scale);
    await fill($("rebuilt"), blob, `${codes.name} rebuilt from ${scale} of ${codes.n_scales} scales`);
    $("psnr").textContent = quality === Infinity ? "exact" : `${quality.toFixed(1)} dB`;
    return `Rebuilt from ${scale} of ${codes.n_scales} scales.`;
  }

  #setMap(scale) {
    this.map.set(scale, codesOf(this.#codes, scale), this.#codes.patch_nums[scale - 1]);
  }

  #paintTiles() {
    const { patch_nums: sides } = this.#codes;
    sides.forEach((side, i) => paint(this.scales.canvas(i + 1), codesOf(this.#codes, i + 1), side));
  }
}

function codesOf({ indices, patch_nums: sides }, scale) {
  const start = sides.slice(0, scale - 1).reduce((sum, side) => sum + side * side, 0);
  return indices.slice(start, start + sides[scale - 1] ** 2);
}

/** Decibels between two pictures of 8-bit RGBA, over their colours. */
function psnr(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) if (i % 4 !== 3) sum += (a[i] - b[i]) ** 2;
  return 10 * Math.log10((255 * 255 * 0.75 * a.length) / sum);
}
