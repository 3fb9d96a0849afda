// The panel of asking: a conversation about the picture or the drawing, whose codes are its first message's.

import { events, post } from "./api.js";
import { Tasks } from "./parts.js";

const $ = (id) => document.getElementById(id);

export class Asking {
  #codes = {};
  #messages = [];

  constructor() {
    const section = $("asking");
    section.hidden = false;
    this.tasks = new Tasks(section, $("talk"), $("ask-stop"));
    for (const choice of this.#choices()) choice.addEventListener("change", () => this.#restart());
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      const question = $("question").value;
      $("question").value = "";
      this.tasks.run("Answering…", (signal) => this.#answer(question, signal));
    });
    $("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!$("ask").querySelector("[type=submit]").disabled) $("ask").requestSubmit();
    });
  }

  /** Take the codes (base64 of a .tfc) of `what`: `picture` or `drawing`. */
  about(what, tfc) {
    this.#codes[what] = tfc;
    for (const choice of this.#choices()) {
      if (choice.value !== what) continue;
      choice.disabled = false;
      choice.checked = true;
    }
    $("ask").querySelector("[type=submit]").disabled = false;
    this.#restart();
  }

  #choices() {
    return $("ask").elements.namedItem("about");
  }

  #restart() {
    this.tasks.cancel();
    this.tasks.say("");
    this.#messages = [];
    $("talk").querySelectorAll("p:not(.empty)").forEach((each) => each.remove());
  }

  async #answer(question, signal) {
    const tfc = this.#codes[this.#choices().value];
    const text = { type: "text", text: question };
    const content = this.#messages.length ? [text] : [{ type: "image_codes", image_codes: { tfc } }, text];
    const messages = [...this.#messages, { role: "user", content }];
    this.#say("question", question);
    const line = this.#say("answer", "");
    const answer = await post("v1/chat/completions", { messages, stream: true }, signal);
    let finished = false;
    for await (const event of events(answer)) {
      const choice = event.choices[0];
      line.textContent += choice?.delta.content ?? "";
      finished ||= Boolean(choice?.finish_reason);
      $("talk").scrollTop = $("talk").scrollHeight;
    }
    if (!finished) throw new Error("The server ended before the answer was finished. Ask again.");
    // Only whole answers go on with the conversation.
    this.#messages = [...messages, { role: "assistant", content: line.textContent }];
  }

  #say(kind, text) {
    const line = document.createElement("p");
    line.className = kind;
    line.textContent = text;
    $("talk").append(line);
    return line;
  }
}
