// Run after tokenizer.js and model.js by tests/export/test_html.py: node FILE PAGE TASKS prints one JSON result a line.
const fs = require("fs");

const [page, tasks] = process.argv.slice(2, 4).map((path) => fs.readFileSync(path, "utf8"));
const element = (id) => page.match(new RegExp(`id="${id}">([^<]*)<`))[1];
const always = async () => true;

const actions = {
  encode: ({ text }, { tokenizer }) => tokenizer.encode(text),
  decode: ({ ids, skipSpecial }, { tokenizer }) => tokenizer.decode(ids, { skipSpecial }),
  logits: async ({ ids }, { model }) => Array.from(await model.logitsAfter(ids, always)),
  async generate({ prompt, maxNewTokens }, { model, header }) {
    const options = { maxNewTokens, sampling: { temperature: 0 }, seed: 0, endIds: header.endIds };
    const ids = [];
    for await (const id of generate(model, prompt, options, always)) ids.push(id);
    return ids;
  },
  conversation({ system, messages, maxNewTokens }, { tokenizer, header }) {
    const { ids, droppedTurns } = conversationPrompt(header, tokenizer, system, messages, maxNewTokens);
    return [ids, droppedTurns];
  },
  // the share of each id among `points` evenly spaced random numbers
  shares({ logits, sampling, points }) {
    const shares = logits.map(() => 0);
    for (let i = 0; i < points; i++) {
      shares[chooseNext(Float32Array.from(logits), sampling, () => (i + 0.5) / points)] += 1 / points;
    }
    return shares;
  },
  mostLikely: ({ logits, count }) =>
    mostLikely(Float32Array.from(logits), count).map(({ id, probability }) => [id, probability]),
};

async function main() {
  if (process.argv[4] === "plain") delete globalThis.WebAssembly;
  const header = JSON.parse(element("header"));
  const memory = await createMemory(header, Buffer.from(element("kernel"), "base64"));
  if (memory.isPlain !== (process.argv[4] === "plain")) throw new Error("another kernel than the test wants");
  memory.weights.set(Buffer.from(element("weights"), "base64"));
  const engine = { header, tokenizer: new Tokenizer(header.tokenizer), model: new Model(header, memory) };
  for (const { action, ...task } of JSON.parse(tasks)) {
    let result;
    try {
      result = await actions[action](task, engine);
    } catch (error) {
      result = { error: error.message };
    }
    console.log(JSON.stringify(result));
  }
}

main();
