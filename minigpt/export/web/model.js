// GPT-2's forward pass for one sequence, with a cache of keys and values.
// Shapes: n tokens of this call, C hidden size, H heads, D = C / H, S tokens so far, V vocabulary.

const WASM_PAGE = 65536;
const FIRST_BYTE = 2 * WASM_PAGE; // the compiler reserves the memory below for a stack
const CHUNK = 8; // tokens of one forward pass: enough to read the weights once for several of them

// Creates the memory for a model: { buffer, weights, kernel, isPlain }. weights is the part that the caller fills with
// the arrays of the export. Without WebAssembly and its vectors, the kernel is plain JavaScript, which is slower.
async function createMemory(header, kernelBytes) {
  const size = FIRST_BYTE + header.bytes + workspace(header).bytes;
  let buffer, kernel;
  let isPlain = false;
  try {
    const memory = new WebAssembly.Memory({ initial: Math.ceil(size / WASM_PAGE) });
    kernel = (await WebAssembly.instantiate(kernelBytes, { env: { memory } })).instance.exports;
    buffer = memory.buffer;
  } catch {
    buffer = new ArrayBuffer(size);
    kernel = plainKernel(buffer);
    isPlain = true;
  }
  return { buffer, kernel, isPlain, weights: new Uint8Array(buffer, FIRST_BYTE, header.bytes) };
}

// Where the cache and the intermediate results lie behind the weights, and how many bytes they take.
function workspace({ config }) {
  const sizes = {
    cache: 2 * config.layers * config.context * config.hidden,
    stream: CHUNK * config.hidden,
    normed: CHUNK * config.hidden,
    qkv: CHUNK * 3 * config.hidden,
    mixed: CHUNK * config.hidden,
    inner: CHUNK * config.intermediate,
    logits: config.vocabulary,
    scores: config.context,
    scratch: CHUNK * (1 + Math.max(config.hidden, config.intermediate)),
  };
  const offsets = {};
  let bytes = 0;
  for (const [name, floats] of Object.entries(sizes)) {
    offsets[name] = bytes;
    bytes += 16 * Math.ceil(floats / 4);
  }
  return { sizes, offsets, bytes };
}

// The functions of kernel.c in JavaScript; see there.
function plainKernel(buffer) {
  const floats = new Float32Array(buffer, 0, buffer.byteLength >> 2);
  const bytes = new Int8Array(buffer);
  function product(weights, scales, out, x, w, bias, rows, columns, n) {
    for (let r = 0; r < rows; r++) {
      for (let i = 0; i < n; i++) {
        const row = w + r * columns;
        const vector = x / 4 + i * columns;
        let total = 0;
        for (let c = 0; c < columns; c++) total += weights[row + c] * floats[vector + c];
        if (scales) total *= floats[scales / 4 + r];
        floats[out / 4 + i * rows + r] = total + (bias ? floats[bias / 4 + r] : 0);
      }
    }
  }
  return {
    matmul_f32: (out, x, w, bias, rows, columns, n) => product(floats, 0, out, x, w / 4, bias, rows, columns, n),
    matmul_i8: (out, x, w, scales, bias, rows, columns, n) => product(bytes, scales, out, x, w, bias, rows, columns, n),
    weighted_sum(out, weights, v, rows, columns) {
      for (let c = 0; c < columns; c++) {
        let total = 0;
        for (let r = 0; r < rows; r++) total += floats[weights / 4 + r] * floats[v / 4 + r * columns + c];
        floats[out / 4 + c] = total;
      }
    },
  };
}

class Model {
  constructor(header, { buffer, kernel }) {
    this.config = header.config;
    this.arrays = header.arrays;
    this.buffer = buffer;
    this.kernel = kernel;
    this.ids = []; // the tokens whose keys and values are in the cache
    const { sizes, offsets } = workspace(header);
    this.at = {}; // byte offset of each part of the workspace
    this.view = {};
    for (const name of Object.keys(sizes)) {
      this.at[name] = FIRST_BYTE + header.bytes + offsets[name];
      this.view[name] = new Float32Array(buffer, this.at[name], sizes[name]);
    }
  }

  // The logits [V] after `ids`, a view that the next call overwrites. Tokens at the beginning that are in the cache
  // already are not computed again. `pause` is awaited between chunks; if it returns false, the result is null.
  async logitsAfter(ids, pause = async () => true) {
    let known = 0;
    while (known < Math.min(ids.length - 1, this.ids.length) && ids[known] === this.ids[known]) known++;
    this.ids.length = known;
    while (this.ids.length < ids.length) {
      this.forward(ids.slice(this.ids.length, this.ids.length + CHUNK));
      if (this.ids.length < ids.length && !(await pause())) return null;
    }
    return this.head();
  }

  // Adds 1 to CHUNK tokens to the cache; the hidden state of the last one is left for `head`.
  forward(ids) {
    const { hidden, layers, intermediate, heads, context } = this.config;
    const { stream, qkv, mixed, inner } = this.view;
    const n = ids.length;
    const start = this.ids.length;
    if (start + n > context) throw new RangeError(`${start + n} tokens do not fit into a context of ${context}`);
    const positions = this.floats("positions");
    ids.forEach((id, i) => {
      this.addRow("embedding", id, stream, i * hidden);
      for (let c = 0; c < hidden; c++) stream[i * hidden + c] += positions[(start + i) * hidden + c];
    });
    for (let layer = 0; layer < layers; layer++) {
      const name = `layers.${layer}.`;
      this.normalize(name + "norm1", n);
      this.linear(name + "qkv", "qkv", "normed", 3 * hidden, hidden, n);
      this.attend(layer, start, n, hidden / heads);
      this.linear(name + "attention_out", "normed", "mixed", hidden, hidden, n);
      for (let i = 0; i < n * hidden; i++) stream[i] += this.view.normed[i];
      this.normalize(name + "norm2", n);
      this.linear(name + "up", "inner", "normed", intermediate, hidden, n);
      for (let i = 0; i < n * intermediate; i++) inner[i] = gelu(inner[i]);
      this.linear(name + "down", "mixed", "inner", hidden, intermediate, n);
      for (let i = 0; i < n * hidden; i++) stream[i] += mixed[i];
    }
    this.lastRow = n - 1;
    this.ids.push(...ids);
  }

  // The logits of the last token of `forward`.
  head() {
    const { hidden, vocabulary } = this.config;
    const { stream } = this.view;
    stream.copyWithin(0, this.lastRow * hidden, (this.lastRow + 1) * hidden);
    this.lastRow = 0;
    this.normalize("norm", 1);
    this.linear("head.weight" in this.arrays ? "head" : "embedding", "logits", "normed", vocabulary, hidden, 1);
    return this.view.logits;
  }

  // Causal attention of n tokens from position `start` on, from `qkv` into `mixed`; keys and values go to the cache.
  // The cache is [layer, key or value, H, context, D].
  attend(layer, start, n, size) {
    const { hidden, heads, context } = this.config;
    const { qkv, cache, scores } = this.view;
    const scale = 1 / Math.sqrt(size);
    for (let head = 0; head < heads; head++) {
      const keys = (2 * layer * heads + head) * context * size;
      const values = keys + heads * context * size;
      for (let i = 0; i < n; i++) {
        const query = i * 3 * hidden + head * size;
        const length = start + i + 1;
        cache.set(qkv.subarray(query + hidden, query + hidden + size), keys + (length - 1) * size);
        cache.set(qkv.subarray(query + 2 * hidden, query + 2 * hidden + size), values + (length - 1) * size);
        this.kernel.matmul_f32(
          this.at.scores, this.at.qkv + 4 * query, this.at.cache + 4 * keys, 0, length, size, 1,
        );
        softmax(scores, length, scale);
        const out = this.at.mixed + 4 * (i * hidden + head * size);
        this.kernel.weighted_sum(out, this.at.scores, this.at.cache + 4 * values, length, size);
      }
    }
  }

  // LayerNorm of n rows of `stream` into `normed`.
  normalize(name, n) {
    const { hidden, epsilon } = this.config;
    const { stream, normed } = this.view;
    const weight = this.floats(name + ".weight");
    const bias = this.floats(name + ".bias");
    for (let row = 0; row < n * hidden; row += hidden) {
      let mean = 0;
      for (let c = 0; c < hidden; c++) mean += stream[row + c];
      mean /= hidden;
      let variance = 0;
      for (let c = 0; c < hidden; c++) variance += (stream[row + c] - mean) ** 2;
      const inverse = 1 / Math.sqrt(variance / hidden + epsilon);
      for (let c = 0; c < hidden; c++) normed[row + c] = (stream[row + c] - mean) * inverse * weight[c] + bias[c];
    }
  }

  linear(name, out, x, rows, columns, n) {
    const address = (array) => (array in this.arrays ? FIRST_BYTE + this.arrays[array].offset : 0);
    const weight = address(name + ".weight");
    const bias = address(name + ".bias");
    const scales = address(name + ".scale");
    const [to, from] = [this.at[out], this.at[x]];
    if (scales) this.kernel.matmul_i8(to, from, weight, scales, bias, rows, columns, n, this.at.scratch);
    else this.kernel.matmul_f32(to, from, weight, bias, rows, columns, n);
  }

  // Writes one row of a matrix into `target`.
  addRow(name, row, target, offset) {
    const { hidden } = this.config;
    if (name + ".scale" in this.arrays) {
      const weight = new Int8Array(this.buffer, FIRST_BYTE + this.arrays[name + ".weight"].offset + row * hidden, hidden);
      const scale = this.floats(name + ".scale")[row];
      for (let c = 0; c < hidden; c++) target[offset + c] = weight[c] * scale;
    } else {
      target.set(this.floats(name + ".weight").subarray(row * hidden, (row + 1) * hidden), offset);
    }
  }

  floats(name) {
    const { offset, shape } = this.arrays[name];
    return new Float32Array(this.buffer, FIRST_BYTE + offset, shape.reduce((a, b) => a * b, 1));
  }
}

// GELU in the approximation with tanh, as in GPT-2.
function gelu(x) {
  return 0.5 * x * (1 + Math.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

// Replaces the first `length` scores, each times `scale`, by probabilities.
function softmax(scores, length, scale) {
  let largest = -Infinity;
  for (let i = 0; i < length; i++) largest = Math.max(largest, scores[i]);
  let total = 0;
  for (let i = 0; i < length; i++) total += scores[i] = Math.exp((scores[i] - largest) * scale);
  for (let i = 0; i < length; i++) scores[i] /= total;
}

// The ids of the first probabilities in descending order, as many of them as `count` and `share` together need: at
// least `count`, and a sum of at least `share`. A vocabulary is large, so only the likely part of it is sorted.
function likeliest(probabilities, count, share) {
  const needed = Math.min(count, probabilities.length);
  let ids, sum;
  let bound = 0.01;
  do {
    ids = [];
    sum = 0;
    for (let id = 0; id < probabilities.length; id++) {
      if (probabilities[id] >= bound) {
        ids.push(id);
        sum += probabilities[id];
      }
    }
    bound = bound > 1e-9 ? bound / 30 : 0;
  } while (ids.length < probabilities.length && (ids.length < needed || sum < share));
  return ids.sort((a, b) => probabilities[b] - probabilities[a] || a - b);
}

// The ids and probabilities of the `count` most likely tokens, most likely first.
function mostLikely(logits, count) {
  const probabilities = new Float64Array(logits);
  softmax(probabilities, logits.length, 1);
  const ids = likeliest(probabilities, count, 0).slice(0, count);
  return ids.map((id) => ({ id, probability: probabilities[id] }));
}

// The next id. temperature 0: the most likely one. Otherwise a random one of the topK most likely (0: of all), and of
// the fewest of these that have the share topP of their probability. random() is from [0, 1).
function chooseNext(logits, { temperature, topK, topP }, random) {
  if (temperature === 0) {
    let best = 0;
    for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
    return best;
  }
  const probabilities = new Float64Array(logits);
  softmax(probabilities, logits.length, 1 / temperature);
  let ids, total;
  if (topK > 0 || topP < 1) {
    ids = likeliest(probabilities, topK, topP < 1 ? topP : 0);
    if (topK > 0) ids = ids.slice(0, topK);
    total = ids.reduce((sum, id) => sum + probabilities[id], 0);
    if (topP < 1) {
      const limit = topP * (topK > 0 ? total : 1);
      let kept = 0;
      total = 0;
      while (kept === 0 || (kept < ids.length && total < limit)) total += probabilities[ids[kept++]];
      ids = ids.slice(0, kept);
    }
  } else {
    ids = probabilities.keys();
    total = 1;
  }
  let point = random() * total;
  let last = 0;
  for (const id of ids) {
    last = id;
    if ((point -= probabilities[id]) < 0) break;
  }
  return last;
}

// Random numbers from [0, 1) that depend on the seed alone (mulberry32).
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
  };
}

// Yields new ids after `prompt`, at most maxNewTokens, up to and including one of `endIds`. If the context is full,
// generation goes on with the second half of it as the prompt. `pause` as in `Model.logitsAfter`.
async function* generate(model, prompt, { maxNewTokens, sampling, seed, endIds }, pause) {
  const { context } = model.config;
  const random = randomNumbers(seed);
  let ids = [...prompt];
  for (let made = 0; made < maxNewTokens; made++) {
    if (ids.length >= context) ids = ids.slice(-Math.max(1, context >> 1));
    const logits = await model.logitsAfter(ids, pause);
    if (logits === null) return;
    const next = chooseNext(logits, sampling, random);
    ids.push(next);
    yield next;
    if (endIds.includes(next) || !(await pause())) return;
  }
}
