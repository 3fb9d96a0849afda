// What the panels share: one task at a time, the row of scales, links to files.

export const number = (value) => value.toLocaleString("en");

/** Runs one task at a time and says how it goes; a new one cancels the one before. */
export class Tasks {
  #running = null;

  /** `section` has the line of state; `busy` is what the task fills. */
  constructor(section, busy, stop = null) {
    this.state = section.querySelector(".state");
    this.busy = busy;
    this.stop = stop;
    stop?.addEventListener("click", () => {
      this.cancel();
      this.say("Stopped.");
    });
  }

  /** Run `work(signal)`, which may return what to say at its end. */
  async run(said, work) {
    this.cancel();
    const mine = (this.#running = new AbortController());
    this.say(said);
    this.#show(true);
    try {
      const end = await work(mine.signal);
      if (!mine.signal.aborted) this.say(end ?? "");
    } catch (error) {
      if (!mine.signal.aborted) this.say(error.message, true);
    } finally {
      if (this.#running === mine) this.cancel();
    }
  }

  cancel() {
    this.#running?.abort();
    this.#running = null;
    this.#show(false);
  }

  say(text, wrong = false) {
    this.state.textContent = text;
    this.state.classList.toggle("wrong", wrong);
  }

  #show(running) {
    this.busy.setAttribute("aria-busy", running);
    if (!this.stop) return;
    // Who has the focus on a button that goes must not lose their place.
    if (!running && document.activeElement === this.stop) this.stop.closest("section").querySelector("textarea").focus();
    this.stop.hidden = !running;
  }
}

/** A slider over scales below a row of tiles, one a scale. `changed(scale)` is called when the user moves it. */
export class Scales {
  constructor(section, patchNums, changed) {
    const box = section.querySelector(".scales");
    this.slider = box.querySelector("input");
    this.text = box.querySelector(".reading span");
    this.patchNums = patchNums;
    box.style.setProperty("--scales", patchNums.length);
    this.slider.max = patchNums.length;
    this.tiles = patchNums.map((side, i) => {
      const tile = document.createElement("div");
      const canvas = document.createElement("canvas");
      canvas.width = canvas.height = 1;
      tile.append(canvas, String(side));
      tile.addEventListener("click", () => {
        if (this.slider.disabled) return;
        this.show(i + 1);
        changed(i + 1);
      });
      return tile;
    });
    box.querySelector(".strip").replaceChildren(...this.tiles);
    this.slider.addEventListener("input", () => {
      this.show(this.value);
      changed(this.value);
    });
    this.show(patchNums.length);
  }

  get value() {
    return Number(this.slider.value);
  }

  /** Show a scale as chosen. */
  show(scale) {
    const side = this.patchNums[scale - 1];
    this.slider.value = scale;
    this.text.textContent = `${scale} of ${this.patchNums.length}, the finest ${side} × ${side}`;
    this.slider.setAttribute("aria-valuetext", this.text.textContent);
    this.tiles.forEach((tile, i) => {
      tile.classList.toggle("chosen", i === scale - 1);
      tile.classList.toggle("left-out", i >= scale);
    });
  }

  /** The canvas of a scale's tile. */
  canvas(scale) {
    return this.tiles[scale - 1].querySelector("canvas");
  }
}

/** Let a link download something, or do nothing without it. */
export function offer(link, blob, name) {
  if (link.href.startsWith("blob:")) URL.revokeObjectURL(link.href);
  if (blob === null) {
    link.removeAttribute("href");
    link.setAttribute("aria-disabled", "true");
  } else {
    link.removeAttribute("aria-disabled");
    link.href = URL.createObjectURL(blob);
    link.download = name;
  }
}

/** Show a picture's file in an image and resolve when it is there. */
export async function fill(image, blob, alt) {
  const old = image.src;
  const url = URL.createObjectURL(blob);
  image.src = url;
  image.alt = alt;
  await image.decode().catch((error) => {
    // Another picture may have taken its place meanwhile.
    if (image.src === url) throw error;
  });
  image.hidden = false;
  if (old) URL.revokeObjectURL(old);
}

/** The pixels of a picture's file, RGBA. */
export async function pixels(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}

/** A file's name without its ending, fit for another. */
export const stem = (name) => name.replace(/\.[^.]*$/, "") || "picture";
