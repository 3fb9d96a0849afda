// The token map: one coloured cell a code, over the reconstruction. The same code has the same colour everywhere.

/** Paint codes of one scale, a pixel each. */
export function paint(canvas, codes, side) {
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  codes.forEach((code, i) => {
    context.fillStyle = colour(code);
    context.fillRect(i % side, Math.floor(i / side), 1, 1);
  });
}

function colour(code) {
  // Steps of the golden ratio spread hues of neighbouring codes; lightness tells apart those that come close.
  const hue = (code * 137.508) % 360;
  return `hsl(${hue.toFixed(1)} 58% ${40 + ((code * 7) % 5) * 8}%)`;
}

/** The map of a scale, shown while the pointer or the keyboard is on it. */
export class TokenMap {
  #at = 0;

  constructor() {
    this.canvas = document.getElementById("map");
    this.cell = document.getElementById("cell");
    this.note = document.getElementById("code");
    this.codes = [];
    this.side = 1;
    const { canvas } = this;
    for (const name of ["pointermove", "pointerdown"]) {
      canvas.addEventListener(name, (event) => {
        const { width, height } = canvas.getBoundingClientRect();
        const [column, row] = [event.offsetX / width, event.offsetY / height].map((part) => Math.floor(part * this.side));
        this.#go(row * this.side + Math.min(column, this.side - 1), false);
      });
    }
    canvas.addEventListener("focus", () => this.#go(this.#at, true));
    canvas.addEventListener("blur", () => this.hide());
    canvas.addEventListener("pointerleave", () => document.activeElement !== canvas && this.hide());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
  }

  /** Take the codes of a scale; `number` is the scale's. */
  set(number, codes, side) {
    [this.number, this.codes, this.side] = [number, codes, side];
    this.#at = 0;
    this.canvas.hidden = !codes.length;
    this.hide();
    if (codes.length) paint(this.canvas, codes, side);
    this.canvas.setAttribute("aria-label", `Token map of scale ${number}: ${side} by ${side} codes`);
  }

  /** Show the map without a cell: for the pointer on a tile. */
  peek() {
    if (!this.codes.length) return;
    this.canvas.classList.add("shown");
    this.note.textContent = `scale ${this.number}: ${this.side} × ${this.side} codes`;
  }

  hide() {
    this.canvas.classList.remove("shown");
    this.cell.hidden = true;
    this.note.textContent = "";
  }

  #go(place, spoken) {
    if (!(place >= 0 && place < this.codes.length)) return;
    this.#at = place;
    const [row, column, part] = [Math.floor(place / this.side), place % this.side, 100 / this.side];
    this.canvas.classList.add("shown");
    this.cell.hidden = false;
    Object.assign(this.cell.style, { left: `${column * part}%`, top: `${row * part}%`, width: `${part}%`, height: `${part}%` });
    this.note.setAttribute("aria-live", spoken ? "polite" : "off");
    this.note.textContent = `row ${row + 1}, column ${column + 1}: code ${this.codes[place]}`;
  }

  #key(event) {
    const column = this.#at % this.side;
    const steps = {
      ArrowLeft: column > 0 ? -1 : 0,
      ArrowRight: column < this.side - 1 ? 1 : 0,
      ArrowUp: -this.side,
      ArrowDown: this.side,
      Home: -column,
      End: this.side - 1 - column,
    };
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#go(this.#at + steps[event.key], true);
  }
}
