// Digests of model folders and files, for namespace facts (docs/keys.md, "Namespace").

import { closeSync, openSync, readSync, readdirSync, realpathSync, statSync } from "node:fs";
import { join } from "node:path";

import { blake3 } from "@noble/hashes/blake3";

import { KeyInputError, digest, textBytes } from "./encoding.js";

const PICTURES = /\.(gif|jpeg|jpg|lock|md|pdf|png|rst|svg|webp)$/;
const DOCUMENTS = /^(changelog|copying|licence|license|notice|readme|use_policy)(\.txt)?$/;

/** "b3:" and hex digits that identify a file by its contents. */
export function fileDigest(path) {
  return `b3:${digest("k1.file", contentHash(path)).toString("hex")}`;
}

/** The same of a folder: all that an engine reads in it, at any depth. */
export function directoryDigest(folder) {
  const files = [];
  collect(folder, "", [realpathSync(folder)], files);
  if (!files.length) throw new KeyInputError(`${folder} holds no file of a model`);
  files.sort(([left], [right]) => Buffer.compare(left, right));
  const fields = files.flatMap(([name, path]) => [name, contentHash(path)]);
  return `b3:${digest("k1.directory", ...fields).toString("hex")}`;
}

function collect(folder, prefix, above, files) {
  for (const name of readdirSync(folder)) {
    const path = join(folder, name);
    const lower = name.toLowerCase();
    if (name.startsWith(".")) continue;
    if (statSync(path).isDirectory()) {
      if (name === "__pycache__") continue;
      const real = realpathSync(path);
      if (above.includes(real)) throw new KeyInputError(`${path} links back to a folder above it`);
      collect(path, `${prefix}${name}/`, [...above, real], files);
    } else if (!PICTURES.test(lower) && !DOCUMENTS.test(lower)) {
      files.push([textBytes(prefix + name, path), path]);
    }
  }
}

function contentHash(path) {
  if (!statSync(path).isFile()) throw new KeyInputError(`${path} is no regular file`);
  const hasher = blake3.create({});
  const chunk = Buffer.allocUnsafe(4 << 20);
  const file = openSync(path, "r");
  try {
    for (let count; (count = readSync(file, chunk)); ) hasher.update(chunk.subarray(0, count));
  } finally {
    closeSync(file);
  }
  return Buffer.from(hasher.digest());
}
