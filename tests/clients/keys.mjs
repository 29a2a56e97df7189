// Evaluates golden vectors with the Node client: the JSON file named first, one JSON list of results on stdout.

import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";

import * as mmcache from "../../clients/node/index.js";

function plain(value) {
  if (Array.isArray(value)) return value.map(plain);
  if (typeof value !== "object" || value === null) return value;
  const entries = Object.entries(value);
  if (entries.length === 1) {
    const [[tag, body]] = entries;
    if (tag === "$hex") return Buffer.from(body, "hex");
    if (tag === "$float") return new mmcache.Float(Number(body));
    if (tag === "$int") return BigInt(body);
    if (tag === "$range") return Array.from({ length: body[1] - body[0] }, (_, place) => body[0] + place);
  }
  return Object.fromEntries(entries.map(([name, item]) => [name, plain(item)]));
}

const row = (key) => ({
  chain: key.chain.toString("hex"),
  digest: key.digest.toString("hex"),
  home: key.home.toString("hex"),
  parent: key.parent.toString("hex"),
  index: key.index,
});

function inFolder(act) {
  const folder = mkdtempSync(join(tmpdir(), "mmcache-keys-"));
  try {
    return act(folder);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

function writeAll(folder, files) {
  for (const [name, content] of Object.entries(files)) {
    mkdirSync(dirname(join(folder, name)), { recursive: true });
    writeFileSync(join(folder, name), content);
  }
  return folder;
}

const FUNCTIONS = {
  canonical: ({ value }) => mmcache.canonical(value).toString("hex"),
  namespace: (given) => {
    const { facts, id } = new mmcache.Namespace(given);
    return { facts, id: id.toString("hex") };
  },
  media_digest: ({ data, modality }) => mmcache.mediaDigest(data, modality).toString("hex"),
  samples_digest: (given) => mmcache.samplesDigest(given).toString("hex"),
  item_digest: ({ content, ...given }) => mmcache.itemDigest(content, given).toString("hex"),
  block_keys: ({ namespace, tokens, spans, part }) =>
    new mmcache.Namespace(namespace).blockKeys(tokens, spans, part).map(row),
  part: ({ chain, ...part }) => mmcache.storedKey(chain, part).toString("hex"),
  opaque_key: ({ namespace, data, ...rest }) => row(mmcache.opaqueKey(new mmcache.Namespace(namespace), data, rest)),
  embedding_key: ({ namespace, item }) => row(mmcache.embeddingKey(new mmcache.Namespace(namespace), item)),
  file_digest: ({ data }) => inFolder((folder) => mmcache.fileDigest(join(writeAll(folder, { adapter: data }), "adapter"))),
  directory_digest: ({ files }) => inFolder((folder) => mmcache.directoryDigest(writeAll(folder, files))),
};

const { vectors } = JSON.parse(readFileSync(process.argv[2], "utf8"));

function evaluate({ function: name, input }) {
  try {
    return FUNCTIONS[name](plain(input));
  } catch (error) {
    if (!(error instanceof mmcache.KeyInputError)) throw error;
    return { refused: error.message };
  }
}

process.stdout.write(JSON.stringify(vectors.map(evaluate)));
