// Calls of the server: with the key if it asks for one, errors as Error with the server's message, event streams.

export const TFC = "application/vnd.tokenflow.codes";
const KEY = "tokenflow-key";
let asking = null;

/** The answer to a request. Throws an Error whose message is for the user, or an AbortError when it was cancelled. */
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const answer = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
    });
    if (answer.ok) return answer;
    const message = await messageOf(answer);
    if (answer.status !== 401) throw new Error(message);
    // Another request may have asked for the key meanwhile.
    if (sessionStorage.getItem(KEY) === key) await (asking ??= askForKey(key !== null).finally(() => (asking = null)));
    options.signal?.throwIfAborted();
  }
}

/** The answer to a POST of JSON. */
export function post(path, body, signal) {
  return call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
}

/** The data of an answer's server-sent events. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Error("The connection to the server broke.");
      });
      if (done) return;
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const line = part.split("\n").find((each) => each.startsWith("data: "));
        if (line === undefined || line === "data: [DONE]") continue;
        const data = JSON.parse(line.slice(6));
        if (data.error) throw new Error(data.error.message);
        yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The bytes of base64. */
export function bytes(base64) {
  return Uint8Array.from(atob(base64), (each) => each.charCodeAt(0));
}

async function messageOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answered with status ${answer.status}.`;
  }
}

/** Ask for the key in a dialog. Throws when the user cancels. */
function askForKey(wrong) {
  const dialog = document.getElementById("key-dialog");
  const field = document.getElementById("key");
  document.getElementById("key-wrong").textContent = wrong ? "That key is not one of this server’s." : "";
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    document.getElementById("key-cancel").onclick = () => dialog.close("");
    document.getElementById("key-form").onsubmit = () => sessionStorage.setItem(KEY, field.value);
    dialog.onclose = () => {
      const given = field.value;
      field.value = "";
      if (given && sessionStorage.getItem(KEY) === given) resolve();
      else reject(new Error("The server asks for a key. Reload the page to give one."));
    };
  });
}
