// Content keys: namespaces, media and item digests, block chains, and the other kinds of key (docs/keys.md).
// tests/golden/keys_v1.json holds the vectors they must give. Latent keys, which may still change, are not here.

import {
  Float,
  KeyInputError,
  NONE,
  canonical,
  checkCount,
  checkDigest,
  digest,
  exactFloat,
  framed,
  hash,
  textBytes,
  u32,
  u64,
} from "./encoding.js";

export { Float, KeyInputError, canonical };

const REQUIRED = {
  kv: ["model", "dtype", "layout", "block_size"],
  embedding: ["model", "dtype"],
  prompt: ["model", "dtype"],
  latent: ["model", "dtype"],
};
const SAMPLE_DTYPES = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"].concat([
  "float16",
  "float32",
  "float64",
]);
const PATH = /^(\/|~|file:|\\\\|[a-z]:[/\\]|\.\.?([/\\]|$))/i;
const RANGES = [
  ["kv_group", 2],
  ["layers", 3],
  ["kv_heads", 3],
  ["context", 2],
];

/**
 * Everything but the content that decides a value's bytes. `facts` are text, integers, booleans, null (left out), or
 * anything canonical (hashed). `id` is 32 bytes; `facts` of the result are what a Put declares.
 */
export class Namespace {
  constructor({ kind, block_size: blockSize = null, facts = {} }) {
    if (!Object.hasOwn(REQUIRED, kind)) throw new KeyInputError(`kind ${kind} is unknown`);
    const texts = {};
    for (const [name, value] of Object.entries(facts)) if (value !== null) texts[name] = factText(name, value);
    if (blockSize !== null) {
      if (kind !== "kv") throw new KeyInputError(`block_size: only kind kv has blocks`);
      if (checkCount(blockSize, "block_size", 1n) >= 1n << 32n) throw new KeyInputError("block_size: too large");
      texts.block_size = String(blockSize);
    }
    for (const name of REQUIRED[kind])
      if (!texts[name]) throw new KeyInputError(`${name} is missing: a ${kind} namespace needs it`);
    let total = 0;
    const fields = [];
    for (const name of Object.keys(texts)) {
      if (name !== "cache_salt" && PATH.test(texts[name]))
        throw new KeyInputError(`${name} looks like a local path; pass a repository name with its revision, or a digest`);
      const pair = [textBytes(name, name), textBytes(texts[name], name)];
      if (pair[1].length > 64 << 10) throw new KeyInputError(`${name}: text of more than 64 KiB; pass a digest of it`);
      total += pair[0].length + pair[1].length;
      fields.push(pair);
    }
    if (fields.length > 1024 || total > 256 << 10)
      throw new KeyInputError("too many facts; pass one structure as a fact, it is hashed");
    fields.sort(([left], [right]) => Buffer.compare(left, right));
    this.kind = kind;
    this.blockSize = blockSize === null ? null : Number(blockSize);
    this.facts = texts;
    this.id = digest("k1.namespace", Buffer.from(kind), ...fields.flat());
  }

  /** The keys of every full block of `tokens`; `spans` are {offset, length, item}. */
  blockKeys(tokens, spans = [], part = {}) {
    if (this.blockSize === null) throw new KeyInputError("block keys need a kv namespace");
    const size = this.blockSize;
    const checked = checkSpans(spans, tokens.length);
    const keys = [];
    let chain = NONE;
    let home = NONE;
    let parent = NONE;
    for (let index = 0; (index + 1) * size <= tokens.length; index++) {
      const first = index * size;
      const ids = Buffer.alloc(8 * size);
      for (let place = 0; place < size; place++) ids.writeBigUInt64LE(tokenId(tokens[first + place]), 8 * place);
      const segments = segmentsOf(checked, first, size);
      chain = hash(framed(Buffer.from("k1.block")), this.id, u32(size), chain, ids, u32(segments.length), ...segments);
      if (index === 0 || runOf(first) !== runOf(first - size)) home = chain;
      const stored = storedKey(chain, part);
      keys.push({ digest: stored, chain, home, parent, index });
      parent = stored;
    }
    return keys;
  }
}

function factText(name, value) {
  if (typeof value === "string") return value;
  if (typeof value === "boolean") return String(value);
  const whole = typeof value === "bigint" || (Number.isSafeInteger(value) && !Object.is(value, -0));
  if (whole && value >= -(1n << 63n) && value < 1n << 64n) return String(value);
  return `b3:${digest("k1.value", canonical(value, name)).toString("hex")}`;
}

function tokenId(token) {
  const id = typeof token === "bigint" || Number.isSafeInteger(token) ? BigInt(token) : -1n;
  if (id < 0n || id >= 1n << 64n) throw new KeyInputError(`token ${String(token)} is no id, 0 <= id < 2^64`);
  return id;
}

function checkSpans(spans, count) {
  const checked = spans.map(({ offset, length, item }) => ({
    offset: checkCount(offset, "span.offset"),
    length: checkCount(length, "span.length", 1n),
    item: checkDigest(item, "span.item"),
  }));
  checked.sort((left, right) => (left.offset < right.offset ? -1 : left.offset > right.offset ? 1 : 0));
  let end = 0n;
  for (const span of checked) {
    if (span.offset < end) throw new KeyInputError("two spans overlap; a position belongs to one item");
    end = span.offset + span.length;
  }
  if (end > BigInt(count)) throw new KeyInputError(`a span reaches beyond the ${count} tokens`);
  return checked;
}

function segmentsOf(spans, first, size) {
  const segments = [];
  for (const span of spans) {
    const offset = Number(span.offset);
    const begin = Math.max(offset, first);
    const end = Math.min(offset + Number(span.length), first + size);
    if (begin < end)
      segments.push(
        Buffer.concat([u32(begin - first), u32(end - begin), span.item, u64(span.length, begin - offset)]),
      );
  }
  return segments;
}

function runOf(token) {
  return Math.max(...[0, 512, 1024, 2048, token - (token % 4096)].filter((start) => start <= token));
}

/** The key of a part of what has this chain key; `part` is {kv_group, layers, kv_heads, context}, without it: whole. */
export function storedKey(chain, part = {}) {
  let flags = 0;
  const numbers = [];
  RANGES.forEach(([name, width], bit) => {
    const range = part[name];
    if (range === undefined || range === null) return;
    if (range.length !== width) throw new KeyInputError(`${name}: expected ${width} integers`);
    const counts = range.map((number) => checkCount(number, name));
    const total = counts[width - 1];
    const [start, stop] = width === 3 ? counts : [counts[0], counts[0] + 1n];
    if (start >= stop || stop > total) throw new KeyInputError(`${name}: not a range of its total`);
    if (stop - start !== total) {
      flags |= 1 << bit;
      numbers.push(...counts);
    }
  });
  return digest("k1.part", checkDigest(chain, "chain"), Buffer.concat([Buffer.of(flags), u64(...numbers)]));
}

function modalityBytes(modality) {
  if (!/^[a-z][a-z0-9_]{0,31}$/.test(modality)) throw new KeyInputError(`modality ${modality} is no lower-case word`);
  return Buffer.from(modality);
}

/** What identifies an encoded medium by its bytes. */
export function mediaDigest(data, modality) {
  return digest("k1.media", modalityBytes(modality), data);
}

/** What identifies decoded samples: `data` in C order, little-endian. */
export function samplesDigest({ data, dtype, shape, modality, mode, sample_rate: rate = null }) {
  if (!SAMPLE_DTYPES.includes(dtype)) throw new KeyInputError(`samples: dtype ${dtype} is none of ${SAMPLE_DTYPES}`);
  if (typeof mode !== "string" || !mode) throw new KeyInputError("mode: say what the samples mean, such as RGB");
  if (rate === null && modality === "audio") throw new KeyInputError("sample_rate is missing; pass it in Hz");
  const hertz = rate === null ? null : exactFloat(rate, "sample_rate");
  if (hertz !== null && !(hertz.value > 0)) throw new KeyInputError("sample_rate is no positive number");
  return digest(
    "k1.samples",
    modalityBytes(modality),
    textBytes(mode, "mode"),
    Buffer.from(dtype),
    u64(...shape.map((size) => checkCount(size, "shape"))),
    canonical(hertz, "sample_rate"),
    data,
  );
}

/** What identifies a medium as a model sees it: `content` and how this request processes it. */
export function itemDigest(content, given = {}) {
  const { grid = null, is_embed: mask = null, processor_kwargs: settings = null, timestamps = null } = given;
  const times = timestamps && timestamps.map((time) => exactFloat(time, "timestamps"));
  return digest(
    "k1.item",
    checkDigest(content, "content"),
    canonical(grid && grid.map((count) => checkCount(count, "grid")), "grid"),
    canonical(mask && Buffer.from(mask.map((bit) => (bit ? 1 : 0))), "is_embed"),
    canonical(settings, "processor_kwargs"),
    canonical(times, "timestamps"),
  );
}

function singleKey(chain, home = chain, index = 0) {
  return { digest: storedKey(chain), chain, home: checkDigest(home, "home"), parent: NONE, index };
}

/** The key of one item's embedding (kind embedding) or of one prompt's (kind prompt). */
export function embeddingKey(namespace, item) {
  if (!["embedding", "prompt"].includes(namespace.kind))
    throw new KeyInputError("embeddingKey needs a namespace of kind embedding or prompt");
  return singleKey(digest("k1.embedding", namespace.id, checkDigest(item, "item")));
}

/** A key for an engine's own hash, whole. */
export function opaqueKey(namespace, data, { home, index = 0 } = {}) {
  if (!data.length) throw new KeyInputError("data: expected the engine's own hash as bytes");
  return singleKey(digest("k1.opaque", namespace.id, data), home ?? undefined, index);
}
