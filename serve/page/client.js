// The server's interface: models, streamed answers, attention.

async function check(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // it is no JSON of ours: the status has to do
  }
  throw new Error(message);
}

const post = (path, body, signal) => fetch(path, {
  method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
}).then(check);

export const models = async () => (await (await fetch("v1/models").then(check)).json()).data;

export const attention = async (body, signal) => (await post("v1/attention", body, signal)).json();

// Calls `told` with each event of a stream.
export async function stream(body, signal, told) {
  const response = await post("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server ended the answer early");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      told(event);
    }
  }
}
