// The npm client `openai`, plain and streaming, over every endpoint it knows. Arguments: the server's URL.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "any", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "What is the capital of Norway?" }];
const answer = "The capital of Norway is Oslo.";

const chat = await client.chat.completions.create({ model, messages, temperature: 0, logprobs: true, top_logprobs: 2 });
assert.equal(chat.choices[0].message.content, answer);
assert.equal(chat.choices[0].logprobs.content[0].top_logprobs.length, 2);

let text = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({
  model, messages, temperature: 0, stream: true, stream_options: { include_usage: true },
})) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, answer);
assert.equal(usage.completion_tokens, chat.usage.completion_tokens);

const helper = client.chat.completions.stream({ model, messages, temperature: 0 });
assert.equal(await helper.finalContent(), answer);

const plain = await client.completions.create({ model, prompt: [[5], [6, 7]], max_tokens: 4, n: 2 });
assert.deepEqual(plain.choices.map((choice) => choice.index), [0, 1, 2, 3]);

let pieces = 0;
for await (const chunk of await client.completions.create({ model, prompt: "Once", max_tokens: 4, stream: true })) {
  pieces += chunk.choices.length;
}
assert.ok(pieces >= 1);

const response = await client.responses.create({ model, input: messages[0].content, temperature: 0 });
assert.equal(response.output_text, answer);
const kinds = [];
for await (const event of await client.responses.create({ model, input: "Hello", stream: true })) kinds.push(event.type);
assert.equal(kinds.at(0), "response.created");
assert.ok(["response.completed", "response.incomplete"].includes(kinds.at(-1)));

const controller = new AbortController();
const cut = await client.completions.create(
  { model, prompt: "Once", max_tokens: 900, stream: true }, { signal: controller.signal },
);
for await (const _ of cut) { controller.abort(); break; }

await assert.rejects(client.completions.create({ model: "gpt-4", prompt: "x" }), OpenAI.NotFoundError);
await assert.rejects(client.completions.create({ model, prompt: "x", temprature: 1 }), OpenAI.BadRequestError);
console.log("all is well");
