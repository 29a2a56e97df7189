// The names of the package: a client of the gRPC service, and content keys.

export { Cache, tensor } from "./cache.js";
export { directoryDigest, fileDigest } from "./files.js";
export {
  Float,
  KeyInputError,
  Namespace,
  canonical,
  embeddingKey,
  itemDigest,
  mediaDigest,
  opaqueKey,
  samplesDigest,
  storedKey,
} from "./keys.js";
