// Text to token ids and back, as the tokenizers library does it: byte-level BPE with GPT-2's pattern, or characters.

// Each byte as the character that stands for it in a byte-level vocabulary: itself if it is printable.
const BYTE_CHARACTERS = (() => {
  const characters = [];
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte !== 173);
    characters.push(String.fromCodePoint(printable ? byte : next++));
  }
  return characters;
})();
const CHARACTER_BYTES = new Map(BYTE_CHARACTERS.map((character, byte) => [character, byte]));

// White_Space and not \s: JavaScript's \s holds U+FEFF and lacks U+0085.
const WORDS = new RegExp(
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
    "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
  "gu",
);

class Tokenizer {
  // spec is the object that `tokenizer_spec` in html.py writes.
  constructor(spec) {
    this.spec = spec;
    this.ids = new Map();
    spec.tokens.forEach((token, id) => token !== null && this.ids.set(token, id));
    this.addedIds = new Map(spec.added.map((token) => [token.content, token.id]));
    this.special = new Set(spec.added.filter((token) => token.special).map((token) => token.id));
    // tokens that a normalizer could change are looked for after the others
    this.addedPatterns = [false, true].map((normalized) =>
      alternatives(spec.added.filter((token) => token.normalized === normalized).map((token) => token.content)),
    );
    this.merges = new Map();
    for (let rank = 0; rank < spec.merges.length / 2; rank++) {
      this.merges.set(pairKey(spec.merges[2 * rank], spec.merges[2 * rank + 1]), rank);
    }
    this.words = new Map();
  }

  // The ids of a text. Throws if the vocabulary lacks one of its characters.
  encode(text, { addSpecialTokens = true } = {}) {
    const ids = [];
    for (const [part, id] of this.splitAdded(text.replace(/\p{Surrogate}/gu, "\uFFFD"))) {
      if (id !== null) ids.push(id);
      else if (this.spec.kind === "bpe") this.encodeBytes(part, ids);
      else this.encodeCharacters(part, ids);
    }
    return addSpecialTokens ? [...this.spec.before, ...ids, ...this.spec.after] : ids;
  }

  // [text, null] for ordinary text and [content, id] for an added token.
  splitAdded(text) {
    let parts = [[text, null]];
    for (const pattern of this.addedPatterns) {
      if (pattern === null) continue;
      parts = parts.flatMap(([part, id]) => {
        if (id !== null) return [[part, id]];
        const pieces = [];
        let end = 0;
        for (const match of part.matchAll(pattern)) {
          pieces.push([part.slice(end, match.index), null], [match[0], this.addedIds.get(match[0])]);
          end = match.index + match[0].length;
        }
        return [...pieces, [part.slice(end), null]];
      });
    }
    return parts.filter(([part]) => part !== "");
  }

  encodeCharacters(text, ids) {
    for (const character of text) {
      const id = this.ids.get(character) ?? this.spec.unknownId;
      if (id === null) throw new Error(`the model does not know the character ${JSON.stringify(character)}`);
      ids.push(id);
    }
  }

  encodeBytes(text, ids) {
    if (this.spec.addPrefixSpace && !text.startsWith(" ")) text = " " + text;
    for (const [word] of text.matchAll(WORDS)) {
      let found = this.words.get(word);
      if (found === undefined) {
        found = this.mergeWord(word);
        if (this.words.size < 50000) this.words.set(word, found);
      }
      for (const id of found) ids.push(id);
    }
  }

  // Joins the pair that comes first in the list of merges, everywhere in the word, until no pair is left.
  mergeWord(word) {
    let ids = Array.from(new TextEncoder().encode(word), (byte) => this.ids.get(BYTE_CHARACTERS[byte]));
    while (ids.length > 1) {
      let best = Infinity;
      for (let i = 0; i + 1 < ids.length; i++) {
        best = Math.min(best, this.merges.get(pairKey(ids[i], ids[i + 1])) ?? Infinity);
      }
      if (best === Infinity) break;
      const [left, right] = [this.spec.merges[2 * best], this.spec.merges[2 * best + 1]];
      const joined = this.ids.get(this.spec.tokens[left] + this.spec.tokens[right]);
      const merged = [];
      for (let i = 0; i < ids.length; i++) {
        const isPair = i + 1 < ids.length && ids[i] === left && ids[i + 1] === right;
        merged.push(isPair ? joined : ids[i]);
        if (isPair) i++;
      }
      ids = merged;
    }
    return ids;
  }

  // The text of ids. Bytes that are not UTF-8 become U+FFFD. With skipSpecial, special tokens are skipped.
  decode(ids, { skipSpecial = false } = {}) {
    const kept = skipSpecial ? ids.filter((id) => !this.special.has(id)) : ids;
    if (this.spec.kind !== "bpe") return kept.map((id) => this.spec.tokens[id] ?? "").join("");
    const bytes = kept.flatMap((id) => this.tokenBytes(id));
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
  }

  tokenBytes(id) {
    const token = this.spec.tokens[id] ?? "";
    const bytes = Array.from(token, (character) => CHARACTER_BYTES.get(character));
    return bytes.includes(undefined) ? Array.from(new TextEncoder().encode(token)) : bytes; // an added token
  }
}

function pairKey(left, right) {
  return left * 0x1000000 + right; // an exact number as long as ids stay below 2^24
}

// A pattern that finds the longest of some texts at the first place where one of them is; null without texts.
function alternatives(texts) {
  const longestFirst = [...texts].sort((a, b) => b.length - a.length);
  const escaped = longestFirst.map((text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
  return escaped.length ? new RegExp(escaped.join("|"), "gu") : null;
}

// The text before the assistant's next words, for the chat templates `chatml` and `plain`.
function chatText(template, messages, eosToken) {
  if (template === "chatml") {
    const turns = messages.map(({ role, content }) => `<|im_start|>${role}\n${content}<|im_end|>\n`);
    return turns.join("") + "<|im_start|>assistant\n";
  }
  const turns = messages.map(({ role, content }) => {
    const name = role[0].toUpperCase() + role.slice(1);
    return `${name}:\n${content}${role === "assistant" ? eosToken : ""}`;
  });
  return turns.join("\n") + "\nAssistant:\n";
}

// The prompt of a conversation: the system prompt ("": none) and as many of the last turns as leave room for
// maxNewTokens, but for no more than a quarter of the context. `messages` are questions and answers by turns; the last
// one is a question. Returns the ids and how many turns are dropped; throws if the last question does not fit.
function conversationPrompt(header, tokenizer, system, messages, maxNewTokens) {
  const { context } = header.config;
  const room = Math.max(1, Math.min(maxNewTokens, context >> 2));
  const first = system ? [{ role: "system", content: system }] : [];
  for (let turn = 0; 2 * turn < messages.length; turn++) {
    const text = chatText(header.chat, [...first, ...messages.slice(2 * turn)], header.eosToken);
    const ids = tokenizer.encode(text, { addSpecialTokens: false });
    if (ids.length <= context - room) return { ids, droppedTurns: turn };
  }
  throw new Error(`The message is too long: the context holds ${context} tokens, ${room} of them for the answer.`);
}
