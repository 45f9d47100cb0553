// One conversation of the real openai package with a gateway, as JSON on stdout; the tests say what it must be.
// node talk.mjs BASE KEY CASE, where openai is found in NODE_PATH's place: the folder that is given as MODULES.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [base, key, name] = process.argv.slice(2);
const require = createRequire(`${process.env.MODULES}/`);
const { default: OpenAI } = await import(pathToFileURL(require.resolve("openai")).href);
const options = { baseURL: `${base}/v1`, apiKey: key, maxRetries: 0 };
const client = new OpenAI.OpenAI(options);
const model = "fake";
const user = (content) => [{ role: "user", content }];
const tools = [{ type: "function", function: { name: "find", parameters: { type: "object" } } }];

async function chat(content, more = {}) {
  const reply = await client.chat.completions.create({ model, messages: user(content), ...more });
  const [{ message, finish_reason: reason }] = reply.choices;
  return { text: message.content, refusal: message.refusal, reason, action: reply.guardrails.action, id: reply._request_id };
}

async function streamed(content, more = {}) {
  let text = "", reason = null, action = null;
  const stream = await client.chat.completions.create({ model, messages: user(content), stream: true, ...more });
  for await (const chunk of stream) {
    text += chunk.choices[0].delta.content ?? "";
    reason = chunk.choices[0].finish_reason ?? reason;
    action = chunk.guardrails?.action ?? action;
  }
  return { text, reason, action };
}

async function failed(work) {
  try {
    await work();
  } catch (error) {
    return { kind: error.constructor.name, status: error.status ?? null, code: error.code ?? null };
  }
  return null;
}

const cases = {
  whole: chat,
  streamed,
  "helper": async (content) => {
    const runner = client.chat.completions.stream({ model, messages: user(content) });
    const { choices } = await runner.finalChatCompletion();
    return { text: choices[0].message.content, reason: choices[0].finish_reason };
  },
  tools: async (content) => {
    const reply = await client.chat.completions.create({ model, messages: user(content), tools });
    const { tool_calls: calls } = reply.choices[0].message;
    return { calls: calls.map((one) => [one.function.name, one.function.arguments]), reason: reply.choices[0].finish_reason };
  },
  responses: async (content) => {
    const response = await client.responses.create({ model, input: content });
    return { text: response.output_text, status: response.status, why: response.incomplete_details?.reason ?? null };
  },
  "responses helper": async (content) => {
    const kinds = [];
    const stream = client.responses.stream({ model, input: content });
    for await (const event of stream) kinds.push(event.type);
    const response = await stream.finalResponse();
    return { text: response.output_text, status: response.status, first: kinds[0], last: kinds.at(-1) };
  },
  moderations: async (content) => {
    const { results } = await client.moderations.create({ input: content });
    return { flagged: results[0].flagged, categories: Object.keys(results[0].categories).length };
  },
  "wrong key": () => failed(() => new OpenAI.OpenAI({ ...options, apiKey: "nk-wrong" }).models.list()),
  "no model": (content) => failed(() => client.chat.completions.create({ model: "none", messages: user(content) })),
  fails: (content) => failed(() => chat(content)),
  "stream fails": (content) => failed(() => streamed(content)),
  "retries": async (content) => {
    const patient = new OpenAI.OpenAI({ ...options, maxRetries: 2 });
    const reply = await patient.chat.completions.create({ model, messages: user(content) });
    return { text: reply.choices[0].message.content };
  },
};

console.log(JSON.stringify(await cases[name](process.env.SAID ?? "Hello")));
