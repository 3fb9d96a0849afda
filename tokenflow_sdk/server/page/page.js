// The page: waits for the server, then opens the panels for what its models can do.

import { call } from "./api.js";
import { Asking } from "./asking.js";
import { Drawing } from "./drawing.js";
import { Picture } from "./picture.js";

const server = document.getElementById("server");

async function start() {
  const models = (await (await call("v1/models")).json()).data;
  while (!(await ready())) {
    server.textContent = "The models are being opened…";
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  // All at once, so that nothing moves.
  for (const part of document.querySelectorAll("main, footer")) part.hidden = false;
  const able = (ability) => models.find((model) => model.abilities.includes(ability));
  const asking = able("chat") && new Asking();
  new Picture(able("tokens"), (tfc) => asking?.about("picture", tfc));
  if (able("generations")) new Drawing(able("generations"), (tfc) => asking?.about("drawing", tfc));
  const { image_size: size, patch_nums: sides } = models[0];
  server.textContent = `${models.map((model) => model.id).join(", ")} · ${size} × ${size} pixels in ${sides.length} scales`;
}

async function ready() {
  const answer = await fetch("readyz").catch(() => {
    throw new Error("The server cannot be reached.");
  });
  return answer.ok;
}

// Keeps the page when a file is dropped before there are panels: the browser would open the file in its place.
for (const name of ["dragover", "drop"]) {
  addEventListener(name, (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
}

start().catch((error) => {
  server.textContent = error.message;
  server.classList.add("wrong");
});
